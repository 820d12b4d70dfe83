"""AdamW and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nsa_transformer.config import TrainingConfig
from nsa_transformer.distributed.parallelize import clip_gradients
from nsa_transformer.distributed.world import World
from nsa_transformer.memory.optimizer_offload import OffloadedAdamW
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.utils.hardware import usable_cores

UNDECAYED = ("norm", "embedding", "bias", "position")


def build_optimizer(model: Transformer, config: TrainingConfig, offload_from: torch.device | None = None) -> torch.optim.AdamW | OffloadedAdamW:
    """Fused AdamW that decays matrices, not norms, biases, embeddings and positions; in host memory for a model on the device `offload_from`."""
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (rest if any(word in name for word in UNDECAYED) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    rates: Any = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.adam_eps}
    if offload_from is None:
        return torch.optim.AdamW(groups, **rates, fused=True)
    threads = config.cpu_threads or max(1, usable_cores() - 2)  # one launches kernels, one runs the backward
    return OffloadedAdamW(model, groups, **rates, device=offload_from, threads=threads)


def clip(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, world: World) -> Tensor:
    """The global norm of the gradients, which are scaled down to `max_norm`. Every rank must call."""
    if isinstance(optimizer, OffloadedAdamW):
        return optimizer.clip(max_norm)
    return clip_gradients(model.parameters(), max_norm, world)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """For the step numbered from 1: linear warm-up, then cosine, or stable and a linear decay (wsd), to min_lr_ratio at max_steps."""
    peak, floor = config.learning_rate, config.learning_rate * config.min_lr_ratio
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
        return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    start = max(config.warmup_steps, config.max_steps - round(config.decay_fraction * config.max_steps))
    progress = (step - start) / max(1, config.max_steps - start)
    return peak + (floor - peak) * min(max(progress, 0.0), 1.0)
