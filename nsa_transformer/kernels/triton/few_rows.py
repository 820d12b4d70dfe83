"""Layers of a step of decoding that plain PyTorch computes in many kernels: a launch costs 2 to 3 µs, whatever a few rows take.

    router_logits   a program per token and strip of experts: x and the router's weights in float32
    choose_experts  a program per token: scores, groups, the k best, their weights
    gates           a program per token and strip of gates: silu, product, bias, sigmoid

No gradients, and nothing waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_transformer.kernels.triton.expert_kernels import silu

STRIP = 4  # outputs of a program: of a row of 1,024 in 16 bits, 8 KB to stream
DEPTH = 512  # of a row at once


@triton.jit
def _products(x, row, stride, weight, outputs, depth, STRIP: tl.constexpr, DEPTH: tl.constexpr, ACTIVATED: tl.constexpr):
    """Row `row` of x [T, depth], `stride` apart, with STRIP rows of weight [outputs, depth], float32 [STRIP]; x goes through silu where ACTIVATED."""
    output = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    column = tl.arange(0, DEPTH)
    total = tl.zeros((STRIP, DEPTH), tl.float32)
    for start in range(0, depth, DEPTH):
        inside = start + column < depth
        value = tl.load(x + row * stride + start + column, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATED:
            value = silu(value)
        at = output.to(tl.int64)[:, None] * depth + (start + column)[None, :]
        total += value[None, :] * tl.load(weight + at, mask=(output < outputs)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return output, tl.sum(total, axis=1)


@triton.jit(repr=lambda _: "router_logits")
def router_logits(x, stride, weight, logits, experts, depth, STRIP: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    expert, value = _products(x, row, stride, weight, experts, depth, STRIP, DEPTH, False)
    tl.store(logits + row * experts + expert, value, mask=expert < experts)


@triton.jit
def _best(values, place):
    """The first of the largest values and its place; numbers that are not are never larger."""
    largest = tl.max(values, axis=0)
    return largest, tl.min(tl.where(values == largest, place, place.shape[0]), axis=0)


@triton.jit(repr=lambda _: "choose_experts")
def choose_experts(
    logits, bias, indices, weights, scaling,
    E: tl.constexpr, PADDED: tl.constexpr, K: tl.constexpr, PADDED_K: tl.constexpr, GROUPS: tl.constexpr, PADDED_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr,
    SIGMOID: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, PADDED)
    inside = expert < E
    logit = tl.load(logits + row * E + expert, mask=inside, other=-float("inf"))
    if SIGMOID:
        score = tl.where(inside, tl.sigmoid(logit), 0.0)
    else:
        power = tl.exp(logit - tl.max(logit, axis=0))
        score = power / tl.sum(power, axis=0)
    biased = score + tl.load(bias + expert, mask=inside, other=0.0)
    # Whatever is not a number comes last, so that no index lies outside.
    biased = tl.where(inside & (biased == biased), biased, -float("inf"))
    if GROUPS > 1:
        SIZE: tl.constexpr = E // GROUPS
        group = tl.arange(0, PADDED_GROUPS)
        sums = tl.full((PADDED_GROUPS,), -float("inf"), tl.float32)
        for number in tl.static_range(GROUPS):
            members = tl.where(inside & (expert // SIZE == number), biased, -float("inf"))
            first, place = _best(members, expert)
            if SIZE > 1:
                first += tl.max(tl.where(expert == place, -float("inf"), members), axis=0)
            sums = tl.where(group == number, first, sums)
        kept = expert < 0
        for _ in tl.static_range(TOP_GROUPS):
            _, place = _best(sums, group)
            kept = kept | (expert // SIZE == place)
            sums = tl.where(group == place, -float("inf"), sums)
        biased = tl.where(kept, biased, -float("inf"))
    turn = tl.arange(0, PADDED_K)
    chosen = tl.zeros((PADDED_K,), tl.int32)
    weight = tl.zeros((PADDED_K,), tl.float32)
    left = inside
    for number in tl.static_range(K):
        # Among those left, so that no expert is chosen twice where nothing is a number.
        _, place = _best(tl.where(left, tl.maximum(biased, -3.0e38), -float("inf")), expert)
        left = left & (expert != place)
        chosen = tl.where(turn == number, place, chosen)
        weight = tl.where(turn == number, tl.sum(tl.where(expert == place, score, 0.0), axis=0), weight)
    weight = weight / (tl.sum(weight, axis=0) + 1e-20) * scaling
    tl.store(indices + row * K + turn, chosen.to(tl.int64), mask=turn < K)
    tl.store(weights + row * K + turn, weight, mask=turn < K)


@triton.jit(repr=lambda _: "gates_of_rows")
def gates_kernel(hidden, stride, weight, bias, out, gates, depth, STRIP: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    gate, value = _products(hidden, row, stride, weight, gates, depth, STRIP, DEPTH, True)
    value += tl.load(bias + gate, mask=gate < gates, other=0.0).to(tl.float32)
    tl.store(out + row * gates + gate, tl.sigmoid(value), mask=gate < gates)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def route(
    x: Tensor, weight: Tensor, bias: Tensor, top_k: int, num_groups: int, top_groups: int, sigmoid: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.few_rows.route`."""
    tokens, depth = x.shape
    experts = weight.shape[0]
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    indices = torch.empty(tokens, top_k, dtype=torch.int64, device=x.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    if tokens:
        grid = (triton.cdiv(experts, STRIP), tokens)
        x = _rows(x)
        router_logits[grid](x, x.stride(0), weight.contiguous(), logits, experts, depth, STRIP, DEPTH, num_warps=4)
        # A whole warp at least, so that no lane holds what another one has.
        padded_experts, padded_k, padded_groups = (max(32, triton.next_power_of_2(n)) for n in (experts, top_k, num_groups))
        choose_experts[(tokens,)](
            logits, bias, indices, weights, scaling, experts, padded_experts, top_k, padded_k, num_groups, padded_groups, top_groups, sigmoid, num_warps=1
        )
    return indices, weights, logits


def gates(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `kernels.few_rows.gates`."""
    tokens, depth = hidden.shape
    out = torch.empty(tokens, weight.shape[0], dtype=torch.float32, device=hidden.device)
    if tokens:
        grid = (triton.cdiv(weight.shape[0], STRIP), tokens)
        hidden = _rows(hidden)
        gates_kernel[grid](hidden, hidden.stride(0), weight.contiguous(), bias, out, weight.shape[0], depth, STRIP, DEPTH, num_warps=4)
    return out
