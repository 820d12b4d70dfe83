"""What a `KVCache` takes, from the configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nsa_transformer.config import KVCacheConfig, ModelConfig
from nsa_transformer.kernels.paged import SCALE, page_rows, page_tokens, recent_tokens, ring_tokens

SHORTEST = 64  # tokens that dense attention has room for, at least


def dense_capacity(longest: int) -> int:
    """Tokens that dense attention has room for in each sequence: a power of two."""
    return max(SHORTEST, 1 << (longest - 1).bit_length())


def newest_tokens(model: ModelConfig, settings: KVCacheConfig) -> int:
    """Tokens that a cache in FP8 keeps in the compute dtype: `settings.threshold`, as far as a sequence can be so long, so that no ring is larger than that."""
    return min(settings.threshold, model.max_position_embeddings)


@dataclass(frozen=True)
class CacheSize:
    """Bytes over all layers, by what they hold: `page` of a page of `page_tokens` tokens (dense attention has none: there a page is a token), `sequence` of
    what each sequence has once, however long it is."""

    page_tokens: int
    page: dict[str, int]
    sequence: dict[str, int]

    @property
    def per_token(self) -> float:
        return sum(self.page.values()) / self.page_tokens

    @property
    def per_sequence(self) -> int:
        return sum(self.sequence.values())

    def total(self, lengths: Sequence[int], copies: int = 1, grown: bool = False) -> int:
        """`KVCache.nbytes` of `copies` times sequences of these lengths that share no page, where all their room is taken at once; `grown`: the most that it
        can be where they came step by step. Then the pages double whenever all are taken; rings have their size from the first token on, and dense
        attention's room is the same either way. The old pages of the store that is just doubling are not counted."""
        if self.page_tokens == 1:
            return copies * len(lengths) * dense_capacity(max(lengths)) * sum(self.page.values())
        pages = 1 + copies * sum(-(-length // self.page_tokens) for length in lengths)  # page 0 is nobody's
        if grown:  # at worst there was one page too few
            pages = max(pages, 2 * (pages - 1))
        return pages * sum(self.page.values()) + copies * len(lengths) * self.per_sequence

    def describe(self) -> str:
        """One line."""
        grows = ", ".join(f"{name} {size / self.page_tokens:,.0f}" for name, size in self.page.items())
        once = ", ".join(f"{name} {size:,}" for name, size in self.sequence.items())
        text = f"{self.per_token:,.0f} bytes a token ({grows})"
        return text + (f", and {self.per_sequence:,} a sequence ({once})" if once else "")


def cache_size(model: ModelConfig, settings: KVCacheConfig | None = None, dtype: torch.dtype = torch.bfloat16) -> CacheSize:
    """Of `KVCache(model, …, settings)` with keys and values in `dtype`."""
    width = model.num_layers * model.num_kv_heads * (model.head_dim + model.value_dim)
    row = width * dtype.itemsize
    if model.attention != "nsa":
        return CacheSize(1, {"keys and values": row}, {})
    nsa, settings = model.nsa, settings or KVCacheConfig()
    tokens = page_tokens(nsa)
    page = {"selected": tokens * row, "compressed": page_rows(nsa) * row}
    sequence = {"window": ring_tokens(nsa) * row, "not yet compressed": nsa.compress_block * row}
    if settings.quantization == "fp8":
        scales = 2 * model.num_layers * model.num_kv_heads * SCALE.itemsize
        page = {"selected": tokens * width, "scales": tokens * scales, "compressed": page["compressed"]}
        sequence["not yet in FP8"] = recent_tokens(nsa, newest_tokens(model, settings)) * row
    return CacheSize(tokens, page, sequence)
