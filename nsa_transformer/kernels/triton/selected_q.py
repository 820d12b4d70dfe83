"""dq of the selected branch from the gradients of the scores, which dk and dv leave in memory: one product for each chosen block instead of three.

A score's gradient is 2 bytes for each pair of a query row and a key; a block's keys and values, which are not read again, are as much for every
tile that chose it. Where neighbouring queries agree little, a tile reads half of what it would to compute the scores once more.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_transformer.kernels.triton.common import add_dot, find_document, load_pair, load_tile, store_rows


@triton.jit
def _ones(x):
    """How many bits of x, unsigned and of 32 or 64 bits, are set."""
    if x.dtype == tl.uint64:
        return _ones((x >> 32).to(tl.uint32)) + _ones((x & 0xFFFFFFFF).to(tl.uint32))
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def member_of(place, SIXTEENS: tl.constexpr):
    """The head of the group whose score gradients stand at `place` of grad_scores. With SIXTEENS, sixteen heads stand in the order 0, 1, 8, 9, 2, 3, …"""
    if SIXTEENS:
        return place // 16 * 16 + (place >> 1 & 1) * 8 + place % 16 // 4 * 2 + (place & 1)
    return place


@triton.jit(repr=lambda _: "nsa_selected_dq_stored", do_not_specialize=["num_docs", "first_head", "first_owner"])
def selected_grad_q_stored(
    keys0,
    keys1,
    union,
    members,
    last,
    counts,
    starts,
    grad_scores,
    grad_q,
    cu_q,
    cu_k,
    tiles,
    num_docs,
    first_head,
    first_owner,
    raw_scale,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    L: tl.constexpr,
    SELECT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    SIXTEENS: tl.constexpr,
):
    """grad_q += the selected branch's, for the heads from `first_head` on; grad_scores as `selected.selected_grad_kv` stores it."""
    PIECES: tl.constexpr = (SELECT + N - 1) // N
    if tl.program_id(0) >= tl.load(tiles + num_docs):
        return
    head = first_head + tl.program_id(1)
    tile = tl.program_id(0)
    document = find_document(tiles, num_docs, tile)
    row0 = (tile - tl.load(tiles + document)) * M
    row = row0 + tl.arange(0, M)
    first = tl.load(cu_q + document)
    inside = row < (tl.load(cu_q + document + 1) - first) * G
    token = row // G
    bit = token - row0 // G
    pair = (first + token).to(tl.int64) * HQ + head * G + member_of(row % G, SIXTEENS)
    base = tl.load(cu_k + document)
    at = (tile.to(tl.int64) * HKV + head) * L
    column = tl.arange(0, N)
    WORD: tl.constexpr = tl.uint32 if members.dtype.element_ty == tl.int32 else tl.uint64
    before = tl.load(starts + first_owner) - 1
    dq0 = tl.zeros([M, D0], tl.float32)
    dq1 = 0.0
    if D1 > 0:
        dq1 = tl.zeros([M, D1], tl.float32)
    for step in tl.range(0, tl.load(counts + tile * HKV + head) * PIECES, num_stages=STAGES):
        entry = step // PIECES
        piece = step % PIECES * N
        position = tl.load(union + at + entry) * SELECT + piece
        # From this row's token on: the tokens of the tile that chose the block stand in a row, the last of them at `last`.
        rest = tl.load(members + at + entry).to(WORD, bitcast=True) >> bit.to(WORD)
        place = tl.load(last + at + entry) - before - _ones(rest)
        chose = ((rest & 1) != 0) & inside
        of = place.to(tl.int64) * (SELECT * G) + piece * G + row % G
        if M % G == 0 and G & (G - 1) == 0:
            of = tl.max_contiguous(tl.multiple_of(of, G), G)
        mask = chose[None, :]
        if SELECT < N:
            mask = mask & (column < SELECT)[:, None]
        ds = tl.load(grad_scores + (of[None, :] + column[:, None] * G), mask=mask, other=0.0)
        k0, k1 = load_tile(keys0, keys1, base + position, head * (D0 + D1), D0, D1)
        dq0 = add_dot(tl.trans(ds), k0, dq0, PRECISION)
        if D1 > 0:
            dq1 = add_dot(tl.trans(ds), k1, dq1, PRECISION)
    to = pair * (D0 + D1)
    before0, before1 = load_pair(grad_q, to, inside, D0, D1)
    store_rows(grad_q, to, inside, before0 + dq0 * raw_scale, 0, D0)
    if D1 > 0:
        store_rows(grad_q, to, inside, before1 + dq1 * raw_scale, D0, D1)
