"""Attention where each query sees one run of keys: the compressed branch and the sliding window, forward and backward.

Query t sees keys [lo(t), hi(t)): compressed keys that end by t, or tokens (t - window, t]. Both bounds rise with t. The compressed branch is
WINDOW = 0 with the geometry's BLOCK and STRIDE; the window has BLOCK = STRIDE = 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_transformer.kernels.triton.common import (
    attend_step,
    find_document,
    finish_softmax,
    grad_kv_step,
    grad_q_step,
    keys_before,
    load_lse,
    load_pair,
    load_tile,
    load_token_rows,
    store_lse,
    store_rows,
)

_RUNTIME = ["num_docs"]


def _named(step):
    return lambda spec: f"nsa_{'window' if spec.constants.get('WINDOW') else 'compressed'}_{step}"


@triton.jit
def _row_tile(starts, cu_q, q_start, num_docs, head, M: tl.constexpr, G: tl.constexpr, HQ: tl.constexpr, LATEST_FIRST: tl.constexpr):
    """The program's tile of query rows: document, whether each row exists, its position t, its index among all (token, head) pairs."""
    tile = tl.program_id(0)
    if LATEST_FIRST:  # late queries see most compressed keys: the longest programs start first
        tile = tl.load(starts + num_docs) - 1 - tile
    document = find_document(starts, num_docs, tile)
    row = (tile - tl.load(starts + document)) * M + tl.arange(0, M)
    first = tl.load(cu_q + document)
    inside = row < (tl.load(cu_q + document + 1) - first) * G
    token = row // G
    t = tl.load(q_start + document) + token
    pair = (first + token).to(tl.int64) * HQ + head * G + row % G
    return document, inside, t, pair


@triton.jit(repr=_named("forward"), do_not_specialize=_RUNTIME)
def banded_forward(
    q,
    q_stride,
    q_head_stride,
    keys0,
    keys1,
    values0,
    values1,
    out,
    lse,
    cu_q,
    key_starts,
    q_start,
    tiles,
    num_docs,
    scale,
    HQ: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [T, Hq, Dv] and lse, log2 of the sum of exponentials (see `store_lse`), for one tile of query rows and one key/value head."""
    if tl.program_id(0) >= tl.load(tiles + num_docs):
        return
    head = tl.program_id(1)
    document, inside, t, pair = _row_tile(tiles, cu_q, q_start, num_docs, head, M, G, HQ, WINDOW == 0)
    q0, q1 = load_pair(q, pair // HQ * q_stride + pair % HQ * q_head_stride, inside, D0, D1)
    high = tl.where(inside, keys_before(t, BLOCK, STRIDE), 0)
    low = tl.maximum(t + 1 - WINDOW, 0)
    base = tl.load(key_starts + document)
    end = tl.max(high, 0)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc0 = tl.zeros([M, E0], tl.float32)
    acc1 = 0.0
    if E1 > 0:
        acc1 = tl.zeros([M, E1], tl.float32)
    begin = 0
    if WINDOW > 0:
        begin = tl.min(tl.where(inside, low, end), 0)
    else:
        full = keys_before(tl.min(t, 0), BLOCK, STRIDE) // N * N  # every row of the tile sees these
        for at in tl.range(0, full, N, num_stages=STAGES):
            acc0, acc1, top, total = attend_step(
                acc0, acc1, top, total, q0, q1, keys0, keys1, values0, values1, base + at, head, at, low, high, scale, 0, D0, D1, E0, E1, PRECISION
            )
        begin = full
    for at in tl.range(begin, end, N, num_stages=STAGES):
        column = at + tl.arange(0, N)
        MASK: tl.constexpr = 2 if WINDOW > 0 else 1
        acc0, acc1, top, total = attend_step(
            acc0, acc1, top, total, q0, q1, keys0, keys1, values0, values1, base + at, head, column, low, high, scale, MASK, D0, D1, E0, E1, PRECISION
        )
    inverse, row_lse = finish_softmax(top, total, scale)
    store_rows(out, pair * (E0 + E1), inside, acc0 * inverse[:, None], 0, E0)
    if E1 > 0:
        store_rows(out, pair * (E0 + E1), inside, acc1 * inverse[:, None], E0, E1)
    store_lse(lse, pair, inside, top, inverse, row_lse, scale, PRECISION)


@triton.jit(repr=_named("dq"), do_not_specialize=_RUNTIME)
def banded_grad_q(
    q,
    q_stride,
    q_head_stride,
    keys0,
    keys1,
    values0,
    values1,
    grad_out,
    lse,
    delta,
    gates,
    grad_q,
    cu_q,
    key_starts,
    q_start,
    tiles,
    num_docs,
    scale,
    raw_scale,
    HQ: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_q [T, Hq, Dk]: the compressed branch writes it, the window adds to it."""
    if tl.program_id(0) >= tl.load(tiles + num_docs):
        return
    head = tl.program_id(1)
    document, inside, t, pair = _row_tile(tiles, cu_q, q_start, num_docs, head, M, G, HQ, WINDOW == 0)
    q0, q1 = load_pair(q, pair // HQ * q_stride + pair % HQ * q_head_stride, inside, D0, D1)
    do0, do1 = load_pair(grad_out, pair * (E0 + E1), inside, E0, E1)
    row_lse, factor = load_lse(lse, pair, inside, PRECISION)
    row_delta = tl.load(delta + pair, mask=inside, other=0.0)
    high = tl.where(inside, keys_before(t, BLOCK, STRIDE), 0)
    low = tl.maximum(t + 1 - WINDOW, 0)
    base = tl.load(key_starts + document)
    end = tl.max(high, 0)
    dq0 = tl.zeros([M, D0], tl.float32)
    dq1 = 0.0
    if D1 > 0:
        dq1 = tl.zeros([M, D1], tl.float32)
    begin = 0
    if WINDOW > 0:
        begin = tl.min(tl.where(inside, low, end), 0)
    else:
        full = keys_before(tl.min(t, 0), BLOCK, STRIDE) // N * N
        for at in tl.range(0, full, N, num_stages=STAGES):
            dq0, dq1 = grad_q_step(
                dq0, dq1, q0, q1, do0, do1, row_lse, factor, row_delta, keys0, keys1, values0, values1,
                base + at, head, at, low, high, scale, 0, D0, D1, E0, E1, PRECISION,
            )  # fmt: skip
        begin = full
    for at in tl.range(begin, end, N, num_stages=STAGES):
        column = at + tl.arange(0, N)
        MASK: tl.constexpr = 2 if WINDOW > 0 else 1
        dq0, dq1 = grad_q_step(
            dq0, dq1, q0, q1, do0, do1, row_lse, factor, row_delta, keys0, keys1, values0, values1,
            base + at, head, column, low, high, scale, MASK, D0, D1, E0, E1, PRECISION,
        )  # fmt: skip
    factor = raw_scale * tl.load(gates + pair * 3 + (2 if WINDOW > 0 else 0), mask=inside, other=0.0).to(tl.float32)
    to = pair * (D0 + D1)
    dq0 *= factor[:, None]
    if D1 > 0:
        dq1 *= factor[:, None]
    if WINDOW > 0:
        before0, before1 = load_pair(grad_q, to, inside, D0, D1)
        dq0 += before0
        if D1 > 0:
            dq1 += before1
    store_rows(grad_q, to, inside, dq0, 0, D0)
    if D1 > 0:
        store_rows(grad_q, to, inside, dq1, D0, D1)


@triton.jit
def _rows(
    q,
    q_stride,
    q_head_stride,
    grad_out,
    q_rows0,
    q_rows1,
    grad_rows0,
    grad_rows1,
    first,
    start,
    head,
    at,
    end,
    BOXES: tl.constexpr,
    HQ: tl.constexpr,
    G: tl.constexpr,
    M: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
):
    """Query rows at … at + M of a document (heads fastest): q, dO, position, index among all (token, head) pairs, whether they exist.

    BOXES: through descriptors, where the tile is whole tokens; rows past the end are then other documents', to be masked out.
    """
    row = at + tl.arange(0, M)
    inside = row < end
    token = (first + row // G).to(tl.int64)
    query = head * G + row % G
    pair = token * HQ + query
    if BOXES:
        q0, q1 = load_token_rows(q_rows0, q_rows1, first + at // G, head, G, M, D0, D1)
        do0, do1 = load_token_rows(grad_rows0, grad_rows1, first + at // G, head, G, M, E0, E1)
    else:
        q0, q1 = load_pair(q, token * q_stride + query * q_head_stride, inside, D0, D1)
        do0, do1 = load_pair(grad_out, pair * (E0 + E1), inside, E0, E1)
    return q0, q1, do0, do1, start + row // G, pair, inside


@triton.jit(repr=_named("dkv"), do_not_specialize=[*_RUNTIME, "num_parts", "part_stride"])
def banded_grad_kv(
    q,
    q_stride,
    q_head_stride,
    keys0,
    keys1,
    values0,
    values1,
    grad_out,
    q_rows0,
    q_rows1,
    grad_rows0,
    grad_rows1,
    lse,
    delta,
    gates,
    grad_k,
    grad_v,
    part_stride,
    cu_q,
    key_starts,
    q_start,
    tiles,
    num_docs,
    scale,
    raw_scale,
    num_parts,
    BOXES: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_k, grad_v of one tile of N keys from one of num_parts runs of the queries that see them; part p writes at p * part_stride rows.

    Early compressed keys are seen by all later queries, so their work is cut into parts, which `sum_parts` adds up in order.
    """
    # All key tiles of one run of queries side by side, so that they read its rows from the cache.
    tiles_here = tl.num_programs(0) // num_parts
    tile = tl.program_id(0) % tiles_here
    part = num_parts - 1 - tl.program_id(0) // tiles_here
    head = tl.program_id(1)
    if tile >= tl.load(tiles + num_docs):
        return
    document = find_document(tiles, num_docs, tile)
    at = (tile - tl.load(tiles + document)) * N
    base = tl.load(key_starts + document)
    num_keys = tl.load(key_starts + document + 1) - base
    column = at + tl.arange(0, N)
    first = tl.load(cu_q + document)
    start = tl.load(q_start + document)
    queries = tl.load(cu_q + document + 1) - first
    # Rows of queries that see the first of these keys, all of them, and the last one: relative to the document's first query.
    last = tl.minimum(at + N, num_keys) - 1
    begin = tl.minimum(tl.maximum(at * STRIDE + BLOCK - 1 - start, 0), queries) * G
    full = tl.minimum(tl.maximum(last * STRIDE + BLOCK - 1 - start, 0), queries) * G
    end = queries * G
    if WINDOW > 0:
        end = tl.minimum(tl.maximum(last + WINDOW - start, 0), queries) * G
    each = tl.cdiv(tl.cdiv(queries * G, num_parts), M) * M
    begin = tl.maximum(begin, part * each)
    end = tl.minimum(end, (part + 1) * each)
    masked_end = end
    if WINDOW == 0:
        masked_end = tl.minimum(begin + tl.cdiv(tl.maximum(full - begin, 0), M) * M, end)

    k0, k1 = load_tile(keys0, keys1, base + at, head * (D0 + D1), D0, D1)
    dk1 = 0.0
    dv1 = 0.0
    v0, v1 = load_tile(values0, values1, base + at, head * (E0 + E1), E0, E1)
    dk0 = tl.zeros([N, D0], tl.float32)
    if D1 > 0:
        dk1 = tl.zeros([N, D1], tl.float32)
    dv0 = tl.zeros([N, E0], tl.float32)
    if E1 > 0:
        dv1 = tl.zeros([N, E1], tl.float32)
    BRANCH: tl.constexpr = 2 if WINDOW > 0 else 0
    MASK: tl.constexpr = 2 if WINDOW > 0 else 1
    for at_row in tl.range(begin, masked_end, M, num_stages=STAGES):
        q0, q1, do0, do1, t, pair, inside = _rows(
            q, q_stride, q_head_stride, grad_out, q_rows0, q_rows1, grad_rows0, grad_rows1, first, start, head, at_row, end,
            BOXES, HQ, G, M, D0, D1, E0, E1,
        )  # fmt: skip
        dk0, dk1, dv0, dv1, _ = grad_kv_step(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q0, q1, do0, do1, lse, delta, gates, pair, inside,
            column, t + 1 - WINDOW, keys_before(t, BLOCK, STRIDE), scale, BRANCH, MASK, D1, E1, PRECISION,
        )  # fmt: skip
    if WINDOW == 0:
        for at_row in tl.range(masked_end, end, M, num_stages=STAGES):
            q0, q1, do0, do1, t, pair, inside = _rows(
                q, q_stride, q_head_stride, grad_out, q_rows0, q_rows1, grad_rows0, grad_rows1, first, start, head, at_row, end,
                BOXES, HQ, G, M, D0, D1, E0, E1,
            )  # fmt: skip
            dk0, dk1, dv0, dv1, _ = grad_kv_step(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, q0, q1, do0, do1, lse, delta, gates, pair, inside,
                column, t, t, scale, BRANCH, 0, D1, E1, PRECISION,
            )  # fmt: skip
    inside = column < num_keys
    to = (part * part_stride + base + column).to(tl.int64) * HKV + head
    store_rows(grad_k, to * (D0 + D1), inside, dk0 * raw_scale, 0, D0)
    if D1 > 0:
        store_rows(grad_k, to * (D0 + D1), inside, dk1 * raw_scale, D0, D1)
    store_rows(grad_v, to * (E0 + E1), inside, dv0, 0, E0)
    if E1 > 0:
        store_rows(grad_v, to * (E0 + E1), inside, dv1, E0, E1)


@triton.jit(repr=lambda _: "nsa_sum_parts", do_not_specialize=["size", "num_parts", "num_docs"])
def sum_parts(parts, out, starts, num_docs, size, row_size, num_parts, CHUNK: tl.constexpr):
    """out [size] = the sum of `parts` [num_parts, size] in order, in out's dtype; 0 in rows past starts[num_docs], which nothing wrote."""
    index = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    used = tl.load(starts + num_docs).to(tl.int64) * row_size
    total = tl.zeros([CHUNK], tl.float32)
    for part in range(num_parts):
        total += tl.load(parts + part * size.to(tl.int64) + index, mask=index < used, other=0.0)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=index < size)


@triton.jit(repr=lambda _: "nsa_clean", do_not_specialize=["rows", "num_docs"])
def clean_copy(source, stride, head_stride, out, starts, num_docs, rows, HKV: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):
    """out [rows, HKV, D] = source, rows past starts[num_docs] as 0: they are never to be read, yet tiles reach over the end."""
    line = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)  # (row, head)
    row = line // HKV
    column = tl.arange(0, WIDTH)
    inside = (line < rows * HKV)[:, None] & (column < D)[None, :]
    used = (row < tl.load(starts + num_docs))[:, None]
    offset = row.to(tl.int64) * stride + line % HKV * head_stride
    value = tl.load(source + offset[:, None] + column[None, :], mask=inside & used, other=0.0)
    tl.store(out + line.to(tl.int64)[:, None] * D + column[None, :], value, mask=inside)
