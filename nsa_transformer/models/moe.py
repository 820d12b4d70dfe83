"""Mixture-of-experts layer in the manner of DeepSeekMoE (arXiv 2401.06066): shared experts that every token visits, and
fine-grained routed ones, balanced without an auxiliary loss by a bias on the routing scores (arXiv 2408.15664)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_transformer.config import MoEConfig
from nsa_transformer.kernels import experts, few_rows

# Takes `experts`, w13 and w2, and returns what the experts make of tokens that were dispatched, [T, hidden].
Arrive = Callable[[Callable[..., Tensor], Tensor, Tensor], Tensor]


class MLP(nn.Module):
    """SwiGLU, `[T, hidden]` to `[T, hidden]`."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


@dataclass(frozen=True)
class RouterStatistics:
    """What one pass through a layer says of its router.

    load       int64 [E], visits of real tokens to each expert
    auxiliary  float32 scalar, the weighted sequence and z losses, summed over real tokens
    share      float32 [E], each expert's part of a token's scores, summed over real tokens, for `global_balance_loss`; None where that has no weight
    """

    load: Tensor
    auxiliary: Tensor
    share: Tensor | None


def global_balance_loss(share: Tensor, load: Tensor, weight: float) -> Tensor:
    """Balance over all tokens of an optimizer step instead of one document (arXiv 2501.11873): `weight * tokens * sum_i f_i P_i` for each layer, summed.

    Args:
        share: float32 `[layers, E]` of one pass on one rank, with gradient: tokens * P.
        load: int64 `[layers, E]`, visits on all ranks in the passes of the step so far, this one among them. f is E times each expert's part of them.

    Like the other router losses it is summed over tokens: over the passes and ranks of a step it comes to tokens * weight where experts are balanced.
    """
    frequency = load / load.sum(-1, keepdim=True).clamp(min=1) * load.shape[-1]
    return weight * (frequency * share).sum()


def load_statistics(load: Tensor) -> dict[str, Any]:
    """What a metrics row says of the visits to each expert, int64 [MoE layers, E], of a step.

    Of the least balanced layer the busiest expert over the mean, and the entropy of the shares over that of even ones (1: even, 0: one expert has all); how
    many experts of all layers nobody visited; the same for each layer in `expert_balance`; and each layer's shares in `expert_load`, to five digits.
    """
    load = load.cpu()  # one wait for the device, not one for each number
    share = load.double() / load.sum(-1, keepdim=True).clamp(min=1)
    worst = share.max(-1).values * load.shape[-1]
    entropy = -(share * share.clamp(min=1e-300).log()).sum(-1) / math.log(max(load.shape[-1], 2))
    dead = (load == 0).sum(-1)
    return {
        "expert_load_max_over_mean": float(worst.max()),
        "expert_load_entropy": float(entropy.min()),
        "dead_experts": int(dead.sum()),
        "expert_balance": {"max_over_mean": _rounded(worst), "entropy": _rounded(entropy), "dead": dead.tolist()},
        "expert_load": _rounded(share),
    }


def _rounded(values: Tensor) -> list[Any]:
    return values.round(decimals=5).tolist()


class Router(nn.Module):
    """Scores in float32; the top k by score plus bias, in the best groups where there are groups, weighted by their renormalised scores alone."""

    bias: Tensor

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.register_buffer("bias", torch.zeros(config.num_experts))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `[T, hidden]` to indices int64 `[T, k]`, weights float32 `[T, k]`, logits float32 `[T, E]`."""
        config = self.config
        if not config.forced_balance and few_rows.few_rows(x, self.weight):
            sigmoid = config.score == "sigmoid"
            kinds = {"top_k": config.top_k, "num_groups": config.num_groups, "top_groups": config.top_groups}
            return few_rows.route(x, self.weight, self.bias, **kinds, sigmoid=sigmoid, scaling=config.routed_scaling)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        scores = self._scores(logits)
        indices = self._choose(scores.detach() + self.bias)
        weights = scores.gather(-1, indices)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.config.routed_scaling
        return indices, weights, logits

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.config.score == "sigmoid" else logits.softmax(-1)

    def _choose(self, biased: Tensor) -> Tensor:
        """int64 [T, k] from scores plus bias [T, E]."""
        config = self.config
        if config.forced_balance:
            turn = torch.arange(biased.shape[0] * config.top_k, device=biased.device)
            return (turn % config.num_experts).view(-1, config.top_k)
        if config.num_groups > 1:
            # A group counts by its two best experts (arXiv 2412.19437, section 2.1.2).
            grouped = biased.unflatten(-1, (config.num_groups, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1).topk(config.top_groups, dim=-1).indices
            hidden = torch.ones(grouped.shape[:2], dtype=torch.bool, device=biased.device).scatter_(-1, best, False)
            biased = grouped.masked_fill(hidden[..., None], -torch.inf).flatten(1)
        return biased.topk(config.top_k, dim=-1).indices

    def statistics(self, logits: Tensor, indices: Tensor, document: Tensor, num_documents: int, valid: Tensor | None) -> RouterStatistics:
        """Load, sequence-wise balance loss (arXiv 2412.19437, equations 17–20; a sequence is a document), z-loss (arXiv 2202.08906) and shares.

        document int64 `[T]`; valid bool `[T]`, False for padding, None for no padding.
        """
        config = self.config
        chosen = torch.zeros_like(logits).scatter_(-1, indices, 1.0)
        if valid is not None:
            chosen = chosen * valid[:, None]
        auxiliary, share, summed = logits.new_zeros(()), None, None
        if (config.sequence_loss_weight or config.global_loss_weight) and torch.is_grad_enabled():
            scores = self._scores(logits)
            share = scores / scores.sum(-1, keepdim=True)
            if valid is not None:
                share = share * valid[:, None]
        if config.global_loss_weight and share is not None:
            summed = share.sum(0)
        if config.sequence_loss_weight and share is not None:
            shape = (num_documents, config.num_experts)
            visits = chosen.new_zeros(shape).index_add_(0, document, chosen)
            shares = share.new_zeros(shape).index_add(0, document, share)
            tokens = visits.sum(-1, keepdim=True).clamp(min=1.0) / config.top_k
            # tokens * sum_i f_i P_i, with f = visits * E / (k * tokens) and P = shares / tokens
            auxiliary = auxiliary + config.sequence_loss_weight * (visits * shares / tokens).sum() * config.num_experts / config.top_k
        if config.z_loss_weight and torch.is_grad_enabled():
            z = logits.logsumexp(-1).square()
            auxiliary = auxiliary + config.z_loss_weight * (z if valid is None else z * valid).sum()
        return RouterStatistics(chosen.detach().sum(0).long(), auxiliary, summed)

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """Once per optimizer step, from the load `[E]` of the whole step over all ranks: overloaded experts down, the others up."""
        load = load.float()
        self.bias += self.config.bias_update_rate * torch.sign(load.mean() - load)
        self.bias -= self.bias.mean()


class MixtureOfExperts(nn.Module):
    """Experts stored stacked: `w13` `[E, 2I, H]` (gate rows, then up) and `w2` `[E, H, I]`."""

    def __init__(self, hidden_size: int, config: MoEConfig) -> None:
        super().__init__()
        self.router = Router(hidden_size, config)
        self.w13 = nn.Parameter(torch.empty(config.num_experts, 2 * config.expert_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(config.num_experts, hidden_size, config.expert_size))
        self.shared = MLP(hidden_size, config.num_shared_experts * config.expert_size) if config.num_shared_experts else None
        self.experts: Callable[..., Tensor] = experts
        # How tokens get to their experts: expert parallelism puts itself in here.
        self.dispatch: Callable[[Tensor, Tensor, Tensor], Arrive] = _stay
        for parameter in (self.w13, self.w2):
            nn.init.normal_(parameter, std=0.02)

    def forward(
        self, x: Tensor, document: Tensor, num_documents: int, valid: Tensor | None = None, count: bool = True
    ) -> tuple[Tensor, RouterStatistics | None]:
        """x `[T, hidden]`; document int64 `[T]`; valid bool `[T]`: padding is computed but not counted. Statistics with `count` alone."""
        indices, weights, logits = self.router(x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        arrive = self.dispatch(x.to(dtype), indices, weights)
        # Where tokens travel, this is done meanwhile; and what the backward needs of it stands before the way back, which then is not recomputed.
        shared = None if self.shared is None else self.shared(x)
        statistics = self.router.statistics(logits, indices, document, num_documents, valid) if count else None
        y = arrive(self.experts, self.w13.to(dtype), self.w2.to(dtype))
        return y if shared is None else y + shared, statistics


def _stay(x: Tensor, indices: Tensor, weights: Tensor) -> Arrive:
    return lambda experts, w13, w2: experts(x, indices, weights, w13, w2)
