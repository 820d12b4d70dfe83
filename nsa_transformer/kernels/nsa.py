"""`nsa_attention`: the one door to Native Sparse Attention, whatever the backend."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels import reference

BACKENDS = ("reference",)


def available_backends() -> list[str]:
    """Backends that work on this machine, the plain PyTorch `reference` first."""
    return list(BACKENDS)


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    config: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
    blocks: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_blocks: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Native Sparse Attention (arXiv 2502.11089) over packed documents: `g_cmp o_cmp + g_slc o_slc + g_win o_win`.

    Args:
        q: `[T, Hq, Dk]`, bf16, fp16, fp32 or fp64, already rotated.
        k_cmp, v_cmp: `[N', Hkv, Dk]`, `[N', Hkv, Dv]`: compressed keys and values, documents one after the other, `max(0, (len - l) // d + 1)`
            each; rows past their sum are never read.
        k_slc, v_slc, k_win, v_win: `[S, Hkv, Dk or Dv]`, keys and values of the selected and the window branch. S = T unless `cu_seqlens_k` says otherwise.
        gates: `[T, Hq, 3]` in q's dtype or float32, after the sigmoid, in the order compressed, selected, window.
        config: the geometry.
        cu_seqlens: int32 `[num_docs + 1]`, boundaries of the documents' queries, from 0 to T; None: one document.
        cu_seqlens_k: int32 `[num_docs + 1]`, boundaries of the documents' keys; None: `cu_seqlens`.
        q_start: int32 `[num_docs]`, position of each document's first query; None: queries end where keys end.
        blocks: int32 `[T, Hkv, n]`, -1 padded: attend exactly these selection blocks instead of choosing.
        scale: of the scores; None: `Dk ** -0.5`.
        backend: `auto` or one of `available_backends()`.
        return_blocks: also return the attended blocks.

    Returns:
        `[T, Hq, Dv]` in q's dtype; with `return_blocks` also int32 `[T, Hkv, n]`, ascending, -1 padded.

    Raises:
        ValueError: naming the argument, what it was and what would do. What only a GPU knows (values of `cu_seqlens`, `blocks`)
            is checked on CPU tensors, and everywhere under `NSA_CHECK=1`.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend={backend!r} is not available here; write one of auto, {', '.join(available_backends())}")
    if not isinstance(config, NSAConfig):
        raise ValueError(f"config is {type(config).__name__}; give an NSAConfig")
    keys_values = (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)
    _check_tensors(q, keys_values, gates, blocks, scale)
    queries, keys = q.shape[0], k_slc.shape[0]
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, queries], dtype=torch.int32, device=q.device)
        if cu_seqlens_k is None and keys != queries:
            cu_seqlens_k = torch.tensor([0, keys], dtype=torch.int32, device=q.device)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    _check_boundaries(q, cu_seqlens, cu_seqlens_k, q_start)
    if q_start is None:
        q_start = cu_seqlens_k.diff() - cu_seqlens.diff()
    out, used = _reference_op(
        q, *keys_values, gates, cu_seqlens, cu_seqlens_k, q_start, blocks, _geometry(config), q.shape[-1] ** -0.5 if scale is None else float(scale)
    )
    return (out, used) if return_blocks else out


# ------------------------------------------------------------------------------------------- the reference as one operator
# An operator of its own keeps torch.compile and selective activation checkpointing out of the loops: both see one node.


def _ascending(blocks: Tensor) -> Tensor:
    """Ids in rising order, the padding behind them."""
    last = torch.iinfo(blocks.dtype).max
    ordered = blocks.masked_fill(blocks < 0, last).sort(dim=-1).values
    return ordered.masked_fill(ordered == last, -1)


def _geometry(config: NSAConfig) -> list[int]:
    return [
        config.compress_block,
        config.compress_stride,
        config.select_block,
        config.num_selected,
        config.num_initial,
        config.num_local,
        config.window,
    ]


def _config(geometry: list[int]) -> NSAConfig:
    block, stride, select, num_selected, num_initial, num_local, window = geometry
    return NSAConfig(block, stride, select, num_selected, num_initial, num_local, window)


@torch.library.custom_op("nsa_transformer::attention_reference", mutates_args=())
def _reference_op(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    q_start: Tensor,
    blocks: Tensor | None,
    geometry: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    config = NSAConfig(*geometry)  # type: ignore[arg-type]  # seven numbers; the eighth field, a word, keeps its default
    # Here and not at the door, where torch.compile would break its graph to read the values.
    if q.device.type == "cpu" or os.environ.get("NSA_CHECK") == "1":
        _check_values(q.shape[0], k_slc.shape[0], k_cmp.shape[0], cu_seqlens, cu_seqlens_k, q_start, blocks, config)
    if blocks is not None:
        blocks = _ascending(blocks)
    with torch.autocast(q.device.type, enabled=False):
        boundaries = (cu_seqlens.tolist(), cu_seqlens_k.tolist(), q_start.tolist())
        return reference.attention_forward(q, (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win), gates, _config(geometry), *boundaries, blocks, scale)


@_reference_op.register_fake
def _(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, cu_seqlens, cu_seqlens_k, q_start, blocks, geometry, scale):
    width = geometry[3] if blocks is None else blocks.shape[-1]
    out = q.new_empty(q.shape[0], q.shape[1], v_cmp.shape[-1])
    return out, q.new_empty(q.shape[0], k_slc.shape[1], width, dtype=torch.int32)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.geometry, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:11], output[1])


def _backward(ctx: Any, grad_out: Tensor, _grad_blocks: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, cu_seqlens, cu_seqlens_k, q_start, blocks = ctx.saved_tensors
    grads = _reference_backward_op(grad_out, *inputs, cu_seqlens, cu_seqlens_k, q_start, blocks, ctx.geometry, ctx.scale)
    return *grads, None, None, None, None, None, None


@torch.library.custom_op("nsa_transformer::attention_reference_backward", mutates_args=())
def _reference_backward_op(
    grad_out: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    q_start: Tensor,
    blocks: Tensor,
    geometry: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        boundaries = (cu_seqlens.tolist(), cu_seqlens_k.tolist(), q_start.tolist())
        keys_values = (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)
        grads = reference.attention_backward(grad_out, q, keys_values, gates, _config(geometry), *boundaries, blocks, scale)
    return tuple(grads)  # type: ignore[return-value]


@_reference_backward_op.register_fake
def _(grad_out, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, cu_seqlens, cu_seqlens_k, q_start, blocks, geometry, scale):
    return tuple(torch.empty_like(x) for x in (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates))


_reference_op.register_autograd(_backward, setup_context=_save_for_backward)


# ------------------------------------------------------------------------------------------------------------------- checks


def _check_tensors(q: Tensor, keys_values: tuple[Tensor, ...], gates: Tensor, blocks: Tensor | None, scale: float | None) -> None:
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


def _check_boundaries(q: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, q_start: Tensor | None) -> None:
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


def _check_values(
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
