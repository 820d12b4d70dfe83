"""What every kernel here shares: which document a tile lies in, products of split widths, one step of the online softmax.

Shape letters: M query rows of a tile, N keys of a tile. A query row is a pair (token, head of the group), the head running fastest, so a tile
holds neighbouring tokens with all heads that share their keys, and any group size fills it. A head width of 192 is not a power of two:
tiles are split as 128 + 64, the second part absent (size 0) for other widths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634


def split_width(width: int) -> tuple[int, int]:
    """192 as (128, 64); powers of two as (width, 0)."""
    first = 1 << (width.bit_length() - 1)
    return first, width - first


def aligned(x: Tensor) -> bool:
    """Whether x [S, H, D] or a matrix begins, and each of its rows but the last axis, at multiples of 16 bytes, as descriptors need it."""
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])


def packed(x: Tensor) -> Tensor:
    """x contiguous and aligned; copied where it is not so. (`contiguous` would hand back a contiguous view at an odd offset.)"""
    return x if x.is_contiguous() and aligned(x) else x.clone(memory_format=torch.contiguous_format)


def by_rows(x: Tensor) -> Tensor:
    """x [S, H, D] with its heads side by side in memory, as a tile descriptor needs it; copied where it is not so."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] and x.stride(0) >= x.stride(1) * x.shape[1] and aligned(x) else packed(x)


def descriptors(x: Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Descriptors of tiles [rows, part] of x [S, H, D], seen as [S, H * D], for both parts of D."""
    shape, strides = [x.shape[0], x.shape[1] * x.shape[2]], [x.stride(0), 1]
    first, second = split_width(x.shape[2])
    return TensorDescriptor(x, shape, strides, [rows, first]), TensorDescriptor(x, shape, strides, [rows, second or first])


def token_descriptors(x: Tensor, rows: int, group: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Descriptors of boxes [rows / group, group, part] of x [T, H, D]: so many query rows of one key/value head."""
    first, second = split_width(x.shape[2])
    shape, strides = list(x.shape), list(x.stride())
    box = [rows // group, group]
    return TensorDescriptor(x, shape, strides, [*box, first]), TensorDescriptor(x, shape, strides, [*box, second or first])


def launches_dependently(device: torch.device) -> bool:
    """Whether kernels may be launched while the one before them still runs, and wait for what it writes (PDL: programmatic dependent launch): the attribute
    and the instruction that waits are for compute capability 9.0 and later. The interpreter has neither."""
    return not triton.knobs.runtime.interpret and torch.cuda.get_device_capability(device)[0] >= 9


def precision(dtype: torch.dtype) -> str:
    """float32 products stay float32; 16-bit ones are exact either way."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def find_document(starts, num_docs, index):
    """The document d with starts[d] <= index < starts[d + 1]; `starts` int32 [num_docs + 1] rises from 0."""
    low = 0
    high = num_docs
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(starts + middle) <= index
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def keys_before(t, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """How many keys end at or before position t: compressed keys of BLOCK tokens every STRIDE, or tokens (1, 1)."""
    return tl.maximum(t + 1 - BLOCK + STRIDE, 0) // STRIDE


@triton.jit
def load_rows(x, offsets, inside, COLUMN: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of x at int64 `offsets` [M], columns COLUMN … COLUMN + WIDTH; 0 where not `inside`."""
    column = COLUMN + tl.arange(0, WIDTH)
    return tl.load(x + offsets[:, None] + column[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def store_rows(x, offsets, inside, value, COLUMN: tl.constexpr, WIDTH: tl.constexpr):
    column = COLUMN + tl.arange(0, WIDTH)
    tl.store(x + offsets[:, None] + column[None, :], value.to(x.dtype.element_ty), mask=inside[:, None])


@triton.jit
def load_pair(x, offsets, inside, W0: tl.constexpr, W1: tl.constexpr):
    """Both parts of a tile of rows; the second is the first again where there is none."""
    first = load_rows(x, offsets, inside, 0, W0)
    second = first
    if W1 > 0:
        second = load_rows(x, offsets, inside, W0, W1)
    return first, second


@triton.jit
def load_tile(part0, part1, row, column, W0: tl.constexpr, W1: tl.constexpr):
    """Both parts of a tile through descriptors."""
    first = part0.load([row, column])
    second = first
    if W1 > 0:
        second = part1.load([row, column + W0])
    return first, second


@triton.jit
def load_token_rows(part0, part1, token, head, G: tl.constexpr, M: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    """M rows from `token` on, G heads of each token, through descriptors of [M / G, G, part] boxes: both parts."""
    first = tl.reshape(part0.load([token, head * G, 0]), [M, W0])
    second = first
    if W1 > 0:
        second = tl.reshape(part1.load([token, head * G, W0]), [M, W1])
    return first, second


@triton.jit
def dot_pair(a0, a1, b0, b1, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over both parts, float32."""
    product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if SPLIT:
        product = tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)
    return product


@triton.jit
def add_dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b. Long sums of float32 products are made of short ones, which keeps their rounding small; tensor cores do so themselves. It takes registers:
    the forward over tiles of keys, where it would gain a tenth, and the experts do without."""
    if PRECISION == "ieee":
        # Triton would make `total + tl.dot(a, b)` the one long sum `tl.dot(a, b, total)`. It lets an fma be, of which LLVM leaves an addition.
        return tl.fma(tl.dot(a, b, input_precision=PRECISION), 1.0, total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def attend_step(
    acc0,
    acc1,
    top,
    total,
    q0,
    q1,
    keys0,
    keys1,
    values0,
    values1,
    row,
    head,
    column,
    low,
    high,
    scale,
    MASK: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys of the online softmax in base 2 (scale includes log2 e). `top` is the running maximum of the raw scores.

    MASK 0: every row sees every key; 1: those with column < high; 2: low <= column < high.
    """
    k0, k1 = load_tile(keys0, keys1, row, head * (D0 + D1), D0, D1)
    s = dot_pair(q0, q1, k0, k1, D1 > 0, PRECISION)
    if MASK == 1:
        s = tl.where(column[None, :] < high[:, None], s, float("-inf"))
    if MASK == 2:
        s = tl.where((column[None, :] < high[:, None]) & (column[None, :] >= low[:, None]), s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = new_top * scale
    if MASK > 0:  # a row may have seen nothing yet
        shift = tl.where(new_top == float("-inf"), 0.0, shift)
    p = tl.exp2(s * scale - shift[:, None])
    fade = tl.exp2(top * scale - shift)
    if PRECISION == "ieee":
        # Where the maximum stays, top * scale - shift, fused, is not 0 but what `shift` was rounded by: each tile would change the weight of all before it,
        # always the same way, and the probabilities of the backward would not add up to 1.
        fade = tl.where(top < new_top, fade, 1.0)
    total = total * fade + tl.sum(p, 1)
    v0, v1 = load_tile(values0, values1, row, head * (E0 + E1), E0, E1)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * fade[:, None], input_precision=PRECISION)
    if E1 > 0:
        acc1 = tl.dot(p, v1, acc1 * fade[:, None], input_precision=PRECISION)
    return acc0, acc1, new_top, total


@triton.jit
def finish_softmax(top, total, scale):
    """1 / sum and log2 sum exp of each row; a row that saw no key gets 0 and +inf, which makes its every probability 0 later."""
    seen = total > 0
    inverse = tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0)
    lse = tl.where(seen, top * scale + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
    return inverse, lse


@triton.jit
def store_lse(lse, pair, inside, top, inverse, row_lse, scale, PRECISION: tl.constexpr):
    """lse float32 [T, Hq], for float32 inputs [T, Hq, 2]: there the maximum and 1 / sum apart. An lse of ten is rounded by 5e-7, and so would be every
    exponent it is taken from: several times the error of a softmax that divides."""
    if PRECISION == "ieee":
        tl.store(lse + 2 * pair, tl.where(inverse > 0, top * scale, float("inf")), mask=inside)
        tl.store(lse + 2 * pair + 1, inverse, mask=inside)
    else:
        tl.store(lse + pair, row_lse, mask=inside)


@triton.jit
def load_lse(lse, pair, inside, PRECISION: tl.constexpr):
    """Of rows: p = factor * 2 ** (s * scale - lse). Rows that do not exist get probabilities of 0."""
    if PRECISION == "ieee":
        return tl.load(lse + 2 * pair, mask=inside, other=float("inf")), tl.load(lse + 2 * pair + 1, mask=inside, other=0.0)
    row_lse = tl.load(lse + pair, mask=inside, other=float("inf"))
    return row_lse, row_lse  # the factor is 1, and not used


@triton.jit
def grad_q_step(
    dq0,
    dq1,
    q0,
    q1,
    do0,
    do1,
    lse,
    factor,
    delta,
    keys0,
    keys1,
    values0,
    values1,
    row,
    head,
    column,
    low,
    high,
    scale,
    MASK: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    E0: tl.constexpr,
    E1: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq += p (dO v^T - delta) k for one tile of keys; MASK as in `attend_step`."""
    k0, k1 = load_tile(keys0, keys1, row, head * (D0 + D1), D0, D1)
    v0, v1 = load_tile(values0, values1, row, head * (E0 + E1), E0, E1)
    s = dot_pair(q0, q1, k0, k1, D1 > 0, PRECISION)
    dp = dot_pair(do0, do1, v0, v1, E1 > 0, PRECISION)
    p = tl.exp2(s * scale - lse[:, None])
    if PRECISION == "ieee":
        p = p * factor[:, None]
    if MASK == 1:
        p = tl.where(column[None, :] < high[:, None], p, 0.0)
    if MASK == 2:
        p = tl.where((column[None, :] < high[:, None]) & (column[None, :] >= low[:, None]), p, 0.0)
    ds = (p * (dp - delta[:, None])).to(k0.dtype)
    dq0 = add_dot(ds, k0, dq0, PRECISION)
    if D1 > 0:
        dq1 = add_dot(ds, k1, dq1, PRECISION)
    return dq0, dq1


@triton.jit
def grad_kv_step(
    dk0,
    dk1,
    dv0,
    dv1,
    k0,
    k1,
    v0,
    v1,
    q0,
    q1,
    do0,
    do1,
    lse,
    delta,
    gates,
    pair,
    inside,
    column,
    low,
    high,
    scale,
    BRANCH: tl.constexpr,
    MASK: tl.constexpr,
    D1: tl.constexpr,
    E1: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk, dv of a tile of keys += what M query rows give, whose indices token * Hq + head are `pair`; and the gradients of their scores, less the
    scale, in q's dtype. Scores are [N keys, M rows]."""
    row_lse, factor = load_lse(lse, pair, inside, PRECISION)
    row_delta = tl.load(delta + pair, mask=inside, other=0.0)
    gate = tl.load(gates + pair * 3 + BRANCH, mask=inside, other=0.0).to(tl.float32)
    # Both products before the arithmetic on either, so that the second runs beside it.
    s = dot_pair(k0, k1, q0, q1, D1 > 0, PRECISION)
    dp = dot_pair(v0, v1, do0, do1, E1 > 0, PRECISION)
    p = tl.exp2(s * scale - row_lse[None, :])
    if PRECISION == "ieee":
        p = p * factor[None, :]
    if MASK == 1:
        p = tl.where(column[:, None] < high[None, :], p, 0.0)
    if MASK == 2:
        p = tl.where((column[:, None] < high[None, :]) & (column[:, None] >= low[None, :]), p, 0.0)
    p = p * gate[None, :]
    rounded = p.to(do0.dtype)
    dv0 = add_dot(rounded, do0, dv0, PRECISION)
    if E1 > 0:
        dv1 = add_dot(rounded, do1, dv1, PRECISION)
    ds = (p * (dp - row_delta[None, :])).to(q0.dtype)
    dk0 = add_dot(ds, q0, dk0, PRECISION)
    if D1 > 0:
        dk1 = add_dot(ds, q1, dk1, PRECISION)
    return dk0, dk1, dv0, dv1, ds
