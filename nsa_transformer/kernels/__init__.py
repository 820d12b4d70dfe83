"""Attention and experts as functions on tensors. Needs torch alone."""

from nsa_transformer.kernels.moe import experts
from nsa_transformer.kernels.nsa import available_backends, nsa_attention

__all__ = ["available_backends", "experts", "nsa_attention"]
