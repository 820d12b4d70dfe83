"""A new token's keys and values of each sequence into its cache, and what has become old into e4m3: one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels.paged import LARGEST, NewRows, PagedKeysValues, page_tokens


@triton.jit
def _copy(x, stride, store, at, sequence, head, D: tl.constexpr, DP: tl.constexpr):
    """Row [D] of x [B, HKV, D] to row `at` of a store."""
    column = tl.arange(0, DP)
    row = tl.load(x + sequence * stride + head * D + column, mask=column < D, other=0.0)
    tl.store(store + at * D + column, row, mask=column < D)


@triton.jit
def _nearest_bf16(x):
    """Positive float32 numbers rounded to bfloat16's, the even one of two that are as near. By hand, because Triton's interpreter cuts."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _quantize(ring, ring_row, pool, scales, page_row, SELECT: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, LARGEST: tl.constexpr):
    """SELECT rows of a ring to e4m3 rows of a pool, with a scale for each: `quantize_rows`, to the bit."""
    row = tl.arange(0, TILE)
    column = tl.arange(0, DP)
    inside = (row < SELECT)[:, None] & (column < D)[None, :]
    x = tl.load(ring + (ring_row + row)[:, None] * D + column[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = _nearest_bf16(tl.maximum(tl.max(tl.abs(x), 1) * (1 / LARGEST), 1e-12))
    # Divided as IEEE has it: numbers with few bits often lie halfway between two of e4m3, where the last bit of a quotient decides.
    x = tl.minimum(tl.maximum(tl.div_rn(x, scale[:, None]), -LARGEST), LARGEST)
    tl.store(pool + (page_row + row)[:, None] * D + column[None, :], x.to(pool.dtype.element_ty), mask=inside)
    tl.store(scales + page_row + row, scale.to(scales.dtype.element_ty), mask=row < SELECT)


@triton.jit(repr=lambda _: "decode_write", do_not_specialize=["table_stride"])
def decode_write(
    k_raw, v_raw, k_slc, v_slc, k_win, v_win, stride_k_raw, stride_v_raw, stride_k_slc, stride_v_slc, stride_k_win, stride_v_win,
    raw_k, raw_v, pool_k, pool_v, win_k, win_v, scale_k, scale_v, recent_k, recent_v, pages, lengths, table_stride,
    HKV: tl.constexpr, DK: tl.constexpr, DKP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, RAW: tl.constexpr, RING: tl.constexpr, TOKENS: tl.constexpr,
    SELECT: tl.constexpr, TILE: tl.constexpr, QUANTIZED: tl.constexpr, THRESHOLD: tl.constexpr, RECENT: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Grid [B * HKV]."""
    pair = tl.program_id(0).to(tl.int64)
    sequence = pair // HKV
    head = pair % HKV
    length = tl.load(lengths + sequence)
    if length == 0:
        return
    t = length - 1
    at = pair * RAW + t % RAW
    _copy(k_raw, stride_k_raw, raw_k, at, sequence, head, DK, DKP)
    _copy(v_raw, stride_v_raw, raw_v, at, sequence, head, DV, DVP)
    at = pair * RING + t % RING
    _copy(k_win, stride_k_win, win_k, at, sequence, head, DK, DKP)
    _copy(v_win, stride_v_win, win_v, at, sequence, head, DV, DVP)
    if QUANTIZED:
        at = pair * RECENT + t % RECENT
        _copy(k_slc, stride_k_slc, recent_k, at, sequence, head, DK, DKP)
        _copy(v_slc, stride_v_slc, recent_v, at, sequence, head, DV, DVP)
        old = length - THRESHOLD
        if (old > 0) & (old % SELECT == 0):
            tl.debug_barrier()  # without a threshold the newest token is of that block
            first = old - SELECT
            page = tl.load(pages + sequence * table_stride + first // TOKENS).to(tl.int64)
            to = (page * HKV + head) * TOKENS + first % TOKENS
            _quantize(recent_k, pair * RECENT + first % RECENT, pool_k, scale_k, to, SELECT, TILE, DK, DKP, LARGEST)
            _quantize(recent_v, pair * RECENT + first % RECENT, pool_v, scale_v, to, SELECT, TILE, DV, DVP, LARGEST)
    else:
        page = tl.load(pages + sequence * table_stride + t // TOKENS).to(tl.int64)
        at = (page * HKV + head) * TOKENS + t % TOKENS
        _copy(k_slc, stride_k_slc, pool_k, at, sequence, head, DK, DKP)
        _copy(v_slc, stride_v_slc, pool_v, at, sequence, head, DV, DVP)


def write(rows: NewRows, cache: PagedKeysValues, config: NSAConfig) -> None:
    ready = [x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous() for x in rows]
    sequences, kv_heads, dk = rows.k_slc.shape
    dv = rows.v_slc.shape[2]
    assert cache.k_raw is not None and cache.v_raw is not None
    quantized = cache.k_scale is not None
    decode_write[(sequences * kv_heads,)](
        *ready, *(x.stride(0) for x in ready), cache.k_raw, cache.v_raw, cache.k_slc, cache.v_slc, cache.k_win, cache.v_win,
        cache.k_scale, cache.v_scale, cache.k_recent, cache.v_recent, cache.pages, cache.lengths, cache.pages.stride(0),
        HKV=kv_heads, DK=dk, DKP=triton.next_power_of_2(dk), DV=dv, DVP=triton.next_power_of_2(dv), RAW=cache.k_raw.shape[2], RING=cache.k_win.shape[2],
        TOKENS=page_tokens(config), SELECT=config.select_block, TILE=max(16, triton.next_power_of_2(config.select_block)), QUANTIZED=quantized,
        THRESHOLD=cache.threshold, RECENT=0 if cache.k_recent is None else cache.k_recent.shape[2], LARGEST=LARGEST, num_warps=4,
    )  # fmt: skip
