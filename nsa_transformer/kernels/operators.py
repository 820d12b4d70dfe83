"""The attention's backends as operators of torch: torch.compile and selective activation checkpointing see one node each, not the loops inside.

Nothing here loads Triton before its backend is called.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels import reference
from nsa_transformer.kernels.checks import check_values


def _checked_blocks(
    q: Tensor, k_slc: Tensor, k_cmp: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor, q_start: Tensor, blocks: Tensor | None, config: NSAConfig
) -> Tensor | None:
    """Given blocks in rising order, once the values of all were checked: here and not at the door, where torch.compile would break
    its graph to read them."""
    if q.device.type == "cpu" or os.environ.get("NSA_CHECK") == "1":
        check_values(q.shape[0], k_slc.shape[0], k_cmp.shape[0], cu_seqlens, cu_seqlens_k, q_start, blocks, config)
    return None if blocks is None else _ascending(blocks)


def _ascending(blocks: Tensor) -> Tensor:
    """Ids in rising order, the padding behind them."""
    last = torch.iinfo(blocks.dtype).max
    ordered = blocks.masked_fill(blocks < 0, last).sort(dim=-1).values
    return ordered.masked_fill(ordered == last, -1)


def _config(geometry: list[int]) -> NSAConfig:
    block, stride, select, num_selected, num_initial, num_local, window = geometry
    return NSAConfig(block, stride, select, num_selected, num_initial, num_local, window)


@torch.library.custom_op("nsa_transformer::attention_reference", mutates_args=())
def reference_op(
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
    """Output and blocks."""
    config = _config(geometry)
    blocks = _checked_blocks(q, k_slc, k_cmp, cu_seqlens, cu_seqlens_k, q_start, blocks, config)
    with torch.autocast(q.device.type, enabled=False):
        boundaries = (cu_seqlens.tolist(), cu_seqlens_k.tolist(), q_start.tolist())
        return reference.attention_forward(q, (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win), gates, config, *boundaries, blocks, scale)


@reference_op.register_fake
def _(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, cu_seqlens, cu_seqlens_k, q_start, blocks, geometry, scale):
    width = geometry[3] if blocks is None else blocks.shape[-1]
    out = q.new_empty(q.shape[0], q.shape[1], v_cmp.shape[-1])
    return out, q.new_empty(q.shape[0], k_slc.shape[1], width, dtype=torch.int32)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.geometry, ctx.scale = inputs
    ctx.save_for_backward(*tensors[:11], output[1])


def _backward(ctx: Any, grad_out: Tensor, _grad_blocks: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, cu_seqlens, cu_seqlens_k, q_start, blocks = ctx.saved_tensors
    grads = reference_backward_op(grad_out, *inputs, cu_seqlens, cu_seqlens_k, q_start, blocks, ctx.geometry, ctx.scale)
    return *grads, None, None, None, None, None, None


@torch.library.custom_op("nsa_transformer::attention_reference_backward", mutates_args=())
def reference_backward_op(
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


@reference_backward_op.register_fake
def _(grad_out, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, cu_seqlens, cu_seqlens_k, q_start, blocks, geometry, scale):
    return tuple(torch.empty_like(x) for x in (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates))


reference_op.register_autograd(_backward, setup_context=_save_for_backward)


# ------------------------------------------------------------------------------------------------------ the Triton pipeline


@torch.library.custom_op("nsa_transformer::attention_triton", mutates_args=())
def triton_op(
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
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and blocks; with `save`, for the backward, each branch's output [3, T, Hq, Dv] and log-sum-exp [3, T, Hq] (float32 [3, T, Hq, 2], in two parts),
    else empty."""
    from nsa_transformer.kernels.triton import attention

    config = _config(geometry)
    blocks = _checked_blocks(q, k_slc, k_cmp, cu_seqlens, cu_seqlens_k, q_start, blocks, config)
    boundaries = (cu_seqlens.contiguous(), cu_seqlens_k.contiguous(), q_start.contiguous())
    with torch.cuda.device_of(q):
        return attention.forward(q, (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win), gates, *boundaries, blocks, config, scale, save)


@triton_op.register_fake
def _(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, cu_seqlens, cu_seqlens_k, q_start, blocks, geometry, scale, save):
    width = geometry[3] if blocks is None else blocks.shape[-1]
    shape = (q.shape[0], q.shape[1], v_cmp.shape[-1])
    used = q.new_empty(q.shape[0], k_slc.shape[1], width, dtype=torch.int32)
    parts = (2,) if q.dtype == torch.float32 else ()
    outs, lse = ((3, *shape), (3, *shape[:2], *parts)) if save else ((0,), (0,))
    return q.new_empty(shape), used, q.new_empty(outs), q.new_empty(lse, dtype=torch.float32)


def _save_for_triton(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.geometry, ctx.scale, ctx.save = inputs
    _, blocks, outs, lse = output
    ctx.save_for_backward(*tensors[:11], blocks, outs, lse)
    ctx.set_materialize_grads(False)  # or `outs` would get a gradient of zeros as large as itself


def _backward_triton(ctx: Any, grad_out: Tensor | None, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 15
    assert ctx.save, "the forward ran without gradients"
    return *triton_backward_op(grad_out, *ctx.saved_tensors, ctx.geometry, ctx.scale), *[None] * 7


@torch.library.custom_op("nsa_transformer::attention_triton_backward", mutates_args=())
def triton_backward_op(
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
    outs: Tensor,
    lse: Tensor,
    geometry: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from nsa_transformer.kernels.triton import attention

    keys_values = (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)
    boundaries = (cu_seqlens.contiguous(), cu_seqlens_k.contiguous(), q_start.contiguous())
    with torch.cuda.device_of(q):
        grads = attention.backward(grad_out, q, keys_values, gates, *boundaries, blocks, outs, lse, _config(geometry), scale)
    return grads  # type: ignore[return-value]


@triton_backward_op.register_fake
def _(grad_out, q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, cu_seqlens, cu_seqlens_k, q_start, blocks, outs, lse, geometry, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates))


triton_op.register_autograd(_backward_triton, setup_context=_save_for_triton)
