"""Small layers in few kernels, for the few rows of a step of decoding: the router of a mixture of experts, and the gates of the branches. Without gradients.

Elsewhere `models/moe.py` and `models/attention.py` compute the same in plain PyTorch, which judges this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_transformer.kernels.dispatch import device_refuses

MAX_ROWS = 256  # a program per row and strip streams the weights again for each row; for more, torch's products are less
DEVICES = ("cuda",)  # and not the CPU where Triton interprets its kernels: every small model would wait for that


def few_rows(x: Tensor, *weights: Tensor) -> bool:
    """Whether `route` and `gates` take x `[T, …]`: a few rows, on a device of the kernels, of which nobody wants a gradient."""
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    return (
        not (wanted or torch.compiler.is_compiling())
        and x.shape[0] <= MAX_ROWS
        and x.device.type in DEVICES
        and all(device_refuses(t, "x") is None for t in (x, *weights))
    )


def route(
    x: Tensor, weight: Tensor, bias: Tensor, *, top_k: int, num_groups: int, top_groups: int, sigmoid: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Experts of each token, as `models.moe.Router` chooses them.

    Args:
        x: `[T, H]`. weight: `[E, H]`. bias: float32 `[E]`, for the choice alone.
        top_k: experts of a token. num_groups, top_groups: as in `model.moe`. sigmoid: of the logits, else softmax. scaling: of the weights.

    Returns:
        Indices int64 `[T, top_k]`, best first, each other where scores are equal or are no numbers; weights float32 `[T, top_k]`; logits float32 `[T, E]`.
    """
    from nsa_transformer.kernels.triton import few_rows as kernels

    with torch.cuda.device_of(x):
        return kernels.route(x, weight, bias, top_k, num_groups, top_groups, sigmoid, scaling)


def gates(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`sigmoid(silu(hidden) @ weight.T + bias)`, float32 `[T, N]`; hidden `[T, W]`, weight `[N, W]`, bias `[N]`."""
    from nsa_transformer.kernels.triton import few_rows as kernels

    with torch.cuda.device_of(hidden):
        return kernels.gates(hidden, weight, bias)
