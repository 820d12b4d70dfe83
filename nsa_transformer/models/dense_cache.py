"""The part of a `KVCache` that a layer of dense or windowed attention has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_transformer.models.cache_size import dense_capacity
from nsa_transformer.models.chunk import ChunkPlan

if TYPE_CHECKING:
    from nsa_transformer.models.cache import KVCache


class DenseLayerCache:
    """One layer of dense or windowed attention: keys and values [B, Hkv, capacity, …] one after the other."""

    def __init__(self, owner: KVCache) -> None:
        self.owner = owner
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.stores)

    @property
    def stores(self) -> list[Tensor]:
        return [x for x in (self.k, self.v) if x is not None]

    def make_room(self) -> None:
        """As long as the longest sequence, once there is any row."""
        if self.k is not None and self.v is not None:
            self._make(self.k[:0, :, 0], self.v[:0, :, 0])

    def _make(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Room for the longest sequence."""
        capacity = dense_capacity(max(self.owner.lengths))
        if self.k is None or self.v is None or self.k.shape[2] < capacity:
            before = (self.k, self.v)
            grown = [x.new_zeros(len(self.owner.lengths), x.shape[1], capacity, x.shape[2]) for x in (k, v)]
            for old, new in zip(before, grown, strict=True):
                if old is not None:
                    new[:, :, : old.shape[2]] = old
            self.k, self.v = grown
            self.owner.moves += 1
        return self.k, self.v

    def extend(self, plan: ChunkPlan, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [T, Hkv, …]; all of the sequence [S, Hkv, …]."""
        keys, values = (x[plan.sequence].transpose(0, 1)[: plan.end] for x in self._make(k, v))
        keys[plan.start :], values[plan.start :] = k, v
        return keys, values

    def step(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append k, v [B, Hkv, …]; all [B, Hkv, capacity, …], and the newest position of each sequence, int64 [B]."""
        keys, values = self._make(k, v)
        assert self.owner.device_lengths is not None
        t = (self.owner.device_lengths.long() - 1).clamp(min=0)
        each = torch.arange(len(t), device=t.device)
        keys[each, :, t], values[each, :, t] = k, v
        return keys, values, t

    def copy(self, source: int, target: int, _pages: list[tuple[int, int]]) -> None:
        assert self.k is not None and self.v is not None
        self.k[target], self.v[target] = self.k[source], self.v[source]
