"""Which experts lie in which slots of a pool on the GPU, decided and copied there: nothing waits for the device, all shapes are fixed, a graph can capture it.

Of each layer: a table (expert to slot, -1: absent), the slots' owners, a priority per expert, a list of copies. *plan* marks the experts that the indices name,
takes slots for the absent ones from the owners of least priority, and writes the list. *fetch* copies a part of each expert along the list, from page-locked
host memory that the GPU reads itself, 16 bytes a thread. *stream* copies experts one after the other, for a prompt that needs them all, and takes what lies in
slots from there.

An expert's weights are one piece of WORDS int32, in the host's memory [layers, E, WORDS] as in the slots.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa_transformer.kernels.triton.common import launches_dependently

POLICIES = ("lru", "frequency")
HITS, MISSES, PREFETCHED, STREAMED = range(4)  # columns of Slots.counts
AT_HAND, COPIED = 1, 2  # in Slots.marks, of experts that the plan needs
USE, HALVING = 1 << 16, 64  # frequency: what a use adds to an expert's priority, and the plans after which all priorities are halved
# Programs that copy. Each has 16 KiB under way, and some 2 us pass until the host's memory answers: 8 GB/s, where a link of PCIe 5 carries 55. More than
# enough, then, and few enough to leave the multiprocessors to whoever computes meanwhile.
PROGRAMS, BLOCK = 32, 4096


@dataclass(frozen=True)
class Slots:
    """The state of all layers, or of one where the first axis is missing; on the GPU.

    table     int32 [layers, E]      slot of an expert, -1 where it is absent
    owner     int32 [layers, S]      expert of a slot, -1 where it is free
    priority  int32 [layers, E]      lru: the plan that last needed the expert; frequency: its uses, halved now and then
    clock     int32 [layers]         plans so far
    marks     int32 [layers, E]      of the last plan: AT_HAND or COPIED where it needs the expert, else 0
    moves     int32 [layers, 1 + 2 S]  copies of the last plan: how many, their experts, their slots
    counts    int64 [layers, 4]      hits, misses, prefetched, streamed: experts, each once a plan
    """

    table: Tensor
    owner: Tensor
    priority: Tensor
    clock: Tensor
    marks: Tensor
    moves: Tensor
    counts: Tensor

    @staticmethod
    def empty(layers: int, experts: int, slots: int, device: torch.device) -> Slots:
        def ints(count: int, value: int = 0) -> Tensor:
            """Each layer's at a multiple of 16 bytes, or Triton would compile variants for those that are not."""
            return torch.full((layers, (count + 3) // 4 * 4), value, dtype=torch.int32, device=device)[:, :count]

        counts = torch.zeros(layers, 4, dtype=torch.int64, device=device)
        return Slots(ints(experts, -1), ints(slots, -1), ints(experts), ints(1)[:, 0], ints(experts), ints(1 + 2 * slots), counts)

    def layer(self, index: int) -> Slots:
        return Slots(*(getattr(self, field.name)[index] for field in fields(self)))


@triton.jit(repr=lambda _: "slots_plan", do_not_specialize=["rows"])
def slots_plan(
    indices, table, owner, priority, clock, marks, moves, counts, rows,
    E: tl.constexpr, S: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
    FREQUENCY: tl.constexpr, DEMAND: tl.constexpr, USE: tl.constexpr, HALVING: tl.constexpr,
):  # fmt: skip
    """One program of one warp: several would hold copies of what is loaded, and one might load what another has stored already. Every load comes before the
    barrier and every store after it, so that a plan waits for memory once; only priorities of owners are asked for later, and are in the cache by then.
    EXPERTS and SLOTS are E and S padded. Without DEMAND the indices are a guess: it makes experts present, and is no use of them."""
    e = tl.arange(0, EXPERTS)
    s = tl.arange(0, SLOTS)
    lies = tl.load(table + e, mask=e < E, other=0)
    rank = tl.load(priority + e, mask=e < E, other=0)
    holds = tl.load(owner + s, mask=s < S, other=-1)
    if DEMAND:
        now = tl.load(clock) + 1
        hits, misses = tl.load(counts), tl.load(counts + 1)
    else:
        prefetched = tl.load(counts + 2)
    needed = e < 0  # the experts that a row names, and the slots that hold one of them
    kept = s < 0
    for start in range(0, rows, CHUNK):
        for row in tl.static_range(CHUNK):
            chosen = tl.load(indices + start + row, mask=start + row < rows, other=-2).to(tl.int32)  # -1 is the owner of a free slot
            needed |= e == chosen
            kept |= holds == chosen
    absent = (needed & (lies < 0)).to(tl.int32)
    count = tl.sum(absent, 0)
    uses = needed.to(tl.int32)
    # Free slots cost nothing, slots that the plan needs cannot be taken. The needed experts are at most S, so there are enough others.
    BUSY: tl.constexpr = 2147483647
    cost = tl.load(priority + holds, mask=holds >= 0, other=0)
    if FREQUENCY and DEMAND:
        rank = tl.where(now % HALVING == 0, rank // 2, rank) + uses * USE
        cost = tl.where(now % HALVING == 0, cost // 2, cost)
    elif DEMAND:
        rank = tl.where(needed, now, rank)
    cost = tl.where(holds < 0, -1, cost)
    cost = tl.where((s < S) & ~kept, cost, BUSY)
    tl.debug_barrier()
    tl.store(marks + e, uses + absent, mask=e < E)  # AT_HAND is 1, COPIED 2
    if DEMAND:
        tl.store(priority + e, rank, mask=e < E)
        tl.store(clock, now)
        tl.store(counts, hits + (tl.sum(uses, 0) - count))
        tl.store(counts + 1, misses + count)
    else:
        tl.store(counts + 2, prefetched + count)
    for move in range(count):
        slot = tl.argmin(cost, 0)
        expert = tl.argmax(absent, 0)
        old = tl.sum(tl.where(s == slot, holds, 0), 0)
        tl.store(table + old, -1, mask=old >= 0)
        tl.store(table + expert, slot)
        tl.store(owner + slot, expert)
        tl.store(moves + 1 + move, expert)
        tl.store(moves + 1 + S + move, slot)
        cost = tl.where(s == slot, BUSY, cost)
        absent = tl.where(e == expert, 0, absent)
    tl.store(moves, count)


@triton.jit(repr=lambda _: "slots_fetch")
def slots_fetch(
    host, pool, moves, WORDS: tl.constexpr, START: tl.constexpr, PART: tl.constexpr, S: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """pool [S, WORDS]: words START … START + PART of the slots of the list, from host [E, WORDS]. Programs take blocks in turn, so all read the same expert at
    a time. PDL: the next part may be launched when each program asks for its last block, so that the link does not fall idle between the two. It reads and
    writes other words, and need not wait; it ends after the part before it, so that who waits for it has both."""
    blocks: tl.constexpr = (PART + BLOCK - 1) // BLOCK
    units = tl.load(moves) * blocks
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        expert = tl.load(moves + 1 + unit // blocks).to(tl.int64)
        slot = tl.load(moves + 1 + S + unit // blocks).to(tl.int64)
        if PDL and unit + tl.num_programs(0) >= units:
            gdc_launch_dependents()
        at = unit % blocks * BLOCK + tl.arange(0, BLOCK)
        tl.store(pool + slot * WORDS + START + at, tl.load(host + expert * WORDS + START + at, mask=at < PART), mask=at < PART)
    if PDL:
        gdc_wait()


@triton.jit(repr=lambda _: "slots_stream", do_not_specialize=["first", "count"])
def slots_stream(host, pool, table, out, first, count, WORDS: tl.constexpr, START: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr):
    """out [count, PART]: words START … START + PART of experts first … first + count, from their slots where they have one, else from host [E, WORDS]."""
    blocks: tl.constexpr = (PART + BLOCK - 1) // BLOCK
    for unit in range(tl.program_id(0), count * blocks, tl.num_programs(0)):
        expert = (first + unit // blocks).to(tl.int64)
        slot = tl.load(table + expert).to(tl.int64)
        at = unit % blocks * BLOCK + tl.arange(0, BLOCK)
        if slot >= 0:  # noqa: SIM108
            value = tl.load(pool + slot * WORDS + START + at, mask=at < PART)
        else:
            value = tl.load(host + expert * WORDS + START + at, mask=at < PART)
        tl.store(out + (expert - first) * PART + at, value, mask=at < PART)


def plan(indices: Tensor, slots: Slots, policy: str, demand: bool = True) -> None:
    """Make room for the experts that `indices`, at most as many as slots, names: updates one layer's `slots` and leaves the copies to make in `moves`."""
    assert slots.table.dim() == 1 and policy in POLICIES
    rows, experts, count = indices.numel(), slots.table.shape[0], slots.owner.shape[0]
    assert rows <= count, f"{rows} places for {count} slots"
    padded = (max(16, triton.next_power_of_2(n)) for n in (experts, count))
    slots_plan[(1,)](
        indices.contiguous(), *(getattr(slots, field.name) for field in fields(slots)), rows, experts, count, *padded, 8 if rows <= 8 else 16,
        policy == "frequency", demand, USE, HALVING, num_warps=1,
    )  # fmt: skip


def fetch(host: Tensor, pool: Tensor, slots: Slots, start: int, part: int) -> None:
    """Copy words start … start + part of what the last plan lists from host int32 [E, words], page-locked, to pool int32 [S, words]. A part that begins beyond
    0 comes right after the one before it, and may be launched before that has ended."""
    pdl = launches_dependently(pool.device)
    slots_fetch[(PROGRAMS,)](host, pool, slots.moves, host.shape[1], start, part, pool.shape[0], BLOCK, PDL=pdl, launch_pdl=pdl and start > 0)


def stream(host: Tensor, pool: Tensor, slots: Slots, first: int, out13: Tensor, out2: Tensor) -> None:
    """Copy experts from `first` on, as many as out13 and out2, int32 [count, words of w13 and w2], have room for."""
    start = 0
    for out in (out13, out2):
        count, part = out.shape
        slots_stream[(PROGRAMS,)](host, pool, slots.table, out, first, count, host.shape[1], start, part, BLOCK)
        start += part
