"""benchmarks/expert_parallel.py on CPU processes: the comparison before timing, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import expert_parallel as bench
from tests.runs import ROOT, command

SCRIPT = str(ROOT / "benchmarks" / "expert_parallel.py")


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = command(*launcher, SCRIPT, "--shapes", "64/32/8/2@300", "--repeats", "2", "--out", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (numbers,) = tmp_path.glob("*.json")
    results = json.loads(numbers.read_text())
    (row,) = results["rows"]
    assert row["status"] == "ok" and row["worst_error"] < 1e-5 and set(row["sides"]) == set(bench.SIDES)
    assert numbers.with_suffix(".md").read_text() == bench.render(results)
    row |= {"status": "FAILED", "worst_error": 0.5}
    del row["sides"]
    assert "| 64/32/8/2@300 | FAILED |  |  | 5.0e-01 |" in bench.render(results)


def test_wrong_words_end_with_status_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert bench.main(["--shapes", "64@64"]) == 2
    assert "HIDDEN/WIDTH/EXPERTS/TOP_K@TOKENS" in capsys.readouterr().err
    assert bench.main([]) == 2
    assert "torchrun --nproc_per_node=N" in capsys.readouterr().err
