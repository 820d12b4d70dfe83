from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nsa_transformer.config import LoggingConfig, WandbConfig
from nsa_transformer.training import metrics
from nsa_transformer.training.metrics import MetricsWriter, read_metrics, scalars, truncate_metrics

QUIET = LoggingConfig(tensorboard=False)


def write_lines(path: Path, *lines: str) -> None:
    path.write_bytes("".join(lines).encode())


def test_rows_come_back_as_json_can_hold_them(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, QUIET, {}, 0) as writer:
        writer.write({"step": 1, "loss": torch.tensor(2.5), "mfu": None, "grad_norm": float("nan"), "lr": np.float32(0.5)})
        assert len(read_metrics(writer.path)) == 1  # flushed, not held until close
        writer.write({"step": np.int64(2), "gate_means": torch.tensor([[0.5, 0.25, math.inf]]), "expert_load": np.array([[0.5, 0.5]])})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 2.5, "mfu": None, "grad_norm": None, "lr": 0.5},
        {"step": 2, "gate_means": [[0.5, 0.25, None]], "expert_load": [[0.5, 0.5]]},
    ]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_row_without_a_step_is_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, QUIET, {}, 0) as writer, pytest.raises(ValueError, match="needs its step"):
        writer.write({"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step"', "{", '{"step": 4, "loss": 1.0', "\x00\x00\x00"])
def test_truncation_drops_later_rows_and_a_torn_line(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, '{"step": 1}\n', '{"step": 2, "loss": 1.0}\n', '{"step": 2, "val_loss": 2.0}\n', '{"step": 3}\n', torn)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 2, 3]
    assert truncate_metrics(path, 2) == 2
    assert path.read_text() == '{"step": 1}\n{"step": 2, "loss": 1.0}\n{"step": 2, "val_loss": 2.0}\n'
    assert truncate_metrics(path, 2) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, '{"step": 1}\n', '{"step": 2}')
    assert truncate_metrics(path, 5) == 0
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_every_cut_of_the_file_resumes_to_the_same_rows(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 5)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / "metrics.jsonl"
    third = whole.index('{"step": 3')
    for cut in range(third, len(whole) + 1):
        path.write_text(whole[:cut])
        with MetricsWriter(tmp_path, QUIET, {}, 2) as writer:
            for row in rows[2:]:
                writer.write(row)
        assert path.read_text() == whole


def test_a_fresh_start_removes_the_rows_of_one_that_never_saved(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", '{"step": 1}\n')
    MetricsWriter(tmp_path, QUIET, {}, 0).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert truncate_metrics(tmp_path / "absent.jsonl", 3) == 0


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "m", '{"step": 1}\n', "{broken\n", '{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not a row"):
        read_metrics(tmp_path / "m")


def test_scalars_group_by_kind() -> None:
    assert scalars({"step": 3, "loss": 1.5, "mfu": None}) == {"train/loss": 1.5}
    row = {"step": 3, "val_loss": 2.0, "val_bpb": 1.0, "gate_means": [[0.1, 0.2, None]], "expert_load": [[0.75, 0.25], [0.0, 0.0], [None, 1.0]]}
    assert scalars(row) == {
        "val/loss": 2.0,
        "val/bpb": 1.0,
        "gates/layer_00_compressed": 0.1,
        "gates/layer_00_selected": 0.2,
        "val_experts/moe_layer_00_max_over_mean": 1.5,
    }
    balance = {"max_over_mean": [1.5, None], "entropy": [0.8, 1.0], "dead": [0, 2]}
    assert scalars({"step": 3, "loss": 1.5, "expert_balance": balance, "expert_load": [[0.75, 0.25]]}) == {
        "train/loss": 1.5,
        "experts/moe_layer_00_max_over_mean": 1.5,
        "experts/moe_layer_00_entropy": 0.8,
        "experts/moe_layer_01_entropy": 1.0,
        "experts/moe_layer_00_dead": 0,
        "experts/moe_layer_01_dead": 2,
    }


def test_tensorboard_hides_what_a_resume_repeats(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume, loss in ((0, 1.0), (2, 9.0)):
        with MetricsWriter(tmp_path, LoggingConfig(), {}, resume) as writer:
            for step in range(resume + 1, 5):
                writer.write({"step": step, "loss": loss})
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 1.0), (2, 1.0), (3, 9.0), (4, 9.0)]


class FakeWandb(types.ModuleType):
    """Stands in for the client: records what it is told, and fails where it is asked to."""

    def __init__(self, api_key: str | None = None, fail: str = "") -> None:
        super().__init__("wandb")
        self.fail, self.inits, self.logged, self.api_key = fail, [], [], api_key  # type: ignore[var-annotated]

    def setup(self) -> Any:
        return types.SimpleNamespace(settings=types.SimpleNamespace(api_key=self.api_key, base_url="https://wandb.invalid"))

    def Settings(self, **values: Any) -> dict[str, Any]:
        return values

    def _may_fail(self, where: str) -> None:
        if where in self.fail:
            raise ConnectionError(f"no network in {where}\nsecond line")

    def init(self, **values: Any) -> FakeWandb:
        self._may_fail(values["mode"])
        self.inits.append(values)
        return self

    def teardown(self) -> None:
        pass

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, numbers: dict[str, float]) -> None:
        self._may_fail("log")
        self.logged.append(numbers)

    def finish(self) -> None:
        self._may_fail("finish")


def run_with(fake: FakeWandb, folder: Path, monkeypatch: pytest.MonkeyPatch, resume: int = 0) -> list[str]:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("NETRC", str(folder / "no-netrc"))
    for name in ("WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    warnings: list[str] = []
    with MetricsWriter(folder, LoggingConfig(tensorboard=False, wandb=WandbConfig(project="p")), {"a": 1}, resume, warn=warnings.append) as writer:
        for step in (resume + 1, resume + 2):
            writer.write({"step": step, "loss": 1.0})
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, resume + 3))
    return warnings


def test_wandb_without_a_login_is_offline_and_a_resume_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = FakeWandb(), FakeWandb(api_key="k")
    assert run_with(first, tmp_path, monkeypatch) == []
    assert run_with(second, tmp_path, monkeypatch, resume=2) == []
    assert [fake.inits[0]["mode"] for fake in (first, second)] == ["offline", "online"]
    assert first.inits[0]["id"] == second.inits[0]["id"]
    assert first.inits[0]["dir"] == str(tmp_path)
    assert first.inits[0]["config"] == {"a": 1}
    assert first.logged == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 1.0}]


def test_wandb_finds_a_login_in_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine wandb.invalid login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert metrics._has_wandb_login(FakeWandb().setup().settings)
    monkeypatch.setenv("NETRC", str(tmp_path / "absent"))
    assert not metrics._has_wandb_login(FakeWandb().setup().settings)


def test_wandb_goes_offline_when_the_network_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb(api_key="k", fail="online")
    (warning,) = run_with(fake, tmp_path, monkeypatch)
    assert "offline" in warning
    assert "second line" not in warning
    assert fake.inits[0]["mode"] == "offline"
    assert len(fake.logged) == 2


@pytest.mark.parametrize("where", ["offline", "log", "finish"])
def test_a_wandb_failure_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    (warning,) = run_with(FakeWandb(fail=where), tmp_path, monkeypatch)
    assert warning.startswith("Weights & Biases failed")


def test_missing_packages_are_one_warning_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    warnings: list[str] = []
    config = LoggingConfig(wandb=WandbConfig(project="p"))
    with MetricsWriter(tmp_path, config, {}, 0, warn=warnings.append) as writer:
        writer.write({"step": 1, "loss": 1.0})
    assert len(warnings) == 2
    assert "pip install tensorboard" in warnings[0]
    assert "pip install wandb" in warnings[1]


def test_the_real_client_records_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    warnings: list[str] = []
    run = tmp_path / "run"
    run.mkdir()
    with MetricsWriter(run, LoggingConfig(tensorboard=False, wandb=WandbConfig(project="p")), {"a": {"b": 1}}, 0, warn=warnings.append) as writer:
        writer.write({"step": 1, "loss": 1.0})
    assert warnings == []
    assert len(list(run.glob("wandb/offline-run-*/*.wandb"))) == 1
