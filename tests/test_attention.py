"""The attention from the outside: `nsa_attention` against its definition, and the layer `NativeSparseAttention`.

The full comparison is in tests/kernels; this file is the short way to see that the attention does what it says.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from nsa_transformer import NativeSparseAttention, NSAConfig
from nsa_transformer.kernels import available_backends, nsa_attention

from .kernels.cases import assert_close, assert_matches_oracle, bounds, make_case

CONFIG = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=12)
LENGTHS = [70, 1, 5, 0, 100]
CU_SEQLENS = bounds(LENGTHS)


def build(config: NSAConfig = CONFIG, **changes) -> NativeSparseAttention:
    torch.manual_seed(0)
    return NativeSparseAttention(**{"hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "config": config, **changes}).double()


def tokens(total: int = sum(LENGTHS), hidden: int = 24) -> torch.Tensor:
    return torch.randn(total, hidden, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------- the function


def test_function_equals_its_definition_in_float64():
    """Blocks, output and all eight gradients against loops over every query, head and key."""
    assert_matches_oracle(make_case([70, 1, 5, 0, 40], CONFIG, group=4))


def test_function_at_one_glance():
    """The README's shapes: 40 tokens, 8 query heads over 2 key heads, keys of 8 and values of 6."""
    config = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=7)
    q, gates = torch.randn(40, 8, 8), torch.rand(40, 8, 3)
    k_slc, k_win, k_cmp = torch.randn(40, 2, 8), torch.randn(40, 2, 8), torch.randn(20, 2, 8)
    v_slc, v_win, v_cmp = torch.randn(40, 2, 6), torch.randn(40, 2, 6), torch.randn(20, 2, 6)
    out, blocks = nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, config, return_blocks=True)
    assert out.shape == (40, 8, 6) and out.dtype == torch.float32 and out.isfinite().all()
    assert blocks.shape == (40, 2, 4) and blocks.dtype == torch.int32
    assert blocks[0].tolist() == [[0, -1, -1, -1]] * 2
    assert ((blocks[39] == 0).any(-1) & (blocks[39] == 3).any(-1) & (blocks[39] == 4).any(-1)).all(), "first, own and the one before"


def test_available_backends():
    assert available_backends()[0] == "reference"


# ------------------------------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("changes", [{}, {"head_dim_v": 6}, {"num_heads": 2}, {"num_heads": 6, "num_kv_heads": 1}, {"num_kv_heads": 4}], ids=str)
@pytest.mark.parametrize("compression", ["mlp", "mean"])
def test_layer_keeps_the_shape_of_its_input(changes, compression):
    config = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=12, compression=compression)
    layer = build(config, **changes)
    out = layer(tokens(), cu_seqlens=CU_SEQLENS)
    assert out.shape == (sum(LENGTHS), 24) and out.dtype == torch.float64 and out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_in_the_dtypes_of_training(dtype):
    layer, x = build(), tokens()
    exact = layer(x, cu_seqlens=CU_SEQLENS)
    out = layer.to(dtype)(x.to(dtype), cu_seqlens=CU_SEQLENS)
    assert out.dtype == dtype
    error = (out.double() - exact).norm() / exact.norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]


def test_layer_under_autocast():
    layer, x = build(), tokens()
    exact = layer(x, cu_seqlens=CU_SEQLENS)
    layer, x = layer.float(), x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x, cu_seqlens=CU_SEQLENS)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() < 0.1 * exact.norm()
    out.float().square().mean().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad.dtype == torch.float32 and tensor.grad.isfinite().all() and tensor.grad.any()


def test_layer_with_its_default_config():
    layer = NativeSparseAttention(32, 4, 2, 8)
    x = torch.randn(1300, 32)
    assert layer(x).shape == (1300, 32)


def test_layer_without_cu_seqlens_takes_one_document():
    layer, x = build(), tokens(50)
    assert torch.equal(layer(x), layer(x, cu_seqlens=bounds([50])))


def test_each_document_of_a_pack_gets_what_it_gets_alone():
    layer, x = build(), tokens()
    packed = layer(x, cu_seqlens=bounds(LENGTHS, padding=3))
    for a, b in pairwise(CU_SEQLENS.tolist()):
        assert_close(f"tokens {a} to {b}", packed[a:b], layer(x[a:b], cu_seqlens=bounds([b - a])), 1e-12)


def test_another_document_changes_nothing():
    layer, x = build(), tokens()
    changed = torch.cat([x[:76], 3 * tokens()[:100]])
    assert torch.equal(layer(x, cu_seqlens=CU_SEQLENS)[:76], layer(changed, cu_seqlens=CU_SEQLENS)[:76])


@pytest.mark.parametrize("first", [1, 7, 8, 15, 16, 40, 63, 69])
def test_future_tokens_change_nothing_before_them(first):
    layer, x = build(), tokens(70)
    changed = x.clone()
    changed[first:] += 10 * tokens(70 - first)
    before, after = layer(x), layer(changed)
    assert torch.equal(after[:first], before[:first])
    assert not torch.equal(after[first], before[first])


def test_a_loss_on_early_tokens_has_no_gradient_to_later_ones():
    layer, x = build(), tokens(70).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x)[:33].square().sum(), x)
    assert not grad[33:].any() and grad[:33].any(dim=1).all()


@pytest.mark.parametrize("compression", ["mlp", "mean"])
def test_gradients_reach_every_parameter(compression):
    layer = build(NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=12, compression=compression))
    x = tokens().requires_grad_()
    layer(x, cu_seqlens=CU_SEQLENS).square().sum().backward()
    assert list(layer.parameters())
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"no gradient for {name}"
        assert parameter.grad.isfinite().all() and parameter.grad.any(), f"gradient of {name}"
    assert x.grad.isfinite().all() and x.grad.any(dim=1).all()


def test_gradients_of_the_layer_equal_finite_differences():
    """Along a random direction in all parameters and the input at once. Blocks are those of dense attention here, since a switch of blocks is a step."""
    config = NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=5, window=12)
    layer, x = build(config), tokens(70).requires_grad_()
    weight = tokens(70).flip(0)
    leaves = [x, *layer.parameters()]
    grads = torch.autograd.grad((layer(x) * weight).sum(), leaves)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in leaves]
    slope = sum((g * d).sum().item() for g, d in zip(grads, directions, strict=True))

    def value(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(leaves, directions, strict=True):
                p.add_(d, alpha=step)
            result = (layer(x) * weight).sum().item()
            for p, d in zip(leaves, directions, strict=True):
                p.sub_(d, alpha=step)
        return result

    step = 1e-6
    assert (value(step) - value(-step)) / (2 * step) == pytest.approx(slope, rel=1e-5)


def test_layer_trains():
    """Learn the mean of the last 8 tokens, which is what the window branch gives without any scores."""
    torch.manual_seed(0)
    config = NSAConfig(compress_block=4, compress_stride=2, select_block=8, num_selected=4, window=8)
    layer = NativeSparseAttention(16, 2, 2, 8, config=config)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        x = torch.randn(64, 16)
        loss = (layer(x)[7:] - x.unfold(0, 8, 1).mean(-1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10]), losses[::15]


def test_layer_on_the_meta_device_and_through_its_state_dict():
    with torch.device("meta"):
        empty = NativeSparseAttention(24, 4, 2, 8, config=CONFIG)
    layer, x = build().float(), tokens().float()
    loaded = empty.to_empty(device="cpu")
    loaded.load_state_dict(layer.state_dict())
    for (name, a), (_, b) in zip(loaded.named_buffers(), layer.named_buffers(), strict=True):
        if name not in layer.state_dict():
            a.copy_(b)
    assert torch.equal(loaded(x, cu_seqlens=CU_SEQLENS), layer(x, cu_seqlens=CU_SEQLENS))


def test_empty_input():
    layer = build()
    assert layer(tokens(0)).shape == (0, 24)
    assert layer(tokens(0), cu_seqlens=bounds([0, 0])).shape == (0, 24)


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"num_heads": 3}, "num_kv_heads"), ({"head_dim": 7}, "head_dim"), ({"num_kv_heads": 0}, "num_kv_heads"), ({"head_dim_v": 0}, "head_dim_v")],
    ids=str,
)
def test_layer_that_cannot_be(changes, name):
    with pytest.raises(ValueError, match=name):
        build(**changes)


def test_input_of_another_shape():
    layer = build()
    with pytest.raises(ValueError, match=r"\bx\b"):
        layer(tokens(50, 25))
    with pytest.raises(ValueError, match=r"\bx\b"):
        layer(tokens(50)[None])
    with pytest.raises(ValueError, match="cu_seqlens"):
        layer(tokens(50), cu_seqlens=bounds([49]))
