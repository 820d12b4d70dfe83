"""φ as an MLP over blocks: what it needs beside its matrix products, forward and backward. Words as in `compress`.

The first product is over l * D numbers a block. Blocks share their tokens, so it is split into PARTS products over d * D numbers a chunk, which
are one product of all chunks with all PARTS pieces of the weight; a block's pre-activation is the sum of the piece p of its chunk p. Both products
are plain matrix products of torch; here is what stands around them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_transformer.kernels.triton.common import by_rows
from nsa_transformer.kernels.triton.compress import RUNTIME, TILE, find, first_of, named, num_units


@triton.jit
def _copy_chunk(
    x, first, x_stride, out, row, used, H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, LINES: tl.constexpr
):  # fmt: skip
    """STRIDE tokens of x [S, H, D] from `first` on, as the H rows of `out` from `row` on."""
    column = tl.arange(0, WIDTH)
    for at in range(0, STRIDE * H, LINES):
        line = at + tl.arange(0, LINES)
        token, head = line // H, line % H
        inside = (line < STRIDE * H)[:, None] & (column < D)[None, :]
        source = (first + token).to(tl.int64) * x_stride + head * D
        value = tl.load(x + source[:, None] + column[None, :], mask=inside & used, other=0.0)
        to = ((row + head) * STRIDE + token) * D
        tl.store(out + to[:, None] + column[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _split_of(
    x, x_stride, position, out, chunk, count, first, used, H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, LINES: tl.constexpr
):  # fmt: skip
    if chunk < count:
        _copy_chunk(x, first, x_stride, out, chunk.to(tl.int64) * H, used, H, D, WIDTH, STRIDE, LINES)
    else:  # the position embedding, as one head
        _copy_chunk(position, (chunk - count) * STRIDE, D, out, count.to(tl.int64) * H + chunk - count, True, 1, D, WIDTH, STRIDE, LINES)


@triton.jit(repr=named("split"), do_not_specialize=RUNTIME)
def _split(
    k, k_stride, v, v_stride, position_k, position_v, k_out, v_out, plan, num_docs, count,
    H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, STRIDE: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Chunk by chunk, [count * H + PARTS, d * D]: a head's d tokens side by side; zeros past the documents' chunks."""
    chunk = tl.program_id(0)
    used = chunk < first_of(plan, num_docs, 2, num_docs)
    document, place = find(plan, num_docs, 2, chunk)
    first = first_of(plan, num_docs, 0, document) + place * STRIDE
    if tl.program_id(2) == 0:
        _split_of(k, k_stride, position_k, k_out, chunk, count, first, used, H, DK, WIDTH_K, STRIDE, LINES)
    else:
        _split_of(v, v_stride, position_v, v_out, chunk, count, first, used, H, DV, WIDTH_V, STRIDE, LINES)


@triton.jit
def _join_of(grad, out, chunk, whole, first, tokens, H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, STRIDE: tl.constexpr, LINES: tl.constexpr):
    column = tl.arange(0, WIDTH)
    for at in range(0, STRIDE * H, LINES):
        line = at + tl.arange(0, LINES)
        token, head = line // H, line % H
        inside = (line < STRIDE * H)[:, None] & (column < D)[None, :]
        source = ((chunk.to(tl.int64) * H + head) * STRIDE + token) * D
        value = tl.load(grad + source[:, None] + column[None, :], mask=inside & whole, other=0.0)
        to = ((first + token).to(tl.int64) * H + head) * D
        tl.store(out + to[:, None] + column[None, :], value, mask=inside & (token < tokens)[:, None])


@triton.jit(repr=named("split_grad"), do_not_specialize=RUNTIME)
def _join(
    grad_k, grad_v, k_out, v_out, plan, num_docs,
    H: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, STRIDE: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """The gradient of each token from its one chunk; 0 where it has none."""
    unit = tl.program_id(0)
    if unit >= first_of(plan, num_docs, 3, num_docs):
        return
    document, place = find(plan, num_docs, 3, unit)
    first = first_of(plan, num_docs, 0, document) + place * STRIDE
    tokens = first_of(plan, num_docs, 0, document + 1) - first
    chunk = first_of(plan, num_docs, 2, document) + place
    if tl.program_id(2) == 0:
        _join_of(grad_k, k_out, chunk, tokens >= STRIDE, first, tokens, H, DK, WIDTH_K, STRIDE, LINES)
    else:
        _join_of(grad_v, v_out, chunk, tokens >= STRIDE, first, tokens, H, DV, WIDTH_V, STRIDE, LINES)


def _line_sizes(heads: int, widths: list[int], stride: int) -> dict[str, int]:
    padded = [triton.next_power_of_2(width) for width in widths]
    lines = min(triton.next_power_of_2(stride * heads), max(1, TILE // max(padded)))
    return {"H": heads, "DK": widths[0], "DV": widths[1], "WIDTH_K": padded[0], "WIDTH_V": padded[1], "STRIDE": stride, "LINES": lines}


def split(k: Tensor, v: Tensor, position_k: Tensor, position_v: Tensor, plan: Tensor, block: int, stride: int) -> tuple[Tensor, Tensor]:
    """[T // d * H + l / d, d * D] of k and of v; the last l / d rows are those of the position embedding."""
    k, v = by_rows(k), by_rows(v)
    count, parts, heads = k.shape[0] // stride, block // stride, k.shape[1]
    out = tuple(torch.empty(count * heads + parts, stride * x.shape[2], dtype=x.dtype, device=x.device) for x in (k, v))
    sizes = _line_sizes(heads, [k.shape[2], v.shape[2]], stride)
    _split[(count + parts, 1, 2)](
        k, k.stride(0), v, v.stride(0), position_k.contiguous(), position_v.contiguous(), *out, plan, plan.shape[1] - 1, count, **sizes
    )
    return out  # type: ignore[return-value]


def split_backward(
    grad_k: Tensor, grad_v: Tensor, plan: Tensor, tokens: int, heads: int, block: int, stride: int, dtype_k: torch.dtype, dtype_v: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of k, v and the position embeddings, these in the dtypes asked for."""
    grads = [grad.contiguous() for grad in (grad_k, grad_v)]
    widths = [grad.shape[1] // stride for grad in grads]
    out = [torch.empty(tokens, heads, width, dtype=grad.dtype, device=grad.device) for grad, width in zip(grads, widths, strict=True)]
    if tokens:
        _join[(num_units(plan, tokens, stride), 1, 2)](*grads, *out, plan, plan.shape[1] - 1, **_line_sizes(heads, widths, stride))
    rows = tokens // stride * heads
    positions = [grad[rows:].reshape(block, -1).to(dtype, copy=True) for grad, dtype in zip(grads, (dtype_k, dtype_v), strict=True)]
    return out[0], out[1], positions[0], positions[1]


# ------------------------------------------------------------------------------------- from the chunks' shares to the blocks


@triton.jit
def _combine_of(
    shares, out, pre, block, chunk, used, count, H: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = (head < H)[:, None] & (column < HIDDEN)[None, :]
    bias = tl.zeros([WIDTH], tl.float32)
    total = tl.zeros([HEADS, WIDTH], tl.float32)
    for part in tl.static_range(PARTS):
        at = column * PARTS + part
        row = (count.to(tl.int64) * H + part) * (HIDDEN * PARTS)
        bias += tl.load(shares + row + at, mask=column < HIDDEN, other=0.0).to(tl.float32)
        rows = ((chunk + part).to(tl.int64) * H + head) * (HIDDEN * PARTS)
        total += tl.load(shares + rows[:, None] + at[None, :], mask=inside & used, other=0.0).to(tl.float32)
    total = tl.where(used, total + bias[None, :], 0.0)
    to = (block.to(tl.int64) * H + head)[:, None] * HIDDEN + column[None, :]
    tl.store(pre + to, total.to(pre.dtype.element_ty), mask=inside)
    tl.store(out + to, (total * tl.sigmoid(total)).to(out.dtype.element_ty), mask=inside)


@triton.jit(repr=named("combine"), do_not_specialize=RUNTIME)
def _combine(
    shares_k, shares_v, k_out, v_out, pre_k, pre_v, plan, num_docs, count,
    H: tl.constexpr, HIDDEN_K: tl.constexpr, HIDDEN_V: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One block: share p of its chunk p, summed, with the bias, through silu; 0 past the documents' blocks. shares [count * H + PARTS, HIDDEN * PARTS],
    the parts running fastest; its last rows are the position embedding's, whose row p counts with share p."""
    block = tl.program_id(0)
    used = block < first_of(plan, num_docs, 1, num_docs)
    document, place = find(plan, num_docs, 1, block)
    chunk = first_of(plan, num_docs, 2, document) + place
    if tl.program_id(2) == 0:
        _combine_of(shares_k, k_out, pre_k, block, chunk, used, count, H, HIDDEN_K, WIDTH_K, PARTS, HEADS)
    else:
        _combine_of(shares_v, v_out, pre_v, block, chunk, used, count, H, HIDDEN_V, WIDTH_V, PARTS, HEADS)


@triton.jit
def _combine_grad_of(
    grad, pre, out, sums, chunk, used, place, blocks, first_block,
    H: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    tile = tl.program_id(1)
    head = tile * HEADS + tl.arange(0, HEADS)
    inside = (head < H)[:, None] & (column < HIDDEN)[None, :]
    to = (chunk.to(tl.int64) * H + head)[:, None] * (HIDDEN * PARTS) + column[None, :] * PARTS
    for part in tl.static_range(PARTS):
        block = place - part
        exists = inside & used & (block >= 0) & (block < blocks)
        at = ((first_block + block).to(tl.int64) * H + head)[:, None] * HIDDEN + column[None, :]
        x = tl.load(pre + at, mask=exists, other=0.0).to(tl.float32)
        gate = tl.sigmoid(x)
        value = tl.load(grad + at, mask=exists, other=0.0).to(tl.float32) * gate * (1 + x * (1 - gate))
        tl.store(out + to + part, value.to(out.dtype.element_ty), mask=inside)
        if part == 0:  # in which every block occurs once
            line = chunk.to(tl.int64) * tl.num_programs(1) + tile
            tl.store(sums + line * HIDDEN + column, tl.sum(value, 0), mask=column < HIDDEN)


@triton.jit(repr=named("combine_grad"), do_not_specialize=RUNTIME)
def _combine_grad(
    grad_k, grad_v, pre_k, pre_v, k_out, v_out, sums_k, sums_v, plan, num_docs,
    H: tl.constexpr, HIDDEN_K: tl.constexpr, HIDDEN_V: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Gradients of the shares of one chunk, 0 for blocks that do not exist; and, in sums [chunks * tiles, HIDDEN], what the bias gets from the block
    that starts here."""
    chunk = tl.program_id(0)
    used = chunk < first_of(plan, num_docs, 2, num_docs)
    document, place = find(plan, num_docs, 2, chunk)
    first_block = first_of(plan, num_docs, 1, document)
    blocks = first_of(plan, num_docs, 1, document + 1) - first_block
    if tl.program_id(2) == 0:
        _combine_grad_of(grad_k, pre_k, k_out, sums_k, chunk, used, place, blocks, first_block, H, HIDDEN_K, WIDTH_K, PARTS, HEADS)
    else:
        _combine_grad_of(grad_v, pre_v, v_out, sums_v, chunk, used, place, blocks, first_block, H, HIDDEN_V, WIDTH_V, PARTS, HEADS)


@triton.jit
def _bias_of(sums, out, lines, count, H: tl.constexpr, HIDDEN: tl.constexpr, PARTS: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([LINES, COLUMNS], tl.float32)
    for at in range(0, lines, LINES):
        line = at + tl.arange(0, LINES)
        inside = (line < lines)[:, None] & (column < HIDDEN)[None, :]
        total += tl.load(sums + line.to(tl.int64)[:, None] * HIDDEN + column[None, :], mask=inside, other=0.0)
    bias = tl.sum(total, 0)
    for row in tl.static_range(PARTS):
        to = out + (count.to(tl.int64) * H + row) * (HIDDEN * PARTS) + column * PARTS
        for part in tl.static_range(PARTS):
            tl.store(to + part, (bias if part == row else tl.zeros([COLUMNS], tl.float32)).to(out.dtype.element_ty), mask=column < HIDDEN)


@triton.jit(repr=named("bias_grad"), do_not_specialize=["lines", "count"])
def _bias_grad(
    sums_k, sums_v, k_out, v_out, lines, count,
    H: tl.constexpr, HIDDEN_K: tl.constexpr, HIDDEN_V: tl.constexpr, PARTS: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of the position embedding's shares: row p has the bias's in share p."""
    if tl.program_id(2) == 0:
        _bias_of(sums_k, k_out, lines, count, H, HIDDEN_K, PARTS, LINES, COLUMNS)
    else:
        _bias_of(sums_v, v_out, lines, count, H, HIDDEN_V, PARTS, LINES, COLUMNS)


def _head_sizes(heads: int, hidden: list[int], parts: int) -> dict[str, int]:
    padded = [triton.next_power_of_2(width) for width in hidden]
    tile = min(triton.next_power_of_2(heads), max(1, TILE // 4 // max(padded)))
    return {"H": heads, "HIDDEN_K": hidden[0], "HIDDEN_V": hidden[1], "WIDTH_K": padded[0], "WIDTH_V": padded[1], "PARTS": parts, "HEADS": tile}


def combine(shares_k: Tensor, shares_v: Tensor, plan: Tensor, rows: int, heads: int, parts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """silu of the pre-activations of k and of v, [rows, heads, hidden], and the pre-activations."""
    shares = [x.contiguous() for x in (shares_k, shares_v)]
    hidden = [x.shape[1] // parts for x in shares]
    out = [torch.empty(rows, heads, width, dtype=x.dtype, device=x.device) for _ in range(2) for x, width in zip(shares, hidden, strict=True)]
    sizes = _head_sizes(heads, hidden, parts)
    if rows:
        _combine[(rows, triton.cdiv(heads, sizes["HEADS"]), 2)](*shares, *out, plan, plan.shape[1] - 1, rows, **sizes)
    return out[0], out[1], out[2], out[3]


def combine_backward(grad_k: Tensor, grad_v: Tensor, pre_k: Tensor, pre_v: Tensor, plan: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Gradients of the shares; what lies past the documents' blocks is not read."""
    grads = [grad.contiguous() for grad in (grad_k, grad_v)]
    count, heads, _ = pre_k.shape
    hidden = [x.shape[2] for x in (pre_k, pre_v)]
    sizes = _head_sizes(heads, hidden, parts)
    tiles, device = triton.cdiv(heads, sizes["HEADS"]), pre_k.device
    out = [torch.empty(count * heads + parts, width * parts, dtype=pre_k.dtype, device=device) for width in hidden]
    sums = [torch.empty(count * tiles, width, dtype=torch.float32, device=device) for width in hidden]
    if count:
        _combine_grad[(count, tiles, 2)](*grads, pre_k, pre_v, *out, *sums, plan, plan.shape[1] - 1, **sizes)
    columns, lines = 16, min(512, max(16, triton.next_power_of_2(count * tiles)))
    _bias_grad[(triton.cdiv(max(hidden), columns), 1, 2)](*sums, *out, count * tiles, count, heads, *hidden, parts, lines, columns)
    return out[0], out[1]
