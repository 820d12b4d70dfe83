"""AdamW and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from nsa_transformer.config import TrainingConfig

UNDECAYED = ("norm", "embedding", "bias", "position")


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """Fused AdamW that decays matrices, not norms, biases, embeddings and positions."""
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (rest if any(word in name for word in UNDECAYED) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)


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
