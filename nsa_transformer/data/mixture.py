"""Several streams of packs as one, in fixed shares."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from nsa_transformer.config import ConfigError, MixtureSource
from nsa_transformer.data.pack import Pack
from nsa_transformer.data.stream import PackStream

__all__ = ["CYCLE", "MixtureStream", "apportion", "mixture_weights"]

_ORDER_VERSION = 1  # raise it when the same settings come to mean another order
CYCLE = 1000  # packs in which every source has its share
_CYCLES_KEPT = 2


def mixture_weights(mixture: Sequence[MixtureSource], tokens: Sequence[int]) -> list[float]:
    """Share of the packs that each source gets, from its `weight`, or from its `epochs` and how many tokens it has."""
    amounts = [part.weight if part.weight is not None else (part.epochs or 0) * count for part, count in zip(mixture, tokens, strict=True)]
    return [amount / sum(amounts) for amount in amounts]


class MixtureStream:
    """Packs of several streams in fixed shares, without end. Each goes through epochs of its own, so none of its tokens is lost or repeated within one.

    The sequence consists of cycles of `CYCLE` packs. In each a source has the same number of them, spread evenly and begun at a place that the seed
    and the number of the cycle decide. So what pack number `index` is follows from `index` alone, as in a `PackStream`.
    """

    def __init__(self, streams: Sequence[PackStream], weights: Sequence[float], seed: int) -> None:
        """`weights` are positive and sum to 1. Raises `ConfigError` where one is less than half a pack of a cycle."""
        self.streams = list(streams)
        self.seed = seed
        self._counts = apportion(weights, CYCLE)
        if not all(self._counts):
            number = int(np.argmin(weights))
            raise ConfigError(
                f"data.mixture[{number}] would get {weights[number]:.2e} of the packs; write weights that give it at least {1 / CYCLE} or leave it out"
            )
        most = max(stream.num_boundaries for stream in self.streams)
        for stream in self.streams:  # one shape for all packs, whatever source they are of
            stream.num_boundaries = most
        self.num_boundaries = most
        self._cycles: OrderedDict[int, np.ndarray] = OrderedDict()

    @property
    def shares(self) -> list[float]:
        return [count / CYCLE for count in self._counts]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything the order depends on: streams with the same one yield the same packs."""
        parts = (_ORDER_VERSION, self.seed, self._counts, [stream.fingerprint for stream in self.streams])
        return hashlib.sha256(json.dumps(parts).encode() + self._cycle(0).tobytes()).hexdigest()[:32]

    def locate(self, index: int) -> tuple[int, int]:
        """(source, number of the pack in its own stream) of a pack of the mixture."""
        if index < 0:
            raise IndexError(f"pack index={index} must be 0 or greater")
        cycle, place = divmod(index, CYCLE)
        order = self._cycle(cycle)
        source = int(order[place])
        return source, cycle * self._counts[source] + int((order[:place] == source).sum())

    def pack(self, index: int) -> Pack:
        """Pack number `index`; see `PackStream.pack`."""
        source, number = self.locate(index)
        return self.streams[source].pack(number)

    def position(self, next_pack: int) -> list[list[int]]:
        """As of a `PackStream`, an entry for each source."""
        cycle, place = divmod(next_pack, CYCLE)
        before = np.bincount(self._cycle(cycle)[:place], minlength=len(self.streams))
        return [stream.position(cycle * count + int(more))[0] for stream, count, more in zip(self.streams, self._counts, before, strict=True)]

    def start_at(self, position: list[list[int]]) -> None:
        for stream, part in zip(self.streams, position, strict=True):
            stream.start_at([part])

    def first_epoch(self, count: int) -> list[Pack]:
        """The first `count` packs that belong to the first epoch of their source, or all of them."""
        packs: list[Pack] = []
        wanted = min(count, sum(stream.packs_in_epoch(0) for stream in self.streams))
        index = 0
        while len(packs) < wanted:
            source, number = self.locate(index)
            if number < self.streams[source].packs_in_epoch(0):
                packs.append(self.streams[source].pack(number))
            index += 1
        return packs

    def _cycle(self, cycle: int) -> np.ndarray:
        """int64 [CYCLE], the source of each pack of a cycle."""
        order = self._cycles.get(cycle)
        if order is None:
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, cycle])))
            places = [(np.arange(count) + begin) / count for count, begin in zip(self._counts, rng.random(len(self._counts)), strict=True)]
            sources = np.repeat(np.arange(len(self._counts)), self._counts)
            order = self._cycles[cycle] = sources[np.argsort(np.concatenate(places), kind="stable")]
            while len(self._cycles) > _CYCLES_KEPT:
                self._cycles.popitem(last=False)
        return order


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """`total` cut in whole parts in proportion to `weights`, which sum to 1, each off by less than one."""
    exact = np.asarray(weights, dtype=np.float64) * total
    parts = np.floor(exact).astype(np.int64)
    largest = np.argsort(parts - exact, kind="stable")  # by what is left over, the most first
    parts[largest[: total - int(parts.sum())]] += 1
    return [int(part) for part in parts]
