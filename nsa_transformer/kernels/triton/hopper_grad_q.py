"""What dq of the banded and the selected branches shares on compute capability 9.0, in Gluon; tiles, producers and rings are the forward's."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

WARPGROUPS = gl.constexpr(2)  # three have too few registers for both products and the sum
ROWS = gl.constexpr(128)


@gluon.jit
def start_products(q_tile, grad_tile, k_tiles, v_tiles, stage, LAYOUT: gl.constexpr, M: gl.constexpr, N: gl.constexpr):
    """Under way: scores q k^T and dO v^T of one tile of keys, [M, N]."""
    s = gl.zeros([M, N], gl.float32, LAYOUT)
    s = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
    dp = gl.zeros([M, N], gl.float32, LAYOUT)
    return s, warpgroup_mma(grad_tile, v_tiles.index(stage).permute((1, 0)), dp, use_acc=False, is_async=True)


@gluon.jit
def row_stats(lse, delta, pair, inside):
    """lse and delta of rows; rows that do not exist get probabilities of 0."""
    return gl.load(lse + pair, mask=inside, other=float("inf")), gl.load(delta + pair, mask=inside, other=0.0)


@gluon.jit
def score_gradients(s, dp, row_lse, row_delta, scale, LAYOUT: gl.constexpr, DTYPE: gl.constexpr):
    """p (dO v^T - delta), p = 2 ** (s * scale - lse), as the left operand of a product into LAYOUT; the gate and the scale come at the end."""
    p = gl.exp2(s * scale - gl.expand_dims(row_lse, 1))
    ds = p * (dp - gl.expand_dims(row_delta, 1))
    return gl.convert_layout(ds.to(DTYPE), gl.DotOperandLayout(0, LAYOUT, 2))


@gluon.jit
def finish_product(ds, k_tiles, stage, dq):
    return warpgroup_mma_wait(0, deps=[warpgroup_mma(ds, k_tiles.index(stage), dq, is_async=True)])


@gluon.jit
def store_gradient(
    dq,
    grad_q,
    gates,
    first,
    row,
    rows,
    head,
    raw_scale,
    BRANCH: gl.constexpr,
    ADD: gl.constexpr,
    HQ: gl.constexpr,
    G: gl.constexpr,
    D: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """dq [M, D] times its gate and scale, to rows of grad_q, with ADD beside what is there."""
    inside = row < rows
    pair = (first + row // G).to(gl.int64) * HQ + head * G + row % G
    factor = raw_scale * gl.load(gates + pair * 3 + BRANCH, mask=inside, other=0.0)
    to = gl.expand_dims(pair * D, 1) + gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, LAYOUT)), 0)
    dq = dq * gl.expand_dims(factor, 1)
    if ADD:
        dq += gl.load(grad_q + to, mask=gl.expand_dims(inside, 1), other=0.0).to(gl.float32)
    gl.store(grad_q + to, dq.to(grad_q.dtype.element_ty), mask=gl.expand_dims(inside, 1))
