"""benchmarks/expert_traces.py and slot_policies.py: policies beside the best there could be, rates, the page."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import expert_traces as bench
from benchmarks.slot_policies import misses
from nsa_transformer.training.trainer import Trainer
from tests.runs import small_config, write_corpus


def fewest(steps: list[list[int]], slots: int) -> int:
    """Over all ways to keep experts."""
    states = {frozenset(): 0}
    for chosen in steps:
        needed = frozenset(chosen)
        after: dict[frozenset[int], int] = {}
        for there, count in states.items():
            rest = there - needed
            for size in range(min(len(rest), slots - len(needed)) + 1):
                for kept in itertools.combinations(sorted(rest), size):
                    state = needed | frozenset(kept)
                    after[state] = min(after.get(state, 1 << 30), count + len(needed - there))
        states = after
    return min(states.values())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_no_policy_is_better_than_the_best(data: st.DataObject) -> None:
    slots = data.draw(st.integers(2, 4))
    steps = data.draw(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=2, unique=True), min_size=1, max_size=9))
    best = sum(misses(steps, slots, "best"))
    assert best == fewest(steps, slots)
    assert all(sum(misses(steps, slots, policy)) >= best for policy in ("lru", "frequency"))


def test_policies_of_a_known_trace() -> None:
    steps = [[0], [0], [1], [2], [0], [1]]
    assert misses(steps, 2, "lru") == [1, 0, 1, 1, 1, 1]
    assert misses(steps, 2, "frequency") == [1, 0, 1, 1, 0, 1]
    assert misses(steps, 2, "best") == [1, 0, 1, 1, 0, 1]


def test_rates_begin_after_the_warm_up() -> None:
    trace = torch.tensor([[[0]], [[1]], [[0]], [[1]], [[0]], [[1]], [[2]], [[1]]])
    assert bench.miss_rate(trace, 2, "lru") == 1 / 6  # the 2; of the first two tokens none counts
    assert bench.busiest(trace, 4) == 2.0
    drawn = bench.random_trace(400, 2, 8, 2)
    assert drawn.shape == (400, 2, 2) and (drawn[..., 0] != drawn[..., 1]).all() and bench.busiest(drawn, 8) < 1.3
    assert bench.miss_rate(drawn, 4, "lru") == pytest.approx(0.5, abs=0.07)  # whoever is there, half are not


def test_prefetch_spares_misses_and_costs_copies() -> None:
    """The second layer visits 0, 1, 2 in turn with one slot; its guesses are right, or always 3."""
    trace = torch.tensor([[[0], [token % 3]] for token in range(12)])
    right, wrong = trace[:, 1:], torch.full((12, 1, 1), 3)
    assert bench.with_prefetch(trace, right, 1, 0) == {"missing": 0.5, "copied": 0.5}
    assert bench.with_prefetch(trace, right, 1, 1) == {"missing": 0.0, "copied": 0.5}
    assert bench.with_prefetch(trace, wrong, 1, 1) == {"missing": 0.5, "copied": 1.0}


def test_page_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs"
    write_corpus(folder / "text")
    config = small_config(folder, "training.max_steps=2")
    assert Trainer(config).train() == 0
    text = tmp_path / "text.py"
    text.write_text("def f(x):\n    return x\n" * 20)
    run = str(config.run_dir)
    words = ["--run", run, "--text", str(text), "--tokens", "40", "--out", str(tmp_path / "out"), "--commit", "abc"]
    assert bench.main([*words, "--shares", "0.75"]) == 0
    page = next((tmp_path / "out").glob("expert_traces_cpu_*.md")).read_text()
    assert "| text.py | 40 |" in page and page.count("| text.py |") == 2 and "weights step_00000002" in page and "Commit abc" in page
    assert bench.main([*words, "--shares", "0.01"]) == 2 and "slots, and a token visits" in capsys.readouterr().err
    assert bench.main([*words, "--shares", "2"]) == 2 and "must lie between 0 and 1" in capsys.readouterr().err
    for nothing in ("", "x"):
        text.write_text(nothing)
        assert bench.main([*words, "--shares", "0.75"]) == 2 and "tokens long; give one of 4 or more" in capsys.readouterr().err
