"""Decoding with the cache gives the logits of one prefill, at every length."""

from __future__ import annotations

import random

import pytest
import torch

from nsa_transformer.config import KVCacheConfig
from nsa_transformer.kernels.paged import gather_pages
from nsa_transformer.models import attention

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
ATTENTION = torch.nn.functional.scaled_dot_product_attention


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
def test_masked_queries_of_dense_attention_go_by_pieces(monkeypatch: pytest.MonkeyPatch):
    model, tokens = small_model(attention="dense").double(), random_tokens(60)
    cache, whole, masks = model.new_cache(), model(tokens), []

    def sdpa(q, k, v, attn_mask=None, **keywords):
        masks.append(None if attn_mask is None else list(attn_mask.shape))
        return ATTENTION(q, k, v, attn_mask=attn_mask, **keywords)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", sdpa)
    monkeypatch.setattr(attention, "MASKED_QUERIES", 7)
    close(model(tokens[:40], cache=cache), whole[:40], "no mask")
    close(model(tokens[40:], cache=cache), whole[40:], "pieces")
    assert masks == [None] * 2 + [[7, 47], [7, 54], [6, 60]] * 2


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
def test_a_refused_token_leaves_nothing_behind():
    model, tokens = small_model(), random_tokens(30)
    cache = model.new_cache()
    model(tokens[:10], cache=cache)
    for call in (lambda wrong: model.decode(wrong, cache), lambda wrong: model(wrong, cache=cache)):
        with pytest.raises(ValueError, match=r"tokens holds ids from 61 to 61; the vocabulary is 0 … 60"):
            call(torch.tensor([61]))
    assert cache.lengths == [10]
    for place in range(10, 30):
        close(model.decode(tokens[place : place + 1], cache)[0], model(tokens[: place + 1])[-1], place)


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
def test_memory_is_taken_page_by_page():
    model, tokens = small_model(), random_tokens(250)
    cache, sizes = model.new_cache(), []
    assert cache.nbytes == 0 and cache.span == 128  # 64 compressed keys, one every 2 tokens
    for place in range(0, 250, 2):
        model(tokens[place : place + 2], cache=cache)
        sizes.append(cache.nbytes)
    row = 2 * 2 * 2 * 8 * 4  # two layers' key and value of two heads of 8 in float32
    rings = (64 + 4) * row  # window and tokens not yet compressed
    assert set(sizes) == {rings + pages * (128 + 64) * row for pages in (2, 4)}, "page 0 is nobody's"


# ------------------------------------------------------------------------------------------------------------ many sequences


def settings(quantization: str, threshold: int = 16) -> KVCacheConfig:
    return KVCacheConfig(quantization=quantization, threshold=threshold)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["nsa", "dense", "window"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_sequences_of_any_length_together(geometry: str, attention: str):
    """Prefill some, decode all, stop some, begin others: each gets what it gets alone."""
    rng = random.Random(geometry)
    model = small_model(nsa=GEOMETRIES[geometry], attention=attention).double()
    texts = [random_tokens(200, seed) for seed in range(4)]
    cache, wholes, at = model.new_cache(4), [model(text) for text in texts], [0] * 4
    for turn in range(60):
        if turn % 20 == 0:
            sequence = rng.randrange(4)
            cache.free(sequence)
            at[sequence] = rng.randint(1, 130)
            close(model(texts[sequence][: at[sequence]], cache=cache, sequence=sequence), wholes[sequence][: at[sequence]], turn)
        tokens = torch.stack([text[place] for text, place in zip(texts, at, strict=True)])
        logits = model.decode(tokens, cache)
        for sequence in range(4):
            if at[sequence]:
                close(logits[sequence], wholes[sequence][at[sequence]], (turn, sequence, at))
                at[sequence] += 1
        assert cache.lengths == at


@torch.no_grad()
def test_a_fork_goes_on_from_its_prefix_and_shares_whole_pages():
    model, text, other = small_model().double(), random_tokens(200, 1), random_tokens(60, 2)
    cache = model.new_cache(3)
    for prefix in (2, 7, 127, 128, 129, 130, 150):
        for sequence in range(3):
            cache.free(sequence)
        model(text[:prefix], cache=cache, sequence=0)
        used = cache.num_pages - len(cache._unused)
        cache.fork(0, 2)
        copied = -(-prefix // 128) - (prefix - 2) // 128  # a block of 4 every 2: the last of a page ends 2 tokens past it
        assert cache.num_pages - len(cache._unused) == used + copied
        branch = torch.cat([text[:prefix], other])
        whole, expected = model(text), model(branch)
        for place in range(50):
            logits = model.decode(torch.stack([text[prefix + place], text[0], other[place]]), cache)
            close(logits[0], whole[prefix + place], (prefix, place))
            close(logits[2], expected[prefix + place], (prefix, place))
        cache.free(0)
        close(model(other[50:], cache=cache, sequence=2), expected[prefix + 50 :], "after its prefix was freed")


def test_pages_come_back():
    model = small_model()
    cache = model.new_cache(2)
    for turn in range(5):
        for sequence in range(2):
            model(random_tokens(140 + turn), cache=cache, sequence=sequence)
        for sequence in range(2):
            cache.free(sequence)
    assert cache.num_pages == 5 and sorted(cache._unused) == [1, 2, 3, 4]


@torch.no_grad()
def test_mistakes_are_named():
    model = small_model(max_position_embeddings=20)
    cache = model.new_cache(2)
    model(random_tokens(20), cache=cache, sequence=1)
    with pytest.raises(ValueError, match="sequence=2 is not in the cache; write 0 … 1"):
        model(random_tokens(1), cache=cache, sequence=2)
    with pytest.raises(ValueError, match="21 tokens, past max_position_embeddings=20"):
        model.decode(random_tokens(2), cache)
    with pytest.raises(ValueError, match="target=1 has 20 tokens; free it first"):
        cache.fork(0, 1)
    for call in (lambda: cache.fork(-1, 0), lambda: cache.fork(0, 2), lambda: cache.free(-1)):
        with pytest.raises(ValueError, match=r"=(-1|2) is not in the cache; write 0 … 1"):
            call()
    with pytest.raises(ValueError, match=r"give torch\.int64 \[2\], a token of each sequence"):
        model.decode(random_tokens(3), cache)
    with pytest.raises(ValueError, match=r"is for model\.attention=nsa, not dense"):
        small_model(attention="dense").new_cache(1, settings("fp8"))
    assert cache.lengths == [0, 20]


# ---------------------------------------------------------------------------------------------------------------------- FP8


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0, 1, 8, 16, 23, 1000])
def test_fp8_differs_by_its_rounding_alone(threshold: int):
    """Up to `threshold` tokens nothing is rounded; beyond, logits stay near."""
    model, text = small_model(init_std=0.1).double(), random_tokens(180)
    whole = model(text)
    cache = model.new_cache(2, settings("fp8", threshold))
    model(text[:50], cache=cache)
    model(text[50:90], cache=cache)
    cache.fork(0, 1)
    for place in range(90, 180):
        logits = model.decode(text[place].repeat(2), cache)
        assert torch.equal(logits[0], logits[1])
        error = (logits[0] - whole[place]).abs()
        assert error.max() < (1e-5 if threshold >= 180 else 0.25) and error.mean() < 0.04, place
    differs = (model.decode(text[:1].repeat(2), cache)[0] - model(torch.cat([text, text[:1]]))[-1]).abs().max()
    assert (differs > 1e-4) == (threshold < 180)


@torch.no_grad()
def test_fp8_holds_the_same_whatever_the_chunks():
    model, text = small_model().double(), random_tokens(200)
    stores = []
    for sizes in ([200], [64, 1, 77, 58], [1] * 200):
        cache, start = model.new_cache(1, settings("fp8")), 0
        for size in sizes:
            if size == 1 and start:
                model.decode(text[start : start + 1], cache)
            else:
                model(text[start : start + size], cache=cache)
            start += size
        layer = cache.layers[0]
        stores.append([gather_pages(layer._stores[f"{name}_slc"], cache.table[0].long(), 184).float() for name in ("k", "v")])
    for store in stores[1:]:
        for found, expected in zip(store, stores[0], strict=True):
            assert torch.equal(found, expected)


def test_a_cache_excludes_a_pack():
    model = small_model()
    with pytest.raises(ValueError, match=r"^cu_seqlens and cache"):
        model(random_tokens(4), torch.tensor([0, 4], dtype=torch.int32), cache=model.new_cache())
