"""The rotary embedding: a rotation, relative, and stretched by YaRN only where asked."""

from __future__ import annotations

import math

import pytest
import torch

from nsa_transformer.models.rope import RotaryEmbedding

ROPE = RotaryEmbedding(16, theta=10000.0)


def rotate(rope: RotaryEmbedding, x: torch.Tensor, start: int = 0) -> torch.Tensor:
    """x `[T, heads, D]` at positions start, start + 1, …"""
    return rope.rotation(torch.arange(start, start + len(x)))(x)


def test_rotation_by_hand():
    """The first half of a head pairs with the second; pair i turns by position * theta ** (-2i / D)."""
    x = torch.randn(1, 1, 4, dtype=torch.float64)
    a, b, c, d = x.flatten().tolist()
    y = RotaryEmbedding(4, theta=100.0).rotation(torch.tensor([7]))(x).flatten().tolist()
    for (first, second), (p, q), angle in (((a, c), (y[0], y[2]), 7.0), ((b, d), (y[1], y[3]), 0.7)):
        assert p == pytest.approx(first * math.cos(angle) - second * math.sin(angle), abs=1e-6)
        assert q == pytest.approx(second * math.cos(angle) + first * math.sin(angle), abs=1e-6)


def test_norms_are_preserved_and_position_0_is_the_identity():
    x = torch.randn(50, 3, 16)
    y = rotate(ROPE, x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[0], x[0]) and not torch.allclose(y[1:], x[1:])


def test_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 16).expand(2, 40, 1, 16)
    for start in (0, 13, 1000):
        scores = rotate(ROPE, q, start)[:, 0] @ rotate(ROPE, k, start)[:, 0].T
        for distance in (-7, 0, 1, 20):
            diagonal = scores.diagonal(distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-3, atol=1e-3)
        assert scores[0].std() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_dtype_is_kept_and_the_angles_are_float32(dtype: torch.dtype):
    x = torch.randn(8, 2, 16).to(dtype)
    y = rotate(ROPE, x, start=100_000)
    exact = rotate(ROPE, x.double(), start=100_000)
    assert y.dtype == dtype
    assert float((y.double() - exact).norm() / exact.norm()) <= {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 1e-6)


def test_frequencies_far_out_are_precise():
    """At position 131071 the float32 angle of the fastest pair is still good to a hundredth of a radian."""
    rope = RotaryEmbedding(128, theta=500000.0)
    rotation = rope.rotation(torch.tensor([131071]))
    exact = 131071 * 500000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert (rotation.cos[0].double() - exact.cos()).abs().max() < 1e-2


@pytest.mark.parametrize("original", [None, 4096])
def test_no_scaling_without_an_original_length_or_with_an_equal_one(original: int | None):
    rope = RotaryEmbedding(64, max_length=4096, original_length=original)
    plain = RotaryEmbedding(64)
    cpu = torch.device("cpu")
    assert rope.factor == 1.0
    assert torch.equal(rope.frequencies(cpu), plain.frequencies(cpu))
    positions = torch.arange(100)
    assert torch.equal(rope.rotation(positions).cos, plain.rotation(positions).cos)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    original, factor = 4096, 8
    rope = RotaryEmbedding(64, theta=500000.0, max_length=original * factor, original_length=original)
    plain = RotaryEmbedding(64, theta=500000.0).frequencies(torch.device("cpu"))
    ratio = rope.frequencies(torch.device("cpu")) / plain
    turns = plain * original / (2 * math.pi)
    assert rope.factor == factor
    assert (ratio[turns >= 32] == 1).all() and ratio[0] == 1
    torch.testing.assert_close(ratio[turns <= 1], torch.full_like(ratio[turns <= 1], 1 / factor))
    assert ratio[-1] == pytest.approx(1 / factor)
    assert (ratio.diff() <= 1e-6).all() and ((ratio > 0.13) & (ratio < 0.99)).any(), "a ramp lies between"


def test_yarn_temperature():
    """Both cos and sin carry 0.1 ln(factor) + 1, so a score is multiplied by its square (arXiv 2309.00071, section 3.4)."""
    rope = RotaryEmbedding(64, max_length=32768, original_length=4096)
    x = torch.randn(20, 2, 64)
    temperature = 0.1 * math.log(8) + 1
    torch.testing.assert_close(rotate(rope, x).norm(dim=-1), temperature * x.norm(dim=-1))
