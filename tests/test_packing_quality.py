"""benchmarks/packing_quality.py: two ways that see the same documents, and an honest line of differences."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import packing_quality
from nsa_transformer.data.corpus import Split
from nsa_transformer.data.loader import PackStream


def test_both_ways_hold_every_token_of_an_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 50)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    split = Split(np.arange(1, offsets[-1] + 1, dtype=np.uint32), offsets, np.arange(50), "test")
    stream = PackStream(split, max_length=16, seed=0, pack_buffer=8, eod_id=0)
    for one in (stream, packing_quality.concatenated(stream)):
        tokens = np.concatenate([p.tokens[p.valid].numpy() for p in one.first_epoch(10_000)])
        assert sorted(tokens.tolist()) == list(range(1, int(offsets[-1]) + 1))


def test_the_verdict_takes_pairs_of_equal_seed() -> None:
    rows = [
        {"way": way, "seed": seed, "losses": {packing_quality.BEST_FIT: loss, packing_quality.CONCATENATE: loss}}
        for way, seed, loss in [("best fit", 1, 3.0), ("concatenate and cut", 1, 3.5), ("best fit", 0, 3.0), ("concatenate and cut", 0, 2.9)]
    ]
    assert "by seed -0.1000, +0.5000; mean +0.2000, standard deviation 0.4243" in packing_quality.verdict(rows)


@pytest.mark.slow
def test_a_page_is_written(tmp_path: Path) -> None:
    small = ["training.batch_size=1", "training.eval_packs=2", "data.max_length=128"]
    assert packing_quality.main(["--steps", "2", "--seeds", "0", "--out", str(tmp_path), *small]) == 0
    (page,) = tmp_path.glob("*.md")
    assert "| 0 | concatenate and cut |" in page.read_text()
    assert len(json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]) == 2
    assert packing_quality.main(["--out", str(tmp_path), "data.max_length=0"]) == 2
