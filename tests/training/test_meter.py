"""What the rows say of what a run waited for."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from nsa_transformer.data.loader import PackStream
from nsa_transformer.data.pack import Pack
from nsa_transformer.distributed.world import World
from nsa_transformer.training.meter import Meter
from nsa_transformer.training.metrics import read_metrics
from nsa_transformer.training.trainer import Trainer

from ..memory.stand_ins import stand_in_for_cuda
from ..runs import QUIET, small_config, write_corpus

SLOW = 0.1  # seconds


def test_slow_data_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step loads the packs of the next, the first its own too, and the last none."""
    pack = PackStream.pack

    def slow(self: PackStream, index: int) -> Pack:
        time.sleep(SLOW)
        return pack(self, index)

    monkeypatch.setattr(PackStream, "pack", slow)
    write_corpus(tmp_path / "text")
    assert Trainer(small_config(tmp_path, *QUIET, "training.max_steps=3", "training.eval_every=0", "training.eval_packs=1")).train() == 0
    waits = [row["data_wait_fraction"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert all(0.2 < wait < 1 for wait in waits[:2]) and waits[2] == 0


def test_on_a_gpu_its_own_clock_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in's events are always a millisecond apart, whatever the host does."""
    stand_in_for_cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    monkeypatch.setattr("nsa_transformer.training.meter.peak_flops", lambda *_: None)
    write_corpus(tmp_path / "text")
    meter = Meter(small_config(tmp_path), World(0, 1, torch.device("cuda"), None))
    meter._clock = iter([10.0, 10.5, 20.0, 20.5]).__next__
    for loads in (2, 0):
        meter.restart()
        for _ in range(loads):
            with meter.loading():
                time.sleep(0.01)
        meter.step_done()
    assert meter.read()["data_wait_fraction"] == pytest.approx(0.002)


@pytest.mark.gpu
def test_loading_beside_a_pass_is_no_waiting(tmp_path: Path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    write_corpus(tmp_path / "text")
    meter = Meter(small_config(tmp_path), World(0, 1, device, None))
    found = []
    for busy in (True, False):
        meter.restart()
        if busy:
            torch.cuda._sleep(2_000_000_000)  # cycles: a second, or nearly
        with meter.loading():
            time.sleep(SLOW)
        meter.step_done()
        found.append(meter.read()["data_wait_fraction"] * meter.last_step_seconds)
    assert found[0] < 0.01 and found[1] == pytest.approx(SLOW, rel=0.2)
