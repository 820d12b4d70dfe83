"""Attention, its compression, a step of decoding and experts as functions on tensors. Needs torch alone."""

from nsa_transformer.kernels.compress import CompressionWeights, compress_blocks
from nsa_transformer.kernels.decode import append_rows, nsa_decode
from nsa_transformer.kernels.moe import experts
from nsa_transformer.kernels.nsa import available_backends, nsa_attention
from nsa_transformer.kernels.paged import NewRows, PagedKeysValues

__all__ = [
    "CompressionWeights",
    "NewRows",
    "PagedKeysValues",
    "append_rows",
    "available_backends",
    "compress_blocks",
    "experts",
    "nsa_attention",
    "nsa_decode",
]
