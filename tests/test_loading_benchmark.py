"""benchmarks/loading.py: what it measures, on something small, and its page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import loading
from tests.runs import write_corpus


@pytest.fixture
def text(tmp_path: Path) -> str:
    return str(write_corpus(tmp_path / "text"))


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SECONDS", 0.05)


def test_the_figures_of_a_corpus(text: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    cold = loading.cold(text, cache)
    assert loading.cold(text, cache, 2)["tokens"] == cold["tokens"]
    assert cold["documents"] == 10 and cold["tokens"] > 1000 and cold["seconds"] > 0
    assert set(loading.cached(text, cache)) == {"2048", "8192", "65536"}
    assert loading.start(text, cache)["seconds"] > 0
    assert all(value > 0 for value in loading.wait(text, cache).values())


def test_the_page_says_whether_the_promise_is_kept() -> None:
    run = {"bytes": 10e6, "seconds": 2.0, "cpu": 2.0}
    corpus = {"name": "c", "bytes": 10e6, "tokens": 3e6, "cold": [run, run], "cached": {str(n): 9e6 for n in loading.LENGTHS}, "starts": [{"seconds": 1.0}] * 3}
    facts = dict.fromkeys(("date", "cpu", "python", "torch", "numpy", "tokenizers", "commit", "command"), "x")
    resume = {"length": 8192, "tokens": 1e9, "epoch": 3, "first": 1.0, "with": 2.0, "without": 9.0}
    wait = {f"{length} {where}": 0.1 for length in loading.LENGTHS for where in ("disk", "memory")}
    big = {kind: {"seconds": 1.0, "gib": 0.5} for kind in ("txt", "jsonl")}
    page = loading.render({"facts": facts, "cores": [1, 2], "corpora": [corpus], "resume": [resume], "wait": wait, "big": big})
    assert "The slowest here: 2.5 MB/s per core by the clock\n(kept), 5.0 by seconds of CPU (kept), 9 M tokens/s (kept)." in page
    assert "| 8k | 3 | 1.0 s | 2.0 s | 9.0 s |" in page
    assert "| 8k | memory | 0.10 | 0.04% | 0.12% | 1.22% |" in page
    corpus["cold"] = [run | {"seconds": 9.0}, run]
    assert "1.1 MB/s per core by the clock\n(not kept), 5.0" in loading.verdict({"cores": [1, 2], "corpora": [corpus]})


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert loading.main(["--corpus", "nowhere"]) == 2
    assert loading.main(["--measure", "start", json.dumps([str(tmp_path / "nowhere")]), "--cache", str(tmp_path)]) == 2
    assert loading.main(["--corpus", f"missing={tmp_path / 'nowhere'}"]) == 2  # before anything is measured
    assert capsys.readouterr().err.count("error: ") == 3
