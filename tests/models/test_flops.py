"""Counting of operations against brute force."""

from __future__ import annotations

import pytest

from nsa_transformer.config import ModelConfig, MoEConfig, NSAConfig
from nsa_transformer.models.flops import TrainingFlops, attention_pairs
from nsa_transformer.models.transformer import count_parameters

GEOMETRIES = [
    NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=3, window=20),
    NSAConfig(compress_block=4, compress_stride=4, select_block=4, num_selected=5, window=1),
    NSAConfig(compress_block=9, compress_stride=3, select_block=12, num_selected=4, num_initial=2, num_local=1, window=7),
    NSAConfig(compress_block=6, compress_stride=2, select_block=6, num_selected=1, num_initial=0, num_local=1, window=200),
]


def brute_force(config: ModelConfig, length: int) -> int:
    nsa, pairs = config.nsa, 0
    for t in range(length):
        visible = range(t + 1)
        if config.attention == "dense":
            pairs += len(visible)
            continue
        pairs += sum(s > t - nsa.window for s in visible)
        if config.attention == "window":
            continue
        pairs += sum(i * nsa.compress_stride + nsa.compress_block <= t + 1 for i in range(length))
        own = t // nsa.select_block
        chosen = {own, *range(min(own + 1, nsa.num_selected - 1))}  # the query's own block, and any others before it
        if own + 1 <= nsa.num_selected:
            chosen = set(range(own + 1))
        pairs += sum(s // nsa.select_block in chosen for s in visible)
    return pairs


@pytest.mark.parametrize("attention", ["nsa", "dense", "window"])
@pytest.mark.parametrize("nsa", GEOMETRIES, ids=range(len(GEOMETRIES)))
def test_attention_pairs(nsa: NSAConfig, attention: str):
    config = ModelConfig(nsa=nsa, attention=attention)
    for length in range(140):
        assert attention_pairs(config, length) == brute_force(config, length), length


@pytest.mark.parametrize("tie", [True, False])
def test_training_flops(tie: bool):
    """6 per matrix parameter that a token meets, the embedding's look-up left out, and 6 per attended pair and width of key and value."""
    config = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        head_dim_v=4,
        intermediate_size=32,
        nsa=GEOMETRIES[0],
        moe=MoEConfig(num_experts=4, top_k=1, expert_size=8),
        tie_embeddings=tie,
    )
    _, active = count_parameters(config)
    matrices = active - (0 if tie else 64 * 16)
    # Two layers' compression MLPs, of keys and values: one head's every stride, instead of every token.
    nsa = config.nsa
    compression = 2 * sum(nsa.compress_block * width * width + width * width for width in (8, 4))
    matrices += compression * config.num_kv_heads // nsa.compress_stride - compression
    pairs = attention_pairs(config, 50) + attention_pairs(config, 7)
    assert TrainingFlops(config).of_documents([50, 7]) == 6 * matrices * 57 + 6 * pairs * 2 * 2 * (8 + 4)
    assert TrainingFlops(config).of_documents([]) == 0
