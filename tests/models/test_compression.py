"""The layer on the compression's kernels: the same output, gradients and decoding as on the reference. The attention itself stays the reference's,
which the interpreter of Triton does not slow down."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_transformer import ModelConfig, NativeSparseAttention, NSAConfig
from nsa_transformer.kernels import nsa_attention
from nsa_transformer.models.cache import KVCache, LayerView
from nsa_transformer.models.layout import PackLayout

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux alone"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors are on the CPU"),
]

LENGTHS = [70, 1, 5, 0, 33]
KINDS = pytest.mark.parametrize("compression", ["mlp", "mean"])


def build(compression: str, backend: str, dtype: torch.dtype = torch.float32) -> NativeSparseAttention:
    torch.manual_seed(0)
    config = NSAConfig(8, 4, 16, 4, 1, 2, 12, compression)  # type: ignore[arg-type]
    layer = NativeSparseAttention(24, 4, 2, 64, config=config, head_dim_v=128).to(dtype)
    layer.backend = backend

    def attend(*args: Any, backend: str, **kwargs: Any) -> Tensor:
        return nsa_attention(*args, **kwargs)  # type: ignore[return-value]

    layer.attend = attend
    return layer


def tokens(total: int) -> Tensor:
    return torch.randn(total, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def run(layer: NativeSparseAttention) -> dict[str, Tensor]:
    x = tokens(sum(LENGTHS)).to(layer.q_proj.weight.dtype).requires_grad_()
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    out = layer(x, cu_seqlens=cu)
    out.float().square().sum().backward()
    return {"out": out.detach(), "x": x.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}  # type: ignore[dict-item]


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        error = (x.double() - wanted[name].double()).norm() / wanted[name].double().norm()
        assert error < bound, f"{name}: {error:.3g}"


@KINDS
def test_output_and_gradients(compression: str) -> None:
    assert_near(run(build(compression, "triton")), run(build(compression, "reference", torch.float64)), 1e-5)


@KINDS
def test_under_autocast(compression: str) -> None:
    exact = run(build(compression, "reference", torch.float64))
    with torch.autocast("cpu", torch.float16):
        found = run(build(compression, "triton"))
    assert found["out"].dtype == torch.float16
    assert all(found[name].dtype == torch.float32 for name in found if name != "out")
    assert_near(found, exact, 0.05)


@torch.no_grad()
@KINDS
def test_decoding_is_prefill(compression: str) -> None:
    layer, x = build(compression, "triton"), tokens(45).float()
    whole = layer(x)
    for sizes in ([1] * 45, [7, 1, 20, 3, 14]):
        cache, start = KVCache(ModelConfig(num_layers=1, nsa=layer.config)), 0
        for size in sizes:
            plan = cache.extend(0, size, x.device)
            assert (plan.start, plan.end) == (start, start + size)
            layout = PackLayout.chunk(plan, layer.rope, x.device)
            out = layer(x[start : start + size], layout=layout, cache=LayerView(cache.layers[0], plan))
            torch.testing.assert_close(out, whole[start : start + size], rtol=1e-5, atol=1e-5)
            start += size


def test_attention_and_compression_have_one_backend() -> None:
    layer = NativeSparseAttention(24, 4, 2, 8, config=NSAConfig(8, 4, 16, 4, 1, 2, 12))
    layer.backend = "triton"
    with pytest.raises(ValueError, match="head widths 8 and 8"):
        layer(tokens(40).float())
    seen = []
    layer.backend, layer.attend = "reference", lambda q, *_, backend, **__: seen.append(backend) or q
    layer(tokens(40).float())
    assert seen == ["reference"]
