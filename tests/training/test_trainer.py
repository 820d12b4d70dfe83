"""What a run says of its settings, and of what befalls it, in messages and rows."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from nsa_transformer.training.faults import TrainingError
from nsa_transformer.training.inspect import describe_run
from nsa_transformer.training.trainer import Trainer
from tests.runs import QUIET, small_config, steady_rows, write_corpus


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "text")
    return tmp_path


def trained(folder: Path, *more: str) -> list[dict[str, Any]]:
    """Train in `folder`/run and return its rows of metrics."""
    assert Trainer(small_config(folder, *QUIET, *more)).train() == 0
    return steady_rows(folder / "run")


def test_forced_balance_is_in_the_rows(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = trained(work, "model.moe.forced_balance=true", "training.max_steps=2")
    steps = [row for row in rows if "grad_norm" in row]
    assert [row["forced_balance"] for row in steps] == [True, True] and max(row["expert_load_max_over_mean"] for row in steps) < 1.02
    assert "warning: model.moe.forced_balance=true: experts take turns" in capsys.readouterr().err
    assert describe_run(work / "run").splitlines()[0].endswith("model.moe.forced_balance: routing not learned")
    shutil.rmtree(work / "run")
    assert not any("forced_balance" in row for row in trained(work, "training.max_steps=2"))
    assert "routing not learned" not in describe_run(work / "run")


def test_experts_that_no_layer_has_are_warned_of(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(work, "model.moe.num_dense_layers=2", "training.max_steps=1")
    assert "no layer has experts: model.moe.num_dense_layers=2 is all of model.num_layers=2" in (err := capsys.readouterr().err)
    assert "write model.moe.num_dense_layers=1 or fewer, or model.moe.num_experts=0" in err
    shutil.rmtree(work / "run")
    trained(work, "model.moe.num_experts=0", "training.max_steps=1")
    assert "no layer has experts" not in capsys.readouterr().err, "it was asked for"


def test_a_router_that_learns_nothing_is_warned_of(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A single weight, renormalised, is 1: the loss does not depend on the router."""
    without = ("model.moe.sequence_loss_weight=0", "training.weight_decay=0", "training.precision=fp32", "training.max_steps=1", "training.checkpoint_every=1")
    for top_k, learns in ((1, False), (2, True)):
        config = small_config(work, *QUIET, *without, f"model.moe.top_k={top_k}")
        trainer = Trainer(config)
        assert trainer.train() == 0
        assert ("model.moe.top_k=1: the weight" not in capsys.readouterr().err) == learns
        moment = trainer.optimizer.state[trainer.model.layers[1].mlp.router.weight]["exp_avg"]
        assert (float(moment.abs().max()) > 1e-7) == learns
        shutil.rmtree(work / "run")


def test_a_lost_rank_is_one_message(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: object) -> None:
        raise RuntimeError("[pair.cc:537] Read error [127.0.0.1]:11699: Connection reset by peer.")

    monkeypatch.setattr(Trainer, "_train", lose)
    monkeypatch.setattr("nsa_transformer.training.trainer.open_world", lambda device: nullcontext(None))
    with pytest.raises(RuntimeError, match=r"^\[pair") as alone:  # of one process it says nothing
        Trainer(small_config(work)).train()
    assert not isinstance(alone.value, TrainingError)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=r"^another rank ended while starting; .* When that is mended, start it again$"):
        Trainer(small_config(work)).train()
