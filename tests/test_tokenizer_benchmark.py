"""benchmarks/tokenizer.py from files to the page, on little text and without the peers that may be installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import tokenizer, vocabularies
from benchmarks.vocabularies import Candidate


def test_from_files_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"text number {i}, and some words more\n" * (1 + i))

    def fails(texts: Sequence[str]) -> list[Sequence[int]]:
        if set(texts[0]) == {"a"}:
            raise OverflowError
        return [list(map(ord, text)) for text in texts]

    peer = Candidate("peer", 128, fails, lambda ids: "".join(map(chr, ids)).upper())
    monkeypatch.setattr(vocabularies, "ready_made", lambda: [peer])
    monkeypatch.setattr(tokenizer, "installed_version", lambda name: None if name == "sentencepiece" else "1.0")
    sizes = ["--train-bytes", "50k", "--test-bytes", "1k", "--hard-bytes", "2k", "--vocab-size", "300"]
    assert tokenizer.main(["--text", f"words={tmp_path / 'text'}", *sizes, "--out", str(tmp_path / "out")]) == 0
    (numbers,) = (tmp_path / "out").glob("*.json")
    results = json.loads(numbers.read_text())
    ours, library, _, other = results["rows"]
    assert ours["bytes_per_token"] == library["bytes_per_token"]
    assert ours["lossless"] and not other["lossless"]
    assert other["bytes_per_token"] == {"words": 1.0, "numbers": 1.0}
    assert all(isinstance(seconds, float) for seconds in ours["hard"].values())
    assert other["hard"]["one letter"] == "OverflowError"
    page = numbers.with_suffix(".md").read_text()
    assert "| this project | 300 |" in page and "## 0.002 MB of one thing" in page


def test_a_text_that_takes_too_long_is_given_up() -> None:
    def forever(_texts: Sequence[str]) -> list[Sequence[int]]:
        while True:
            pass

    assert tokenizer.hard_seconds(Candidate("slow", 1, forever, str), "a", 0.2) == "> 0 s"


@pytest.mark.parametrize("wrong", [["--text", "nothing"], ["--text", "a=/nowhere"], ["--train-bytes", "2x"]])
def test_a_mistake_is_named(wrong: list[str]) -> None:
    try:
        status: object = tokenizer.main(wrong)
    except SystemExit as exit:
        status = exit.code
    assert status == 2
