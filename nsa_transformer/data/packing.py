"""Which tokens lie in which pack: a pure function of document lengths."""

from __future__ import annotations

from array import array
from bisect import bisect_right, insort
from dataclasses import dataclass
from functools import partial

import numpy as np

__all__ = ["CUTS", "WASTE", "PackPlan", "most_fragments", "plan_packs"]

WASTE = 512  # a document is cut to fill a pack where more than 1 / WASTE of all packs so far would stay empty without it
CUTS = 20  # as long as such cuts add at most 1 / CUTS to the fragments
_CUT_ENDS = 8  # fragments of cut documents in one pack, beside the whole ones


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

    def mean_lengths(self) -> np.ndarray:
        """For each pack, float64 [num_packs]: tokens of the fragment that a token of the pack lies in, on average."""
        begins = self.offsets[:-1]
        return np.add.reduceat(self.length.astype(np.float64) ** 2, begins) / np.add.reduceat(self.length, begins)

    def fragments(self, pack: int) -> list[tuple[int, int, int]]:
        """(document, start, length) of each fragment of a pack, in the order they lie in it."""
        part = slice(int(self.offsets[pack]), int(self.offsets[pack + 1]))
        return list(zip(self.document[part].tolist(), self.start[part].tolist(), self.length[part].tolist(), strict=True))


def most_fragments(lengths: np.ndarray, max_length: int) -> int:
    """Fragments that `plan_packs` puts into a pack at most: the same whatever the order, so that what is compiled for a number of them lasts."""
    rest = np.sort(np.asarray(lengths, dtype=np.int64) % max_length)
    rest = rest[rest > 0][:max_length]
    return _CUT_ENDS + int(np.searchsorted(np.cumsum(rest), max_length, side="right"))  # as many whole remainders as fit


def plan_packs(lengths: np.ndarray, max_length: int, order: np.ndarray, buffer: int) -> PackPlan:
    """Lay documents into packs of at most `max_length` tokens; no token is lost or repeated, no document cropped.

    lengths  tokens of each document, at least 1
    order    the documents to pack, in the order they come, each once
    buffer   documents among which best fit chooses

    A document longer than a pack is cut into consecutive fragments: full ones, each a pack of its own, and a remainder that
    is packed like a short document. A shared pack starts with the largest piece of the buffer, then takes the largest that still
    fits, until none does; the buffer is refilled after each piece.

    That alone leaves packs half empty where most pieces are longer than half a pack. So where leaving a pack as it is would make more
    than 1 / `WASTE` of all tokens so far padding, the start of the largest piece fills it, and the rest of that piece goes back to the
    buffer. At most 1 / `CUTS` of sum(ceil(length / max_length)) is added to the number of fragments that way; when that is used up,
    packs stay as best fit leaves them. Raises `ValueError` on bad arguments.
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
    shared = _best_fit(full, rest, buffer, max_length, most_fragments(ordered, max_length))

    document = np.concatenate([order[places], order[shared.place]])
    start = np.concatenate([nth * max_length, full[shared.place] * max_length + shared.start])
    length = np.concatenate([np.full(len(places), max_length, dtype=np.int64), shared.length])
    when = np.concatenate([places, np.repeat(shared.when, shared.sizes)])
    pack = np.concatenate([np.arange(len(places)), len(places) + np.repeat(np.arange(len(shared.sizes)), shared.sizes)])
    by_time = np.lexsort((pack, when))  # stable: fragments of one pack stay together and in order
    pack_when = np.concatenate([places, shared.when])
    pack_size = np.concatenate([np.ones(len(places), dtype=np.int64), shared.sizes])[np.argsort(pack_when, kind="stable")]
    offsets = np.concatenate([[0], np.cumsum(pack_size)]).astype(np.int64)
    return PackPlan(document[by_time], start[by_time], length[by_time], offsets)


@dataclass(frozen=True)
class _Shared:
    """Packs of remainders, one after the other; all int64.

    place, start, length  of each fragment: where its document stands in the order, and which tokens of that document's remainder it is
    sizes                 fragments of each pack
    when                  place up to which documents had arrived when the pack was closed
    """

    place: np.ndarray
    start: np.ndarray
    length: np.ndarray
    sizes: np.ndarray
    when: np.ndarray


def _best_fit(full: np.ndarray, rest: np.ndarray, buffer: int, max_length: int, most: int) -> _Shared:
    """Pack the remainders `rest` (tokens, 0 for none) of documents that also have `full` packs, in order of arrival."""
    places = np.flatnonzero(rest)
    count = len(places)
    full_before = array("q", np.cumsum(full)[places].tobytes())  # as fast as lists, and smaller
    cuts_left = (int(full.sum()) + count) // CUTS
    # A piece is one number that sorts by length, and among equals puts the earliest arrival last, where bisection finds it.
    keys = array("q", (rest[places] * count + (count - 1 - np.arange(count))).tobytes())
    packed, lengths, starts, sizes, closed_after = (array("q") for _ in range(5))
    begun: dict[int, int] = {}  # tokens of cut pieces that lie in packs already
    ready = sorted(keys[:buffer])
    arrived = min(buffer, count)
    waste = 0
    while ready:
        space, begin = max_length, len(packed)
        at = len(ready) - 1
        while at >= 0 and len(packed) - begin < most:
            length, late = divmod(ready.pop(at), count)
            piece = count - 1 - late
            packed.append(piece)
            lengths.append(length)
            starts.append(begun.get(piece, 0))
            space -= length
            if arrived < count:
                insort(ready, keys[arrived])
                arrived += 1
            at = bisect_right(ready, space * count + count - 1) - 1 if space else -1
        laid = (len(sizes) + 1 + full_before[arrived - 1]) * max_length
        if space and at < 0 and ready and cuts_left and (waste + space) * WASTE > laid and len(packed) - begin < most:
            key = ready.pop()
            piece = count - 1 - key % count
            packed.append(piece)
            lengths.append(space)
            starts.append(begun.get(piece, 0))
            begun[piece] = starts[-1] + space
            insort(ready, key - space * count)
            cuts_left -= 1
            space = 0
        waste += space
        sizes.append(len(packed) - begin)
        closed_after.append(arrived - 1)
    as_array = partial(np.array, dtype=np.int64)
    return _Shared(places[as_array(packed)], as_array(starts), as_array(lengths), as_array(sizes), places[as_array(closed_after)])
