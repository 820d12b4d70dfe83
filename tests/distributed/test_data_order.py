"""A run that stops twice and goes on with other numbers of ranks reads what an uninterrupted one reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_transformer.training.metrics import read_metrics
from tests.runs import ENTRY, QUIET, SMALL, command, write_corpus

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.mark.slow
def test_ranks_change_twice_within_a_run_on_a_mixture(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text")
    write_corpus(tmp_path / "more", documents=3, seed=1)
    mixture = f"data.mixture=[{{path:{tmp_path / 'text'},weight:2}},{{path:{tmp_path / 'more'},weight:1}}]"
    settings = [
        *SMALL,
        *QUIET,
        mixture,
        f"data.cache_dir={tmp_path / 'cache'}",
        "training.schedule=wsd",
        "training.decay_fraction=0.001",
        "training.precision=fp32",
    ]

    def run(name: str, steps: int, *more: str, ranks: int = 1) -> None:
        launcher = TORCHRUN if ranks == 2 else ()
        done = command(*launcher, str(ENTRY), *settings, f"run_dir={tmp_path / name}", f"training.max_steps={steps}", *more, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr

    run("whole", 18)
    run("parts", 6)
    run("parts", 12, "training.resume=auto", ranks=2)
    run("parts", 18, "training.resume=auto")
    whole, parts = ([row for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row] for name in ("whole", "parts"))
    assert [row["step"] for row in parts] == list(range(1, 19))
    # The same tokens, step by step, and the same losses but for the order of sums: no other packs have these.
    assert [row["tokens"] for row in parts] == [row["tokens"] for row in whole]
    assert [row["loss"] for row in parts] == pytest.approx([row["loss"] for row in whole], rel=2e-3)
