"""Validation: bits per byte, loss by position, gates and expert loads on held-out packs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nsa_transformer.data.pack import IGNORE, Pack
from nsa_transformer.distributed.world import World
from nsa_transformer.models.attention import GateMLP
from nsa_transformer.models.transformer import LossOutput

EARLY, LATE = 16, 128  # positions up to the one, and from the other on


@dataclass(frozen=True)
class Evaluation:
    """loss: mean nats per target token. bits_per_byte: the same bits over the bytes those tokens stand for.
    early_loss, late_loss: mean nats at positions <= 16 and >= 128, None without such tokens.
    gate_means [layers][3]; expert_load [MoE layers][E], shares of visits; either may be empty."""

    loss: float
    bits_per_byte: float
    early_loss: float | None
    late_loss: float | None
    gate_means: list[list[float]]
    expert_load: list[list[float]]

    def row(self, step: int) -> dict[str, Any]:
        row: dict[str, Any] = {"step": step, "val_loss": self.loss, "val_bpb": self.bits_per_byte}
        row |= {"val_loss_early": self.early_loss, "val_loss_late": self.late_loss}
        row |= {"gate_means": self.gate_means} if self.gate_means else {}
        return row | ({"expert_load": self.expert_load} if self.expert_load else {})


@torch.no_grad()
def evaluate(model: nn.Module, packs: Sequence[Pack], byte_lengths: np.ndarray, world: World, autocast: Any, loss_chunk_size: int) -> Evaluation:
    """Over `packs`, shared among the ranks. `byte_lengths[id]`: UTF-8 bytes of a token, 0 for special ones."""
    lengths = torch.from_numpy(np.asarray(byte_lengths)).to(world.device)
    sums = torch.zeros(6, dtype=torch.float64, device=world.device)  # nats, tokens, early nats, early tokens, late nats, late tokens
    num_bytes = torch.zeros((), dtype=torch.int64, device=world.device)
    load: Tensor | None = None
    model.eval()
    # Hooks and the absence of gradients would each compile the blocks anew.
    with torch.compiler.set_stance("force_eager"), _recorded_gates(model) as gates:
        # Every rank makes the same number of passes, since a sharded model gathers its weights in each; a surplus one counts nothing.
        for start in range(0, len(packs), world.size):
            index = start + world.rank
            counted = index < len(packs)
            pack = packs[index if counted else -1].to(world.device)
            gates.counted = pack.valid & counted
            with autocast:
                out = model(pack.tokens, pack.cu_seqlens, targets=pack.targets, valid=pack.valid, loss_chunk_size=loss_chunk_size, per_token=True)
            assert isinstance(out, LossOutput)
            load = out.load * counted if load is None else load + out.load * counted
            if not counted:
                continue
            known, positions = pack.targets != IGNORE, pack.positions
            for place, where in enumerate((known, known & (positions <= EARLY), known & (positions >= LATE))):
                sums[2 * place] += out.loss[where].double().sum()
                sums[2 * place + 1] += where.sum()
            num_bytes += lengths[pack.targets[known]].sum()
    model.train()
    gate_sums = gates.sums(world.device)
    load = torch.zeros(0, 1, dtype=torch.int64, device=world.device) if load is None else load
    for values in (sums, num_bytes, load, gate_sums):
        world.sum(values)
    nats, tokens, early, early_tokens, late, late_tokens = sums.tolist()
    shares = load.double() / load.sum(-1, keepdim=True).clamp(min=1)
    return Evaluation(
        loss=nats / max(tokens, 1),
        bits_per_byte=nats / math.log(2) / max(int(num_bytes), 1),
        early_loss=early / early_tokens if early_tokens else None,
        late_loss=late / late_tokens if late_tokens else None,
        gate_means=(gate_sums[:, :3] / gate_sums[:, 3:].clamp(min=1)).tolist(),
        expert_load=shares.tolist(),
    )


class _Gates:
    """Sums of the gates of each layer, collected by hooks."""

    def __init__(self, num_layers: int) -> None:
        self._rows: list[Tensor | None] = [None] * num_layers
        self.counted: Tensor | None = None  # bool [T]: tokens of documents; padding has gates too, but they say nothing

    def add(self, layer: int, gates: Tensor) -> None:
        assert self.counted is not None
        weight = self.counted.double()
        row = torch.cat([weight @ gates.double().mean(1), weight.sum()[None]])
        before = self._rows[layer]
        self._rows[layer] = row if before is None else before + row

    def sums(self, device: torch.device) -> Tensor:
        """[layers, 4]: three branches and the number of tokens of documents."""
        rows = [row for row in self._rows if row is not None]
        return torch.stack(rows) if rows else torch.zeros(0, 4, dtype=torch.float64, device=device)


@contextmanager
def _recorded_gates(model: nn.Module) -> Iterator[_Gates]:
    modules = [m for m in model.modules() if isinstance(m, GateMLP)]
    gates = _Gates(len(modules))
    handles = [m.register_forward_hook(lambda _m, _i, out, layer=layer: gates.add(layer, out)) for layer, m in enumerate(modules)]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()
