"""`compress_blocks`: φ of equation 7, the l keys (and values) of a block, one block every d tokens, become one.

Backends: `reference` gathers every block, in plain autograd (float64-capable, judges the other). `triton` never makes the blocks, which
overlap and so would be l / d times the size of k: a mean is summed straight from the tokens, and the first product of the MLP is split into
the l / d products of d tokens each, of which every token takes part in exactly one input row.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels.dispatch import check_backend_name, choose_backend


class CompressionWeights(NamedTuple):
    """Parameters of the MLP for heads of width D, shared by the heads: `down @ silu(up @ flatten(block + position))`.

    position `[l, D]`, up `[hidden, l * D]`, down `[D, hidden]`.
    """

    position: Tensor
    up: Tensor
    down: Tensor


def compress_blocks(
    k: Tensor,
    v: Tensor,
    config: NSAConfig,
    *,
    weights: tuple[CompressionWeights, CompressionWeights] | None = None,
    cu_seqlens: Tensor | None = None,
    rows: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compressed keys and values of packed documents (arXiv 2502.11089, equation 7): block i of a document stands for its tokens `[i*d, i*d + l)`.

    Args:
        k, v: `[T, Hkv, Dk]`, `[T, Hkv, Dv]`, keys not yet rotated.
        config: the geometry, and `compression`, the kind of φ.
        weights: of k's and v's MLP where `compression="mlp"`; None for `mean`.
        cu_seqlens: int32 `[num_docs + 1]`, boundaries of the documents, from 0 to T; None: one document.
        rows: what `block_rows` gave for these documents, for callers that have many layers; only the reference reads it, and gives as many rows.
        backend: as for `nsa_attention`, with k in q's place.

    Returns:
        `[T // d, Hkv, Dk]`, `[T // d, Hkv, Dv]`: documents one after the other, `max(0, (len - l) // d + 1)` rows each. Rows past their sum are finite and
        mean nothing; their gradient must be zero, as `nsa_attention` gives it.

    Raises:
        ValueError: naming the argument, what it was and what would do. The values of `cu_seqlens` are checked on CPU tensors, and everywhere
            under `NSA_CHECK=1`.
    """
    check_backend_name(backend)
    _check(k, v, config, weights, cu_seqlens)
    cu_seqlens = torch.tensor([0, k.shape[0]], dtype=torch.int32, device=k.device) if cu_seqlens is None else cu_seqlens
    if choose_backend(backend, k, v, config, "k") == "reference":
        if rows is None:
            if not torch.compiler.is_compiling():  # reading the values would break the graph
                _check_values(cu_seqlens, k.shape[0])
            rows = block_rows(cu_seqlens, k.shape[0], config)[0]
        return _reference(k, rows, weights and weights[0]), _reference(v, rows, weights and weights[1])
    geometry = config.compress_block, config.compress_stride
    if weights is None:
        return mean_op(k, v, cu_seqlens, *geometry)[:2]
    # One product gives, for every chunk of d tokens, its share in each of the l / d blocks that it belongs to; the position embedding is a block
    # more, whose shares add up to the bias that it is.
    chunks_k, chunks_v, plan = split_op(k, v, weights[0].position, weights[1].position, cu_seqlens, *geometry)
    shares = (F.linear(x, w.up.reshape(-1, x.shape[1])) for x, w in zip((chunks_k, chunks_v), weights, strict=True))
    hidden_k, hidden_v, _, _ = combine_op(*shares, plan, k.shape[0] // geometry[1], k.shape[1], geometry[0] // geometry[1])
    return F.linear(hidden_k, weights[0].down), F.linear(hidden_v, weights[1].down)


def _reference(x: Tensor, rows: Tensor, weights: CompressionWeights | None) -> Tensor:
    """x `[T, heads, D]`, rows int64 `[N, l]` into it: `[N, heads, D]`."""
    block = x[rows].transpose(1, 2)  # [N, heads, l, D]
    if weights is None:
        return block.mean(2)
    return F.linear(F.silu(F.linear((block + weights.position.to(x.dtype)).flatten(2), weights.up)), weights.down)


def block_rows(cu_seqlens: Tensor, num_tokens: int, config: NSAConfig) -> tuple[Tensor, Tensor]:
    """Tokens of each compressed block, int64 `[N', l]` with N' = T // d, and the block's index in its document, int64 `[N']`. Rows past the
    documents' blocks point anywhere in the pack. Nothing waits for the device."""
    block, stride = config.compress_block, config.compress_stride
    cu = cu_seqlens.long()
    counts = ((cu.diff() - block).div(stride, rounding_mode="floor") + 1).clamp(min=0)
    ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    document, index = position_in_group(ends, torch.arange(num_tokens // stride, device=cu.device))
    rows = (cu[document] + index * stride)[:, None] + torch.arange(block, device=cu.device)
    return rows.clamp(0, max(num_tokens - 1, 0)), index


def position_in_group(boundaries: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Which group [boundaries[g], boundaries[g + 1]) each index lies in, and where in it; past the end, the last group."""
    group = torch.searchsorted(boundaries[1:].contiguous(), index, right=True).clamp(max=max(len(boundaries) - 2, 0))
    return group, index - boundaries[group]


def _check(k: Tensor, v: Tensor, config: NSAConfig, weights: tuple[CompressionWeights, CompressionWeights] | None, cu_seqlens: Tensor | None) -> None:
    if not isinstance(config, NSAConfig):
        raise ValueError(f"config is {type(config).__name__}; give an NSAConfig")
    for name, x in (("k", k), ("v", v)):
        if x.dim() != 3 or 0 in x.shape[1:]:
            raise ValueError(f"{name} has shape {list(x.shape)}; give [T, heads, width], packed tokens without a batch axis")
    if v.shape[:2] != k.shape[:2] or v.dtype != k.dtype or v.device != k.device:
        raise ValueError(f"v is {v.dtype} {list(v.shape)} on {v.device}; k asks for {k.dtype} [{k.shape[0]}, {k.shape[1]}, Dv] on {k.device}")
    if (weights is None) != (config.compression == "mean"):
        needed = "None" if config.compression == "mean" else "CompressionWeights of k and of v"
        raise ValueError(f"weights is {'None' if weights is None else 'given'}; compression={config.compression!r} takes {needed}")
    for name, x, w in zip(("k", "v"), (k, v), weights or (), strict=False):
        width, block = x.shape[2], config.compress_block
        hidden = w.up.shape[0]
        shapes, wanted = [list(part.shape) for part in w], [[block, width], [hidden, block * width], [width, hidden]]
        if shapes != wanted:
            raise ValueError(f"weights for {name} have shapes {shapes}; position, up and down must be {wanted}")
    if cu_seqlens is not None and (cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.device != k.device):
        was = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens is {was}; give torch.int32 [num_docs + 1] on {k.device}")


def _check_values(cu_seqlens: Tensor, num_tokens: int) -> None:
    if cu_seqlens.device.type != "cpu" and os.environ.get("NSA_CHECK") != "1":
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_tokens or bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise ValueError(f"cu_seqlens is {int(cu_seqlens[0])} … {int(cu_seqlens[-1])}; it must rise from 0 to {num_tokens} without decreasing")


# ---------------------------------------------------------------------------------------------------------- Triton operators
# k and v go through each together, which halves the launches: on short packs those are what φ costs.


def _remember(ctx: Any, output: tuple[Tensor, ...]) -> None:
    """Of the first two outputs; the others have no gradient, and without this would get one of zeros as large as themselves."""
    ctx.set_materialize_grads(False)
    ctx.shapes = [x.shape for x in output[:2]]


def _both(ctx: Any, *grads: Tensor | None) -> list[Tensor]:
    """A loss may know one of the two alone."""
    (known, *_) = (grad for grad in grads if grad is not None)
    return [known.new_zeros(shape) if grad is None else grad for grad, shape in zip(grads, ctx.shapes, strict=True)]


@torch.library.custom_op("nsa_transformer::compress_mean", mutates_args=())
def mean_op(k: Tensor, v: Tensor, cu_seqlens: Tensor, block: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """k_cmp, v_cmp, and the plan, int32 [4, num_docs + 1]."""
    from nsa_transformer.kernels.triton import compress

    _check_values(cu_seqlens, k.shape[0])
    with torch.cuda.device_of(k):
        plan = compress.make_plan(cu_seqlens.contiguous(), block, stride)
        return *compress.mean(k, v, plan, block, stride), plan


@mean_op.register_fake
def _(k, v, cu_seqlens, block, stride):
    return *(x.new_empty(x.shape[0] // stride, *x.shape[1:]) for x in (k, v)), _fake_plan(cu_seqlens)


def _fake_plan(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens.new_empty(4, cu_seqlens.shape[0])


@torch.library.custom_op("nsa_transformer::compress_mean_backward", mutates_args=())
def mean_backward_op(grad_k: Tensor, grad_v: Tensor, plan: Tensor, tokens: int, block: int, stride: int) -> tuple[Tensor, Tensor]:
    from nsa_transformer.kernels.triton import compress

    with torch.cuda.device_of(grad_k):
        return compress.mean_backward(grad_k, grad_v, plan, tokens, block, stride)


@mean_backward_op.register_fake
def _(grad_k, grad_v, plan, tokens, block, stride):
    return tuple(x.new_empty(tokens, *x.shape[1:]) for x in (grad_k, grad_v))


def _save_mean(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _remember(ctx, output)
    ctx.sizes = (inputs[0].shape[0], *inputs[3:])
    ctx.save_for_backward(output[2])


def _backward_mean(ctx: Any, grad_k: Tensor | None, grad_v: Tensor | None, _grad_plan: None) -> tuple[Tensor | None, ...]:
    return *mean_backward_op(*_both(ctx, grad_k, grad_v), *ctx.saved_tensors, *ctx.sizes), None, None, None


mean_op.register_autograd(_backward_mean, setup_context=_save_mean)


@torch.library.custom_op("nsa_transformer::compress_split", mutates_args=())
def split_op(k: Tensor, v: Tensor, position_k: Tensor, position_v: Tensor, cu_seqlens: Tensor, block: int, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """The chunks of d tokens as rows [T // d * heads + l / d, d * D], the last l / d those of the position embedding; of k, of v; and the plan."""
    from nsa_transformer.kernels.triton import compress, compress_mlp

    _check_values(cu_seqlens, k.shape[0])
    with torch.cuda.device_of(k):
        plan = compress.make_plan(cu_seqlens.contiguous(), block, stride)
        return *compress_mlp.split(k, v, position_k, position_v, plan, block, stride), plan


@split_op.register_fake
def _(k, v, position_k, position_v, cu_seqlens, block, stride):
    return *(x.new_empty(x.shape[0] // stride * x.shape[1] + block // stride, stride * x.shape[2]) for x in (k, v)), _fake_plan(cu_seqlens)


@torch.library.custom_op("nsa_transformer::compress_split_backward", mutates_args=())
def split_backward_op(
    grad_k: Tensor, grad_v: Tensor, plan: Tensor, tokens: int, heads: int, block: int, stride: int, dtype_k: torch.dtype, dtype_v: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from nsa_transformer.kernels.triton import compress_mlp

    with torch.cuda.device_of(grad_k):
        return compress_mlp.split_backward(grad_k, grad_v, plan, tokens, heads, block, stride, dtype_k, dtype_v)


@split_backward_op.register_fake
def _(grad_k, grad_v, plan, tokens, heads, block, stride, dtype_k, dtype_v):
    widths = [x.shape[1] // stride for x in (grad_k, grad_v)]
    positions = (grad_k.new_empty(block, width, dtype=dtype) for width, dtype in zip(widths, (dtype_k, dtype_v), strict=True))
    return *(grad_k.new_empty(tokens, heads, width) for width in widths), *positions


def _save_split(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    k, _, position_k, position_v, _, block, stride = inputs
    _remember(ctx, output)
    ctx.sizes = (*k.shape[:2], block, stride, position_k.dtype, position_v.dtype)
    ctx.save_for_backward(output[2])


def _backward_split(ctx: Any, grad_k: Tensor | None, grad_v: Tensor | None, _grad_plan: None) -> tuple[Tensor | None, ...]:
    return *split_backward_op(*_both(ctx, grad_k, grad_v), *ctx.saved_tensors, *ctx.sizes), None, None, None


split_op.register_autograd(_backward_split, setup_context=_save_split)


@torch.library.custom_op("nsa_transformer::compress_combine", mutates_args=())
def combine_op(shares_k: Tensor, shares_v: Tensor, plan: Tensor, rows: int, heads: int, parts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """silu of the blocks' pre-activations, [rows, heads, hidden] of k and of v, from the shares of their chunks; and for the backward the pre-activations."""
    from nsa_transformer.kernels.triton import compress_mlp

    with torch.cuda.device_of(shares_k):
        return compress_mlp.combine(shares_k, shares_v, plan, rows, heads, parts)


@combine_op.register_fake
def _(shares_k, shares_v, plan, rows, heads, parts):
    return tuple(x.new_empty(rows, heads, x.shape[1] // parts) for x in (shares_k, shares_v, shares_k, shares_v))


@torch.library.custom_op("nsa_transformer::compress_combine_backward", mutates_args=())
def combine_backward_op(grad_k: Tensor, grad_v: Tensor, pre_k: Tensor, pre_v: Tensor, plan: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    from nsa_transformer.kernels.triton import compress_mlp

    with torch.cuda.device_of(grad_k):
        return compress_mlp.combine_backward(grad_k, grad_v, pre_k, pre_v, plan, parts)


@combine_backward_op.register_fake
def _(grad_k, grad_v, pre_k, pre_v, plan, parts):
    return tuple(x.new_empty(x.shape[0] * x.shape[1] + parts, x.shape[2] * parts) for x in (pre_k, pre_v))


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _remember(ctx, output)
    ctx.parts = inputs[5]
    ctx.save_for_backward(*output[2:], inputs[2])
    ctx.mark_non_differentiable(*output[2:])


def _backward_combine(ctx: Any, grad_k: Tensor | None, grad_v: Tensor | None, *_others: None) -> tuple[Tensor | None, ...]:
    return *combine_backward_op(*_both(ctx, grad_k, grad_v), *ctx.saved_tensors, ctx.parts), None, None, None, None


combine_op.register_autograd(_backward_combine, setup_context=_save_combine)
