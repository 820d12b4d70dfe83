"""Gradients of the gates, dO · O of each branch, which the softmax backward needs too (there called delta)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(repr=lambda _: "nsa_delta", do_not_specialize=["rows"])
def _gate_gradients(grad_out, outs, delta, grad_gates, rows, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    column = tl.arange(0, PADDED)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    grad = tl.load(grad_out + at, mask=inside, other=0.0).to(tl.float32)
    for branch in tl.static_range(3):
        total = tl.sum(grad * tl.load(outs + branch * rows.to(tl.int64) * WIDTH + at, mask=inside, other=0.0).to(tl.float32), axis=1)
        tl.store(delta + branch * rows.to(tl.int64) + row, total, mask=row < rows)
        tl.store(grad_gates + row * 3 + branch, total.to(grad_gates.dtype.element_ty), mask=row < rows)


def gate_gradients(grad_out: Tensor, outs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """delta float32 [3, T, Hq] and the gradient of the gates [T, Hq, 3] in `dtype`, from grad_out [T, Hq, Dv] and outs [3, T, Hq, Dv]."""
    queries, heads, width = grad_out.shape
    delta = torch.empty(3, queries, heads, dtype=torch.float32, device=grad_out.device)
    grad_gates = torch.empty(queries, heads, 3, dtype=dtype, device=grad_out.device)
    rows, chunk = queries * heads, 32
    _gate_gradients[(triton.cdiv(rows, chunk),)](grad_out, outs, delta, grad_gates, rows, width, triton.next_power_of_2(width), chunk)
    return delta, grad_gates
