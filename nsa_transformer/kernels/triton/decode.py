"""Decoding in Triton: one new token of each sequence against its cache, in two launches of fixed shape that wait for nothing. `decode_kernels.py` has the
kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels.paged import PagedKeysValues
from nsa_transformer.kernels.triton.common import LOG2E, precision
from nsa_transformer.kernels.triton.decode_kernels import decode_scan, decode_selected

PROGRAMS = 264  # wanted at once: two a multiprocessor of an H100


def decode(q: Tensor, gates: Tensor, cache: PagedKeysValues, config: NSAConfig, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Dk], gates [B, Hq, 3]: out [B, Hq, Dv], and the blocks int32 [B, Hkv, n] in no order, -1 where there are fewer."""
    sequences, heads, dk = q.shape
    kv_heads, dv, max_pages = cache.k_slc.shape[1], cache.v_slc.shape[3], cache.pages.shape[1]
    group, pairs = heads // kv_heads, sequences * kv_heads
    window_tiles = cache.k_win.shape[2] // 64
    splits = max(1, min(max_pages, 32, triton.cdiv(PROGRAMS, pairs)))
    window_splits = max(1, min(window_tiles, splits))
    selected_splits = max(1, min(config.num_selected, triton.cdiv(PROGRAMS, pairs)))
    shape = {
        "HKV": kv_heads,
        "G": group,
        "GP": max(16, triton.next_power_of_2(group)),
        "DK": dk,
        "DKP": triton.next_power_of_2(dk),
        "DV": dv,
        "DVP": triton.next_power_of_2(dv),
        "STRIDE": config.compress_stride,
        "SELECT": config.select_block,
        "N": config.num_selected,
        "PRECISION": precision(q.dtype),
        "STAGES": 1 if q.dtype == torch.float32 else 3,
    }
    blocks_of_page = 64 // (config.select_block // config.compress_stride)

    def floats(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=q.device)

    def parts(count: int) -> tuple[Tensor, Tensor, Tensor]:
        return floats(pairs, count, group, dv), floats(pairs, count, group), floats(pairs, count, group)

    counters = torch.zeros(2, pairs, dtype=torch.int32, device=q.device)
    base, chosen = floats(sequences, heads, dv), torch.empty(sequences, kv_heads, config.num_selected, dtype=torch.int32, device=q.device)
    q, gates = q.contiguous(), gates.contiguous()
    decode_scan[(splits + window_splits, pairs)](
        q, gates, cache.k_cmp, cache.v_cmp, cache.k_win, cache.v_win, cache.pages, cache.lengths,
        floats(pairs, group, max_pages, blocks_of_page + 1), floats(pairs, group, max_pages),
        floats(pairs, group), *parts(splits + window_splits), counters[0], base, chosen, scale * LOG2E, max_pages,
        BLOCK=config.compress_block, NP=triton.next_power_of_2(config.num_selected), INITIAL=config.num_initial, LOCAL=config.num_local,
        WINDOW=config.window, RING=cache.k_win.shape[2], SPLITS=splits, SPLITS_SPAN=triton.next_power_of_2(splits),
        WINDOW_SPLITS=window_splits, WINDOW_SPAN=triton.next_power_of_2(window_splits), PAGES=triton.next_power_of_2(max_pages),
        num_warps=4, **shape,
    )  # fmt: skip
    quantized = cache.k_scale is not None
    out = q.new_empty(sequences, heads, dv)
    decode_selected[(selected_splits, pairs)](
        q, gates, cache.k_slc, cache.v_slc, cache.k_scale, cache.v_scale, cache.k_recent, cache.v_recent, cache.pages, cache.lengths, base, chosen,
        *parts(selected_splits), counters[1], out, scale * LOG2E, max_pages,
        SPLITS=selected_splits, SPLITS_SPAN=triton.next_power_of_2(selected_splits), QUANTIZED=quantized, THRESHOLD=cache.threshold,
        RECENT=cache.k_recent.shape[2] if cache.k_recent is not None else 0,
        TILE=max(16, config.select_block), num_warps=4, **shape,
    )  # fmt: skip
    return out, chosen
