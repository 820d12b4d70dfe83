"""The projections of an attention layer as one product."""

from __future__ import annotations

import pytest
import torch

from nsa_transformer.models.attention import DenseAttention, NativeSparseAttention
from nsa_transformer.models.rope import RotaryEmbedding

from .small import small_config


@pytest.mark.parametrize("kind", [NativeSparseAttention, DenseAttention])
def test_joined_projections_are_the_same_layers(kind: type) -> None:
    config = small_config()
    rope = RotaryEmbedding(config.head_dim)
    torch.manual_seed(0)
    if kind is DenseAttention:
        layer = DenseAttention(config, rope, None)
    else:
        layer = NativeSparseAttention(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.nsa, rope=rope)
    layer = layer.requires_grad_(False)
    x = torch.randn(70, config.hidden_size)
    wanted, weights = layer(x), {name: value.clone() for name, value in layer.state_dict().items()}
    layer.projections.join()
    layer.projections.join()  # by the next decoder
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, weights[name]) for name, value in layer.state_dict().items())
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in layer.parameters()}
    assert sum(held.values()) == sum(p.nbytes for p in layer.parameters()), "no weight is held twice"
    layer.q_proj.weight.zero_()  # what is written into a weight counts
    assert not torch.allclose(layer(x), wanted)
    layer.load_state_dict(weights)
    layer.q_proj.weight.data = layer.q_proj.weight.clone()  # and where it lies elsewhere
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    layer.q_proj.weight.zero_()
    assert not torch.allclose(layer(x), wanted)


def test_projections_that_want_gradients_are_not_joined() -> None:
    config = small_config()
    layer = NativeSparseAttention(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, config.nsa)
    with pytest.raises(AssertionError):
        layer.projections.join()
