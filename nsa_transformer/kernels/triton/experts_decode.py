"""Experts for a few rows, as in decoding: nothing is sorted, and each chosen expert's weights are read once from memory.

All that counts is how fast weights stream, so a program owns a narrow strip of one expert's matrix, all its depth, and multiplies it with every row that chose
the expert: rows of a tile are tokens, absent ones zero. A program stands for a routed row, a place of [T, K], and a strip; it returns at once where an earlier
place chose the same expert. So the grid comes from shapes alone, one token starts no idle program, and nothing waits for the device.

Experts lie where a table says, if one is given: expert e in slot table[e] of the weights, which is how offloaded experts are read (`expert_slots.py`). Then a
pass is for those of one mark alone: first for experts that are at hand, while the others are being copied, then for these: *up* once every w13 is there, while
w2 is still on its way, then *down*.

From compute capability 9.0 on *down* is launched while *up* still runs, and the sum while *down* does (PDL: programmatic dependent launch), so that their
programs are there, and *down* has looked up its expert, when what they wait for is. *up* is launched as usual, after all that came before it has ended: so
what was written before *up*, such as the table and the marks, *down* and the sum may read without waiting, and so the second pass follows the first. Were
*up* launched like them, *down* could start before the kernels ahead of *up* have ended, and would have to wait before its first load. *down* of copied experts
is launched as usual too: it follows the copy of w2 on another stream as well, which ends long after *up*.

Shape letters: M rows of a tile, N columns of a strip, DEPTH of the sum at a step; CHUNK places looked through at once; H hidden width, WIDTH of an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nsa_transformer.kernels.triton.common import aligned, launches_dependently, packed, precision
from nsa_transformer.kernels.triton.expert_kernels import silu
from nsa_transformer.kernels.triton.expert_slots import AT_HAND, COPIED, Slots
from nsa_transformer.kernels.triton.experts import Tile, sum_rows

# Every program looks through all places for its own, and there is a program for each place and strip. Beyond 512 places, which make most experts of a usual
# layer busy and their tiles of rows full, sorting once is less.
MAX_ROWS = 512

Joins = tuple[Callable[[], None], Callable[[], None]]


@triton.jit
def _chose(indices, at, rows, expert, CHUNK: tl.constexpr):
    """Places at … at + CHUNK, and whether each chose the expert, 0 or 1."""
    place = at + tl.arange(0, CHUNK)
    return place, (tl.load(indices + place, mask=place < rows, other=-1).to(tl.int32) == expert).to(tl.int32)


@triton.jit
def _expert_of(indices, table, marks, mark, rows, row, CHUNK: tl.constexpr):
    """The expert of place `row`, its slot, how many places chose it, and whether this program computes it."""
    expert = tl.load(indices + row).to(tl.int32)
    slot = expert
    ours = row >= 0
    if table is not None:
        slot = tl.load(table + expert)
        ours = tl.load(marks + expert) == mark
    count = 0
    earlier = 0
    for at in range(0, rows, CHUNK):
        place, mine = _chose(indices, at, rows, expert, CHUNK)
        count += tl.sum(mine, 0)
        earlier += tl.sum(tl.where(place < row, mine, 0), 0)
    return expert, slot, count, ours & (earlier == 0)


@triton.jit
def _members(indices, rows, expert, start, M: tl.constexpr, CHUNK: tl.constexpr):
    """Places of the choosers number start … start + M; 0 where there are fewer."""
    member = start + tl.arange(0, M)
    found = tl.zeros([M], tl.int32)
    seen = 0
    for at in range(0, rows, CHUNK):
        place, mine = _chose(indices, at, rows, expert, CHUNK)
        number = seen + tl.cumsum(mine, 0) - 1
        same = (number[None, :] == member[:, None]) & (mine != 0)[None, :]
        found += tl.sum(tl.where(same, place[None, :], 0), 1)
        seen += tl.sum(mine, 0)
    return found


@triton.jit(repr=lambda _: "experts_decode_up", do_not_specialize=["rows", "mark"])
def experts_decode_up(
    x, indices, table, marks, mark, w13, activation, rows, pitch,
    K: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """activation [T * K, WIDTH] = silu(gate) * up from x [T, H] and w13, whose matrices [2 WIDTH, H] begin `pitch` elements apart."""
    strips: tl.constexpr = (WIDTH + N - 1) // N
    row = tl.program_id(0) // strips
    expert, slot, count, ours = _expert_of(indices, table, marks, mark, rows, row, CHUNK)
    if not ours:
        return
    # Not before: where no program of a pass has anything to compute, so that none of *down* waits, *up* has ended when *down* begins.
    if PDL:
        gdc_launch_dependents()
    # Lines of the strip are a gate row and its up row in turn: neighbouring columns of the product, which one thread holds.
    column = tl.program_id(0) % strips * N
    line = tl.arange(0, 2 * N)
    of = column + line // 2
    depth = tl.arange(0, DEPTH)
    strip = w13 + slot.to(tl.int64) * pitch + (of + line % 2 * WIDTH)[:, None] * H
    to = column + tl.arange(0, N)
    for start in range(0, count, M):
        place = _members(indices, rows, expert, start, M, CHUNK)
        there = start + tl.arange(0, M) < count
        tokens = x + (place // K).to(tl.int64)[:, None] * H
        total = tl.zeros([M, 2 * N], tl.float32)
        for k in tl.range(0, H, DEPTH, num_stages=STAGES):
            inside = (k + depth < H)[None, :]
            a = tl.load(tokens + (k + depth)[None, :], mask=there[:, None] & inside, other=0.0)
            b = tl.load(strip + (k + depth)[None, :], mask=(of < WIDTH)[:, None] & inside, other=0.0)
            total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
        gate, up = tl.split(tl.reshape(total, [M, N, 2]))
        # Rounded as in training, where the backward starts from the rounded ones.
        dtype = activation.dtype.element_ty
        value = silu(gate.to(dtype).to(tl.float32)) * up.to(dtype).to(tl.float32)
        tl.store(activation + place.to(tl.int64)[:, None] * WIDTH + to[None, :], value.to(dtype), mask=there[:, None] & (to < WIDTH)[None, :])


@triton.jit(repr=lambda _: "experts_decode_down", do_not_specialize=["rows", "mark"])
def experts_decode_down(
    activation, indices, table, marks, mark, w2, out, rows, pitch,
    H: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T * K, H] from activation [T * K, WIDTH] and w2, whose matrices [H, WIDTH] begin `pitch` elements apart."""
    strips: tl.constexpr = (H + N - 1) // N
    row = tl.program_id(0) // strips
    expert, slot, count, ours = _expert_of(indices, table, marks, mark, rows, row, CHUNK)
    if not ours:
        return
    if PDL:
        gdc_launch_dependents()
    to = tl.program_id(0) % strips * N + tl.arange(0, N)
    depth = tl.arange(0, DEPTH)
    strip = w2 + slot.to(tl.int64) * pitch + to[:, None] * WIDTH
    for start in range(0, count, M):
        place = _members(indices, rows, expert, start, M, CHUNK)
        there = start + tl.arange(0, M) < count
        wide = place.to(tl.int64)[:, None]
        if PDL:
            gdc_wait()  # for the activation; in a further tile of rows it costs nothing
        total = tl.zeros([M, N], tl.float32)
        for k in tl.range(0, WIDTH, DEPTH, num_stages=STAGES):
            inside = (k + depth < WIDTH)[None, :]
            a = tl.load(activation + wide * WIDTH + (k + depth)[None, :], mask=there[:, None] & inside, other=0.0)
            b = tl.load(strip + (k + depth)[None, :], mask=(to < H)[:, None] & inside, other=0.0)
            total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
        tl.store(out + wide * H + to[None, :], total.to(out.dtype.element_ty), mask=there[:, None] & (to < H)[None, :])


def _tile(dtype: torch.dtype, tokens: int) -> Tile:
    """Of the strips. An expert has at most as many rows as there are tokens; up to 64 are one tile.

    One token, top-8 of width 768 and hidden width 2048: strips of 32 lines are 384 programs of 128 KiB in *up* and 512 of 48 KiB in *down*, three or four to
    each of 132 multiprocessors, with 24 KiB of weights under way in each. 32 lines also are what four warps share without doing work twice.
    """
    rows = min(64, max(16, triton.next_power_of_2(tokens)))
    if dtype == torch.float32:  # on the ordinary cores
        return Tile(32, 32, 4, 1, rows=min(32, rows))
    return Tile(32 if rows == 16 else 64, 128, 4, 4 if rows == 16 else 3, rows=rows)


def _pitch(weights: Tensor) -> tuple[Tensor, int]:
    """Matrices [S, A, B] that are contiguous each, with the elements from one to the next; copied where they are not so."""
    one = weights.shape[1] * weights.shape[2]
    if weights.stride()[1:] == (weights.shape[2], 1) and weights.stride(0) >= one and aligned(weights):
        return weights, weights.stride(0)
    return packed(weights), one


def forward(x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, slots: Slots | None = None, joins: Joins | None = None) -> Tensor:
    """y [T, H] of at most MAX_ROWS places. With `slots`, one layer's, as the last plan left them, expert e is w13[table[e]], w2[table[e]]. Before w13 of
    experts that the plan had copied is read the first of `joins` is called, before their w2 the second; without `joins` both are there already."""
    hidden_size, width = x.shape[1], w2.shape[2]
    rows, top_k = indices.numel(), indices.shape[1]
    assert rows <= MAX_ROWS, f"{rows} places"
    if rows == 0:
        return torch.zeros_like(x)
    x, weights, indices = packed(x), weights.contiguous(), indices.contiguous()
    w13, pitch13 = _pitch(w13)
    w2, pitch2 = _pitch(w2)
    tile = _tile(x.dtype, x.shape[0])
    chunk = min(128, max(16, triton.next_power_of_2(rows)))
    half = tile.columns // 2
    pdl = launches_dependently(x.device)
    shared = {"H": hidden_size, "WIDTH": width, "CHUNK": chunk, "M": tile.rows, "PRECISION": precision(x.dtype), "PDL": pdl, **tile.launch}
    activation, y = x.new_empty(rows, width), x.new_empty(rows, hidden_size)
    table, marks = (None, None) if slots is None else (slots.table, slots.marks)
    for mark in (0,) if slots is None else (AT_HAND, COPIED):
        where = (indices, table, marks, mark)
        join_up, join_down = joins if mark == COPIED and joins is not None else (None, None)
        if join_up is not None:
            join_up()
        experts_decode_up[(rows * triton.cdiv(width, half),)](x, *where, w13, activation, rows, pitch13, K=top_k, **shared | {"N": half})
        if join_down is not None:
            join_down()
        early = pdl and join_down is None
        experts_decode_down[(rows * triton.cdiv(hidden_size, tile.columns),)](activation, *where, w2, y, rows, pitch2, launch_pdl=early, **shared)
    return sum_rows(y, weights, True, pdl=pdl)[0]
