"""The selected branch. Forward and dq go over the union of the blocks that a tile of neighbouring queries chose; dk and dv over blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_transformer.kernels.triton.common import (
    attend_step,
    find_document,
    finish_softmax,
    grad_kv_step,
    grad_q_step,
    load_lse,
    load_pair,
    load_tile,
    store_lse,
    store_rows,
)


@triton.jit
def _row_tile(tiles, cu_q, q_start, num_docs, head, M: tl.constexpr, G: tl.constexpr, HQ: tl.constexpr):
    tile = tl.program_id(0)
    document = find_document(tiles, num_docs, tile)
    row0 = (tile - tl.load(tiles + document)) * M
    row = row0 + tl.arange(0, M)
    first = tl.load(cu_q + document)
    inside = row < (tl.load(cu_q + document + 1) - first) * G
    token = row // G
    t = tl.load(q_start + document) + token
    pair = (first + token).to(tl.int64) * HQ + head * G + row % G
    return tile, document, inside, t, pair, token - row0 // G


@triton.jit
def _entry(union, members, at, step, bit, t, inside, SELECT: tl.constexpr, N: tl.constexpr):
    """The N keys of step `step` over a list of blocks: where they start, and how many of them each row sees: those up to t if its token
    chose the block, else none."""
    PIECES: tl.constexpr = (SELECT + N - 1) // N
    entry = step // PIECES
    start = tl.load(union + at + entry) * SELECT + step % PIECES * N
    chose = ((tl.load(members + at + entry) >> bit) & 1) != 0
    return start, tl.where(chose & inside, tl.minimum(t + 1 - start, SELECT), 0)


@triton.jit(repr=lambda _: "nsa_selected_forward", do_not_specialize=["num_docs"])
def selected_forward(
    q,
    q_stride,
    q_head_stride,
    keys0,
    keys1,
    values0,
    values1,
    union,
    members,
    counts,
    gates,
    out_compressed,
    out_window,
    out_selected,
    out,
    lse,
    cu_q,
    cu_k,
    q_start,
    tiles,
    num_docs,
    scale,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    L: tl.constexpr,
    SELECT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    SAVE: tl.constexpr,
):
    """out = the three branches weighed by their gates; out_selected (with SAVE) and lse for the backward."""
    if tl.program_id(0) >= tl.load(tiles + num_docs):
        return
    head = tl.program_id(1)
    tile, document, inside, t, pair, token = _row_tile(tiles, cu_q, q_start, num_docs, head, M, G, HQ)
    q0, q1 = load_pair(q, pair // HQ * q_stride + pair % HQ * q_head_stride, inside, D0, D1)
    base = tl.load(cu_k + document)
    at = (tile.to(tl.int64) * HKV + head) * L
    column = tl.arange(0, N)
    bit = token.to(members.dtype.element_ty)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc0 = tl.zeros([M, E0], tl.float32)
    acc1 = 0.0
    if E1 > 0:
        acc1 = tl.zeros([M, E1], tl.float32)
    for step in tl.range(0, tl.load(counts + tile * HKV + head) * ((SELECT + N - 1) // N), num_stages=STAGES):
        position, high = _entry(union, members, at, step, bit, t, inside, SELECT, N)
        acc0, acc1, top, total = attend_step(
            acc0, acc1, top, total, q0, q1, keys0, keys1, values0, values1,
            base + position, head, column, high, high, scale, 1, D0, D1, E0, E1, PRECISION,
        )  # fmt: skip
    inverse, row_lse = finish_softmax(top, total, scale)
    store_lse(lse, pair, inside, top, inverse, row_lse, scale, PRECISION)
    to = pair * (E0 + E1)
    gate_compressed = tl.load(gates + pair * 3, mask=inside, other=0.0).to(tl.float32)
    gate_selected = tl.load(gates + pair * 3 + 1, mask=inside, other=0.0).to(tl.float32)
    gate_window = tl.load(gates + pair * 3 + 2, mask=inside, other=0.0).to(tl.float32)
    acc0 *= inverse[:, None]
    if E1 > 0:
        acc1 *= inverse[:, None]
    if SAVE:
        store_rows(out_selected, to, inside, acc0, 0, E0)
        if E1 > 0:
            store_rows(out_selected, to, inside, acc1, E0, E1)
    c0, c1 = load_pair(out_compressed, to, inside, E0, E1)
    w0, w1 = load_pair(out_window, to, inside, E0, E1)
    acc0 = gate_compressed[:, None] * c0 + gate_selected[:, None] * acc0 + gate_window[:, None] * w0
    store_rows(out, to, inside, acc0, 0, E0)
    if E1 > 0:
        acc1 = gate_compressed[:, None] * c1 + gate_selected[:, None] * acc1 + gate_window[:, None] * w1
        store_rows(out, to, inside, acc1, E0, E1)


@triton.jit(repr=lambda _: "nsa_selected_dq", do_not_specialize=["num_docs"])
def selected_grad_q(
    q,
    q_stride,
    q_head_stride,
    keys0,
    keys1,
    values0,
    values1,
    union,
    members,
    counts,
    grad_out,
    lse,
    delta,
    gates,
    grad_q,
    cu_q,
    cu_k,
    q_start,
    tiles,
    num_docs,
    scale,
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
    E0: tl.constexpr,
    E1: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_q += the selected branch's."""
    if tl.program_id(0) >= tl.load(tiles + num_docs):
        return
    head = tl.program_id(1)
    tile, document, inside, t, pair, token = _row_tile(tiles, cu_q, q_start, num_docs, head, M, G, HQ)
    q0, q1 = load_pair(q, pair // HQ * q_stride + pair % HQ * q_head_stride, inside, D0, D1)
    do0, do1 = load_pair(grad_out, pair * (E0 + E1), inside, E0, E1)
    row_lse, factor = load_lse(lse, pair, inside, PRECISION)
    row_delta = tl.load(delta + pair, mask=inside, other=0.0)
    base = tl.load(cu_k + document)
    at = (tile.to(tl.int64) * HKV + head) * L
    column = tl.arange(0, N)
    bit = token.to(members.dtype.element_ty)
    dq0 = tl.zeros([M, D0], tl.float32)
    dq1 = 0.0
    if D1 > 0:
        dq1 = tl.zeros([M, D1], tl.float32)
    for step in tl.range(0, tl.load(counts + tile * HKV + head) * ((SELECT + N - 1) // N), num_stages=STAGES):
        position, high = _entry(union, members, at, step, bit, t, inside, SELECT, N)
        dq0, dq1 = grad_q_step(
            dq0, dq1, q0, q1, do0, do1, row_lse, factor, row_delta, keys0, keys1, values0, values1,
            base + position, head, column, high, high, scale, 1, D0, D1, E0, E1, PRECISION,
        )  # fmt: skip
    factor = raw_scale * tl.load(gates + pair * 3 + 1, mask=inside, other=0.0).to(tl.float32)
    to = pair * (D0 + D1)
    before0, before1 = load_pair(grad_q, to, inside, D0, D1)
    store_rows(grad_q, to, inside, before0 + dq0 * factor[:, None], 0, D0)
    if D1 > 0:
        store_rows(grad_q, to, inside, before1 + dq1 * factor[:, None], D0, D1)


@triton.jit(repr=lambda _: "nsa_selected_dkv", do_not_specialize=["num_docs", "num_blocks", "segment", "first_owner", "end_owner"])
def selected_grad_kv(
    q,
    q_stride,
    q_head_stride,
    keys0,
    keys1,
    values0,
    values1,
    tokens,
    starts,
    segments,
    shared,
    grad_out,
    lse,
    delta,
    gates,
    grad_k,
    grad_v,
    parts_k,
    parts_v,
    grad_scores,
    cu_q,
    cu_k,
    q_start,
    block_starts,
    num_docs,
    num_blocks,
    segment,
    first_owner,
    end_owner,
    scale,
    raw_scale,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    SELECT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    STORE: tl.constexpr,
):
    """grad_k, grad_v of N keys of one block from one segment of the tokens that chose it; into parts_k, parts_v where the block has several
    segments. Owners, which are (head, block), from `first_owner` to `end_owner`.

    With STORE, grad_scores [chosen by these owners, SELECT, G], in the order of `tokens`: gradients of the scores, less the scale.
    """
    PIECES: tl.constexpr = (SELECT + N - 1) // N
    piece = tl.program_id(1) * N
    item = tl.load(segments + first_owner) + tl.program_id(0)
    if item >= tl.load(segments + end_owner):
        return
    owner = find_document(segments, HKV * num_blocks, item)
    head = owner // num_blocks
    block = owner % num_blocks
    if block >= tl.load(block_starts + num_docs):
        return
    document = find_document(block_starts, num_docs, block)
    position = (block - tl.load(block_starts + document)) * SELECT + piece
    base = tl.load(cu_k + document)
    column = tl.arange(0, N)
    inside_keys = (position + column < tl.load(cu_k + document + 1) - base) & (column < SELECT)
    base += position
    number = item - tl.load(segments + owner)
    # Segments are counted from the end of the list, see `lists.Choosers`.
    end = tl.load(starts + owner + 1) - number * segment
    begin = tl.maximum(end - segment, tl.load(starts + owner))
    count = (end - begin) * G
    shift = tl.load(q_start + document) - tl.load(cu_q + document) + 1 - position  # a token sees its index + shift keys of the block
    k0, k1 = load_tile(keys0, keys1, base, head * (D0 + D1), D0, D1)
    v0, v1 = load_tile(values0, values1, base, head * (E0 + E1), E0, E1)
    dk0 = tl.zeros([N, D0], tl.float32)
    dv0 = tl.zeros([N, E0], tl.float32)
    dk1 = 0.0
    dv1 = 0.0
    if D1 > 0:
        dk1 = tl.zeros([N, D1], tl.float32)
    if E1 > 0:
        dv1 = tl.zeros([N, E1], tl.float32)
    to_scores = (begin - tl.load(starts + first_owner)).to(tl.int64) * (SELECT * G) + piece * G
    last = (count - 1) // M * M
    for back in tl.range(0, count, M, num_stages=STAGES):  # from the last token on
        row = last - back + tl.arange(0, M)
        inside = row < count
        token = tl.load(tokens + begin + row // G, mask=inside, other=0)
        query = head * G + row % G
        pair = token.to(tl.int64) * HQ + query
        q0, q1 = load_pair(q, token.to(tl.int64) * q_stride + query * q_head_stride, inside, D0, D1)
        do0, do1 = load_pair(grad_out, pair * (E0 + E1), inside, E0, E1)
        dk0, dk1, dv0, dv1, ds = grad_kv_step(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q0, q1, do0, do1, lse, delta, gates, pair, inside,
            column, token, token + shift, scale, 1, 1, D1, E1, PRECISION,
        )  # fmt: skip
        if STORE:
            to = to_scores + (row // G).to(tl.int64) * (SELECT * G) + row % G
            tl.store(grad_scores + (to[None, :] + column[:, None] * G), ds, mask=inside[None, :] & (column < SELECT)[:, None])
    dk0 *= raw_scale
    if D1 > 0:
        dk1 *= raw_scale
    part = tl.load(shared + owner)
    if tl.load(shared + owner + 1) > part:
        to = (part + number).to(tl.int64) * (PIECES * N) + piece + column
        everywhere = column >= 0
        store_rows(parts_k, to * (D0 + D1), everywhere, dk0, 0, D0)
        store_rows(parts_v, to * (E0 + E1), everywhere, dv0, 0, E0)
        if D1 > 0:
            store_rows(parts_k, to * (D0 + D1), everywhere, dk1, D0, D1)
        if E1 > 0:
            store_rows(parts_v, to * (E0 + E1), everywhere, dv1, E0, E1)
    else:
        to = (base + column).to(tl.int64) * HKV + head
        store_rows(grad_k, to * (D0 + D1), inside_keys, dk0, 0, D0)
        store_rows(grad_v, to * (E0 + E1), inside_keys, dv0, 0, E0)
        if D1 > 0:
            store_rows(grad_k, to * (D0 + D1), inside_keys, dk1, D0, D1)
        if E1 > 0:
            store_rows(grad_v, to * (E0 + E1), inside_keys, dv1, E0, E1)


@triton.jit(repr=lambda _: "nsa_sum_segments", do_not_specialize=["num_docs", "num_blocks"])
def sum_segments(
    parts, grad, shared, cu_k, block_starts, num_docs, num_blocks,
    HKV: tl.constexpr, SELECT: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """grad of ROWS keys of a block with several segments: their sum, in order. A part has PADDED rows."""
    owner = tl.program_id(0)
    part = tl.load(shared + owner)
    end = tl.load(shared + owner + 1)
    if end == part:
        return
    head = owner // num_blocks
    block = owner % num_blocks
    document = find_document(block_starts, num_docs, block)
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    position = (block - tl.load(block_starts + document)) * SELECT + column
    base = tl.load(cu_k + document)
    inside = (position < tl.load(cu_k + document + 1) - base) & (column < SELECT)
    total0 = tl.zeros([ROWS, D0], tl.float32)
    total1 = 0.0
    if D1 > 0:
        total1 = tl.zeros([ROWS, D1], tl.float32)
    for number in tl.range(part, end):
        x0, x1 = load_pair(parts, (number * PADDED + column).to(tl.int64) * (D0 + D1), column >= 0, D0, D1)
        total0 += x0
        if D1 > 0:
            total1 += x1
    to = ((base + position).to(tl.int64) * HKV + head) * (D0 + D1)
    store_rows(grad, to, inside, total0, 0, D0)
    if D1 > 0:
        store_rows(grad, to, inside, total1, D0, D1)
