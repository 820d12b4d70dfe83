"""Activation checkpointing: the same gradients, fewer bytes, and only the cheap part computed twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_transformer.memory.activation_checkpointing import apply_activation_checkpointing
from nsa_transformer.models.transformer import Transformer

from ..models.small import random_tokens, small_config, small_model

MODES = ["none", "selective", "full"]
ATTENTIONS = ["nsa", "dense", "window"]
TOKENS, TARGETS = random_tokens(128), random_tokens(128, 1)
CU_SEQLENS = torch.tensor([0, 50, 51, 128], dtype=torch.int32)


def build(mode: str, **changes: Any) -> Transformer:
    model = small_model(small_config(num_layers=3, **changes))
    apply_activation_checkpointing(model, mode)
    return model


def step(model: Transformer, bf16: bool = False) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(TOKENS, CU_SEQLENS, targets=TARGETS)
    (out.loss + out.auxiliary).backward()
    return out.loss


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradients_are_the_same_bits(attention: str, bf16: bool):
    results = []
    for mode in MODES:
        model = build(mode, attention=attention)
        loss = step(model, bf16)
        results.append({"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()})
    for mode, result in zip(MODES[1:], results[1:], strict=True):
        for name, value in results[0].items():
            assert torch.equal(result[name], value), (mode, name)


class OperatorCount(TorchDispatchMode):
    """How often each operator ran, what is recomputed included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.name().split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def operators(mode: str, **changes: Any) -> Counter[str]:
    model = build(mode, **changes)
    with OperatorCount() as count:
        step(model)
    return count.calls


def test_selective_recomputes_neither_attention_nor_experts():
    """Three layers, two of them with experts."""
    calls = {mode: operators(mode) for mode in MODES}
    for mode in ("none", "selective"):
        assert calls[mode]["attention_reference"] == 3 and calls[mode]["experts_grouped"] == 2, mode
    assert calls["full"]["attention_reference"] == 6 and calls["full"]["experts_grouped"] == 4
    for mode in MODES:
        assert calls[mode]["attention_reference_backward"] == 3 and calls[mode]["experts_grouped_backward"] == 2
        assert calls[mode]["topk"] == 2, "which experts were chosen is kept, not chosen again"
    assert calls["none"]["mm"] < calls["selective"]["mm"], "the projections are recomputed"


@pytest.mark.parametrize("changes", [{"attention": "dense"}, {"attention": "window"}], ids=str)
def test_selective_does_not_recompute_torchs_attention(changes: dict[str, Any]):
    def attentions(mode: str) -> int:
        return sum(n for name, n in operators(mode, **changes).items() if "scaled_dot_product" in name and "backward" not in name)

    assert attentions("none") == attentions("selective") > 0
    assert attentions("full") == 2 * attentions("none")


def test_selective_holds_less_than_none_and_full_less_than_selective():
    def held(mode: str) -> int:
        """Bytes allocated and not freed during the forward, by the allocator's own record."""
        model = build(mode)
        step(model)
        model.zero_grad(set_to_none=True)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            out = model(TOKENS, CU_SEQLENS, targets=TARGETS)
        assert out.loss.requires_grad
        return sum(event.self_cpu_memory_usage for event in profiler.key_averages())

    sizes = {mode: held(mode) for mode in MODES}
    assert sizes["selective"] < 0.8 * sizes["none"], sizes
    assert sizes["full"] < 0.6 * sizes["selective"], sizes


@pytest.mark.parametrize("mode", MODES)
def test_no_recomputation_without_gradients(mode: str):
    model = build(mode)
    with torch.no_grad(), OperatorCount() as count:
        logits = model(TOKENS, CU_SEQLENS)
    assert count.calls["attention_reference"] == 3
    torch.testing.assert_close(logits, build("none")(TOKENS, CU_SEQLENS).detach(), rtol=0, atol=0)


def test_decoding_with_a_cache_is_not_disturbed():
    model = build("full")
    cache = model.new_cache()
    with torch.no_grad():
        logits = torch.cat([model(TOKENS[i : i + 1], cache=cache) for i in range(20)])
        torch.testing.assert_close(logits, model(TOKENS[:20]), rtol=1e-4, atol=1e-4)
