"""The parallel plan, put on from outside: the model stays plain, and a world of one runs the same code."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from nsa_transformer.config import Config, ModelConfig
from nsa_transformer.distributed.expert_parallel import KEPT, ExpertParallel, open_expert_mesh, spread_experts
from nsa_transformer.distributed.world import World
from nsa_transformer.memory.activation_checkpointing import apply_activation_checkpointing
from nsa_transformer.memory.compute_dtype import use_compute_dtype
from nsa_transformer.memory.expert_streaming import stream_experts
from nsa_transformer.memory.optimizer_offload import OffloadedAdamW, master_of
from nsa_transformer.models.moe import MixtureOfExperts
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
    """Expert parallelism → activation checkpointing → per-block compile → FSDP2."""
    size = config.training.expert_parallel_size
    expert_mesh = open_expert_mesh(size, world) if size > 1 else None
    if expert_mesh is not None:
        spread_experts(model, expert_mesh)
    apply_activation_checkpointing(model, config.memory.activation_checkpointing, KEPT)
    if config.training.compile:
        for block in model.layers:
            block.compile()
    if world.mesh is not None:
        for block in model.layers:
            if expert_mesh is not None and isinstance(block.mlp, MixtureOfExperts):
                shard_spread_experts(block.mlp, world.mesh, expert_mesh)
            fully_shard(block, mesh=world.mesh)
        fully_shard(model, mesh=world.mesh)


def shard_spread_experts(mixture: MixtureOfExperts, mesh: DeviceMesh, expert_mesh: DeviceMesh) -> None:
    """FSDP2 takes a module's own parameters to one mesh. A mixture's own are its experts, which go to the ranks that hold the same ones."""
    for part in mixture.children():
        fully_shard(part, mesh=mesh)
    fully_shard(mixture, mesh=expert_mesh["expert_data"])


class Shards:
    """What the whole tensors of a model are, of which each rank holds a part: FSDP2's, and of experts those of its place in an expert-parallel group. By the
    names of parameters, since moments lie as their parameter does. Other tensors, buffers and step counts among them, are whole already."""

    def __init__(self, model: nn.Module) -> None:
        self._spread: dict[str, ExpertParallel] = {}
        for name, module in model.named_modules():
            if isinstance(module, MixtureOfExperts) and isinstance(module.dispatch, ExpertParallel):
                self._spread |= {f"{name}.{weight}": module.dispatch for weight, _ in module.named_parameters(recurse=False)}

    def shape(self, name: str, tensor: Tensor) -> torch.Size:
        experts = self._spread.get(name)
        return tensor.shape if experts is None else torch.Size((experts.num_experts, *tensor.shape[1:]))

    def whole(self, name: str, tensor: Tensor) -> Tensor:
        """The unsharded tensor; every rank must call."""
        experts = self._spread.get(name) if tensor.dim() else None
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return full if experts is None else experts.whole(full)

    def assign(self, name: str, target: Tensor, full: Tensor) -> None:
        """Copy a whole tensor into a parameter or moment, of which a sharded one takes its own part. What goes to the device is that part alone."""
        experts = self._spread.get(name) if full.dim() else None
        part = full if experts is None else experts.own(full)
        with torch.no_grad():
            if isinstance(target, DTensor):
                part, target = _own_shard(part, target), target.to_local()
            assert part.shape == target.shape, name
            target.copy_(part)


def _own_shard(full: Tensor, target: DTensor) -> Tensor:
    """The part of a whole tensor that `target` has on this rank, a view: as `torch.chunk` divides it, the last ranks with fewer rows or none."""
    for axis, placement in enumerate(target.placements):
        assert isinstance(placement, Shard)  # FSDP2's
        rows, mesh = full.shape[placement.dim], target.device_mesh
        most = math.ceil(rows / mesh.size(axis))
        start = min(most * mesh.get_local_rank(axis), rows)
        full = full.narrow(placement.dim, start, min(most, rows - start))
    return full


def reshard(model: Transformer) -> None:
    """Let every rank hold its own share again. After a forward without a backward, as in a validation, the outermost parameters are still whole: other
    objects, which the optimizer does not know."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def draw_weights(model: Transformer, config: ModelConfig, seed: int, device: torch.device, optimizer: torch.optim.Optimizer | None = None) -> None:
    """The initial weights of `Transformer.init_weights(seed)`, whatever the number of ranks, one parameter at a time; into an offloaded optimizer's masters."""
    shards = Shards(model)
    for name, parameter in model.named_parameters():
        target = parameter if optimizer is None else master_of(optimizer, parameter)
        shards.assign(name, target, initial_value(name, shards.shape(name, target), config, seed, device))
    if isinstance(optimizer, OffloadedAdamW):
        optimizer.publish()


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, world: World) -> Tensor:
    """Scale gradients in place to a norm over all of them and all ranks of at most `max_norm`; returns the norm there was, float32. Every rank must call.

    Of every gradient each number lies on one rank alone, whatever meshes the parameters are on, so the squares of all parts add up to that of the whole.
    """
    with torch.no_grad():
        grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
        norm = world.sum(torch.nn.utils.get_total_norm(grads).square()).sqrt() if world.size > 1 else torch.nn.utils.get_total_norm(grads)
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
