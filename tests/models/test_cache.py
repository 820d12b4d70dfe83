"""Decoding with the cache gives the logits of one prefill, at every length."""

from __future__ import annotations

import random

import pytest
import torch

from .small import random_tokens, small_model

GEOMETRIES = {
    "overlapping": {},
    "l = d": {"compress_block": 4, "compress_stride": 4},
    "l = d = l'": {"compress_block": 8, "compress_stride": 8, "select_block": 8},
    "l = l'": {"compress_block": 8, "compress_stride": 2},
    "no power of two": {"compress_block": 9, "compress_stride": 3, "select_block": 12, "num_selected": 2, "window": 5},
    "d = 1, w = 1": {"compress_block": 5, "compress_stride": 1, "select_block": 7, "window": 1},
    "nothing forced": {"num_initial": 0, "num_local": 0, "num_selected": 1},
    "mean": {"compression": "mean"},
}
LENGTH = 45
# float64 weights; norms and router round to float32, so neither is the rest exact.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def close(found: torch.Tensor, expected: torch.Tensor, where: object) -> None:
    torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text: f"{where}: {text}")


@torch.no_grad()
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_token_by_token(geometry: str):
    model, tokens = small_model(nsa=GEOMETRIES[geometry]).double(), random_tokens(LENGTH)
    cache = model.new_cache()
    for length in range(1, LENGTH + 1):
        logits = model(tokens[length - 1 : length], cache=cache)
        assert logits.shape == (1, model.config.vocab_size) and cache.length == length
        close(logits[-1], model(tokens[:length])[-1], length)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"attention": "dense"}, {"attention": "window"}, {"head_dim_v": 6}, {"num_kv_heads": 1}, {"num_kv_heads": 4}], ids=str)
def test_token_by_token_for_each_attention_and_group(changes: dict):
    model, tokens = small_model(**changes).double(), random_tokens(LENGTH)
    cache, whole = model.new_cache(), model(tokens)
    for place in range(LENGTH):
        close(model(tokens[place : place + 1], cache=cache)[-1], whole[place], place + 1)


@torch.no_grad()
def test_with_stretched_positions():
    model, tokens = small_model(original_max_position_embeddings=32).double(), random_tokens(LENGTH)
    plain = small_model().double()(tokens)
    cache, whole = model.new_cache(), model(tokens)
    assert not torch.allclose(whole, plain, **CLOSE)
    for place in range(LENGTH):
        close(model(tokens[place : place + 1], cache=cache)[-1], whole[place], place + 1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["nsa", "dense", "window"])
@pytest.mark.parametrize("seed", range(6))
def test_prefill_in_chunks_of_any_size(attention: str, seed: int):
    rng = random.Random(seed)
    geometry = GEOMETRIES[rng.choice(list(GEOMETRIES))]
    model, tokens = small_model(nsa=geometry, attention=attention).double(), random_tokens(150, seed)
    cache, whole, start = model.new_cache(), model(tokens), 0
    while start < len(tokens):
        size = rng.choice([0, 1, 2, rng.randint(1, 20), rng.randint(1, 100)])
        logits = model(tokens[start : start + size], cache=cache)
        start += size
        close(logits, whole[start - size : start], (geometry, start))
    assert cache.length == 150


@torch.no_grad()
def test_last_only():
    model, tokens = small_model(), random_tokens(40)
    cache = model.new_cache()
    logits = model(tokens, cache=cache, last_only=True)
    assert logits.shape == (1, model.config.vocab_size)
    close(logits[0], model(tokens)[-1], "prefill")


@torch.no_grad()
def test_past_the_last_position():
    model, tokens = small_model(max_position_embeddings=20), random_tokens(30)
    cache = model.new_cache()
    model(tokens[:18], cache=cache)
    with pytest.raises(ValueError, match="max_position_embeddings=20"):
        model(tokens[18:21], cache=cache)
    assert cache.length == 18, "what was refused left nothing behind"
    close(model(tokens[18:20], cache=cache), model(tokens[:20])[18:], "the last two")
    with pytest.raises(ValueError, match="21 tokens, past max_position_embeddings=20"):
        model(tokens[20:21], cache=cache)
    with pytest.raises(ValueError, match="max_position_embeddings=20"):
        model(tokens[:21], cache=model.new_cache())


@torch.no_grad()
def test_two_caches_are_independent():
    model = small_model()
    first, second = random_tokens(50, 1), random_tokens(50, 2)
    caches = model.new_cache(), model.new_cache()
    for place in range(50):
        a = model(first[place : place + 1], cache=caches[0])
        b = model(second[place : place + 1], cache=caches[1])
    close(a[-1], model(first)[-1], "first")
    close(b[-1], model(second)[-1], "second")


@torch.no_grad()
def test_memory_grows_by_doubling_and_keeps_no_raw_row_too_many():
    model, tokens = small_model(), random_tokens(200)
    cache, sizes = model.new_cache(), []
    block = model.config.nsa.compress_block
    assert cache.nbytes == 0
    for place in range(0, 200, 2):
        model(tokens[place : place + 2], cache=cache)
        assert all(layer.length("k_raw") < block and layer.length("v_raw") < block for layer in cache.layers)
        sizes.append(cache.nbytes)
    width = 2 * 2 * 8 * 4  # key and value of two heads of 8 in float32
    assert 200 * 2 * width * 2 <= sizes[-1] <= (2 * 256 + 256 // model.config.nsa.compress_stride + 64) * width * 2


def test_a_cache_excludes_a_pack():
    model = small_model()
    with pytest.raises(ValueError, match=r"^cu_seqlens and cache"):
        model(random_tokens(4), torch.tensor([0, 4], dtype=torch.int32), cache=model.new_cache())
