"""benchmarks/optimizer_offload.py without a GPU: the commands, FSDP2's side, the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks import optimizer_offload as bench
from benchmarks import record, train_step
from nsa_transformer.config import build_config
from nsa_transformer.training.metrics import read_metrics
from tests.runs import small_config


@pytest.mark.parametrize(("row", "optimizer", "experts"), [("none", False, False), ("optimizer", True, False), ("both", True, True)])
def test_the_trainer_takes_the_commands(tmp_path: Path, row: str, optimizer: bool, experts: bool) -> None:
    words = train_step.command(32768, "nsa", "selective", tmp_path, tmp_path / "run", bench.overrides(row, 4))
    with initialize_config_dir(str(record.ROOT / "configs"), version_base=None):
        composed: Any = OmegaConf.to_container(compose("config", words[2:]), resolve=True)
    config = build_config(composed)
    assert (config.training.batch_size, config.training.micro_batch_size) == (4, 1)
    assert (config.memory.optimizer_offloading.enabled, config.memory.expert_offloading.enabled) == (optimizer, experts)


@pytest.mark.parametrize("fused", [False, True])
def test_fsdp2_trains(tmp_path: Path, fused: bool) -> None:
    config = small_config(tmp_path, "training.batch_size=2", "training.micro_batch_size=1", "memory.activation_checkpointing=selective")
    bench.fsdp2_steps(config, 4, fused, tmp_path / "fsdp2", torch.device("cpu"))
    rows = read_metrics(tmp_path / "fsdp2" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert bench.summarize(rows, 192)["steps"] == 2
    assert all(5 < row["loss"] < 7 for row in rows)  # tokens at random: log 300


def rows(speed: float, peak: float, **more: float) -> list[dict[str, Any]]:
    return [{"tokens_per_second": speed + step, "max_memory_gib": peak, **more} for step in range(5)]


def test_the_page() -> None:
    facts = {"gpu": "G", "memory_bytes": 8e10, "power_limit": "1 W", "driver": "1", "python": "3", "torch": "2", "triton": "3", "cudnn": "9"}
    facts |= {"commit": "c", "date": "d", "command": "python x"}
    tokens, parameters = 4 * 32768, 2**30
    found = [
        {"row": "none", "problem": "", "parameters": parameters, **bench.summarize(rows(1000, 40.0), tokens)},
        {"row": "optimizer", "problem": "", "parameters": parameters, **bench.summarize(rows(900, 26.0, update_wait_fraction=0.1), tokens)},
        {"row": "both", "problem": "no | such"},
        {"row": "fsdp2", "problem": "", "parameters": 0.0, **bench.summarize(rows(300, 30.0), tokens)},
    ]
    assert found[1]["update_wait_seconds"] == pytest.approx(0.1 * tokens / 903)
    text = bench.render({"facts": facts, "steps": 5, "length": 32768, "accumulation": 4, "checkpointing": "selective", "rows": found})
    assert "| nothing in host memory | 1.00 k | 1.00 | 130.68 | – | 40.0 | – |" in text
    assert "| optimizer | 0.90 k | 0.90 | 145.15 | 14.52 | 26.0 | 14.0 |" in text
    assert "| optimizer and experts | – | – | – | – | – | – | no / such |" in text
    assert "AdamW | 0.30 k | 0.30 | 432.58 | – | 30.0 | 10.0 |" in text


@pytest.mark.parametrize("wrong", [["--steps", "2"], ["--accumulation", "0"], ["--length", "x"]])
def test_options_that_cannot_work(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(wrong) == 2
    assert capsys.readouterr().err.startswith("error: ")
