"""Decoding in CUDA C++: one new token of each sequence against its cache, in one launch that waits for nothing on the host. csrc/decode.cuh has the kernel."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels.paged import PagedKeysValues, page_rows
from nsa_transformer.kernels.sparse_attention import NEEDS, STORES, Arguments, capable, library

DTYPES = (torch.bfloat16, torch.float16)
WIDTHS = (64, 128)
GEOMETRY = {"compress_block": 32, "compress_stride": 16, "select_block": 64}
MOST_HEADS = 16  # of a key/value head
MOST_SELECTED = 32
MOST_CHOSEN = 16  # of those, by importance
MOST_PAIRS = 65535  # of sequences and key/value heads, CUDA's limit for the second axis of a grid
KEYS = 16  # of a group, the kernel's unit of work
CLUSTERS = (16, 8, 4, 2, 1)  # blocks that share a pair
ALIGNMENT = 16  # bytes, of what the kernel copies at once
# From how many pairs on, and from which share of the multiprocessors with work, `auto` takes this kernel (benchmarks/log.md).
AUTO_PAIRS = 24
AUTO_BUSY = 0.6


def refuses(q: Tensor, cache: PagedKeysValues, config: NSAConfig) -> str | None:
    """Why the kernel does not take these inputs, which are those of a step, as a phrase; None if it does."""
    sequences, heads, dk = q.shape
    kv_heads, dv = cache.k_slc.shape[1], cache.v_slc.shape[3]
    if q.device.type != "cuda" or not capable(q.device.index or 0):
        return f"q is on {q.device}, which is not {NEEDS}"
    if q.dtype not in DTYPES:
        return f"q has dtype {q.dtype}, not one of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
    if dk != dv or dk not in WIDTHS:
        return f"the head widths {dk} and {dv} are not both one of {', '.join(map(str, WIDTHS))}"
    if heads // kv_heads > MOST_HEADS:
        return f"{heads // kv_heads} query heads share a key/value head, more than {MOST_HEADS}"
    for name, size in GEOMETRY.items():
        if getattr(config, name) != size:
            return f"{name} is {getattr(config, name)}, not {size}"
    if config.num_local < 1:
        return "num_local is 0, not 1 or more"
    if config.num_selected > MOST_SELECTED:
        return f"num_selected is {config.num_selected}, more than {MOST_SELECTED}"
    if (chosen := config.num_selected - config.num_initial - config.num_local) > MOST_CHOSEN:
        return f"num_selected - num_initial - num_local, blocks chosen by importance, is {chosen}, more than {MOST_CHOSEN}"
    if sequences == 0 or cache.pages.shape[1] == 0:
        return "there is no sequence, or none with a page"
    if sequences * kv_heads > MOST_PAIRS:
        return f"{sequences} sequences with {kv_heads} key/value heads are {sequences * kv_heads} pairs, more than {MOST_PAIRS}"
    for name in STORES:
        x = getattr(cache, name)
        if x is not None and x.data_ptr() % ALIGNMENT:
            return f"{name} begins at an address that is no multiple of {ALIGNMENT} bytes"
    if q.is_contiguous() and q.data_ptr() % ALIGNMENT:
        return f"q begins at an address that is no multiple of {ALIGNMENT} bytes"
    return None


def decode(q: Tensor, gates: Tensor, cache: PagedKeysValues, config: NSAConfig, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, Hq, Dk], gates [B, Hq, 3], which `refuses` takes: out [B, Hq, Dv], and the blocks int32 [B, Hkv, n] in no order, -1 where there are fewer."""
    sequences, heads, width = q.shape
    kv_heads = cache.k_slc.shape[1]
    kind = _kind(q, cache, config)
    step = _sizes(cluster=cluster_size(q.device, **kind), **kind)
    out, chosen = q.new_empty(sequences, heads, width), torch.empty(sequences, kv_heads, config.num_selected, dtype=torch.int32, device=q.device)
    q, gates = q.contiguous(), gates.contiguous()
    for name in (*STORES, "pages", "lengths"):
        x = getattr(cache, name)
        setattr(step, name, None if x is None else x.data_ptr())
    step.q, step.gates, step.out, step.chosen = q.data_ptr(), gates.data_ptr(), out.data_ptr(), chosen.data_ptr()
    step.scale, step.kv_heads, step.group, step.float_gates = scale / math.log(2), kv_heads, heads // kv_heads, gates.dtype == torch.float32
    step.num_selected, step.num_initial, step.num_local = config.num_selected, config.num_initial, config.num_local
    step.window, step.ring, step.max_pages = config.window, cache.k_win.shape[2], cache.pages.shape[1]
    step.threshold, step.recent = cache.threshold, 0 if cache.k_recent is None else cache.k_recent.shape[2]
    floats = library().nsa_decode_notes(step)
    if floats:  # more than shared memory holds
        notes = torch.empty(floats, dtype=torch.float32, device=q.device)
        step.notes = notes.data_ptr()
    problem = library().nsa_decode(step, torch.cuda.current_stream(q.device).cuda_stream)
    if problem is not None:
        raise RuntimeError(f"the CUDA extension's nsa_decode: {problem.decode()}")
    return out, chosen


def worthwhile(q: Tensor, cache: PagedKeysValues, config: NSAConfig) -> bool:
    """Whether the Triton kernels would be slower, for inputs that `refuses` takes."""
    kind = _kind(q, cache, config)
    multiprocessors: int = torch.cuda.get_device_properties(q.device).multi_processor_count
    blocks = kind["pairs"] * cluster_size(q.device, **kind)
    rounds = -(-blocks // multiprocessors)  # a block has a multiprocessor for itself
    return kind["pairs"] >= AUTO_PAIRS and blocks >= AUTO_BUSY * rounds * multiprocessors


def _kind(q: Tensor, cache: PagedKeysValues, config: NSAConfig) -> dict[str, int]:
    """What the launch's shape depends on. groups: of compressed keys, as far as the table of pages goes."""
    groups = cache.pages.shape[1] * page_rows(config) // KEYS
    return {
        "bfloat16": q.dtype == torch.bfloat16, "width": q.shape[2], "fp8": cache.k_scale is not None, "pairs": len(q) * cache.k_slc.shape[1], "groups": groups
    }  # fmt: skip


@lru_cache(maxsize=1024)
def cluster_size(device: torch.device, *, pairs: int, **kind: int) -> int:
    """Blocks that share a pair: as many as leave room for all pairs at once on `device`; 1 where even those have to queue."""
    with torch.cuda.device(device):
        for cluster in CLUSTERS:
            # Minus an error where the device has no such cluster; an error of another kind comes again with the launch.
            if library().nsa_decode_clusters(_sizes(cluster=cluster, pairs=pairs, **kind)) >= pairs:
                return cluster
    return 1


def _sizes(*, groups: int, cluster: int, **kind: int) -> Arguments:
    return Arguments(cluster=cluster, most_groups=-(-groups // cluster), **kind)
