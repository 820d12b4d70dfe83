"""Router and gates of a step of decoding: the kernels against the same layers in plain PyTorch.

Without a GPU the kernels run in Triton's interpreter, in float32 and float16.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsa_transformer.config import MoEConfig
from nsa_transformer.kernels import few_rows
from nsa_transformer.kernels.dispatch import interpreted
from nsa_transformer.models.attention import GateMLP
from nsa_transformer.models.moe import Router

from .judge import poisoned
from .test_triton_gpu import waiting_is_an_error

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (torch.cuda.is_available() or interpreted()), reason="needs Triton's interpreter or a GPU"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
CONFIGS = [
    MoEConfig(num_experts=8, top_k=3, routed_scaling=2.5),
    MoEConfig(num_experts=8, top_k=8, score="softmax"),
    MoEConfig(num_experts=12, top_k=4, num_groups=4, top_groups=2),
    MoEConfig(num_experts=6, top_k=2, num_groups=6, top_groups=3, score="softmax"),
    MoEConfig(num_experts=1, top_k=1),
    MoEConfig(num_experts=70, top_k=6),
]


@pytest.fixture(autouse=True, scope="module")
def _interpreted_too() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "DEVICES", ("cuda", "cpu"))
        yield


def router_of(config: MoEConfig, hidden: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Router:
    generator = torch.Generator().manual_seed(seed)
    router = Router(hidden, config)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * hidden**-0.5)
        router.bias.copy_(torch.randn(router.bias.shape, generator=generator) * 0.1)
    return router.to(dtype).to(DEVICE).requires_grad_(False)


def plainly(layer: Any, x: Tensor) -> Any:
    """What the layer computes without these kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "few_rows", lambda *_: False)
        return layer(x)


def compare(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for tensor, other in zip(found, wanted, strict=True):
        assert tensor.dtype == other.dtype and tensor.shape == other.shape
    torch.testing.assert_close(found[2], wanted[2], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.num_experts} {c.top_k} {c.num_groups} {c.score}")
def test_the_router_chooses_as_in_plain_torch(config: MoEConfig, dtype: torch.dtype) -> None:
    for tokens, hidden in ((1, 20), (5, 600), (0, 8)):
        router = router_of(config, hidden, dtype)
        router.bias = router.bias.float()
        x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).to(DEVICE, dtype)
        with poisoned():
            found = router(x)
        compare(found, plainly(router, x))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_router(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 5))
    experts = groups * data.draw(st.integers(1, 9))
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * (experts // groups)))
    score = data.draw(st.sampled_from(["sigmoid", "softmax"]))
    config = MoEConfig(num_experts=experts, top_k=top_k, num_groups=groups, top_groups=top_groups if groups > 1 else 1, score=score)
    router = router_of(config, 16, seed=data.draw(st.integers(0, 1000)))
    x = torch.randn(data.draw(st.integers(1, 4)), 16, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))).to(DEVICE)
    compare(router(x), plainly(router, x))


def test_equal_scores_and_what_is_not_a_number_choose_each_expert_once() -> None:
    router = router_of(MoEConfig(num_experts=10, top_k=4), 16)
    x = torch.zeros(3, 16, device=DEVICE)
    x[1], x[2, 0] = torch.nan, torch.inf
    router.bias.zero_()
    indices = router(x)[0]
    for row in indices.tolist():
        assert len(set(row)) == 4 and min(row) >= 0 and max(row) < 10
    assert indices[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("heads, hidden, tokens", [(1, 4, 1), (5, 84, 3), (32, 2100, 2)])
def test_gates(heads: int, hidden: int, tokens: int, dtype: torch.dtype) -> None:
    gate = GateMLP(hidden, heads)
    with torch.no_grad():
        gate.down.bias.normal_()
    exact = gate.double()(x := torch.randn(tokens, hidden, dtype=torch.float64))
    gate = gate.to(DEVICE, dtype).requires_grad_(False)
    with poisoned():
        found = gate(x.to(DEVICE, dtype))
    assert found.dtype == torch.float32 and found.shape == (tokens, heads, 3)
    torch.testing.assert_close(found.double().cpu(), exact, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    # Beside float64 of the same rounded numbers: only the sums are float32.
    hidden_rows = torch.randn(tokens, gate.down.weight.shape[1]).to(DEVICE, dtype)
    wanted = torch.nn.functional.linear(torch.nn.functional.silu(hidden_rows.double()), gate.down.weight.double(), gate.down.bias.double()).sigmoid()
    torch.testing.assert_close(few_rows.gates(hidden_rows, gate.down.weight, gate.down.bias).double(), wanted, rtol=0, atol=1e-5)


def test_who_is_left_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 8, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    assert few_rows.few_rows(x, weight)
    assert not few_rows.few_rows(x, weight.clone().requires_grad_())
    with torch.no_grad():
        assert few_rows.few_rows(x, weight.clone().requires_grad_())
    assert not few_rows.few_rows(x.double(), weight) and not few_rows.few_rows(x, weight.double())
    monkeypatch.setattr(few_rows, "DEVICES", ("xpu",))
    assert not few_rows.few_rows(x, weight)
    monkeypatch.undo()
    monkeypatch.setattr(few_rows, "MAX_ROWS", 2)
    assert not few_rows.few_rows(x, weight)
    turns = Router(8, MoEConfig(num_experts=4, top_k=2, forced_balance=True)).to(DEVICE).requires_grad_(False)
    assert turns(x[:2])[0].tolist() == [[0, 1], [2, 3]]


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    router, gate = router_of(MoEConfig(num_experts=64, top_k=6), 1024, HALF), GateMLP(1024, 32).to(DEVICE, HALF).requires_grad_(False)
    router.bias = router.bias.float()
    x = torch.randn(4, 1024, device=DEVICE, dtype=HALF)
    router(x), gate(x)
    with waiting_is_an_error():
        router(x), gate(x)
