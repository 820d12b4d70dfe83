"""`experts`: a mixture of SwiGLU experts over routed tokens, without dropping any.

Backends: `reference`, a loop over experts in plain autograd (float64-capable, judges the others); `torch`, grouped matrix products; and `triton`, kernels
with gather and SwiGLU in the products (`kernels/triton/experts.py`), and others for the few rows of decoding, without gradients
(`kernels/triton/experts_decode.py`). The latter two have a backward of their own that saves only the input, the pre-activations and the routing.

Shape letters: T tokens, K experts per token, R = T * K routed rows sorted by expert, E experts, I expert width, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_transformer.kernels import dispatch

EXPERT_BACKENDS = ("reference", "torch", "triton")


def experts(x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, backend: str = "auto") -> Tensor:
    """`y[t] = sum_k weights[t, k] * w2[e] @ (silu(gate) * up)` with `gate, up = w13[e] @ x[t]` and `e = indices[t, k]`.

    Args:
        x: `[T, H]`, bf16, fp16, fp32 or fp64.
        indices: int64 or int32 `[T, K]`, experts of each token, in `0 … E - 1` (checked on CPU tensors).
        weights: `[T, K]`, x's dtype or float32.
        w13: `[E, 2I, H]`, gate rows first, then up. w2: `[E, H, I]`. Both in x's dtype.
        backend: `auto` (`triton` for bf16 and fp16 on an NVIDIA GPU wherever its kernels take the inputs, else `torch`), `torch`, `triton` (also fp32, and on
            CPU tensors under TRITON_INTERPRET) or `reference`.

    Returns:
        `[T, H]` in x's dtype; rows are summed in float32 (float64 for float64 inputs).

    Raises:
        ValueError: naming the argument, what it was and what would do.
    """
    if backend not in ("auto", *EXPERT_BACKENDS):
        because = f": {dispatch.CUDA_COMPUTES}" if backend == "cuda" else ""
        raise ValueError(f"backend={backend!r} is not available here{because}; write one of auto, {', '.join(EXPERT_BACKENDS)}")
    _check(x, indices, weights, w13, w2)
    if backend == "auto":
        backend = _auto(x, w2)
    if backend == "triton":
        refusal = _kernels_refuse(x, w2)
        if refusal is not None:
            raise ValueError(f"backend='triton' does not take these inputs: {refusal}; write backend='auto' or 'reference'")
        save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, w13, w2))
        return _triton(x, indices, weights, w13, w2, save)[0]
    indices = indices.long()
    if backend == "reference":
        return _reference(x, indices, weights, w13, w2)
    return _grouped(x, indices, weights, w13, w2)[0]


def _auto(x: Tensor, w2: Tensor) -> str:
    # float32 products run on the ordinary cores, where cuBLAS is faster than our tiles.
    fast = x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16) and _kernels_refuse(x, w2) is None
    return "triton" if fast else "torch"


def wait_for_device(x: Tensor, w2: Tensor) -> bool:
    """Whether `experts` with `backend="auto"` may read on the host what the device computes, so that no CUDA graph can be made of it; x of any length."""
    return _auto(x, w2) != "triton"


def _reference(x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    _check_values(indices, w13.shape[0])
    out = torch.zeros(x.shape, dtype=_accumulator(x), device=x.device)
    for expert in range(w13.shape[0]):
        token, place = torch.where(indices == expert)
        gate, up = (x[token] @ w13[expert].mT).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ w2[expert].mT
        out = out.index_add(0, token, y.to(out.dtype) * weights[token, place, None].to(out.dtype))
    return out.to(x.dtype)


# ------------------------------------------------------------------------------------------------------------ grouped matmul
# An operator of its own, so that selective activation checkpointing can keep its outputs, the pre-activations among them.


@torch.library.custom_op("nsa_transformer::experts_grouped", mutates_args=())
def _grouped(x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """The output [T, H] and the pre-activations [R, 2I] in expert order."""
    _check_values(indices, w13.shape[0])
    order, offsets = _sort(indices, w13.shape[0])
    hidden = _product(x[order // indices.shape[1]], w13.mT, offsets)
    y = _product(_swiglu(hidden), w2.mT, offsets)
    return _sum_rows(y, order, weights, x.dtype), hidden


@_grouped.register_fake
def _(x, indices, weights, w13, w2):
    return torch.empty_like(x), x.new_empty(indices.numel(), w13.shape[1])


@torch.library.custom_op("nsa_transformer::experts_grouped_backward", mutates_args=())
def _grouped_backward(
    grad: Tensor, x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order, offsets = _sort(indices, w13.shape[0])
    token = order // indices.shape[1]
    accumulator = _accumulator(x)
    weight = weights.flatten()[order, None].to(accumulator)
    grad_rows = grad.contiguous()[token]
    activation = _swiglu(hidden)
    # <dy, w2 a> = <w2^T dy, a>: the routing weight's gradient without keeping the second product's output.
    grad_activation = _product(grad_rows, w2, offsets)
    grad_weight = torch.empty(order.shape[0], dtype=accumulator, device=x.device)
    grad_weight[order] = (grad_activation.to(accumulator) * activation.to(accumulator)).sum(-1)
    gate, up = hidden.to(accumulator).chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    scaled = grad_activation.to(accumulator) * weight
    grad_gate = scaled * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_hidden = torch.cat([grad_gate, scaled * gate * sigmoid], dim=-1).to(x.dtype)
    grad_w2 = _outer((grad_rows.to(accumulator) * weight).to(x.dtype), activation, offsets)
    grad_w13 = _outer(grad_hidden, x[token], offsets)
    grad_x = _sum_rows(_product(grad_hidden, w13, offsets), order, torch.ones_like(weights), x.dtype)
    return grad_x, grad_weight.view(weights.shape).to(weights.dtype), grad_w13.to(w13.dtype), grad_w2.to(w2.dtype)


@_grouped_backward.register_fake
def _(grad, x, indices, weights, w13, w2, hidden):
    return torch.empty_like(x), torch.empty_like(weights), torch.empty_like(w13), torch.empty_like(w2)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad: Tensor, _grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
    x, indices, weights, w13, w2, hidden = ctx.saved_tensors
    grad_x, grad_weights, grad_w13, grad_w2 = _grouped_backward(grad, x, indices, weights, w13, w2, hidden)
    return grad_x, None, grad_weights, grad_w13, grad_w2


_grouped.register_autograd(_backward, setup_context=_save_for_backward)


# ------------------------------------------------------------------------------------------------------------------ triton


def _kernels_refuse(x: Tensor, w2: Tensor) -> str | None:
    """Why the Triton kernels do not take these inputs, as a phrase; None if they do."""
    refusal = dispatch.device_refuses(x, "x")
    if refusal is not None:
        return refusal
    least = 16 // x.element_size()
    if x.shape[1] % least or w2.shape[2] % least:
        return f"hidden width {x.shape[1]} and expert width {w2.shape[2]} are not both multiples of {least}, 16 bytes"
    return None


@torch.library.custom_op("nsa_transformer::experts_triton", mutates_args=())
def _triton(x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output [T, H]; with `save` the pre-activations [R, 2I] in expert order and the routing, order int64 [R] and offsets int32 [E + 1]; else none."""
    from nsa_transformer.kernels.triton import experts as kernels
    from nsa_transformer.kernels.triton import experts_decode

    _check_values(indices, w13.shape[0])
    nothing = (x.new_empty(0, w13.shape[1]), indices.new_empty(0, dtype=torch.int64), indices.new_empty(0, dtype=torch.int32))
    with torch.cuda.device_of(x):
        if not save and indices.numel() <= experts_decode.MAX_ROWS:
            return experts_decode.forward(x, indices, weights, w13, w2), *nothing
        out, hidden, routing = kernels.forward(x, indices, weights, w13, w2, save)
    return (out, hidden, routing.order, routing.offsets) if save else (out, *nothing)


@_triton.register_fake
def _(x, indices, weights, w13, w2, save):
    rows, starts = (indices.numel(), w13.shape[0] + 1) if save else (0, 0)
    order, offsets = indices.new_empty(rows, dtype=torch.int64), indices.new_empty(starts, dtype=torch.int32)
    return x.new_empty(x.shape), x.new_empty(rows, w13.shape[1]), order, offsets


@torch.library.custom_op("nsa_transformer::experts_triton_backward", mutates_args=())
def _triton_backward(
    grad: Tensor, x: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, hidden: Tensor, order: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from nsa_transformer.kernels.triton import experts as kernels

    with torch.cuda.device_of(x):
        return kernels.backward(grad, x, weights, w13, w2, hidden, order, offsets)


@_triton_backward.register_fake
def _(grad, x, weights, w13, w2, hidden, order, offsets):
    return tuple(t.new_empty(t.shape) for t in (x, weights, w13, w2))


def _save_for_triton(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, weights, w13, w2, ctx.save = inputs
    ctx.save_for_backward(x, weights, w13, w2, *output[1:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # or `hidden` would get a gradient of zeros as large as itself


def _backward_triton(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    assert ctx.save, "the forward ran without gradients"
    grad_x, grad_weights, grad_w13, grad_w2 = _triton_backward(grad, *ctx.saved_tensors)
    return grad_x, None, grad_weights, grad_w13, grad_w2, None


_triton.register_autograd(_backward_triton, setup_context=_save_for_triton)


# ------------------------------------------------------------------------------------------------------------------ shared


def _sort(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Routed rows in expert order, stable, as flat positions [R]; and each expert's end among them, int32 [E]."""
    flat = indices.flatten()
    counts = torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    return flat.argsort(stable=True), counts.cumsum(0).to(torch.int32)


def _swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.to(_accumulator(hidden)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(hidden.dtype)


def _product(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """[R, A] times each row's expert's [A, B]: [R, B]."""
    if _native(rows, matrices.shape[2]):
        return F.grouped_mm(rows, matrices, offs=offsets)
    out = rows.new_empty(rows.shape[0], matrices.shape[2])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        torch.mm(rows[start:end], matrices[expert], out=out[start:end])
        start = end
    return out


def _outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Each expert's rows [R, A] and [R, B] as left^T right: [E, A, B], zero for an expert without rows."""
    if _native(left, right.shape[1]):
        return F.grouped_mm(left.mT, right, offs=offsets)
    out = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(left[start:end].mT, right[start:end], out=out[expert])
        start = end
    return out


def _native(rows: Tensor, width: int) -> bool:
    """torch's grouped kernel takes bf16 on CUDA, with rows that begin at multiples of 16 bytes. Elsewhere it is one product per
    expert, which reads the offsets on the host."""
    return rows.device.type == "cuda" and rows.dtype == torch.bfloat16 and rows.shape[1] % 8 == 0 and width % 8 == 0


def _sum_rows(rows: Tensor, order: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Back from expert order: each token's K rows, weighted and summed. A gather, so the order of the sum is fixed."""
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    each = rows[place].unflatten(0, weights.shape).to(_accumulator(rows))
    return (each * weights.to(each.dtype)[..., None]).sum(1).to(dtype)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> None:
    for name, tensor, axes in (("x", x, 2), ("indices", indices, 2), ("weights", weights, 2), ("w13", w13, 3), ("w2", w2, 3)):
        if not isinstance(tensor, Tensor) or tensor.dim() != axes:
            was = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} has {was}; give a tensor of {axes} axes")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}; move it there")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"x has dtype {x.dtype}; give bfloat16, float16, float32 or float64")
    for name, tensor in (("w13", w13), ("w2", w2)):
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype} but x has {x.dtype}; give {x.dtype}")
    if weights.dtype not in (x.dtype, torch.float32):
        raise ValueError(f"weights has dtype {weights.dtype}; give {x.dtype} or torch.float32")
    if indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"indices has dtype {indices.dtype}; give int64 or int32")
    tokens, hidden = x.shape
    num_experts, rows, _ = w13.shape
    if w13.shape[2] != hidden or rows % 2:
        raise ValueError(f"w13 has shape {list(w13.shape)}; give [experts, 2 * width, {hidden}], gate rows then up rows")
    if tuple(w2.shape) != (num_experts, hidden, rows // 2):
        raise ValueError(f"w2 has shape {list(w2.shape)}; w13 and x ask for {[num_experts, hidden, rows // 2]}")
    if indices.shape[0] != tokens or indices.shape[1] < 1:
        raise ValueError(f"indices has shape {list(indices.shape)}; give [{tokens}, top_k]")
    if weights.shape != indices.shape:
        raise ValueError(f"weights has shape {list(weights.shape)}; give indices' {list(indices.shape)}")


def _check_values(indices: Tensor, num_experts: int) -> None:
    """On the CPU alone, and inside the backends: at the door torch.compile would break its graph to read the values."""
    if indices.device.type == "cpu" and indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < num_experts):
        raise ValueError(f"indices holds {int(indices.min())} … {int(indices.max())}; experts are 0 … {num_experts - 1}")
