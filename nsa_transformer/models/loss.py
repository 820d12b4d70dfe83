"""Cross-entropy whose logits never exist all at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE = -100


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """Negative log-likelihood in nats of each target, float32 `[T]`, 0 where the target is `IGNORE`. Carries no gradient.

    hidden `[T, H]`, weight `[V, H]`, targets int64 `[T]`.
    """
    with torch.no_grad():
        parts = [_chunk(h, weight, t)[0] for h, t in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
    """Sum of `token_losses`, float32 scalar, differentiable in hidden and weight."""
    return _SummedLoss.apply(hidden, weight, targets, chunk_size)


def _chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [t], logits float32 [t, V], and their log-sum-exp [t]."""
    logits = (hidden @ weight.to(hidden.dtype).mT).float()
    log_sum = logits.logsumexp(-1)
    known = targets != IGNORE
    picked = logits.gather(-1, targets.where(known, 0)[:, None]).squeeze(-1)
    return (log_sum - picked).where(known, 0.0), logits, log_sum


class _SummedLoss(torch.autograd.Function):
    """The gradient of each chunk is taken while its logits are at hand; only hidden's and weight's gradients stay."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        kind = hidden.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        cast = weight.to(compute)
        for start in range(0, hidden.shape[0], chunk_size):
            rows = slice(start, start + chunk_size)
            part, target = hidden[rows].to(compute), targets[rows]
            losses, logits, log_sum = _chunk(part, cast, target)
            total += losses.sum()
            known = target != IGNORE
            grad_logits = torch.sub(logits, log_sum[:, None], out=logits).exp_()
            grad_logits.scatter_add_(-1, target.where(known, 0)[:, None], grad_logits.new_full((len(target), 1), -1.0))
            grad_logits = (grad_logits * known[:, None]).to(compute)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ cast
            if grad_weight is not None:
                grad_weight += grad_logits.mT @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * grad.to(grad_weight.dtype),
            None,
            None,
        )
