"""The parallel plan as a single rank sees it: process groups are fakes that send nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_transformer.distributed.parallelize import Shards, build_model
from nsa_transformer.distributed.world import World
from nsa_transformer.models.transformer import Transformer

from .worker import Job, config_of

RANKS, RANK = 4, 3  # the last one, whose parts are smaller than the others' or empty


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One for the file: torch remembers meshes of equal shape beyond the end of their process group."""
    dist.init_process_group("fake", rank=RANK, world_size=RANKS, store=FakeStore())
    yield World(RANK, RANKS, torch.device("cpu"), init_device_mesh("cpu", (RANKS,), mesh_dim_names=("data",)))
    dist.destroy_process_group()


class Copied(TorchDispatchMode):
    """The largest tensor that is copied or converted."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.most = max([self.most, *(x.numel() for x in args if isinstance(x, Tensor))])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_a_rank_takes_its_part_of_a_whole_tensor_before_it_is_copied(world: World, expert_parallel: int) -> None:
    """Neither the 61 rows of the embedding nor the experts are divided evenly by the ranks. Another dtype stands for another device."""
    config = config_of(Job("", num_experts=6, expert_parallel=expert_parallel))
    model, whole = build_model(config, world), Transformer(config.model)
    whole.init_weights(3)
    shards, values = Shards(model), dict(whole.named_parameters())
    sizes = set()
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        expected = values[name].detach()
        full = expected.double()
        ranks, rank = RANKS, RANK
        if name.endswith(("mlp.w13", "mlp.w2")):
            expected = expected.chunk(expert_parallel)[RANK % expert_parallel]
            ranks, rank = RANKS // expert_parallel, RANK // expert_parallel
            sizes.add(len(parameter.to_local()))
        parts = expected.chunk(ranks)
        expected = parts[rank] if rank < len(parts) else expected[:0]
        with Copied() as copied:
            shards.assign(name, parameter, full)
        assert torch.equal(parameter.to_local(), expected), name
        assert copied.most == expected.numel(), name
    assert sizes == {{1: 0, 2: 1}[expert_parallel]}
