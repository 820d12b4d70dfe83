"""Runs with the optimizer in host memory: the same as without it, bit for bit on a CPU, and nothing lost however they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_transformer.distributed.world import World
from nsa_transformer.memory import optimizer_offload
from nsa_transformer.memory.optimizer_offload import OffloadedAdamW
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.training.faults import Stopped
from nsa_transformer.training.metrics import read_metrics
from nsa_transformer.training.trainer import Trainer

from ..runs import QUIET, final_files, small_config, steady_rows, write_corpus

ON = "memory.optimizer_offloading.enabled=true"
# Four passes a step, and gradients that are clipped in every step.
SETTINGS = (*QUIET, "training.batch_size=4", "training.micro_batch_size=1", "training.max_grad_norm=0.5")
CPU = World(0, 1, torch.device("cpu"), None)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "text")
    return tmp_path


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("optimizer")]


def run(folder: Path, name: str, *more: str, trainer: type[Trainer] = Trainer) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Rows and final files of a run, which then is called `name`."""
    torch.compiler.reset()  # else what earlier runs of the process compiled decides what is compiled now, and so the last bits
    assert trainer(small_config(folder, *SETTINGS, *more)).train() == 0
    assert threads() == []
    (folder / "run").rename(folder / name)
    return steady_rows(folder / name), final_files(folder / name)


# --------------------------------------------------------------------------------------------------------- the same run


@pytest.mark.parametrize(
    "settings",
    [
        ("training.precision=bf16",),
        ("training.precision=fp32",),
        ("training.precision=bf16", "model.tie_embeddings=false", "model.attention=dense"),
        ("training.precision=bf16", "training.max_grad_norm=100", "model.nsa.compression=mean"),
        ("training.precision=bf16", "memory.activation_checkpointing=selective"),
        ("training.precision=bf16", "memory.activation_checkpointing=full", "training.micro_batch_size=2"),
        pytest.param(("training.precision=bf16", "training.compile=true"), marks=pytest.mark.slow),
    ],
    ids=lambda settings: " ".join(word.split(".")[-1] for word in settings),
)
def test_a_run_is_the_same_bit_for_bit(work: Path, settings: tuple[str, ...]) -> None:
    plain = run(work, "plain", *settings)
    assert run(work, "offloaded", *settings, ON) == plain
    norms = [row["grad_norm"] for row in plain[0] if "grad_norm" in row]
    assert all(norm > 0.5 for norm in norms), "or clipping is not tested"


@pytest.mark.parametrize("first", [(), (ON,)], ids=["off then on", "on then off"])
def test_a_run_resumes_with_and_without(work: Path, first: tuple[str, ...]) -> None:
    whole = run(work, "whole")
    second = () if first else (ON,)
    more = ("training.max_steps=6", "training.checkpoint_every=3")

    class Ends(Trainer):
        def _save(self) -> None:
            super()._save()
            if self.progress.step == 3:
                raise Stopped(signal.SIGTERM)

    assert Ends(small_config(work, *SETTINGS, *more, *first)).train() == 143
    assert threads() == []
    rows, files = run(work, "resumed", *more, *second, "training.resume=auto")
    assert (rows, files["model.safetensors"], files["optimizer.safetensors"]) == (whole[0], whole[1]["model.safetensors"], whole[1]["optimizer.safetensors"])


def test_the_wait_for_the_update_is_in_the_rows(work: Path) -> None:
    run(work, "plain")
    run(work, "offloaded", ON)
    plain, offloaded = ([row for row in read_metrics(work / name / "metrics.jsonl") if "loss" in row] for name in ("plain", "offloaded"))
    assert all("update_wait_fraction" not in row for row in plain)
    assert all(0 < row["update_wait_fraction"] < 1 for row in offloaded)


def test_init_from_takes_the_weights_into_the_masters(work: Path) -> None:
    run(work, "first")
    start = f"training.init_from={work / 'first'}"
    assert run(work, "offloaded", start, ON) == run(work, "plain", start)


def test_an_update_that_is_not_finite_changes_nothing(work: Path) -> None:
    class Poisoned(Trainer):
        """Infinities in the gradient of a bf16 matrix in the third pass of steps 2 and 3."""

        def _passes(self, *arguments: Any) -> Any:
            passes, bad = 0, self.progress.step + 1 in (2, 3)

            def poison(grad: Tensor) -> Tensor:
                nonlocal passes
                passes += 1
                return grad * torch.inf if bad and passes == 3 else grad

            handle = self.model.get_parameter("layers.1.mlp.w2").register_hook(poison)
            before = self.values()
            result = super()._passes(*arguments)
            handle.remove()
            self.unchanged = (lambda: all(map(torch.equal, before, self.values()))) if bad else None
            return result

        def values(self) -> list[Tensor]:
            return [optimizer_offload.master_of(self.optimizer, p).detach().clone() for p in self.model.parameters()]

        def _update(self, *arguments: Any) -> Any:
            row = super()._update(*arguments)
            assert (row is None) == (self.unchanged is not None)
            assert self.unchanged is None or self.unchanged()
            return row

    plain = run(work, "plain", trainer=Poisoned)
    assert [row["step"] for row in plain[0] if "loss" in row] == [1, 4, 5, 6]
    assert run(work, "offloaded", ON, trainer=Poisoned) == plain


def test_a_signal_between_two_passes_gives_the_step_up(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(work, "whole", ON, "training.max_steps=3")
    forward, passes = Transformer.forward, 0

    def counted(self: Transformer, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += self.training and "targets" in kwargs
        if passes == 6:  # the second of four passes of the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "forward", counted)
        assert Trainer(small_config(work, *SETTINGS, ON, "training.max_steps=3")).train() == 143
    assert threads() == []
    rows, files = run(work, "resumed", ON, "training.max_steps=3", "training.resume=auto")
    assert (rows, files["model.safetensors"]) == (whole[0], whole[1]["model.safetensors"])


# ------------------------------------------------------------------------------------------------------------ its end


def _killed(folder: str, what: str, count: int, more: tuple[str, ...]) -> None:
    """In a process of its own: train, and be killed in the thread of the optimizer, at the `count`-th call of its method `what`."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    method, calls = getattr(OffloadedAdamW, what), 0

    def counted(self: OffloadedAdamW, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *arguments)

    setattr(OffloadedAdamW, what, counted)
    sys.exit(Trainer(small_config(Path(folder), *SETTINGS, ON, *more)).train())


_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.memory.test_optimizer_offload_runs"])


@pytest.mark.parametrize(("what", "share"), [("_update", 0.5), ("_update", 0.9), ("_receive", 0.3), ("_receive", 0.7)])
def test_killed_in_an_offloaded_step(work: Path, monkeypatch: pytest.MonkeyPatch, what: str, share: float) -> None:
    """The newest checkpoint is whole, and the run that goes on from it is the one that was not killed."""
    calls, method = 0, getattr(OffloadedAdamW, what)

    def counted(self: OffloadedAdamW, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return method(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(OffloadedAdamW, what, counted)
        whole = run(work, "whole", ON)
    assert calls > 20
    process = _processes.Process(target=_killed, args=(str(work), what, round(share * calls), ()))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert run(work, "killed", ON, "training.resume=auto") == whole


@pytest.mark.parametrize("what", ["_update", "_receive"])
def test_a_failure_ends_the_run(work: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    method, calls = getattr(OffloadedAdamW, what), 0

    def failing(self: OffloadedAdamW, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise ZeroDivisionError("of the optimizer")
        return method(self, *arguments)

    monkeypatch.setattr(OffloadedAdamW, what, failing)
    with pytest.raises(ZeroDivisionError, match="of the optimizer"):
        Trainer(small_config(work, *SETTINGS, ON)).train()
    assert threads() == []


def test_a_second_signal_does_not_wait_for_the_update(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it leave the thread behind."""
    update, begun, calls = OffloadedAdamW._update, threading.Event(), 0

    def slow(self: OffloadedAdamW, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # the first part of the second update; the trainer waits for it
            begun.set()
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                threading.Event().wait(0.2)
        return update(self, *arguments)

    monkeypatch.setattr(OffloadedAdamW, "_update", slow)
    assert Trainer(small_config(work, *SETTINGS, ON)).train() == 130
    assert begun.is_set() and calls == 5, "what waited in the queue is given up"
    assert threads() == []


# ------------------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [("training.precision=bf16",), ("training.precision=fp32",), ("memory.activation_checkpointing=full",), ("training.compile=true",)],
    ids=lambda settings: settings[0].split(".")[-1],
)
def test_a_run_on_a_gpu_is_the_same(work: Path, settings: tuple[str, ...]) -> None:
    """But for the last bits, in which AdamW differs between CPU and GPU."""
    settings = ("training.device=cuda", "training.max_steps=12", *settings)
    plain, offloaded = run(work, "plain", *settings)[0], run(work, "offloaded", *settings, ON)[0]
    for key in ("loss", "val_loss", "grad_norm"):
        found = [[row[key] for row in rows if key in row] for rows in (plain, offloaded)]
        assert found[1] == pytest.approx(found[0], rel=5e-3), key
    assert offloaded[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6), "the weights of the first forward are the same"


@pytest.mark.gpu
def test_a_gpu_resumes_what_was_offloaded(work: Path) -> None:
    gpu = ("training.device=cuda", "training.max_steps=4")
    run(work, "run", *gpu, ON)
    (work / "run").rename(work / "first")
    (work / "first").rename(work / "run")
    more = ("training.device=cuda", "training.max_steps=6", "training.resume=auto")
    assert Trainer(small_config(work, *SETTINGS, *more)).train() == 0
    losses = [row["loss"] for row in steady_rows(work / "run") if "loss" in row]
    assert len(losses) == 6 and losses[5] < losses[0]
