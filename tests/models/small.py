"""Small models with weights large enough that every part of them shows in the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa_transformer import ModelConfig, MoEConfig, NSAConfig, Transformer

VOCABULARY = 61
NSA = {"compress_block": 4, "compress_stride": 2, "select_block": 8, "num_selected": 3, "num_initial": 1, "num_local": 1, "window": 6}


def small_config(nsa: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 32,
        "max_position_embeddings": 256,
        "init_std": 0.3,
        "rope_theta": 1000.0,
    }
    return ModelConfig(
        **fields | changes,
        nsa=NSAConfig(**{**NSA, **(nsa or {})}),
        moe=MoEConfig(**{"num_experts": 4, "top_k": 2, "expert_size": 8, **(moe or {})}),
    )


def small_model(config: ModelConfig | None = None, seed: int = 0, **changes: Any) -> Transformer:
    model = Transformer(config or small_config(**changes))
    model.init_weights(seed)
    return model


def random_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
