"""What the passes of an optimizer step, on all ranks, tell of its experts."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_transformer.distributed.world import World
from nsa_transformer.models.moe import global_balance_loss
from nsa_transformer.models.transformer import LossOutput


class StepLoad:
    """Visits to each expert in one optimizer step, each token counted once: the load of a pass is an output of its forward, so recomputing adds nothing.

    With a weight every pass sums its load over the ranks, which its loss needs at once; without one a single sum at the end will do.
    """

    def __init__(self, weight: float, world: World) -> None:
        self._weight, self._world = weight, world
        self._load = torch.zeros((), dtype=torch.int64, device=world.device)

    def add(self, out: LossOutput) -> Tensor:
        """Count a pass; returns what to differentiate for it, float32: the summed loss and router losses. Every rank must call."""
        self._load = self._load + (self._world.sum(out.load) if self._weight else out.load)
        loss = out.loss + out.auxiliary
        return loss if out.share is None else loss + global_balance_loss(out.share, self._load, self._weight)

    def total(self) -> Tensor:
        """int64 `[MoE layers, E]` over all passes and ranks. Once, after the last pass; every rank must call."""
        return self._load if self._weight else self._world.sum(self._load)
