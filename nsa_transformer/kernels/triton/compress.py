"""φ, the compression of keys and values, as means of blocks: forward and backward; and the plan that φ as an MLP (`compress_mlp`) shares.

Words: a block is l tokens, one every d; a chunk is d tokens, so a block is PARTS = l / d chunks in a row. Every document starts a block and a
chunk. Chunk c of a document belongs to its blocks c - PARTS + 1 … c, as far as they exist, and tokens past the last whole chunk to none. Each
tensor is written by its rows' owners, which gather what they need: no atomics, and every sum has one order.

All kernels serve k (program axis 2 is 0) and v (1) in one launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_transformer.kernels.triton.common import by_rows, find_document, keys_before

TILE = 8192  # elements that one program holds at a time
RUNTIME = ["num_docs", "count"]


def named(step):
    return lambda _: f"nsa_compress_{step}"


@triton.jit(repr=named("plan"), do_not_specialize=["num_docs"])
def _plan_kernel(cu, plan, num_docs, BLOCK: tl.constexpr, STRIDE: tl.constexpr, CHUNK: tl.constexpr):
    blocks = 0
    chunks = 0
    units = 0
    size = num_docs + 1
    for row in tl.static_range(1, 4):
        tl.store(plan + row * size, 0)
    tl.store(plan, tl.load(cu))
    for start in range(0, num_docs, CHUNK):
        doc = start + tl.arange(0, CHUNK)
        inside = doc < num_docs
        end = tl.load(cu + doc + 1, mask=inside, other=0)
        tokens = end - tl.load(cu + doc, mask=inside, other=0)
        to = plan + doc + 1
        tl.store(to, end, mask=inside)
        count = keys_before(tokens - 1, BLOCK, STRIDE)
        tl.store(to + size, blocks + tl.cumsum(count), mask=inside)
        blocks += tl.sum(count)
        count = tokens // STRIDE
        tl.store(to + 2 * size, chunks + tl.cumsum(count), mask=inside)
        chunks += tl.sum(count)
        count = (tokens + STRIDE - 1) // STRIDE
        tl.store(to + 3 * size, units + tl.cumsum(count), mask=inside)
        units += tl.sum(count)


def make_plan(cu_seqlens: Tensor, block: int, stride: int) -> Tensor:
    """int32 [4, num_docs + 1]: of every document the first token, block, chunk, and unit, which is a chunk or the rest of one."""
    num_docs = cu_seqlens.shape[0] - 1
    plan = torch.empty(4, num_docs + 1, dtype=torch.int32, device=cu_seqlens.device)
    _plan_kernel[(1,)](cu_seqlens, plan, num_docs, block, stride, min(1024, triton.next_power_of_2(max(num_docs, 1))))
    return plan


@triton.jit
def find(plan, num_docs, row: tl.constexpr, index):
    """Document of block (row 1), chunk (2) or unit (3) `index`, which exists, and its place in it."""
    starts = plan + row * (num_docs + 1)
    document = find_document(starts, num_docs, index)
    return document, index - tl.load(starts + document)


@triton.jit
def first_of(plan, num_docs, row: tl.constexpr, document):
    return tl.load(plan + row * (num_docs + 1) + document)


@triton.jit
def _mean_of(x, x_stride, out, block, first, used, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = (first + tl.arange(0, BLOCK)).to(tl.int64) * x_stride
    value = tl.load(x + at[:, None] + column[None, :], mask=(column < WIDTH)[None, :] & used, other=0.0).to(tl.float32)
    total = tl.sum(value, 0) * (1.0 / BLOCK)
    tl.store(out + block.to(tl.int64) * WIDTH + column, total.to(out.dtype.element_ty), mask=column < WIDTH)


@triton.jit(repr=named("mean"), do_not_specialize=RUNTIME)
def _mean(
    k, k_stride, v, v_stride, k_out, v_out, plan, num_docs,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mean of one block, COLUMNS of the heads' widths together; 0 past the documents' blocks."""
    block = tl.program_id(0)
    used = block < first_of(plan, num_docs, 1, num_docs)
    document, place = find(plan, num_docs, 1, block)
    first = first_of(plan, num_docs, 0, document) + place * STRIDE
    if tl.program_id(2) == 0:
        _mean_of(k, k_stride, k_out, block, first, used, WIDTH_K, BLOCK, COLUMNS)
    else:
        _mean_of(v, v_stride, v_out, block, first, used, WIDTH_V, BLOCK, COLUMNS)


@triton.jit
def _mean_grad_of(
    grad, out, place, blocks, first_block, first, tokens,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for part in tl.static_range(PARTS):
        block = place - part
        exists = (block >= 0) & (block < blocks)
        total += tl.load(grad + (first_block + block).to(tl.int64) * WIDTH + column, mask=(column < WIDTH) & exists, other=0.0).to(tl.float32)
    total = total * (1.0 / (PARTS * STRIDE))
    token = tl.arange(0, STRIDE)
    value = tl.broadcast_to(total[None, :], [STRIDE, COLUMNS]).to(out.dtype.element_ty)
    at = (first + token).to(tl.int64) * WIDTH
    tl.store(out + at[:, None] + column[None, :], value, mask=(token < tokens)[:, None] & (column < WIDTH)[None, :])


@triton.jit(repr=named("mean_grad"), do_not_specialize=RUNTIME)
def _mean_grad(
    grad_k, grad_v, k_out, v_out, plan, num_docs,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tokens of a unit all get the same: the sum over the blocks that hold it."""
    unit = tl.program_id(0)
    if unit >= first_of(plan, num_docs, 3, num_docs):
        return
    document, place = find(plan, num_docs, 3, unit)
    first = first_of(plan, num_docs, 0, document) + place * STRIDE
    tokens = first_of(plan, num_docs, 0, document + 1) - first
    first_block = first_of(plan, num_docs, 1, document)
    blocks = first_of(plan, num_docs, 1, document + 1) - first_block
    if tl.program_id(2) == 0:
        _mean_grad_of(grad_k, k_out, place, blocks, first_block, first, tokens, WIDTH_K, PARTS, STRIDE, COLUMNS)
    else:
        _mean_grad_of(grad_v, v_out, place, blocks, first_block, first, tokens, WIDTH_V, PARTS, STRIDE, COLUMNS)


def _columns(width: int, rows: int) -> int:
    """Columns of a tile of so many rows."""
    return max(16, min(triton.next_power_of_2(width), TILE // rows, 256))


def mean(k: Tensor, v: Tensor, plan: Tensor, block: int, stride: int) -> tuple[Tensor, Tensor]:
    """[T // d, H, Dk] and [T // d, H, Dv], zeros past the documents' blocks."""
    k, v = by_rows(k), by_rows(v)
    out = tuple(torch.empty(x.shape[0] // stride, *x.shape[1:], dtype=x.dtype, device=x.device) for x in (k, v))
    widths = [x.shape[1] * x.shape[2] for x in (k, v)]
    columns = _columns(max(widths), block)
    if out[0].shape[0]:
        grid = (out[0].shape[0], triton.cdiv(max(widths), columns), 2)
        _mean[grid](k, k.stride(0), v, v.stride(0), *out, plan, plan.shape[1] - 1, *widths, block, stride, columns)
    return out  # type: ignore[return-value]


def num_units(plan: Tensor, tokens: int, stride: int) -> int:
    """At most so many units: each document may have one that is no whole chunk."""
    return tokens // stride + min(plan.shape[1] - 1, tokens)


def mean_backward(grad_k: Tensor, grad_v: Tensor, plan: Tensor, tokens: int, block: int, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of k and v; what lies past the documents' blocks is not read."""
    grads = [grad.contiguous() for grad in (grad_k, grad_v)]
    out = tuple(torch.empty(tokens, *grad.shape[1:], dtype=grad.dtype, device=grad.device) for grad in grads)
    widths = [grad.shape[1] * grad.shape[2] for grad in grads]
    columns = _columns(max(widths), stride)
    if tokens:
        grid = (num_units(plan, tokens, stride), triton.cdiv(max(widths), columns), 2)
        _mean_grad[grid](*grads, *out, plan, plan.shape[1] - 1, *widths, block // stride, stride, columns)
    return out  # type: ignore[return-value]
