"""What the attention is measured against: torch's dense attention, and other packages of sparse attention where they are installed."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks.gate import Inputs
from benchmarks.timing import Call

DENSE = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION}
WAYS = ("", "keys and values repeated for every query head", "values padded to the keys' width", "keys and values repeated, values padded")
PROBE = 256  # tokens on which it is tried which way a backend takes


def forward_and_backward(forward: Callable[..., Tensor], leaves: tuple[Tensor, ...] | list[Tensor], grad: Tensor) -> Call:
    return lambda: torch.autograd.grad(forward(*leaves), leaves, grad)


def without_gradients(forward: Callable[..., Tensor], inputs: tuple[Tensor, ...] | list[Tensor]) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return forward(*inputs)

    return call


def dense_calls(backend: SDPBackend, inputs: Inputs, grad: Tensor, backward: bool) -> tuple[dict[str, Call], str]:
    """{"forward", "forward+backward"} of dense causal attention of q with the keys and values of the selected branch; and in which way, in words,
    if not the plain one. A way that the backend refuses on a short piece is passed over. Raises `RuntimeError` where none is left."""
    q, k, v, grad = (x.transpose(0, 1).unsqueeze(0) for x in (inputs[0], inputs[3], inputs[4], grad))
    refusal: RuntimeError | None = None
    for number, way in enumerate(WAYS):
        if (number & 1 and q.shape[1] == k.shape[1]) or (number & 2 and v.shape[-1] >= k.shape[-1]):
            continue
        try:
            pieces = [x[:, :, :PROBE] for x in (q, k, v, grad)]
            with warnings.catch_warnings():  # torch says at length why it refuses
                warnings.simplefilter("ignore")
                for call in _dense(backend, *pieces, way=number, backward=backward).values():
                    call()
        except RuntimeError as error:
            refusal = refusal or error
            continue
        return _dense(backend, q, k, v, grad, way=number, backward=backward), way
    assert refusal is not None
    raise refusal


def _dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *, way: int, backward: bool) -> dict[str, Call]:
    scale = q.shape[-1] ** -0.5
    if way & 1:  # outside of what is timed
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if way & 2:
        width = k.shape[-1] - v.shape[-1]
        v, grad = pad(v, (0, width)), pad(grad, (0, width))
    shared = q.shape[1] != k.shape[1]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=shared)

    calls: dict[str, Call] = {"forward": without_gradients(forward, (q, k, v))}
    if backward:
        calls["forward+backward"] = forward_and_backward(forward, [x.detach().requires_grad_() for x in (q, k, v)], grad)
    return calls


def peers() -> dict[str, Any]:
    """`parallel_nsa` of each installed package that has one, by the package's name."""
    found = {}
    for name, module in (("fla", "fla.ops.nsa"), ("native_sparse_attention", "native_sparse_attention.ops.parallel")):
        try:
            found[name] = importlib.import_module(module).parallel_nsa
        except Exception:  # not installed, or broken: nothing to measure
            continue
    return found


def peer_calls(parallel_nsa: Any, inputs: Inputs, grad: Tensor, config: Any, backward: bool) -> dict[str, Call]:
    """Calls of a package whose compressed keys are means over selection blocks, which is less compression work than l = 32, d = 16."""
    q, k, v = (x.unsqueeze(0) for x in (inputs[0], inputs[3], inputs[4]))
    gates = inputs[7].unsqueeze(0).unbind(-1)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = {"block_counts": config.num_selected, "block_size": config.select_block, "window_size": config.window}
        out = parallel_nsa(q=q, k=k, v=v, g_cmp=gates[0], g_slc=gates[1], g_swa=gates[2], **shape)
        return out[0] if isinstance(out, tuple) else out

    calls: dict[str, Call] = {"forward": without_gradients(forward, (q, k, v))}
    if backward:
        calls["forward+backward"] = forward_and_backward(forward, [x.detach().requires_grad_() for x in (q, k, v)], grad.unsqueeze(0))
    return calls
