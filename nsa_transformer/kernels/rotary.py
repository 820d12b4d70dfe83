"""`rotate`: the rotary position embedding (arXiv 2104.09864) of heads, given each token's cosines and sines.

Backends: `reference`, torch's elementwise operations in plain autograd (float64-capable, judges the other); `triton`, one kernel, which reads and writes x
once and is its own backward with the sines negated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_transformer.kernels.dispatch import check_backend_name, device_refuses


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Tensor:
    """`[a * cos - b * sin, b * cos + a * sin]` of the halves a and b of each head: the first half of D pairs with the second, as in Llama.

    Args:
        x: `[T, heads, D]`, bf16, fp16, fp32 or fp64, D even; of any strides, but `triton` copies it unless the last axis is contiguous.
        cos, sin: float32 `[T, D / 2]`, on x's device. A factor in both scales the result. They get no gradient.
        backend: `reference`; `triton` (not fp64), on an NVIDIA GPU or, under TRITON_INTERPRET, on CPU tensors; `auto`: `triton` on a GPU that takes x,
            else `reference`, which torch.compile gets too, since it fuses the reference with what stands around it.

    Returns:
        `[T, heads, D]` in x's dtype, contiguous; computed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: naming the argument, what it was and what would do.
    """
    check_backend_name(backend)
    _check(x, cos, sin)
    if _choose(backend, x) == "reference":
        return _reference(x, cos, sin)
    return rotate_op(x, cos, sin, False)


def _choose(backend: str, x: Tensor) -> str:
    if backend == "reference" or (backend == "auto" and (x.device.type != "cuda" or torch.compiler.is_compiling())):
        return "reference"
    refusal = device_refuses(x, "x")
    if refusal is None:
        return "triton"
    if backend == "auto":
        return "reference"
    raise ValueError(f"backend='triton' does not take these inputs: {refusal}; write backend='auto' or 'reference'")


def _reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] % 2:
        was = f"of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x is {was}; give [T, heads, D] with an even D, packed tokens without a batch axis")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"x has dtype {x.dtype}; give bfloat16, float16, float32 or float64")
    for name, given in (("cos", cos), ("sin", sin)):
        wanted = (x.shape[0], x.shape[2] // 2)
        if not isinstance(given, Tensor) or tuple(given.shape) != wanted or given.dtype != torch.float32 or given.device != x.device:
            was = f"{given.dtype} {list(given.shape)} on {given.device}" if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"{name} is {was}; x asks for torch.float32 {list(wanted)} on {x.device}")
        if given.requires_grad:
            raise ValueError(f"{name} requires a gradient, and gets none here; give {name}.detach()")


# ----------------------------------------------------------------------------------------------------------- Triton operator


@torch.library.custom_op("nsa_transformer::rotate", mutates_args=())
def rotate_op(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """A head times its matrix [[cos, -sin], [sin, cos]], or times the transposed one, which is the backward."""
    from nsa_transformer.kernels.triton import rotary

    with torch.cuda.device_of(x):
        return rotary.rotate(x, cos, sin, transposed)


@rotate_op.register_fake
def _(x, cos, sin, transposed):
    return x.new_empty(x.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return rotate_op(grad, *ctx.saved_tensors, not ctx.transposed), None, None, None


rotate_op.register_autograd(_backward, setup_context=_save_for_backward)
