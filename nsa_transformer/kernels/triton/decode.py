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

BESIDE = 16 << 10  # bytes of shared memory for what is not tiles of keys and values
MOST_SPLITS = 64
PROGRAMS = 2  # for each multiprocessor
COMPARED = 1024  # blocks that are compared at once, and
KEPT = 128  # how many of them may be left when each 128 have been compared


def decode(q: Tensor, gates: Tensor, cache: PagedKeysValues, config: NSAConfig, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Dk], gates [B, Hq, 3]: out [B, Hq, Dv], and the blocks int32 [B, Hkv, n] in no order, -1 where there are fewer."""
    sequences, heads, dk = q.shape
    kv_heads, dv, max_pages = cache.k_slc.shape[1], cache.v_slc.shape[3], cache.pages.shape[1]
    group, pairs = heads // kv_heads, sequences * kv_heads
    runs, select = config.select_block // config.compress_stride, config.select_block
    group_rows, kept = max(16, triton.next_power_of_2(group)), triton.next_power_of_2(config.num_selected)
    padded, padded_v = triton.next_power_of_2(dk), triton.next_power_of_2(dv)
    multiprocessors, pdl, shared = _chip(q.device)
    full = q.dtype == torch.float32  # products on the ordinary cores, which take many registers
    warps = 8 if full and padded + padded_v > 256 else 4
    rows = 32 if full and runs <= 32 else 64  # of a tile
    tiles = max_pages * 64 // rows
    share = max(1, PROGRAMS * multiprocessors // pairs)
    splits = _splits(share, tiles)
    chosen_splits = _splits(share, config.num_selected * max(1, select // rows))
    near_splits = _splits(share, cache.k_win.shape[2] // rows)
    # One piece of memory for what the kernels hand on, each part beginning at a multiple of 128 bytes.
    counts = [pairs * group * tiles * rows // runs, *[pairs * group * tiles] * 2]
    for count in (splits, near_splits, chosen_splits):
        counts += [pairs * count * group * dv, *[pairs * count * group] * 2]
    room = [-(-count // 32) * 32 for count in counts]
    shares, spills, peaks, *parts = torch.empty(sum(room), dtype=torch.float32, device=q.device).split(room)
    scan, near, part = parts[:3], parts[3:6], parts[6:]
    chosen = torch.empty(sequences, kv_heads, config.num_selected, dtype=torch.int32, device=q.device)
    out = q.new_empty(sequences, heads, dv)
    q, gates = q.contiguous(), gates.contiguous()
    widths = {"DV": dv, "DVP": padded_v}
    # A tile of keys and values ahead of the one that is attended, where there is room for both beside the queries.
    ahead = 2 * rows * (padded + padded_v) * q.element_size() + BESIDE <= shared
    attend = widths | {"DK": dk, "DKP": padded, "PRECISION": precision(q.dtype), "STAGES": 1 if full else 3 if ahead else 2, "num_warps": warps}
    shape = {"ROWS": rows, "TILES": 64 // rows, "HKV": kv_heads, "G": group, "GP": group_rows, "STRIDE": config.compress_stride, "SELECT": select}
    choice = {"N": config.num_selected, "NP": kept}
    # The attribute itself is for compute capability 9.0 and later, and so is the instruction that waits.
    launch = {"PDL": pdl, "launch_pdl": pdl}
    scan_span = {"SCAN_SPLITS": splits, "SCAN_SPAN": triton.next_power_of_2(splits)}
    decode_scan[(pairs, splits + near_splits)](
        q, cache.k_cmp, cache.v_cmp, cache.k_win, cache.v_win, cache.pages, cache.lengths, shares, spills, peaks, *scan, *near, scale * LOG2E, max_pages,
        BLOCK=config.compress_block, WINDOW=config.window, RING=cache.k_win.shape[2], SPLITS=splits, NEAR_SPLITS=near_splits,
        EARLY=pairs * (splits + near_splits + chosen_splits) <= PROGRAMS * multiprocessors, **shape, **attend, **launch,
    )  # fmt: skip
    lines = max(1, min(COMPARED // 128, KEPT // kept, COMPARED // 8 // group_rows))
    decode_rank[(pairs,)](
        shares, spills, peaks, cache.lengths, scan[1], scan[2], chosen, max_pages, BLOCK=config.compress_block, INITIAL=config.num_initial,
        LOCAL=config.num_local, LINES=lines, num_warps=max(4, lines), maxnreg=128, **shape, **choice, **scan_span, **launch,
    )  # fmt: skip
    decode_selected[(chosen_splits, pairs)](
        q, cache.k_slc, cache.v_slc, cache.k_scale, cache.v_scale, cache.k_recent, cache.v_recent, cache.pages, cache.lengths, chosen, *part, scale * LOG2E,
        max_pages, SPLITS=chosen_splits, QUANTIZED=cache.k_scale is not None, THRESHOLD=cache.threshold,
        RECENT=cache.k_recent.shape[2] if cache.k_recent is not None else 0, **shape, **attend, **choice, **launch,
    )  # fmt: skip
    decode_combine[(pairs * group,)](
        gates, *scan, *near, *part, out, G=group, NEAR_SPLITS=near_splits, NEAR_SPAN=triton.next_power_of_2(near_splits),
        SPLITS=chosen_splits, SPLITS_SPAN=triton.next_power_of_2(chosen_splits), num_warps=1 if splits <= 16 else 4, **scan_span, **widths, **launch,
    )  # fmt: skip
    return out, chosen


def _splits(share: int, tiles: int) -> int:
    """Programs among which `tiles` are divided, at most `share`, with no more tiles for the last than for the first if it can be."""
    rounds = triton.cdiv(tiles, min(share, MOST_SPLITS))
    return triton.cdiv(tiles, rounds)


def _chip(device: torch.device) -> tuple[int, bool, int]:
    """Multiprocessors, whether a kernel may be launched while the one before it runs, and bytes of shared memory for a program. The interpreter passes for a
    chip with few multiprocessors, so that splits are many pages long."""
    if triton.knobs.runtime.interpret:
        return 8, launches_dependently(device), 99 << 10
    found = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device() if device.index is None else device.index)
    return found["multiprocessor_count"], launches_dependently(device), found["max_shared_mem"]
