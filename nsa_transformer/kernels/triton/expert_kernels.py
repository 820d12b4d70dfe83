"""The kernels of `experts.py`.

Shape letters: M rows of a tile, N columns, DEPTH of the sum at a step; R routed rows, T tokens, K experts of each; H hidden width, I expert width, E experts,
and SPAN, the power of two from E on. `order` and `offsets` are those of `Routing`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

# Grids of products over rows have one axis, column tiles fastest: the second axis of a grid ends at 65,535.


@triton.jit
def _row_tile(offsets, tile, M: tl.constexpr, E: tl.constexpr, SPAN: tl.constexpr):
    """The expert of a tile of M rows, its first row, and the end of the expert's rows; of a tile past the last an expert of at least E."""
    each = tl.arange(0, SPAN)
    begin = tl.load(offsets + each, mask=each < E, other=0)
    end = tl.load(offsets + each + 1, mask=each < E, other=0)
    tiles = (end - begin + M - 1) // M
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    here = each == expert
    within = tile - tl.sum(tl.where(each < expert, tiles, 0), 0)
    return expert, tl.sum(tl.where(here, begin, 0), 0) + within * M, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def _place(order, row, inside):
    """Which of the [T, K] places rows stand for."""
    return tl.load(order + row, mask=inside, other=0).to(tl.int32)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp2(x * -1.4426950408889634))


@triton.jit(repr=lambda _: "experts_up")
def experts_up(
    x, w13, order, offsets, hidden, activation,
    K: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, SPAN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DEPTH: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """activation [R, I] = silu(gate) * up, gate and up [M, N] from x [T, H] and w13 [E * 2I, H]; with SAVE, hidden [R, 2I] holds both."""
    columns: tl.constexpr = (WIDTH + N - 1) // N
    tile = tl.program_id(0) // columns
    expert, first, end = _row_tile(offsets, tile, M, E, SPAN)
    if expert >= E:
        return
    row = first + tl.arange(0, M)
    inside = row < end
    token = _place(order, row, inside) // K
    column = tl.program_id(0) % columns * N
    at = expert * (2 * WIDTH) + column
    depth = tl.arange(0, DEPTH)
    rows = x + token.to(tl.int64)[:, None] * H
    gate = tl.zeros([M, N], tl.float32)
    up = tl.zeros([M, N], tl.float32)
    for k in tl.range(0, H, DEPTH, num_stages=STAGES):
        mask = inside[:, None] & (k + depth < H)[None, :]
        a = tl.load(rows + (k + depth)[None, :], mask=mask, other=0.0)
        gate = tl.dot(a, tl.trans(w13.load([at, k])), gate, input_precision=PRECISION)
        up = tl.dot(a, tl.trans(w13.load([at + WIDTH, k])), up, input_precision=PRECISION)
    to = column + tl.arange(0, N)
    mask = inside[:, None] & (to < WIDTH)[None, :]
    dtype = activation.dtype.element_ty
    gate = gate.to(dtype)
    up = up.to(dtype)
    if SAVE:
        saved = hidden + row.to(tl.int64)[:, None] * (2 * WIDTH) + to[None, :]
        tl.store(saved, gate, mask=mask)
        tl.store(saved + WIDTH, up, mask=mask)
    # From the rounded values, as the backward has them.
    value = silu(gate.to(tl.float32)) * up.to(tl.float32)
    tl.store(activation + row.to(tl.int64)[:, None] * WIDTH + to[None, :], value.to(dtype), mask=mask)


@triton.jit(repr=lambda _: "experts_product")
def experts_product(
    left, right, order, offsets, out, A: tl.constexpr, B: tl.constexpr, E: tl.constexpr, SPAN: tl.constexpr,
    TRANSPOSED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[order[r]] [B] = left[r] [A] times the matrix of the row's expert, [A, B], or [B, A] where TRANSPOSED; both through descriptors."""
    columns: tl.constexpr = (B + N - 1) // N
    tile = tl.program_id(0) // columns
    expert, first, end = _row_tile(offsets, tile, M, E, SPAN)
    if expert >= E:
        return
    row = first + tl.arange(0, M)
    inside = row < end
    column = tl.program_id(0) % columns * N
    total = tl.zeros([M, N], tl.float32)
    for k in tl.range(0, A, DEPTH, num_stages=STAGES):
        a = left.load([first, k])
        b = tl.trans(right.load([expert * B + column, k])) if TRANSPOSED else right.load([expert * A + k, column])
        if A % DEPTH != 0 and not TRANSPOSED:  # the next expert's matrix follows, and may hold what makes NaN of 0
            b = tl.where((k + tl.arange(0, DEPTH) < A)[:, None], b, 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    place = _place(order, row, inside)
    to = column + tl.arange(0, N)
    tl.store(out + place.to(tl.int64)[:, None] * B + to[None, :], total.to(out.dtype.element_ty), mask=inside[:, None] & (to < B)[None, :])


@triton.jit(repr=lambda _: "experts_sum", do_not_specialize=["tokens"])
def experts_sum(
    rows, weights, out, partial, sums, tokens,
    K: tl.constexpr, H: tl.constexpr, WEIGHTED: tl.constexpr, PARTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, H]: rows [T, K, H] summed over K in float32, WEIGHTED by weights [T, K]. With PARTS also sums [T, K]: partial [PARTS, T, K] summed, in order.
    PDL: launched while the kernel that writes rows still runs."""
    token = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    column = tl.program_id(1) * N + tl.arange(0, N)
    mask = (token < tokens)[:, None] & (column < H)[None, :]
    total = tl.zeros([M, N], tl.float32)
    if PDL:
        gdc_wait()
    for k in tl.static_range(K):
        value = tl.load(rows + (token * K + k)[:, None] * H + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + token * K + k, mask=token < tokens, other=0.0).to(tl.float32)[:, None]
        total += value
    tl.store(out + token[:, None] * H + column[None, :], total.to(out.dtype.element_ty), mask=mask)
    if PARTS > 0 and tl.program_id(1) == 0:
        for k in tl.static_range(K):
            one = tl.zeros([M], tl.float32)
            for part in tl.static_range(PARTS):
                one += tl.load(partial + (part * tokens.to(tl.int64) + token) * K + k, mask=token < tokens, other=0.0)
            tl.store(sums + token * K + k, one.to(sums.dtype.element_ty), mask=token < tokens)


@triton.jit
def _halves(x):
    """The left and the right half of x's columns."""
    return tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _swiglu_backward(back, row, inside, column, hidden, weight, grad_hidden, weighted, WIDTH: tl.constexpr, W: tl.constexpr):
    """Of W columns: stores the pre-activations' gradients and the weighted activation; returns each row's <back, activation>."""
    to = column + tl.arange(0, W)
    mask = inside[:, None] & (to < WIDTH)[None, :]
    saved = row.to(tl.int64)[:, None] * (2 * WIDTH) + to[None, :]
    gate = tl.load(hidden + saved, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(hidden + saved + WIDTH, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp2(gate * -1.4426950408889634))
    dtype = grad_hidden.dtype.element_ty
    value = (gate * sigmoid * up).to(dtype)  # what the second product multiplied
    tl.store(weighted + row.to(tl.int64)[:, None] * WIDTH + to[None, :], (value.to(tl.float32) * weight[:, None]).to(dtype), mask=mask)
    total = tl.sum(tl.where(mask, back * value.to(tl.float32), 0.0), axis=1)
    back *= weight[:, None]
    tl.store(grad_hidden + saved + WIDTH, (back * gate * sigmoid).to(dtype), mask=mask)
    tl.store(grad_hidden + saved, (back * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(dtype), mask=mask)
    return total


@triton.jit(repr=lambda _: "experts_down_backward", do_not_specialize=["num_rows"])
def experts_down_backward(
    grad, w2, hidden, weights, order, offsets, grad_hidden, weighted, partial, num_rows,
    K: tl.constexpr, H: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, SPAN: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From grad [T, H] and w2 [E * H, I]: grad_hidden [R, 2I]; weighted [R, I], the activation times its routing weight; and partial [I / N, T * K], what these
    columns give to the weight's gradient, <w2^T dy, a>, so that the second product's output need not be kept."""
    columns: tl.constexpr = (WIDTH + N - 1) // N
    tile = tl.program_id(0) // columns
    expert, first, end = _row_tile(offsets, tile, M, E, SPAN)
    if expert >= E:
        return
    row = first + tl.arange(0, M)
    inside = row < end
    place = _place(order, row, inside)
    column = tl.program_id(0) % columns * N
    depth = tl.arange(0, DEPTH)
    rows = grad + (place // K).to(tl.int64)[:, None] * H
    back = tl.zeros([M, N], tl.float32)
    for k in tl.range(0, H, DEPTH, num_stages=STAGES):
        a = tl.load(rows + (k + depth)[None, :], mask=inside[:, None] & (k + depth < H)[None, :], other=0.0)
        b = w2.load([expert * H + k, column])
        if H % DEPTH != 0:
            b = tl.where((k + depth < H)[:, None], b, 0.0)
        back = tl.dot(a, b, back, input_precision=PRECISION)
    weight = tl.load(weights + place, mask=inside, other=0.0).to(tl.float32)
    # By quarters: each of the epilogue's six tiles would be as many registers as the sum.
    left, right = _halves(back)
    first_quarter, second_quarter = _halves(left)
    third_quarter, fourth_quarter = _halves(right)
    W: tl.constexpr = N // 4
    total = _swiglu_backward(first_quarter, row, inside, column, hidden, weight, grad_hidden, weighted, WIDTH, W)
    total += _swiglu_backward(second_quarter, row, inside, column + W, hidden, weight, grad_hidden, weighted, WIDTH, W)
    total += _swiglu_backward(third_quarter, row, inside, column + 2 * W, hidden, weight, grad_hidden, weighted, WIDTH, W)
    total += _swiglu_backward(fourth_quarter, row, inside, column + 3 * W, hidden, weight, grad_hidden, weighted, WIDTH, W)
    tl.store(partial + (tl.program_id(0) % columns).to(tl.int64) * num_rows + place, total, mask=inside)


@triton.jit(repr=lambda _: "experts_outer")
def experts_outer(
    sorted_rows, gathered, order, offsets, out, K: tl.constexpr, A: tl.constexpr, B: tl.constexpr, GATHERED_FIRST: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [E, A, B]: of each expert the sum over its rows of left^T right, 0 for an expert without rows. One side is in the rows' order, the other,
    GATHERED_FIRST: the left one, is a token's row of `gathered`. Both by pointers: a descriptor would bring the next expert's rows, which may not be finite."""
    expert = tl.program_id(1)
    across = tl.cdiv(B, N)
    at_a = tl.program_id(0) // across * M + tl.arange(0, M)
    at_b = tl.program_id(0) % across * N + tl.arange(0, N)
    end = tl.load(offsets + expert + 1)
    depth = tl.arange(0, DEPTH)
    total = tl.zeros([M, N], tl.float32)
    for r in tl.range(tl.load(offsets + expert), end, DEPTH, num_stages=STAGES):
        row = r + depth
        inside = row < end
        token = _place(order, row, inside) // K
        if GATHERED_FIRST:
            left = tl.load(gathered + token.to(tl.int64)[:, None] * A + at_a[None, :], mask=inside[:, None] & (at_a < A)[None, :], other=0.0)
            right = tl.load(sorted_rows + row.to(tl.int64)[:, None] * B + at_b[None, :], mask=inside[:, None] & (at_b < B)[None, :], other=0.0)
        else:
            left = tl.load(sorted_rows + row.to(tl.int64)[:, None] * A + at_a[None, :], mask=inside[:, None] & (at_a < A)[None, :], other=0.0)
            right = tl.load(gathered + token.to(tl.int64)[:, None] * B + at_b[None, :], mask=inside[:, None] & (at_b < B)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    to = (expert.to(tl.int64) * A + at_a)[:, None] * B + at_b[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=(at_a < A)[:, None] & (at_b < B)[None, :])
