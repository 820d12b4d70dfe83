"""This process among its peers: rank, device, and the few sums that training needs. Without torchrun, a world of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nsa_transformer.config import ConfigError


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None  # one data-parallel axis; None in a world of one

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place; CPU tensors go through gloo and do not wait for the GPU."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The largest of all ranks' values."""
        if self.mesh is None:
            return value
        box = torch.tensor(value)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()

    def broadcast_text(self, text: str | None) -> str | None:
        """Rank 0's text, on every rank."""
        if self.mesh is None:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block alone, then the others do: for what rank 0 leaves on disk. A `ConfigError` of rank 0 is raised on all."""
        if not self.is_main:
            problem = self.broadcast_text(None)
            if problem is not None:
                raise ConfigError(problem)
            yield
            return
        try:
            yield
        except ConfigError as error:
            self.broadcast_text(str(error))
            raise
        self.broadcast_text(None)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu` or `cuda` as this rank's device. Raises `ConfigError` for `cuda` without a GPU, or more ranks than GPUs."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "the device is to be cuda, but torch finds no GPU here; write training.device=cpu, or --device cpu (nsa doctor tells what torch sees)"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # Asked of the number of ranks, which all of them know, since rank 0 alone speaks.
    local_ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if max(local_ranks, local_rank + 1) > gpus:
        raise ConfigError(f"torchrun started {local_ranks} ranks on a machine of {gpus} GPUs; write --nproc_per_node={gpus}, or training.device=cpu")
    return torch.device("cuda", local_rank)


@contextmanager
def open_world(device: str) -> Iterator[World]:
    """Join the process group that torchrun describes in the environment, NCCL on GPUs and gloo on CPUs; leave it at the end."""
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, _current(choose_device(device)), None)
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _current(choose_device(device, local))
    dist.init_process_group("cuda:nccl,cpu:gloo" if chosen.type == "cuda" else "gloo")
    try:
        mesh = init_device_mesh(chosen.type, (dist.get_world_size(),), mesh_dim_names=("data",))
        yield World(dist.get_rank(), dist.get_world_size(), chosen, mesh)
    finally:
        dist.destroy_process_group()


def _current(device: torch.device) -> torch.device:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        return torch.device("cuda", torch.cuda.current_device())
    return device
