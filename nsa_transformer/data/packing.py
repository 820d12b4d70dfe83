"""Which tokens lie in which pack: a pure function of document lengths."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

__all__ = ["PackPlan", "plan_packs"]


@dataclass(frozen=True)
class PackPlan:
    """Packs as lists of fragments. Fragment f is the tokens `start[f] : start[f] + length[f]` of document `document[f]`.

    document, start, length  int64 [num_fragments]
    offsets                  int64 [num_packs + 1]; pack p holds the fragments `offsets[p] : offsets[p + 1]`
    """

    document: np.ndarray
    start: np.ndarray
    length: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def reordered(self, packs: np.ndarray) -> PackPlan:
        """The same packs in another order; `packs` is a permutation of their numbers."""
        sizes = np.diff(self.offsets)[packs]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][packs] - offsets[:-1], sizes)
        return PackPlan(self.document[index], self.start[index], self.length[index], offsets)

    def fragments(self, pack: int) -> list[tuple[int, int, int]]:
        """(document, start, length) of each fragment of a pack, in the order they lie in it."""
        part = slice(int(self.offsets[pack]), int(self.offsets[pack + 1]))
        return list(zip(self.document[part].tolist(), self.start[part].tolist(), self.length[part].tolist(), strict=True))


def plan_packs(lengths: np.ndarray, max_length: int, order: np.ndarray, buffer: int) -> PackPlan:
    """Lay documents into packs of at most `max_length` tokens; no token is lost or repeated, no document cropped.

    lengths  tokens of each document, at least 1
    order    the documents to pack, in the order they come, each once
    buffer   documents among which best fit chooses

    A document longer than a pack is cut into consecutive fragments: full ones, each a pack of its own, and a remainder that
    is packed like a short document. A shared pack starts with the piece that has waited longest, then takes the largest piece
    of the buffer that still fits, until none does; the buffer is refilled after each piece. Raises `ValueError` on bad arguments.
    """
    if max_length < 1 or buffer < 1:
        raise ValueError(f"max_length={max_length} and buffer={buffer} must be at least 1")
    order = np.asarray(order, dtype=np.int64)
    ordered = np.asarray(lengths, dtype=np.int64)[order]
    if len(ordered) and ordered.min() < 1:
        raise ValueError("every document must hold at least 1 token; leave empty ones out of order")

    full, rest = ordered // max_length, ordered % max_length
    # Full fragments: `when` is the place of their document, so that packs keep the order in which documents come.
    places = np.repeat(np.arange(len(order)), full)
    nth = np.arange(len(places)) - np.repeat(np.cumsum(full) - full, full)
    pieces, sizes, shared_when = _best_fit(rest, buffer, max_length)

    document = np.concatenate([order[places], order[pieces]])
    start = np.concatenate([nth * max_length, full[pieces] * max_length])
    length = np.concatenate([np.full(len(places), max_length, dtype=np.int64), rest[pieces]])
    when = np.concatenate([places, np.repeat(shared_when, sizes)])
    pack = np.concatenate([np.arange(len(places)), len(places) + np.repeat(np.arange(len(sizes)), sizes)])
    by_time = np.lexsort((pack, when))  # stable: fragments of one pack stay together and in order
    pack_when = np.concatenate([places, shared_when])
    pack_size = np.concatenate([np.ones(len(places), dtype=np.int64), sizes])[np.argsort(pack_when, kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(pack_size)]).astype(np.int64)
    return PackPlan(document[by_time], start[by_time], length[by_time], offsets)


def _best_fit(rest: np.ndarray, buffer: int, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pack the pieces `rest` (tokens, 0 for none), in order of arrival.

    Returns the places of the pieces pack after pack, the number of pieces in each pack, and the place up to which pieces had arrived
    when it was closed.
    """
    places = np.flatnonzero(rest)
    count = len(places)
    # A piece is one number that sorts by length, and among equals puts the earliest arrival last, where bisection finds it.
    keys = (rest[places] * count + (count - 1 - np.arange(count))).tolist()
    packed: list[int] = []
    sizes: list[int] = []
    closed_after: list[int] = []
    taken = bytearray(count)
    ready = sorted(keys[:buffer])
    arrived = min(buffer, count)
    for oldest in _untaken(taken):
        space, begin = max_length, len(packed)
        at = bisect_right(ready, keys[oldest]) - 1
        while at >= 0:
            length, late = divmod(ready.pop(at), count)
            piece = count - 1 - late
            taken[piece] = 1
            packed.append(piece)
            space -= length
            if arrived < count:
                insort(ready, keys[arrived])
                arrived += 1
            at = bisect_right(ready, space * count + count - 1) - 1 if space else -1
        sizes.append(len(packed) - begin)
        closed_after.append(arrived - 1)
    return places[packed], np.array(sizes, dtype=np.int64), places[closed_after]


def _untaken(taken: bytearray) -> Iterator[int]:
    for i in range(len(taken)):
        if not taken[i]:
            yield i
