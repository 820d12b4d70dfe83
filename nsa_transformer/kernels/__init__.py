"""Attention, its compression and experts as functions on tensors. Needs torch alone."""

from nsa_transformer.kernels.compress import CompressionWeights, compress_blocks
from nsa_transformer.kernels.moe import experts
from nsa_transformer.kernels.nsa import available_backends, nsa_attention

__all__ = ["CompressionWeights", "available_backends", "compress_blocks", "experts", "nsa_attention"]
