"""Which blocks each query attends: scores of the compressed keys, folded onto selection blocks, and the best n of them.

Scores are computed transposed, [keys, (head, token)], so that the sum over a group's heads stays inside a thread. A strip of tokens at a time
writes its importances to a table of bounded size, and one warp per token picks from it: never a T x T / 64 table.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_transformer.kernels.triton.common import dot_pair, find_document, keys_before, load_lse, load_pair, load_tile


@triton.jit
def _take_best(value):
    """The largest of `value` [C], where it is (the lowest of equals), and value without it."""
    best, place = tl.max(value, axis=0, return_indices=True, return_indices_tie_break_left=True)
    return best, place, tl.where(tl.arange(0, value.shape[0]) == place, -1.0, value)


@triton.jit
def _best_of(value, index, best_value, best_index, FREE: tl.constexpr, SLOTS: tl.constexpr, MERGE: tl.constexpr):
    """The FREE largest of `value` [C], with MERGE those of the list [SLOTS] among them, and their indices; equals in the list's, then in C's order."""
    slot = tl.arange(0, SLOTS)
    place_of = tl.arange(0, value.shape[0])
    old_value = best_value
    old_index = best_index
    for turn in range(FREE):
        best, place, rest = _take_best(value)
        found = tl.sum(tl.where(place_of == place, index, 0))
        if MERGE:
            before, where_before, old_rest = _take_best(old_value)
            keep = before >= best
            old_value = tl.where(keep, old_rest, old_value)
            rest = tl.where(keep, value, rest)
            found = tl.where(keep, tl.sum(tl.where(slot == where_before, old_index, 0)), found)
            best = tl.maximum(before, best)
        value = rest
        best_value = tl.where(slot == turn, best, best_value)
        best_index = tl.where(slot == turn, found, best_index)
    return best_value, best_index


@triton.jit
def _score_tile(
    keys0,
    keys1,
    q0,
    q1,
    row_lse,
    factor,
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
    if PRECISION == "ieee":
        p = p * factor[None, :]
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


@triton.jit(repr=lambda _: "nsa_score", do_not_specialize=["num_docs", "first_tile", "width"])
def score(
    q,
    q_stride,
    q_head_stride,
    keys0,
    keys1,
    lse,
    own,
    carried,
    cu_q,
    key_starts,
    q_start,
    tiles,
    num_docs,
    first_tile,
    width,
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
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """own, carried float32 [tiles of the strip, P, HKV, width]: what a block gets from compressed keys that start in it, and in the one before it.

    Tiles of P tokens, HEADS heads of the group at a time, N keys a step.
    """
    RUNS: tl.constexpr = SELECT // STRIDE  # compressed keys that start in one block
    SPREAD: tl.constexpr = BLOCK // STRIDE  # runs of STRIDE tokens that one compressed key covers
    local_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    tile = first_tile + local_tile
    head = tl.program_id(1)
    if tile >= tl.load(tiles + num_docs):
        return
    document = find_document(tiles, num_docs, tile)
    first = (tile - tl.load(tiles + document)) * P
    document_q = tl.load(cu_q + document)
    queries = tl.load(cu_q + document + 1) - document_q
    start = tl.load(q_start + document)
    last_t = start + tl.minimum(first + P, queries) - 1
    if last_t // SELECT < NUM:  # all blocks are taken: no need to score them
        return
    base = tl.load(key_starts + document)
    visible = keys_before(last_t, BLOCK, STRIDE)
    scratch = ((local_tile * P + tl.arange(0, P)).to(tl.int64) * HKV + head) * width
    pair_column = tl.arange(0, HEADS * P)  # head-major
    token = first + pair_column % P
    inside_token = token < queries
    limit = keys_before(start + token, BLOCK, STRIDE)
    full = keys_before(start + first, BLOCK, STRIDE) // N * N  # every token of the tile sees these
    for heads in tl.static_range(0, G, HEADS):
        member = heads + pair_column // P
        inside = inside_token & (member < G)
        pair = (document_q + token).to(tl.int64) * HQ + head * G + member
        q0, q1 = load_pair(q, pair // HQ * q_stride + pair % HQ * q_head_stride, inside, D0, D1)
        row_lse, factor = load_lse(lse, pair, inside, PRECISION)
        for at in tl.range(0, full, N, num_stages=STAGES):
            _score_tile(
                keys0, keys1, q0, q1, row_lse, factor, limit, own, carried, scratch, base, at, head, scale,
                0, heads, HEADS, P, N, RUNS, SPREAD, D0, D1, PRECISION,
            )  # fmt: skip
        for at in tl.range(full, visible, N):
            _score_tile(
                keys0, keys1, q0, q1, row_lse, factor, limit, own, carried, scratch, base, at, head, scale,
                1, heads, HEADS, P, N, RUNS, SPREAD, D0, D1, PRECISION,
            )  # fmt: skip


@triton.jit(repr=lambda _: "nsa_select", do_not_specialize=["num_docs", "first_tile", "width"])
def select_blocks(
    own,
    carried,
    blocks,
    cu_q,
    q_start,
    tiles,
    num_docs,
    first_tile,
    width,
    HKV: tl.constexpr,
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
    GROUPS: tl.constexpr,
    MERGE: tl.constexpr,
):
    """blocks int32 [T, HKV, NUM], ascending, -1 padded: one token and key/value head from `score`'s table, CHUNK blocks at a time (MERGE: there
    are several chunks)."""
    FREE: tl.constexpr = NUM - INITIAL - LOCAL
    local_tile = tl.program_id(0) // P
    tile = first_tile + local_tile
    head = tl.program_id(1)
    if tile >= tl.load(tiles + num_docs):
        return
    document = find_document(tiles, num_docs, tile)
    first = (tile - tl.load(tiles + document)) * P
    token = first + tl.program_id(0) % P
    document_q = tl.load(cu_q + document)
    queries = tl.load(cu_q + document + 1) - document_q
    if token >= queries:
        return
    t = tl.load(q_start + document) + token
    t_block = t // SELECT
    slot = tl.arange(0, SLOTS)
    if t_block < NUM:
        chosen = tl.where(slot <= t_block, slot, -1)
    else:
        row = (tl.program_id(0).to(tl.int64) * HKV + head) * width
        last_t = t + tl.minimum(P - tl.program_id(0) % P, queries - token) - 1  # of the tile: so far were keys scored
        covered = tl.cdiv(keys_before(last_t, BLOCK, STRIDE), N) * (N // (SELECT // STRIDE))
        best_value = tl.full([SLOTS], -1.0, tl.float32)
        chosen = tl.full([SLOTS], -1, tl.int32)
        if FREE > 0:
            for begin in range(0, t_block + 1, CHUNK):
                column = begin + tl.arange(0, CHUNK)
                value = tl.load(own + row + column, mask=column < covered, other=0.0)
                value += tl.load(carried + row + column, mask=(column > 0) & (column <= covered), other=0.0)
                value = tl.where((column >= INITIAL) & (column <= t_block - LOCAL), value, -1.0)
                if CHUNK >= 4 * GROUPS:
                    # FREE groups have a maximum of at least `enough`, so nothing below it is among the best: few are left, and cheap to go through.
                    largest = tl.sort(tl.max(tl.reshape(value, [CHUNK // GROUPS, GROUPS]), axis=0), descending=True)
                    enough = tl.sum(tl.where(tl.arange(0, GROUPS) == FREE - 1, largest, 0.0))
                    passes = value >= enough
                    place = tl.cumsum(passes.to(tl.int32)) - 1
                    count = tl.sum(passes.to(tl.int32))
                    if count <= 2 * GROUPS:
                        # Compacted in the token's own row, whose first chunk was read before anything is written there.
                        tl.debug_barrier()
                        tl.store(own + row + place, value, mask=passes)
                        tl.store(carried + row + place, column.to(tl.float32, bitcast=True), mask=passes)
                        tl.debug_barrier()
                        few = tl.arange(0, 2 * GROUPS)
                        value_few = tl.load(own + row + few, mask=few < count, other=-1.0)
                        index_few = tl.load(carried + row + few, mask=few < count, other=0.0).to(tl.int32, bitcast=True)
                        tl.debug_barrier()
                        best_value, chosen = _best_of(value_few, index_few, best_value, chosen, FREE, SLOTS, MERGE)
                    else:
                        best_value, chosen = _best_of(value, column, best_value, chosen, FREE, SLOTS, MERGE)
                else:
                    best_value, chosen = _best_of(value, column, best_value, chosen, FREE, SLOTS, MERGE)
        # More than NUM blocks are visible here, so every free place was filled and no forced block is another.
        initial = slot - FREE
        chosen = tl.where((initial >= 0) & (initial < INITIAL), initial, chosen)
        back = slot - FREE - INITIAL
        chosen = tl.where((back >= 0) & (back < LOCAL), t_block - back, chosen)
        chosen = tl.where(slot < NUM, chosen, -1)
    ordered = tl.sort(tl.where(chosen < 0, 0x7FFFFFFF, chosen))
    ordered = tl.where(ordered == 0x7FFFFFFF, -1, ordered)
    to = ((document_q + token).to(tl.int64) * HKV + head) * NUM
    tl.store(blocks + to + slot, ordered, mask=slot < NUM)
