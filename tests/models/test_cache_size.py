"""What a cache is said to take is what it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_transformer import ModelConfig, NSAConfig
from nsa_transformer.config import KVCacheConfig
from nsa_transformer.models.cache_size import cache_size

from .small import random_tokens, small_model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[250], [128], [129], [1, 250, 64]], ids=str)
@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, None),
        ({"head_dim_v": 6, "num_kv_heads": 1}, None),
        ({}, KVCacheConfig("fp8", 16)),
        ({"head_dim_v": 6}, KVCacheConfig("fp8", 0)),
        ({}, KVCacheConfig("fp8", 10**9)),
        ({"nsa": {"compress_block": 9, "compress_stride": 3, "select_block": 12, "window": 65}}, KVCacheConfig("fp8", 23)),
        ({"attention": "dense"}, None),
        ({"attention": "window", "num_layers": 3}, None),
    ],
    ids=str,
)
def test_is_what_a_cache_allocates(changes: dict[str, Any], settings: KVCacheConfig | None, lengths: list[int], dtype: torch.dtype) -> None:
    model = small_model(**changes).to(dtype)
    cache = model.new_cache(len(lengths), settings)
    for sequence, length in enumerate(lengths):  # all room at once: nothing doubles
        cache.extend(sequence, length, torch.device("cpu"))
        cache.lengths[sequence] = 0
    for sequence, length in enumerate(lengths):
        model(random_tokens(length), cache=cache, sequence=sequence)
    if model.config.attention != "nsa":  # the longest decides, whenever it comes
        assert cache.lengths == lengths
    size = cache_size(model.config, settings, dtype)
    assert cache.nbytes == size.total(lengths)
    assert size.total(lengths, 3) == size.total(lengths * 3)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 150, 700])
@pytest.mark.parametrize(
    ("changes", "settings"), [({}, None), ({}, KVCacheConfig("fp8", 16)), ({"attention": "dense"}, None)], ids=["pages", "pages in FP8", "dense"]
)
def test_grown_is_the_most_that_a_cache_allocates_step_by_step(changes: dict[str, Any], settings: KVCacheConfig | None, prompt: int) -> None:
    model = small_model(max_position_embeddings=2000, **changes)
    cache, size = model.new_cache(2, settings), cache_size(model.config, settings, torch.float32)
    model(random_tokens(prompt), cache=cache)
    reached = []
    while cache.length < 1500:
        for sequence in (0, 1):
            model(random_tokens(50), cache=cache, sequence=sequence)
            assert size.total(cache.lengths) <= cache.nbytes <= size.total(cache.lengths, grown=True)
            reached.append(cache.nbytes == size.total(cache.lengths, grown=True))
    assert any(reached), "no smaller figure would do"
    assert size.total(cache.lengths, 3, grown=True) == size.total(cache.lengths * 3, grown=True)


def test_no_ring_is_longer_than_a_sequence_can_be() -> None:
    model = small_model(max_position_embeddings=300).config
    assert cache_size(model, KVCacheConfig("fp8", 10**9)) == cache_size(model, KVCacheConfig("fp8", 300))
    assert cache_size(model, KVCacheConfig("fp8", 300)).per_sequence > cache_size(model, KVCacheConfig("fp8", 256)).per_sequence


def test_by_hand() -> None:
    """The paper's geometry: heads of 128 in 16 bits have 512 bytes selected and 32 compressed a token, in FP8 256 with two scales of two bytes."""
    model = ModelConfig(num_layers=1, num_kv_heads=1, num_heads=1, head_dim=128, nsa=NSAConfig())
    plain, small = cache_size(model), cache_size(model, KVCacheConfig("fp8", 512))
    assert plain.per_token == 512 + 32 and small.per_token == 256 + 4 + 32
    assert plain.per_sequence == (512 + 32) * 512 and small.per_sequence == (512 + 32 + 576) * 512
    assert plain.describe() == "544 bytes a token (selected 512, compressed 32), and 278,528 a sequence (window 262,144, not yet compressed 16,384)"
    assert "selected 256, scales 4, compressed 32" in small.describe() and "not yet in FP8 294,912" in small.describe()
    dense = cache_size(ModelConfig(num_layers=3, num_kv_heads=2, num_heads=2, head_dim=128, head_dim_v=64, attention="dense"), dtype=torch.float32)
    assert dense.describe() == "4,608 bytes a token (keys and values 4,608)" and dense.total([65, 3]) == 2 * 128 * 4608
