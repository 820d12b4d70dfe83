"""The endless sequence of packs of a split, addressed by number."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from functools import cached_property

import numpy as np
import torch

from nsa_transformer.data.corpus import Split
from nsa_transformer.data.pack import IGNORE, Pack
from nsa_transformer.data.packing import PackPlan, most_fragments, plan_packs

__all__ = ["PackStream", "lay_pack"]

_ORDER_VERSION = 2  # raise it when the same settings come to mean another order
_PLANS_KEPT = 2


def lay_pack(split: Split, fragments: list[tuple[int, int, int]], max_length: int, eod_id: int, num_boundaries: int, assistant_only: bool = False) -> Pack:
    """The pack of these (document, start, length). The unused tail is one padding document; `cu_seqlens` is padded to `num_boundaries`.

    `assistant_only` leaves the targets of a conversation that the assistant does not write out of the loss, end-of-document among them.
    """
    mask = split.assistant if assistant_only else None
    tokens = np.full(max_length, eod_id, dtype=np.int64)
    targets = np.full(max_length, IGNORE, dtype=np.int64)
    bounds = np.full(num_boundaries, max_length, dtype=np.int32)
    bounds[0] = at = 0
    flat, offsets = split.tokens, split.offsets
    for number, (document, start, length) in enumerate(fragments, 1):
        begin, end = int(offsets[document]), int(offsets[document + 1])
        here = flat[begin + start : min(begin + start + length + 1, end)]
        tokens[at : at + length] = here[:length]
        targets[at : at + len(here) - 1] = here[1:]
        if len(here) == length:  # the document ends here
            targets[at + length - 1] = eod_id if mask is None else IGNORE
        if mask is not None:
            written = mask[begin + start + 1 : begin + start + len(here)]
            targets[at : at + len(written)][~written] = IGNORE
        at += length
        bounds[number] = at
    return Pack(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        cu_seqlens=torch.from_numpy(bounds),
        valid=torch.arange(max_length) < at,
    )


class PackStream:
    """Packs of a split, epoch after epoch without end, each epoch in an order of its own.

    `pack(index)` depends on nothing but the split, the arguments below and `index`: not on ranks, nor on what was read before.
    """

    def __init__(
        self, split: Split, *, max_length: int, seed: int, pack_buffer: int, eod_id: int, length_curriculum: int = 0, assistant_only: bool = False
    ) -> None:
        self.split = split
        self.assistant_only = assistant_only and split.assistant is not None
        self.max_length = max_length
        self.seed = seed
        self.pack_buffer = pack_buffer
        self.length_curriculum = length_curriculum
        self.eod_id = eod_id
        self._starts = {0: 0}  # packs before each epoch, of those known so far
        self._plans: OrderedDict[int, PackPlan] = OrderedDict()

    @cached_property
    def num_boundaries(self) -> int:
        """Length of every pack's `cu_seqlens`, in all epochs, so that nothing is compiled anew for another number of documents."""
        return most_fragments(self._lengths[self.split.documents], self.max_length) + 2  # the start, and the end of the padding document

    @property
    def _lengths(self) -> np.ndarray:
        return np.diff(self.split.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything the order depends on, and of the first epoch's: streams with the same one yield the same packs."""
        parts: tuple[object, ...] = (_ORDER_VERSION, self.split.fingerprint, self.max_length, self.seed, self.pack_buffer, self.length_curriculum, self.eod_id)
        if self.assistant_only:
            parts += ("assistant only",)
        digest = hashlib.sha256(json.dumps(parts).encode())
        plan = self._plan(0)  # numpy promises no one order for a seed in all of its versions
        for part in (plan.document, plan.start, plan.length, plan.offsets):
            digest.update(part.tobytes())
        return digest.hexdigest()[:32]

    def packs_in_epoch(self, epoch: int) -> int:
        """Packs of an epoch. They differ a little, because another order packs differently."""
        if epoch < 0:
            raise IndexError(f"epoch={epoch} must be 0 or greater")
        return len(self._plan(epoch))

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, place within it) of a pack of the endless sequence."""
        if index < 0:
            raise IndexError(f"pack index={index} must be 0 or greater")
        epoch = max(epoch for epoch, start in self._starts.items() if start <= index)
        while index >= (end := self._starts[epoch] + self.packs_in_epoch(epoch)):
            epoch += 1
            self._starts[epoch] = end
        return epoch, index - self._starts[epoch]

    def position(self, next_pack: int) -> list[list[int]]:
        """What a checkpoint keeps so that reading can go on at `next_pack` without planning the epochs before: [[epoch, packs before it]]."""
        epoch, _ = self.locate(max(next_pack - 1, 0))
        return [[epoch, self._starts[epoch]]]

    def start_at(self, position: list[list[int]]) -> None:
        """Take up a `position` of a stream with the same fingerprint."""
        ((epoch, start),) = position
        self._starts[epoch] = start

    def first_epoch(self, count: int) -> list[Pack]:
        """The first `count` packs of the first epoch, or all of them."""
        return [self.pack(i) for i in range(min(count, self.packs_in_epoch(0)))]

    def pack(self, index: int) -> Pack:
        """Pack number `index`: tokens and targets [max_length] int64. The unused tail is one padding document."""
        epoch, place = self.locate(index)
        return lay_pack(self.split, self._plan(epoch).fragments(place), self.max_length, self.eod_id, self.num_boundaries, self.assistant_only)

    def plan_in_order(self, order: np.ndarray) -> PackPlan:
        """The packs of these documents, taken up in this order."""
        return plan_packs(self._lengths, self.max_length, order, self.pack_buffer)

    def _plan(self, epoch: int) -> PackPlan:
        plan = self._plans.get(epoch)
        if plan is None:
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
            plan = self.plan_in_order(rng.permutation(self.split.documents))
            # Packs of one long document come in a row; a batch of neighbours would see little else.
            places = rng.permutation(len(plan))
            if epoch == 0 and self.length_curriculum:
                head = places[: self.length_curriculum]
                places[: self.length_curriculum] = head[np.argsort(plan.mean_lengths()[head], kind="stable")]
            plan = plan.reordered(places)
            self._plans[epoch] = plan
            while len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(epoch)
        return plan
