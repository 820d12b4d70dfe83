"""Decoding in Triton: one new token of each sequence against its cache, in four launches of fixed shape that wait for nothing on the host.
`decode_kernels.py` has the kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels.paged import PagedKeysValues
from nsa_transformer.kernels.triton.common import LOG2E, launches_dependently, precision
from nsa_transformer.kernels.triton.decode_kernels import decode_combine, decode_rank, decode_scan, decode_selected

MOST_PAIRS = 65535  # of sequences and key/value heads, CUDA's limit for the second axis of a grid
BESIDE = 16 << 10  # bytes of shared memory for what is not tiles of keys and values
MOST_SPLITS = 64
STRETCH = 128  # blocks that a program of `decode_rank` compares, or as many more as leave no more than
CANDIDATES = 128  # blocks of a pair to `decode_selected`


def decode(q: Tensor, gates: Tensor, cache: PagedKeysValues, config: NSAConfig, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Dk], gates [B, Hq, 3]: out [B, Hq, Dv], and the blocks int32 [B, Hkv, n] in no order, -1 where there are fewer."""
    sequences, heads, dk = q.shape
    kv_heads, dv, max_pages = cache.k_slc.shape[1], cache.v_slc.shape[3], cache.pages.shape[1]
    group, pairs = heads // kv_heads, sequences * kv_heads
    if pairs > MOST_PAIRS:
        raise ValueError(
            f"{sequences} sequences with {kv_heads} key/value heads are {pairs} pairs, and a step takes {MOST_PAIRS}; decode fewer sequences at once"
        )
    if pairs == 0 or max_pages == 0:  # nothing to split
        return q.new_zeros(sequences, heads, dv), torch.full((sequences, kv_heads, config.num_selected), -1, dtype=torch.int32, device=q.device)
    blocks = 64 // (config.select_block // config.compress_stride)  # of a page
    multiprocessors, pdl, shared = _chip(q.device)
    splits, chosen_splits = _splits(pairs, max_pages, config.num_selected, multiprocessors)
    near_splits = min(cache.k_win.shape[2] // 64, chosen_splits)
    group_rows, kept = max(16, triton.next_power_of_2(group)), triton.next_power_of_2(config.num_selected)
    compared = min(STRETCH, 8192 // group_rows)  # blocks at once, as registers allow
    stretch = max(STRETCH, triton.next_power_of_2(triton.cdiv(max_pages * blocks, max(1, CANDIDATES // kept))))
    stretches = triton.cdiv(max_pages * blocks, stretch)
    # One piece of memory for what the kernels hand on, each part beginning at a multiple of 128 bytes.
    counts = [2 * pairs * stretches * kept, pairs * group * max_pages * blocks, *[pairs * group * max_pages] * 2]
    for count in (splits, near_splits, chosen_splits):
        counts += [pairs * count * group * dv, *[pairs * count * group] * 2]
    room = [-(-count // 32) * 32 for count in counts]
    best, shares, spills, peaks, *parts = torch.empty(sum(room), dtype=torch.float32, device=q.device).split(room)
    scan, near, part = parts[:3], parts[3:6], parts[6:]
    chosen = torch.empty(sequences, kv_heads, config.num_selected, dtype=torch.int32, device=q.device)
    out = q.new_empty(sequences, heads, dv)
    q, gates = q.contiguous(), gates.contiguous()
    widths, padded = {"DV": dv, "DVP": triton.next_power_of_2(dv)}, triton.next_power_of_2(dk)
    full = q.dtype == torch.float32  # products on the ordinary cores, which take many registers
    quantized = cache.k_scale is not None
    row = (padded + widths["DVP"]) * q.element_size()  # bytes of one of keys and values; with e4m3 two tiles of those and one of a ring's are no more than two
    # A tile ahead of the one that is attended, where there is room for both beside the queries.
    stages = 1 if full else 3 if 2 * 64 * row + BESIDE <= shared else 2
    tile = 32 if full else 64
    while tile * row + BESIDE > shared:
        tile //= 2
    shape = widths | {"DK": dk, "DKP": padded, "PRECISION": precision(q.dtype)}
    heads_of = {"HKV": kv_heads, "G": group, "GP": group_rows}
    runs = {"STRIDE": config.compress_stride, "SELECT": config.select_block}
    choice = {"N": config.num_selected, "NP": kept, "INITIAL": config.num_initial, "LOCAL": config.num_local}
    launch = {"PDL": pdl, "launch_pdl": pdl}
    scan_span = {"SCAN_SPLITS": splits, "SCAN_SPAN": triton.next_power_of_2(splits)}
    decode_scan[(splits, pairs)](
        q, cache.k_cmp, cache.v_cmp, cache.pages, cache.lengths, shares, spills, peaks, *scan, scale * LOG2E, max_pages, BLOCK=config.compress_block,
        SPLITS=splits, STAGES=stages, num_warps=4, **heads_of, **runs, **shape, **launch,
    )  # fmt: skip
    if config.num_selected > config.num_initial + config.num_local:  # else all are forced
        decode_rank[(stretches, pairs)](
            shares, spills, peaks, cache.lengths, scan[1], scan[2], best.view(torch.int64), max_pages, BLOCK=config.compress_block, STRETCH=stretch,
            SIZE=compared, num_warps=4, **heads_of, **runs, **choice, **scan_span, **launch,
        )  # fmt: skip
    decode_selected[(chosen_splits, pairs)](
        q, cache.k_slc, cache.v_slc, cache.k_win, cache.v_win, cache.k_scale, cache.v_scale, cache.k_recent, cache.v_recent, cache.pages, cache.lengths,
        best.view(torch.int64), *near, *part, chosen, scale * LOG2E, max_pages, WINDOW=config.window, RING=cache.k_win.shape[2], NEAR_SPLITS=near_splits,
        SPLITS=chosen_splits, CANDIDATES=stretches * kept, CANDIDATES_SPAN=triton.next_power_of_2(stretches * kept), QUANTIZED=quantized,
        NATIVE=not full and not triton.knobs.runtime.interpret, STAGES=stages, THRESHOLD=cache.threshold,
        RECENT=cache.k_recent.shape[2] if cache.k_recent is not None else 0,
        TILE=max(16, min(config.select_block, tile)), num_warps=8 if full and padded + widths["DVP"] > 256 else 4,
        **heads_of, **runs, **choice, **shape, **launch,
    )  # fmt: skip
    decode_combine[(pairs * group,)](
        gates, *scan, *near, *part, out, G=group, NEAR_SPLITS=near_splits, NEAR_SPAN=triton.next_power_of_2(near_splits),
        SPLITS=chosen_splits, SPLITS_SPAN=triton.next_power_of_2(chosen_splits), num_warps=1 if splits <= 16 else 4, **scan_span, **widths, **launch,
    )  # fmt: skip
    return out, chosen


def _splits(pairs: int, max_pages: int, num_selected: int, multiprocessors: int) -> tuple[int, int]:
    """Programs that share the pages of a pair, and its chosen blocks. One for each multiprocessor hides what a step has to wait for, and every further one adds
    parts once more; two, where each still has four pages or blocks, keep the memory busy."""
    share = max(1, multiprocessors // pairs)
    splits = 1 << (share.bit_length() - 1)
    splits = 2 * splits if max_pages >= 8 * splits else splits
    chosen = 2 * share if num_selected >= 8 * share else share
    return min(splits, max_pages, MOST_SPLITS), min(chosen, num_selected)


def _chip(device: torch.device) -> tuple[int, bool, int]:
    """Multiprocessors, whether a kernel may be launched while the one before it runs, and bytes of shared memory for a program. The interpreter passes for a
    chip with few multiprocessors, so that splits are many pages long."""
    if triton.knobs.runtime.interpret:
        return 8, launches_dependently(device), 99 << 10
    found = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device() if device.index is None else device.index)
    return found["multiprocessor_count"], launches_dependently(device), found["max_shared_mem"]
