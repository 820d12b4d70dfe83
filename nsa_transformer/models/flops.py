"""Floating-point operations of the model, counted from its shape, for model FLOP utilisation."""

from __future__ import annotations

from collections.abc import Iterable

from nsa_transformer.config import ModelConfig
from nsa_transformer.models.transformer import count_parameters


def _sum_of_min(length: int, limit: int) -> int:
    """Sum over t = 1 … length of min(t, limit)."""
    rising = min(length, limit)
    return rising * (rising + 1) // 2 + (length - rising) * limit


def attention_pairs(config: ModelConfig, length: int) -> int:
    """Query-key pairs that one head of one layer scores over a document of `length` tokens, a query's own block always among the selected."""
    nsa = config.nsa
    if config.attention == "dense":
        return length * (length + 1) // 2
    window = _sum_of_min(length, nsa.window)
    if config.attention == "window":
        return window
    blocks = max(0, (length - nsa.compress_block) // nsa.compress_stride + 1)
    # Compressed key i is seen by the length - (i * d + l) + 1 queries from its last token on.
    first = length - nsa.compress_block + 1
    compressed = blocks * first - nsa.compress_stride * blocks * (blocks - 1) // 2
    return compressed + _selected_pairs(length, nsa.num_selected, nsa.select_block) + window


def _selected_pairs(length: int, num_selected: int, block: int) -> int:
    """All keys up to the query while there are no more than num_selected blocks; then whole blocks, and its own up to itself."""
    early = min(length, num_selected * block)
    blocks, rest = divmod(length - early, block)
    own = blocks * (block * (block + 1) // 2) + rest * (rest + 1) // 2
    return early * (early + 1) // 2 + (length - early) * (num_selected - 1) * block + own


class TrainingFlops:
    """FLOPs of forward and backward, without what activation checkpointing recomputes (the usual meaning of MFU):
    6 per active matrix parameter and the tokens it meets, and 3 times the forward's attention products."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        _, active = count_parameters(config)
        embedding = config.vocab_size * config.hidden_size
        matrices = active if config.tie_embeddings else active - embedding
        if config.attention == "nsa" and config.nsa.compression == "mlp":
            # The compression MLPs run once per key/value head and stride, not once per token.
            nsa, widths = config.nsa, (config.head_dim, config.value_dim)
            compression = config.num_layers * sum(nsa.compress_block * w * w + w * w for w in widths)
            matrices += compression * config.num_kv_heads // nsa.compress_stride - compression
        self.matrix_parameters = matrices

    def of_documents(self, lengths: Iterable[int]) -> int:
        config, total = self.config, 0
        for length in lengths:
            pairs = attention_pairs(config, length) * config.num_layers * config.num_heads
            total += 6 * self.matrix_parameters * length + 6 * pairs * (config.head_dim + config.value_dim)
        return total
