"""Which blocks each query attends: scores of the compressed keys, folded onto selection blocks, and the best n of them.

One persistent kernel. Scores are computed transposed, [keys, (head, token)], so that the sum over a group's heads stays inside a thread.
A tile's importances live in a scratch row of its program (a few hundred KB in the cache), never in a T x T / 64 table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_transformer.kernels.triton.common import dot_pair, find_document, keys_before, load_pair, load_tile


@triton.jit
def _take_best(value, index):
    """The largest of each row of value [P, C] with its index (the lowest of equals), and value without it."""
    best, place = tl.max(value, axis=1, return_indices=True, return_indices_tie_break_left=True)
    column = tl.arange(0, value.shape[1])[None, :]
    return best, place, tl.where(column == place[:, None], -1.0, value)


@triton.jit
def _score_tile(
    keys0,
    keys1,
    q0,
    q1,
    row_lse,
    limit,
    own,
    carried,
    scratch,
    base,
    at,
    head,
    scale,
    MASK: tl.constexpr,
    FIRST_MEMBER: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    RUNS: tl.constexpr,
    SPREAD: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Probabilities of N compressed keys, summed over the heads and over the keys of each block, into the scratch rows."""
    k0, k1 = load_tile(keys0, keys1, base + at, head * (D0 + D1), D0, D1)
    s = dot_pair(k0, k1, q0, q1, D1 > 0, PRECISION)
    p = tl.exp2(s * scale - row_lse[None, :])
    key = tl.arange(0, N)
    if MASK:
        p = tl.where((at + key)[:, None] < limit[None, :], p, 0.0)
    p = tl.sum(tl.reshape(p, [N, HEADS, P]), axis=1)
    here = tl.minimum(SPREAD, RUNS - key % RUNS).to(tl.float32)
    stays = tl.sum(tl.reshape(p * here[:, None], [N // RUNS, RUNS, P]), axis=1)
    goes = tl.sum(tl.reshape(p * (SPREAD - here)[:, None], [N // RUNS, RUNS, P]), axis=1)
    to = scratch[None, :] + at // RUNS + tl.arange(0, N // RUNS)[:, None]
    if FIRST_MEMBER > 0:
        stays += tl.load(own + to)
        goes += tl.load(carried + to + 1)
    tl.store(own + to, stays)
    tl.store(carried + to + 1, goes)


@triton.jit(repr=lambda _: "nsa_score", do_not_specialize=["num_docs", "scratch_width"])
def score_and_select(
    q,
    q_stride,
    q_head_stride,
    keys0,
    keys1,
    lse,
    own,
    carried,
    found_value,
    found_block,
    blocks,
    cu_q,
    key_starts,
    q_start,
    tiles,
    num_docs,
    scratch_width,
    scale,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SELECT: tl.constexpr,
    NUM: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNK: tl.constexpr,
    FOUND: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """blocks int32 [T, HKV, NUM], ascending, -1 padded. Tiles of P tokens, HEADS heads of the group at a time, N keys a step.

    own, carried: float32 scratch [programs, P, scratch_width], what a block gets from compressed keys that start in it and in the block before it.
    found_value, found_block: scratch [programs, P, FOUND], the best of each CHUNK of blocks, where there are several.
    """
    RUNS: tl.constexpr = SELECT // STRIDE  # compressed keys that start in one block
    SPREAD: tl.constexpr = BLOCK // STRIDE  # runs of STRIDE tokens that one compressed key covers
    FREE: tl.constexpr = NUM - INITIAL - LOCAL
    program = tl.program_id(0)
    num_tiles = tl.load(tiles + num_docs)
    token = tl.arange(0, P)
    scratch = (program * P + token).to(tl.int64) * scratch_width
    pair_column = tl.arange(0, HEADS * P)  # head-major
    slot = tl.arange(0, SLOTS)
    for item in range(program, num_tiles * HKV, tl.num_programs(0)):
        head = item // num_tiles
        tile = num_tiles - 1 - item % num_tiles
        document = find_document(tiles, num_docs, tile)
        first = (tile - tl.load(tiles + document)) * P
        document_q = tl.load(cu_q + document)
        queries = tl.load(cu_q + document + 1) - document_q
        start = tl.load(q_start + document)
        base = tl.load(key_starts + document)
        last_t = start + tl.minimum(first + P, queries) - 1
        visible = keys_before(last_t, BLOCK, STRIDE)
        visible = tl.where(last_t // SELECT < NUM, 0, visible)  # all blocks are taken: no need to score them

        inner_token = first + pair_column % P
        inside_token = inner_token < queries
        limit = keys_before(start + inner_token, BLOCK, STRIDE)
        for heads in tl.static_range(0, G, HEADS):
            member = heads + pair_column // P
            inside = inside_token & (member < G)
            pair = (document_q + inner_token).to(tl.int64) * HQ + head * G + member
            q0, q1 = load_pair(q, pair // HQ * q_stride + pair % HQ * q_head_stride, inside, D0, D1)
            row_lse = tl.load(lse + pair, mask=inside, other=float("inf"))
            full = tl.minimum(keys_before(start + first, BLOCK, STRIDE), visible) // N * N  # every token of the tile sees these
            for at in tl.range(0, full, N, num_stages=STAGES):
                _score_tile(
                    keys0, keys1, q0, q1, row_lse, limit, own, carried, scratch, base, at, head, scale, 0, heads, HEADS, P, N, RUNS, SPREAD, D0, D1, PRECISION
                )
            for at in tl.range(full, visible, N):
                _score_tile(
                    keys0, keys1, q0, q1, row_lse, limit, own, carried, scratch, base, at, head, scale, 1, heads, HEADS, P, N, RUNS, SPREAD, D0, D1, PRECISION
                )
        covered = tl.cdiv(visible, N) * (N // RUNS)
        tl.debug_barrier()

        t = start + first + token
        t_block = t // SELECT
        chosen = tl.full([P, SLOTS], -1, tl.int32)
        num_blocks = last_t // SELECT + 1
        if FREE > 0:
            if FOUND > 0:
                for chunk in range(tl.cdiv(num_blocks, CHUNK)):
                    column = chunk * CHUNK + tl.arange(0, CHUNK)
                    value = _importance(own, carried, scratch, column, covered)
                    value = _candidates(value, column, t_block, INITIAL, LOCAL)
                    for turn in range(FREE):
                        best, place, value = _take_best(value, column)
                        to = (program * P + token).to(tl.int64) * FOUND + chunk * FREE + turn
                        tl.store(found_value + to, best)
                        tl.store(found_block + to, chunk * CHUNK + place)
                tl.debug_barrier()
                column = tl.arange(0, FOUND)
                from_row = (program * P + token).to(tl.int64) * FOUND
                value = tl.load(found_value + from_row[:, None] + column[None, :], mask=(column < tl.cdiv(num_blocks, CHUNK) * FREE)[None, :], other=-1.0)
                for turn in range(FREE):
                    best, place, value = _take_best(value, column)
                    block = tl.load(found_block + from_row + place)
                    chosen = tl.where((slot[None, :] == turn) & (best[:, None] >= 0), block[:, None], chosen)
            else:
                column = tl.arange(0, CHUNK)
                value = _importance(own, carried, scratch, column, covered)
                value = _candidates(value, column, t_block, INITIAL, LOCAL)
                for turn in range(FREE):
                    best, place, value = _take_best(value, column)
                    chosen = tl.where((slot[None, :] == turn) & (best[:, None] >= 0), place[:, None], chosen)
        initial = slot - FREE
        is_initial = (initial >= 0) & (initial < INITIAL)
        chosen = tl.where(is_initial[None, :] & (initial[None, :] <= t_block[:, None]), initial[None, :], chosen)
        back = slot - FREE - INITIAL
        local = t_block[:, None] - back[None, :]
        chosen = tl.where(((back >= 0) & (back < LOCAL))[None, :] & (local >= INITIAL), local, chosen)
        ordered = tl.sort(tl.where(chosen < 0, 0x7FFFFFFF, chosen))
        ordered = tl.where(ordered == 0x7FFFFFFF, -1, ordered)
        to = ((document_q + first + token).to(tl.int64) * HKV + head) * NUM
        tl.store(blocks + to[:, None] + slot[None, :], ordered, mask=(first + token < queries)[:, None] & (slot < NUM)[None, :])
        tl.debug_barrier()


@triton.jit
def _importance(own, carried, scratch, column, covered):
    """[P, C] of the blocks `column`; those past the scored keys have none."""
    value = tl.load(own + scratch[:, None] + column[None, :], mask=(column < covered)[None, :], other=0.0)
    return value + tl.load(carried + scratch[:, None] + column[None, :], mask=((column > 0) & (column <= covered))[None, :], other=0.0)


@triton.jit
def _candidates(value, column, t_block, INITIAL: tl.constexpr, LOCAL: tl.constexpr):
    """Importances of the blocks that compete for a free place, -1 for the others."""
    free = (column[None, :] >= INITIAL) & (column[None, :] <= t_block[:, None] - LOCAL)
    return tl.where(free, value, -1.0)
