"""The ways that benchmarks/packing.py compares with, and its page."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import packers, packing
from nsa_transformer.data.corpus import Split
from nsa_transformer.data.packing import PackPlan

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def tokens_of(plan: PackPlan, lengths: np.ndarray) -> list[list[tuple[int, int]]]:
    """(document, token) of every token of every pack."""
    return [[(d, i) for d, start, n in plan.fragments(p) for i in range(start, start + n)] for p in range(len(plan))]


@given(LENGTHS, st.integers(1, 30), st.randoms())
def test_concatenation_is_every_token_in_order_cut_at_equal_lengths(lengths: list[int], max_length: int, random) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)
    packs = tokens_of(packers.concatenate_and_split(np.array(lengths), max_length, np.array(order)), np.array(lengths))
    assert [token for pack in packs for token in pack] == [(d, i) for d in order for i in range(lengths[d])]
    assert all(len(pack) == max_length for pack in packs[:-1])


@given(LENGTHS, st.integers(1, 30))
def test_first_fit_goes_to_the_first_pack_with_room(lengths: list[int], max_length: int) -> None:
    plan = packers.first_fit(np.array(lengths), max_length, np.arange(len(lengths)))
    packs: list[list[tuple[int, int, int]]] = []
    for document, length in enumerate(lengths):
        for start in range(0, length, max_length):
            piece = (document, start, min(max_length, length - start))
            room = [pack for pack in packs if sum(n for _, _, n in pack) + piece[2] <= max_length]
            (room[0] if room else packs.append([]) or packs[-1]).append(piece)
    assert [plan.fragments(i) for i in range(len(plan))] == packs


@given(LENGTHS, st.integers(1, 30))
def test_counts_of_hugging_face_ways(lengths: list[int], max_length: int) -> None:
    kept, cells = packers.padded_counts(np.array(lengths), max_length)
    rows = [min(n, max_length) for n in lengths]
    batches = [rows[i : i + packers.HF_BATCH] for i in range(0, len(rows), packers.HF_BATCH)]
    assert (kept, cells) == (sum(rows), sum(len(batch) * max(batch) for batch in batches))
    kept, fragments = packers.grouped_counts(np.array(lengths), max_length)
    owners = [d for d, n in enumerate(lengths) for _ in range(n)]
    whole = [owners[i : i + max_length] for i in range(0, len(owners) - max_length + 1, max_length)]
    assert (kept, fragments) == (sum(map(len, whole)), sum(len(set(row)) for row in whole))


def test_hugging_face_datasets_yield_what_is_counted() -> None:
    pytest.importorskip("datasets")
    lengths = np.array([5, 40, 3, 9, 12, 1, 30, 2, 7, 8])
    split = Split(np.arange(lengths.sum(), dtype=np.uint16), np.concatenate([[0], np.cumsum(lengths)]), np.arange(10), "test")
    dataset = packers.hf_dataset(split)
    assert sum(packers.padded_batches(dataset, 16, 0)) == packers.padded_counts(lengths, 16)[0]
    joined = packers.grouped(dataset, 16)
    assert Counter(token for row in joined["input_ids"] for token in row) == Counter(range(len(split.tokens) // 16 * 16))
    assert sum(packers.grouped_batches(joined)) == packers.grouped_counts(lengths, 16)[0]


def test_from_files_to_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SECONDS", 0.01)
    monkeypatch.setattr(packing, "plan_million", lambda length: {"length": length, "seconds": 1.0})
    standard, opened = packing.open_corpus, []

    def small(path: str | None, vocab_size: int, cache: Path) -> tuple[Split, int, int]:
        opened.append(path)
        return standard(str(tmp_path / "text"), vocab_size, cache)  # instead of the whole standard library

    monkeypatch.setattr(packing, "open_corpus", small)
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"text number {i}\n" * (1 + i * i))
    arguments = ["--lengths", "256", "--buffers", "8", "4096", "--vocab-size", "300", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert packing.main([*arguments, "--corpus", f"mine={tmp_path / 'text'}"]) == 0
    assert opened == [None, str(tmp_path / "text")]
    (numbers,) = (tmp_path / "out").glob("*.json")
    rows = json.loads(numbers.read_text())["rows"]
    ours = [row for row in rows if row["way"] == "best fit, buffer 4096"]
    assert len(ours) == 2 and all(packing.kept_promise(row) for row in ours)
    page = numbers.with_suffix(".md").read_text()
    assert "keeps it in 2 of 2 cases." in page and "## mine" in page and "| 256 | concatenate and split |" in page
    assert packing.main(["--corpus", "nothing"]) == 2
    assert packing.main(["--lengths", "2x"]) == 2
