"""NSA-Transformer: long-context language models with Native Sparse Attention and mixture-of-experts layers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nsa_transformer.config import ModelConfig, MoEConfig, NSAConfig

if TYPE_CHECKING:
    from nsa_transformer.inference.load import load_checkpoint
    from nsa_transformer.models.attention import NativeSparseAttention
    from nsa_transformer.models.transformer import Transformer

__version__ = "0.1.0"
__all__ = ["ModelConfig", "MoEConfig", "NSAConfig", "NativeSparseAttention", "Transformer", "load_checkpoint"]

# Looked up at first use, so that `nsa_transformer.kernels` loads without the model's and the tokenizer's libraries.
_LAZY = {
    "NativeSparseAttention": "nsa_transformer.models.attention",
    "Transformer": "nsa_transformer.models.transformer",
    "load_checkpoint": "nsa_transformer.inference.load",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
