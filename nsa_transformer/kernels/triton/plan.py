"""Where the documents of a pack start, counted in each kind of tile: computed on the device, so that nothing waits for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_transformer.kernels.triton.common import keys_before


@triton.jit(repr=lambda _: "nsa_plan", do_not_specialize=["num_docs", "stride"])
def _plan_kernel(
    cu_q,
    cu_k,
    plan,
    stride,
    num_docs,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
    SELECT: tl.constexpr,
    ROWS_BAND: tl.constexpr,
    ROWS_BAND_Q: tl.constexpr,
    ROWS_SELECTED: tl.constexpr,
    ROWS_SELECTED_Q: tl.constexpr,
    ROWS_STORED_Q: tl.constexpr,
    SCORE_TOKENS: tl.constexpr,
    KEYS_COMPRESSED: tl.constexpr,
    KEYS_WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Running sums over the documents, CHUNK of them at a time; row r of `plan` is one kind."""
    compressed = 0
    band = 0
    selected = 0
    score = 0
    keys_compressed = 0
    keys_window = 0
    blocks = 0
    band_q = 0
    selected_q = 0
    stored_q = 0
    tl.store(plan + tl.arange(0, 16) * stride, tl.zeros([16], tl.int32), mask=tl.arange(0, 16) < 10)
    for start in range(0, num_docs, CHUNK):
        doc = start + tl.arange(0, CHUNK)
        inside = doc < num_docs
        queries = tl.load(cu_q + doc + 1, mask=inside, other=0) - tl.load(cu_q + doc, mask=inside, other=0)
        keys = tl.load(cu_k + doc + 1, mask=inside, other=0) - tl.load(cu_k + doc, mask=inside, other=0)
        to = plan + doc + 1
        count = keys_before(keys - 1, BLOCK, STRIDE)
        tl.store(to, compressed + tl.cumsum(count), mask=inside)
        compressed += tl.sum(count)
        count = (queries * G + ROWS_BAND - 1) // ROWS_BAND
        tl.store(to + stride, band + tl.cumsum(count), mask=inside)
        band += tl.sum(count)
        count = (queries * G + ROWS_SELECTED - 1) // ROWS_SELECTED
        tl.store(to + 2 * stride, selected + tl.cumsum(count), mask=inside)
        selected += tl.sum(count)
        count = (queries + SCORE_TOKENS - 1) // SCORE_TOKENS
        tl.store(to + 3 * stride, score + tl.cumsum(count), mask=inside)
        score += tl.sum(count)
        count = (keys_before(keys - 1, BLOCK, STRIDE) + KEYS_COMPRESSED - 1) // KEYS_COMPRESSED
        tl.store(to + 4 * stride, keys_compressed + tl.cumsum(count), mask=inside)
        keys_compressed += tl.sum(count)
        count = (keys + KEYS_WINDOW - 1) // KEYS_WINDOW
        tl.store(to + 5 * stride, keys_window + tl.cumsum(count), mask=inside)
        keys_window += tl.sum(count)
        count = (keys + SELECT - 1) // SELECT
        tl.store(to + 6 * stride, blocks + tl.cumsum(count), mask=inside)
        blocks += tl.sum(count)
        count = (queries * G + ROWS_BAND_Q - 1) // ROWS_BAND_Q
        tl.store(to + 7 * stride, band_q + tl.cumsum(count), mask=inside)
        band_q += tl.sum(count)
        count = (queries * G + ROWS_SELECTED_Q - 1) // ROWS_SELECTED_Q
        tl.store(to + 8 * stride, selected_q + tl.cumsum(count), mask=inside)
        selected_q += tl.sum(count)
        count = (queries * G + ROWS_STORED_Q - 1) // ROWS_STORED_Q
        tl.store(to + 9 * stride, stored_q + tl.cumsum(count), mask=inside)
        stored_q += tl.sum(count)


@dataclass(frozen=True)
class Plan:
    """int32 [num_docs + 1] each: the first compressed key, tile or block of every document."""

    compressed: Tensor
    rows_band: Tensor
    rows_selected: Tensor
    score: Tensor
    keys_compressed: Tensor
    keys_window: Tensor
    blocks: Tensor
    rows_band_q: Tensor
    rows_selected_q: Tensor
    rows_stored_q: Tensor


def make_plan(
    cu_q: Tensor,
    cu_k: Tensor,
    group: int,
    block: int,
    stride: int,
    select: int,
    band: int,
    band_q: int,
    selected: int,
    selected_q: int,
    stored_q: int,
    score: int,
    compressed: int,
    window: int,
) -> Plan:
    """The sizes: query rows of a band and a selected tile, forward and dq each, and of dq from stored scores; tokens of a score tile; keys of a
    compressed and a window tile."""
    num_docs = cu_q.shape[0] - 1
    width = (num_docs + 4) // 4 * 4  # rows stay 16-byte aligned, or each number of documents would compile kernels of its own
    plan = torch.empty(10, width, dtype=torch.int32, device=cu_q.device)
    chunk = min(1024, triton.next_power_of_2(max(num_docs, 1)))
    _plan_kernel[(1,)](
        cu_q, cu_k, plan, width, num_docs, group, block, stride, select, band, band_q, selected, selected_q, stored_q, score, compressed, window, chunk
    )
    return Plan(*plan[:, : num_docs + 1].unbind(0))
