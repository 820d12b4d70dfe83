"""benchmarks/generate.py with a tiny model on the CPU: the rows from start to end, the check before timing, the page."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import generate as bench
from benchmarks.decode import Size
from nsa_transformer.cli import compose_config
from nsa_transformer.config import Config, KVCacheConfig
from nsa_transformer.models.cache_size import cache_size
from nsa_transformer.models.transformer import Transformer

CPU = torch.device("cpu")
FACTS = dict.fromkeys(("gpu", "power_limit", "driver", "python", "torch", "triton", "cudnn", "commit", "date", "command"), "?") | {"memory_bytes": 8e10}


@pytest.fixture(scope="module")
def config() -> Config:
    return compose_config(["model=tiny", "model.num_layers=2", "model.vocab_size=300", "model.max_position_embeddings=4096"])


@pytest.fixture(scope="module")
def model(config: Config) -> Transformer:
    return bench.build_model(config, "nsa", CPU, torch.float32)


def empty_results() -> dict[str, Any]:
    return {
        "facts": FACTS, "model": "model=tiny", "dtype": "float32", "parameters": (2e6, 1e6), "prefill_length": 300, "copy_rate": 3e12,
        "checks": {}, "prefill": [], "rows": [],
    }  # fmt: skip


def test_from_start_to_end(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PREFILL_CHUNK", 128)
    monkeypatch.setattr(bench, "CHECKED_STEPS", 20)
    for ways in (bench.WAYS, bench.STEP_WAYS):  # without cuDNN
        monkeypatch.setitem(ways, "dense", {name: way for name, way in ways["dense"].items() if name != "cuDNN"})
    results, lines = empty_results(), []
    sizes = [Size(2, 1024), Size(1, 300), Size(1, 8192)]
    bench.run(config, list(bench.ROWS), sizes, 300, CPU, torch.float32, 8e9, results, lambda line: lines.append((line, bench.render(results))), checked=700)
    assert {name: found["passed"] for name, found in results["checks"].items()} == dict.fromkeys(bench.ROWS, True), results["checks"]
    assert [(row["size"], row["row"]) for row in results["rows"]] == [(size.name, name) for size in sizes for name in bench.ROWS]
    for row in results["rows"]:
        if row["size"] == "1x8k":
            assert row["status"] == "error: longer than max_position_embeddings=4096"
            continue
        assert (
            row["status"] == "ok"
            and not row["problems"]
            and row["not_recorded"] == "the model is on cpu"
            and len(row["times"]) == (2 if row["row"] == "dense" else 1)
        )
        attention, quantization = bench.ROWS[row["row"]]
        size = cache_size(replace(config.model, attention=attention), KVCacheConfig(quantization), torch.float32)
        batch, length = (2, 1024) if row["size"] == "2x1k" else (1, 300)
        assert row["cache_bytes"] == size.total([length] * batch), "which measure() found the cache to have"
    assert [row["attention"] for row in results["prefill"]] == ["nsa", "dense"]
    assert {label for row in results["prefill"] for label in row["times"]} == {
        "chunks of 128", "one pass", "chunks of 128, torch's choice", "one pass, torch's choice"
    }  # fmt: skip
    page = lines[-1][1]
    assert "| 2x1k | sparse-fp8 |" in page and "longer than max_position_embeddings" in page and "times as fast as dense" in page
    assert page.count("passed") == 3 and "not recorded: the model is on cpu" in page


def test_a_filled_cache_is_one_that_can_be_decoded(model: Transformer, config: Config) -> None:
    for settings in (KVCacheConfig(), KVCacheConfig("fp8", 64)):
        cache = bench.fill(model, Size(3, 700), settings, CPU)
        assert cache.lengths == [700] * 3 and cache.nbytes == cache_size(config.model, settings, torch.float32).total([700] * 3)
        # Page 0 is nobody's; all else is random.
        assert all((store.float() == 0).float().mean() < 0.05 for layer in cache.layers for store in layer.stores)
        logits = model.decode(bench.random_tokens(config.model, [3], CPU), cache)
        assert logits.isfinite().all() and not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", bench.ROWS)
def test_steps_may_end_in_another_page_than_they_began(config: Config, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or in the next power of two: 244 tokens and 21 steps, pages of 256."""
    model = bench.build_model(config, bench.ROWS[name][0], CPU, torch.float32)
    monkeypatch.setitem(bench.STEP_WAYS, "dense", {"torch's choice": bench.STEP_WAYS["dense"]["torch's choice"]})
    moves, time_steps = [], bench.time_steps

    def watched(model: Transformer, cache: Any, *arguments: Any) -> Any:
        moves.append(cache.moves)
        found = time_steps(model, cache, *arguments)
        moves.append(cache.moves)
        return found

    monkeypatch.setattr(bench, "time_steps", watched)
    row = bench.measure(model, name, Size(2, 265), CPU, 8e9)
    assert row["status"] == "ok" and not row["problems"] and moves[0] == moves[1]


def test_what_computes_something_else_gets_no_speed(model: Transformer, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: Any = (model, KVCacheConfig(), CPU, 300, 20)
    assert bench.check(*arguments)[0]
    right = Transformer.decode
    monkeypatch.setattr(Transformer, "decode", lambda self, tokens, cache: right(self, tokens, cache) * 1.05)
    passed, said = bench.check(*arguments)
    assert not passed and "from one prefill" in said
    assert not bench.check(model, KVCacheConfig(), CPU, 300, 20)[0]
    results = empty_results()
    bench.run(config, ["sparse"], [Size(1, 1024)], 100, CPU, torch.float32, 8e9, results, lambda line: None, checked=300)
    assert results["rows"][0]["status"].startswith("FAILED the check") and not results["rows"][0]["times"] and not results["prefill"][0]["times"]
    assert "**FAILED**, so no speed is given" in bench.render(results)


def test_replayed_steps_that_differ_are_noticed(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.Decoder.__call__
    monkeypatch.setattr(bench.Decoder, "__call__", lambda self, tokens: right(self, tokens) * 1.002)
    passed, said = bench.check(model, KVCacheConfig(), CPU, 300, 20)
    assert not passed and "2.0e-03 replayed from direct" in said


def test_what_does_not_fit_or_has_no_time(model: Transformer, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    row = bench.measure(model, "sparse", Size(2, 1024), CPU, 1e6)
    assert row["status"] == "does not fit: 0.0 GiB of weights and cache, 0.0 GiB here" and not row["times"]
    assert bench.measure(model, "sparse", Size(1, 20), CPU, 8e9)["status"].startswith("error: the steps alone are")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(bench, "fill", full)
    assert bench.measure(model, "sparse", Size(1, 1024), CPU, 8e9)["status"].startswith("does not fit: OutOfMemoryError: CUDA out of memory")
    results = empty_results()
    bench.run(config, ["sparse", "dense"], [Size(1, 1024)], 64, CPU, torch.float32, 8e9, results, lambda line: None, deadline=time.monotonic() - 1)
    assert {row["status"] for row in (*results["rows"], *results["prefill"])} == {"not started: out of time"} and len(results["rows"]) == 2
    assert "not started" in bench.render(results)


def test_products_of_groups_are_the_models_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=generator) for shape in ((3, 8, 16), (3, 2, 2048, 16), (3, 2, 2048, 24)))
    t = torch.tensor([0, 2047, 700])
    expected = bench.attention_layers._attend_newest(q, k, v, t, None)
    torch.testing.assert_close(bench.products_of_groups(q, k, v, t, None), expected, rtol=1e-5, atol=1e-5)
    with bench.STEP_WAYS["dense"]["products of groups"]():
        assert bench.attention_layers._attend_newest is bench.products_of_groups


def test_bytes_of_a_step() -> None:
    """By hand: two layers, one of them with experts; tied embeddings are read whole."""
    small = compose_config(["model=tiny", "model.num_layers=2", "model.vocab_size=300", "model.moe.num_experts=4", "model.moe.top_k=2"])
    model = bench.build_model(small, "nsa", CPU, torch.float32)
    all_weights = bench.weights_bytes(model)
    assert all_weights == sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    routed = 4 * 3 * 128 * 96 * 4
    # One token visits half of the experts; 249 compressed keys, 64 of the window, 128 chosen, of 2 layers x 128 numbers in float32.
    row = 2 * 128 * 4
    assert bench.bytes_read(model, Size(1, 1000), KVCacheConfig()) == all_weights - routed / 2 + (249 + 64 + 128) * row
    fp8 = all_weights - routed * 0.25 + 2 * ((249 + 64) * row + 128 * (2 * 128 + 4 * 2))
    assert bench.bytes_read(model, Size(2, 1000), KVCacheConfig("fp8")) == pytest.approx(fp8)
    dense = bench.build_model(small, "dense", CPU, torch.float32)
    assert bench.bytes_read(dense, Size(2, 1000), KVCacheConfig()) == pytest.approx(bench.weights_bytes(dense) - routed * 0.25 + 2 * 1000 * row)


def test_wrong_words_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--sizes", "64k"]) == 2 and "BATCHxTOKENS" in capsys.readouterr().err
    assert bench.main(["--prefill", "much"]) == 2 and "no number of tokens" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert bench.main([]) == 2 and "needs a CUDA GPU" in capsys.readouterr().err
