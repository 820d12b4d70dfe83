"""What may be given to `nsa_attention`, each mistake named with what would do instead."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig


def check_tensors(q: Tensor, keys_values: tuple[Tensor, ...], gates: Tensor, blocks: Tensor | None, scale: float | None) -> None:
    """Shapes, dtypes and devices: what is known without reading the device."""
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = keys_values
    named = dict(zip(("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates"), (q, *keys_values, gates), strict=True))
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is {type(x).__name__}; give a tensor")
        if x.dim() != 3:
            raise ValueError(f"{name} has shape {list(x.shape)}; give three axes, packed tokens first and no batch axis")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move it there")
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"q has dtype {q.dtype}; give bfloat16, float16, float32 or float64")
    for name, x in named.items():
        if x.dtype != q.dtype and not (name == "gates" and x.dtype == torch.float32):
            also = " or torch.float32" if name == "gates" else ""
            raise ValueError(f"{name} has dtype {x.dtype} but q has {q.dtype}; give {q.dtype}{also}")
    queries, heads, dim = q.shape
    keys, kv_heads, dim_v = v_slc.shape
    if 0 in (heads, dim, kv_heads, dim_v):
        raise ValueError(f"q has shape {list(q.shape)} and v_slc {list(v_slc.shape)}; heads and head widths must be at least 1")
    if heads % kv_heads:
        raise ValueError(f"q has {heads} heads, which v_slc's {kv_heads} do not divide; give a multiple of {kv_heads}")
    expected = {
        "k_slc": (k_slc, (keys, kv_heads, dim)),
        "k_win": (k_win, (keys, kv_heads, dim)),
        "v_win": (v_win, (keys, kv_heads, dim_v)),
        "k_cmp": (k_cmp, (k_cmp.shape[0], kv_heads, dim)),
        "v_cmp": (v_cmp, (k_cmp.shape[0], kv_heads, dim_v)),
        "gates": (gates, (queries, heads, 3)),
    }
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {list(x.shape)}; q and v_slc ask for {list(shape)}")
    if blocks is not None:
        if not isinstance(blocks, Tensor) or blocks.dtype != torch.int32 or blocks.dim() != 3 or tuple(blocks.shape[:2]) != (queries, kv_heads):
            was = f"{blocks.dtype} {list(blocks.shape)}" if isinstance(blocks, Tensor) else type(blocks).__name__
            raise ValueError(f"blocks is {was}; give torch.int32 [{queries}, {kv_heads}, num_selected]")
        if blocks.device != q.device:
            raise ValueError(f"blocks is on {blocks.device} but q is on {q.device}; move it there")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale={scale} must be greater than 0, or None for Dk ** -0.5")


def check_boundaries(q: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, q_start: Tensor | None) -> None:
    length = cu_seqlens.shape[0] if isinstance(cu_seqlens, Tensor) and cu_seqlens.dim() == 1 else 0
    wanted = {"cu_seqlens": (cu_seqlens, max(length, 1)), "cu_seqlens_k": (cu_seqlens_k, length), "q_start": (q_start, length - 1)}
    for name, (x, size) in wanted.items():
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.dtype != torch.int32 or x.dim() != 1 or x.shape[0] != size:
            was = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name} is {was}; give torch.int32 [{size if name != 'cu_seqlens' else 'num_docs + 1'}]")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move it there")


def check_values(
    queries: int,
    keys: int,
    compressed: int,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    q_start: Tensor,
    blocks: Tensor | None,
    config: NSAConfig,
) -> None:
    for name, cu, total in (("cu_seqlens", cu_seqlens, queries), ("cu_seqlens_k", cu_seqlens_k, keys)):
        if int(cu[0]) != 0 or int(cu[-1]) != total or bool((cu[1:] < cu[:-1]).any()):
            raise ValueError(f"{name} starts at {int(cu[0])} and ends at {int(cu[-1])}; it must rise from 0 to {total} without decreasing")
    lengths, lengths_k = cu_seqlens.diff(), cu_seqlens_k.diff()
    if bool((q_start < 0).any()) or bool(((q_start > lengths_k - lengths) & (lengths > 0)).any()):
        raise ValueError("q_start puts queries outside their document's keys; 0 <= q_start and q_start + queries <= keys must hold in each document")
    needed = int(((lengths_k - config.compress_block).div(config.compress_stride, rounding_mode="floor") + 1).clamp(min=0).sum())
    if compressed < needed:
        raise ValueError(f"k_cmp has {compressed} rows; these documents have {needed} compressed keys")
    if blocks is not None and queries:
        document = torch.searchsorted(cu_seqlens[1:], torch.arange(queries, device=cu_seqlens.device, dtype=torch.int32), right=True)
        last = (lengths_k[document] - 1) // config.select_block
        if bool((blocks < -1).any()) or bool((blocks > last[:, None, None]).any()):
            raise ValueError(
                f"blocks holds ids from {int(blocks.min())} to {int(blocks.max())}; "
                f"each must be -1 or a block of its document, 0 … (keys - 1) // {config.select_block}"
            )
        ordered = blocks.sort(dim=-1).values
        if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
            raise ValueError("blocks names a block twice for one query; name each once and pad with -1")
