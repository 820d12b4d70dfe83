"""The rotary embedding: one pass over x, bound by memory alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # pairs of numbers that one program turns: for 128 threads two accesses of 16 bytes to each half in 16 bits


@triton.jit(repr=lambda _: "nsa_rotary", do_not_specialize=["rows"])
def rotary(
    x, cos, sin, out, stride_token, stride_head, rows,
    HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """ROWS rows of [T * HEADS, 2 * HALF]. A row is a pair (token, head), the head running fastest: any number of heads fills a program, and its few tokens'
    cosines and sines are read from memory by the first of their heads alone, then from the cache."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    token = first // HEADS
    place = (first - token * HEADS).to(tl.int32) + tl.arange(0, ROWS)  # heads from that token's first on: divided in 32 bits, which is cheaper
    token += place // HEADS
    head = (place % HEADS).to(tl.int64)
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    inside = (row < rows)[:, None] & (column < HALF)[None, :]
    at = (token * stride_token + head * stride_head)[:, None] + column[None, :]
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = (token * HALF)[:, None] + column[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0)
    s = tl.load(sin + angle, mask=inside, other=0.0)
    if TRANSPOSED:
        s = -s
    to = out + (row * (2 * HALF))[:, None] + column[None, :]
    tl.store(to, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """x [T, heads, D] times its matrix or the transposed one, contiguous; cos and sin float32 [T, D / 2]."""
    tokens, heads, width = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty(tokens, heads, width, dtype=x.dtype, device=x.device)
    if out.numel():
        half, rows = width // 2, tokens * heads
        padded = triton.next_power_of_2(half)
        tile = max(1, TILE // padded)
        grid = (triton.cdiv(rows, tile),)
        rotary[grid](x, cos.contiguous(), sin.contiguous(), out, *x.stride()[:2], rows, heads, half, padded, tile, transposed, num_warps=4)
    return out
