"""The parallel plan, put on from outside: the model stays plain, and a world of one runs the same code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nsa_transformer.config import Config, ModelConfig
from nsa_transformer.distributed.world import World
from nsa_transformer.memory.activation_checkpointing import apply_activation_checkpointing
from nsa_transformer.memory.compute_dtype import use_compute_dtype
from nsa_transformer.memory.expert_streaming import stream_experts
from nsa_transformer.memory.optimizer_offload import OffloadedAdamW, master_of
from nsa_transformer.models.transformer import Transformer, initial_value


def build_model(config: Config, world: World) -> Transformer:
    """Build on meta, parallelise, then give each rank the memory of its own share, not yet initialised: float32, or with an offloaded optimizer what passes
    compute in."""
    with torch.device("meta"):
        model = Transformer(config.model)
    parallelize(model, config, world)
    if config.memory.offloads_optimizer:
        use_compute_dtype(model, torch.bfloat16 if config.training.precision == "bf16" else torch.float32)
    if config.memory.expert_offloading.enabled:
        stream_experts(model, world.device, config.memory.expert_offloading.pin_memory)
    else:
        model.to_empty(device=world.device)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.zero_()
    return model


def parallelize(model: Transformer, config: Config, world: World) -> None:
    """Activation checkpointing → per-block compile → FSDP2."""
    apply_activation_checkpointing(model, config.memory.activation_checkpointing)
    if config.training.compile:
        for block in model.layers:
            block.compile()
    if world.mesh is not None:
        for block in model.layers:
            fully_shard(block, mesh=world.mesh)
        fully_shard(model, mesh=world.mesh)


def assign(target: Tensor, full: Tensor) -> None:
    """Copy a whole tensor into a parameter or state, of which a sharded one takes its own part."""
    full = full.to(target.device, target.dtype)
    with torch.no_grad():
        target.copy_(distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None) if isinstance(target, DTensor) else full)


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor; every rank must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(model: Transformer) -> None:
    """Let every rank hold its own share again. After a forward without a backward, as in a validation, the outermost parameters are still whole: other
    objects, which the optimizer does not know."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def draw_weights(model: Transformer, config: ModelConfig, seed: int, device: torch.device, optimizer: torch.optim.Optimizer | None = None) -> None:
    """The initial weights of `Transformer.init_weights(seed)`, whatever the number of ranks, one parameter at a time; into an offloaded optimizer's masters."""
    for name, parameter in model.named_parameters():
        assign(parameter if optimizer is None else master_of(optimizer, parameter), initial_value(name, parameter.shape, config, seed, device))
    if isinstance(optimizer, OffloadedAdamW):
        optimizer.publish()
