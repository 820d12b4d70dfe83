"""Weights in the dtype that passes compute in, for whoever keeps the float32 ones elsewhere."""

from __future__ import annotations

import torch
from torch import nn

from nsa_transformer.models.attention import BlockCompressor, DenseAttention, GateMLP, NativeSparseAttention
from nsa_transformer.models.moe import MLP, MixtureOfExperts
from nsa_transformer.models.transformer import Transformer


def use_compute_dtype(model: Transformer, dtype: torch.dtype) -> None:
    """Turn a model that is still on meta into what passes need under autocast to `dtype`: parameters that are read as factors of products alone
    become that dtype, as autocast would make them in each pass. Embedding, output projection (whose gradient is summed over chunks in its own dtype),
    norms, routers and positions stay float32."""
    for parameter in _factors(model):
        assert parameter.is_meta
        parameter.data = parameter.data.to(dtype)


def _factors(model: Transformer) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            found += [module.w13, module.w2]
        elif isinstance(module, NativeSparseAttention | DenseAttention | MLP | BlockCompressor | GateMLP):
            found += [p for child in module.children() if isinstance(child, nn.Linear) for p in child.parameters()]
    return found
