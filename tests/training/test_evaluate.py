"""Validation counts what belongs to documents, and each token once."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from nsa_transformer.config import ModelConfig, MoEConfig, NSAConfig
from nsa_transformer.data.pack import IGNORE, Pack
from nsa_transformer.distributed.world import World
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.training.evaluate import Evaluation, evaluate

VOCABULARY = 40


def evaluated(packs: list[Pack]) -> Evaluation:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=32,
        nsa=NSAConfig(compress_block=8, compress_stride=4, select_block=16, num_selected=4, window=16),
        moe=MoEConfig(num_experts=4, top_k=2, expert_size=8),
        init_std=0.3,
    )
    model = Transformer(config)
    model.init_weights(0)
    return evaluate(model, packs, np.ones(VOCABULARY, dtype=np.int64), World(0, 1, torch.device("cpu"), None), nullcontext(), 64)


def document(length: int, padding: int, seed: int = 0) -> Pack:
    tokens = torch.randint(1, VOCABULARY, (length + 1,), generator=torch.Generator().manual_seed(seed))
    tail = torch.zeros(padding, dtype=torch.int64)
    return Pack(
        tokens=torch.cat([tokens[:-1], tail]),
        targets=torch.cat([tokens[1:], tail + IGNORE]),
        cu_seqlens=torch.tensor([0, length, length + padding] if padding else [0, length], dtype=torch.int32),
        valid=torch.arange(length + padding) < length,
    )


@pytest.mark.parametrize("padding", [1, 150])
def test_padding_counts_nowhere(padding: int) -> None:
    plain, padded = evaluated([document(150, 0)]), evaluated([document(150, padding)])
    for field in ("loss", "bits_per_byte", "early_loss", "late_loss"):
        assert getattr(padded, field) == pytest.approx(getattr(plain, field), rel=1e-5)
    np.testing.assert_allclose(padded.gate_means, plain.gate_means, rtol=1e-5)
    np.testing.assert_allclose(padded.expert_load, plain.expert_load, rtol=1e-5)
    assert document(150, padding).document_lengths == [150]


def test_every_token_weighs_the_same() -> None:
    short, long = document(30, 0), document(150, 0, seed=1)
    one, other, both = evaluated([short]), evaluated([long]), evaluated([short, long])
    assert both.loss == pytest.approx((30 * one.loss + 150 * other.loss) / 180, rel=1e-5)
    np.testing.assert_allclose(both.gate_means, (30 * np.array(one.gate_means) + 150 * np.array(other.gate_means)) / 180, rtol=1e-5)
    assert one.late_loss is None
