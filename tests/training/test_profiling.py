from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_transformer.config import ProfilingConfig
from nsa_transformer.training.profiling import Profiler


def run(folder: Path, config: ProfilingConfig, steps: int, device: str = "cpu") -> list[str]:
    log: list[str] = []
    x = torch.ones(8, 8, device=device)
    with Profiler(folder, config, device, log.append) as profiler:
        for _ in range(steps):
            x @ x
            profiler.step()
    return log


def trace(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("profiler/trace_*")
    assert path.name == "trace_rank0.json.gz"
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def test_traces_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    log = run(tmp_path, ProfilingConfig(enabled=True, start_step=2, num_steps=3), 8)
    assert len(log) == 1
    assert "steps 3 to 5" in log[0]
    assert "ui.perfetto.dev" in log[0]
    events = trace(tmp_path)
    assert sum(event["name"] == "aten::mm" for event in events) == 3
    assert not any(event["name"] == "[memory]" for event in events)
    assert [path.name for path in (tmp_path / "profiler").iterdir()] == ["trace_rank0.json.gz"]


def test_a_run_that_ends_among_the_steps_still_writes_them(tmp_path: Path) -> None:
    log = run(tmp_path, ProfilingConfig(enabled=True, start_step=1, num_steps=10), 3)
    assert "steps 2 to 3" in log[0]
    assert sum(event["name"] == "aten::mm" for event in trace(tmp_path)) == 2


def test_memory_events(tmp_path: Path) -> None:
    log = run(tmp_path, ProfilingConfig(enabled=True, trace_memory=True, start_step=1, num_steps=1), 4)
    assert any(event["name"] == "[memory]" for event in trace(tmp_path))
    assert "CUDA alone" in log[1]


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_run_too_short_says_so(tmp_path: Path, steps: int) -> None:
    (message,) = run(tmp_path, ProfilingConfig(enabled=True, start_step=3), steps)
    assert message.startswith(f"nothing was traced: {steps} steps ran")
    assert "logging.profiling.start_step=3" in message
    assert list((tmp_path / "profiler").iterdir()) == []


@pytest.mark.parametrize(("steps", "what"), [(1, "step 2 (unfinished)"), (2, "step 2 of"), (3, "steps 2 to 3")])
def test_an_error_in_the_loop_is_not_hidden_and_what_led_to_it_is_written(tmp_path: Path, steps: int, what: str) -> None:
    log: list[str] = []
    with pytest.raises(RuntimeError, match="out of memory"), Profiler(tmp_path, ProfilingConfig(enabled=True, start_step=1), "cpu", log.append) as profiler:
        for _ in range(steps):
            profiler.step()
        raise RuntimeError("out of memory")
    assert what in log[0]
    assert len(trace(tmp_path)) > 0


def test_off_means_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "profile", lambda *a, **k: pytest.fail("profiled while off"))
    assert run(tmp_path, ProfilingConfig(), 20) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_memory_snapshot_on_cuda(tmp_path: Path) -> None:
    log = run(tmp_path, ProfilingConfig(enabled=True, trace_memory=True, start_step=1, num_steps=2), 5, "cuda")
    assert any("memory_viz" in line for line in log)
    assert (tmp_path / "profiler" / "memory_rank0.pickle").stat().st_size > 0
    assert any(event.get("cat") == "kernel" for event in trace(tmp_path))
