"""Training from the outside: it learns, accumulation changes nothing, and an interrupted run is the same run.

`pytest tests/test_training.py` is a command of the README. The golden losses are rewritten by `python -m tests.test_training`,
which is right after a change that is meant to alter the numbers, and only then.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nsa_transformer.config import ConfigError, TrainingConfig
from nsa_transformer.distributed.checkpoint import find_damage
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.training.faults import Stopped, StopSignal, TrainingError
from nsa_transformer.training.metrics import read_metrics
from nsa_transformer.training.optimizer import build_optimizer, learning_rate
from nsa_transformer.training.trainer import Trainer
from tests.runs import ENTRY, QUIET, environment, final_files, overrides, small_config, steady_rows, write_corpus

GOLDEN = Path(__file__).parent / "golden" / "small_run.json"
GOLDEN_RUN = ("training.max_steps=20", "training.precision=fp32", *QUIET)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "text")
    return tmp_path


def trained(folder: Path, *more: str) -> list[dict[str, Any]]:
    """Train in `folder`/run and return its rows of metrics."""
    config = small_config(folder, *QUIET, *more)
    assert Trainer(config).train() == 0
    return steady_rows(folder / "run")


def losses(rows: list[dict[str, Any]], key: str = "loss") -> list[float]:
    return [row[key] for row in rows if key in row]


def newest_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(max((run_dir / "checkpoints").glob("step_*")) / "model.safetensors")


# ------------------------------------------------------------------------------------------------------- it trains


def test_the_loss_falls(work: Path) -> None:
    rows = trained(work, "training.max_steps=60", "training.batch_size=4", "training.eval_every=20", "training.checkpoint_every=0")
    train, validation = losses(rows), losses(rows, "val_loss")
    assert train[0] == pytest.approx(math.log(300), abs=0.3)  # knows nothing at first
    assert sum(train[-5:]) / 5 < train[0] - 1.5
    assert validation == sorted(validation, reverse=True) and len(validation) == 3


@pytest.mark.parametrize("attention", ["dense", "window"])
def test_the_controls_train_as_well(work: Path, attention: str) -> None:
    rows = trained(work, f"model.attention={attention}", "training.max_steps=20")
    assert losses(rows)[-1] < losses(rows)[0] - 0.3


def test_losses_are_the_golden_ones(work: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    rows = trained(work, *GOLDEN_RUN)
    # CPUs sum in different orders (AVX2, AVX-512, NEON), and twenty updates magnify that a little; nothing else may differ.
    assert losses(rows) == pytest.approx(golden["loss"], abs=2e-3)
    assert losses(rows, "val_loss") == pytest.approx(golden["val_loss"], abs=2e-3)
    assert [row["tokens"] for row in rows if "tokens" in row] == golden["tokens"]


def test_two_runs_of_one_seed_are_the_same_run(work: Path) -> None:
    first = trained(work, "training.precision=bf16"), final_files(work / "run")
    (work / "run").rename(work / "first")
    assert (trained(work, "training.precision=bf16"), final_files(work / "run")) == first
    (work / "run").rename(work / "second")
    assert losses(trained(work, "training.precision=bf16", "training.seed=1")) != losses(first[0])


def test_accumulation_changes_nothing(work: Path) -> None:
    """Four packs at once, in pairs, or one by one: the same step, though packs hold different numbers of target tokens."""
    found = {}
    for micro in (1, 2, 4):
        rows = trained(work, "training.batch_size=4", f"training.micro_batch_size={micro}", "training.precision=fp32", "training.max_steps=4")
        found[micro] = rows, newest_weights(work / "run")
        (work / "run").rename(work / f"micro_{micro}")
    rows, weights = found[1]
    for micro in (2, 4):
        other_rows, other_weights = found[micro]
        assert losses(other_rows) == pytest.approx(losses(rows), rel=1e-5)
        assert losses(other_rows, "grad_norm") == pytest.approx(losses(rows, "grad_norm"), rel=1e-4)
        assert losses(other_rows, "tokens") == losses(rows, "tokens")
        assert losses(other_rows, "expert_load")[0] == losses(rows, "expert_load")[0], "before any rounding could have moved a token"
        for name, weight in weights.items():
            # AdamW's first steps divide tiny gradients by their own size, which magnifies rounding.
            torch.testing.assert_close(other_weights[name], weight, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(work: Path, kind: str) -> None:
    losses_of_routers = ("model.moe.global_loss_weight=0.01", "model.moe.z_loss_weight=0.01")
    rows = trained(work, *losses_of_routers)
    (work / "run").rename(work / "plain")
    again = trained(work, f"memory.activation_checkpointing={kind}", *losses_of_routers)
    assert losses(again) == losses(rows)
    for key in ("expert_load_max_over_mean", "expert_load", "expert_balance"):
        assert losses(again, key) == losses(rows, key)  # nothing counted twice


# ------------------------------------------------------------------------------------------------------- schedules


def rate(step: int, **settings: Any) -> float:
    return learning_rate(step, TrainingConfig(max_steps=100, warmup_steps=10, learning_rate=1.0, **settings))


@pytest.mark.parametrize(("step", "expected"), [(1, 0.1), (5, 0.5), (10, 1.0), (55, 0.6), (100, 0.2)])
def test_cosine(step: int, expected: float) -> None:
    assert rate(step, min_lr_ratio=0.2) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(1, 0.1), (10, 1.0), (11, 1.0), (60, 1.0), (70, 0.75), (80, 0.5), (100, 0.0)])
def test_wsd(step: int, expected: float) -> None:
    assert rate(step, schedule="wsd", decay_fraction=0.4, min_lr_ratio=0.0) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_no_warmup_and_more_warmup_than_steps(schedule: Any) -> None:
    none = TrainingConfig(max_steps=10, warmup_steps=0, learning_rate=1.0, schedule=schedule)
    assert learning_rate(1, none) <= 1.0 and learning_rate(10, none) == pytest.approx(0.1)
    long = replace(none, warmup_steps=20)
    assert learning_rate(10, long) == pytest.approx(0.5)


def test_the_rate_of_each_step_is_in_its_row(work: Path) -> None:
    config = small_config(work, "training.schedule=wsd").training
    rows = trained(work, "training.schedule=wsd")
    assert losses(rows, "lr") == [learning_rate(step, config) for step in range(1, 7)]


def test_norms_biases_and_embeddings_do_not_decay(work: Path) -> None:
    from nsa_transformer.models.transformer import Transformer

    config = small_config(work)
    model = Transformer(config.model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, rest = ([names[p] for p in group["params"]] for group in build_optimizer(model, config.training).param_groups)
    assert sorted(decayed + rest) == sorted(names.values())
    assert all(model.get_parameter(name).ndim >= 2 for name in decayed)
    assert {"embedding.weight"} <= set(rest) and all("norm" not in name for name in decayed)


# -------------------------------------------------------------------------------------------------- numbers not finite


class Poisoned(Trainer):
    """Puts an infinity into the gradient of some steps."""

    bad: Callable[[int], bool]

    def _passes(self, *arguments: Any) -> Any:
        parameter = self.model.get_parameter("embedding.weight")
        handle = parameter.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]), torch.inf)) if self.bad(self.progress.step + 1) else None
        self.before = [p.detach().clone() for p in self.model.parameters()]
        passes = super()._passes(*arguments)
        if handle is not None:
            handle.remove()
        return passes

    def _update(self, *arguments: Any) -> Any:
        row = super()._update(*arguments)
        if self.bad(self.progress.step):
            assert row is None
            assert all(torch.equal(p, q) for p, q in zip(self.model.parameters(), self.before, strict=True))
        assert all(bool(torch.isfinite(p).all()) for p in self.model.parameters())
        return row


def test_an_update_that_is_not_finite_is_skipped(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Poisoned(small_config(work, *QUIET))
    trainer.bad = lambda step: step in (2, 3)
    assert trainer.train() == 0
    rows = steady_rows(work / "run")
    assert [row["step"] for row in rows if "loss" in row] == [1, 4, 5, 6]
    assert capsys.readouterr().err.count("this update was skipped") == 2
    assert json.loads(final_files(work / "run")["state.json"])["bad_steps"] == 0


def test_five_in_a_row_end_the_run(work: Path) -> None:
    trainer = Poisoned(small_config(work, *QUIET, "training.max_steps=12"))
    trainer.bad = lambda step: step > 3
    with pytest.raises(TrainingError, match=r"5 updates in a row were not finite.*training.learning_rate"):
        trainer.train()
    assert max(row["step"] for row in read_metrics(work / "run" / "metrics.jsonl") if "loss" in row) == 3


def test_a_disk_that_fills_up_is_one_message_and_costs_no_checkpoint(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(small_config(work, *QUIET))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, before = trainer._save, signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def save_on_a_full_disk() -> None:
        if trainer.progress.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
        save()

    monkeypatch.setattr(trainer, "_save", save_on_a_full_disk)
    try:
        with pytest.raises(TrainingError, match=r"model\.safetensors: .*, while saving a checkpoint; .* run_dir=.*/run training\.resume=auto"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert [entry.name for entry in (work / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    assert find_damage(work / "run" / "checkpoints" / "step_00000002") is None
    assert Trainer(small_config(work, *QUIET, "training.resume=auto")).train() == 0


def test_two_runs_of_one_second_do_not_share_a_folder(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("nsa_transformer.training.trainer.datetime", Clock)
    monkeypatch.chdir(work)
    config = replace(small_config(work, *QUIET), run_dir=None)
    assert Trainer(config).train() == 0
    shutil.rmtree("runs/2026-01-02_03-04-05/checkpoints")  # the other run has saved nothing yet
    before = Path("runs/2026-01-02_03-04-05/metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="in the same second"):
        Trainer(config).train()
    assert Path("runs/2026-01-02_03-04-05/metrics.jsonl").read_bytes() == before


# ----------------------------------------------------------------------------------------------------- other weights


@pytest.mark.parametrize("source", ["run", "checkpoint"])
def test_init_from_takes_the_weights_and_nothing_else(work: Path, source: str) -> None:
    trained(work, "training.max_steps=20")
    (work / "run").rename(work / "first")
    name = work / "first" if source == "run" else max((work / "first" / "checkpoints").iterdir())
    more = (f"training.init_from={name}", "training.learning_rate=1e-12", "training.max_steps=2", "training.warmup_steps=0")
    rows = trained(work, *more)
    assert losses(rows, "step")[0] == 1 and losses(rows, "lr")[0] <= 1e-12
    assert losses(rows, "val_loss")[0] == pytest.approx(losses(steady_rows(work / "first"), "val_loss")[-1], abs=1e-4)
    # A run that began so is resumed like any other.
    small = small_config(work, *QUIET, *more[1:], "training.resume=auto")
    from nsa_transformer.training.resume import continued_config

    assert Trainer(continued_config(small, ["training.max_steps=2"])).train() == 0


def test_init_from_weights_of_another_tokenizer_is_refused(work: Path) -> None:
    trained(work)
    (work / "run").rename(work / "first")
    write_corpus(work / "text", seed=1)  # of which a run would train a tokenizer of its own
    start = f"training.init_from={work / 'first'}"
    with pytest.raises(ConfigError, match=r"another tokenizer .*; write data\.tokenizer=") as error:
        Trainer(small_config(work, *QUIET, start)).train()
    assert not (work / "run").exists()
    assert Trainer(small_config(work, *QUIET, start, str(error.value).rpartition("write ")[2])).train() == 0


# ------------------------------------------------------------------------------------------------------ interruptions


def _run(folder: str, more: tuple[str, ...], kill_at: int | None) -> None:
    """In a process of its own: train; with `kill_at`, be killed at that touch of a file of the run, before it happens."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    config = small_config(Path(folder), *QUIET, *more)
    run_dir, touched = str(Path(folder) / "run"), 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touched
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree") and run_dir in str(arguments[0]):
            touched += 1
            if touched == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    status = Trainer(config).train()
    (Path(folder) / "touched").write_text(str(touched))
    sys.exit(status)


# A server that has everything imported, and forks: each run then starts in milliseconds, without the threads of this process.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.test_training"])


def start(folder: Path, *more: str, kill_at: int | None = None) -> Any:
    process = _processes.Process(target=_run, args=(str(folder), more, kill_at))
    process.start()
    return process


def finish(process: Any) -> int:
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, bytes], int]:
    """Rows, final files, and how often the files of the run were touched."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_corpus(folder / "text")
    assert finish(start(folder)) == 0
    return steady_rows(folder / "run"), final_files(folder / "run"), int((folder / "touched").read_text())


def is_the_same_run(folder: Path, uninterrupted: tuple[Any, ...]) -> None:
    rows, files, _ = uninterrupted
    assert steady_rows(folder / "run") == rows  # bit for bit, none missing, none twice
    assert final_files(folder / "run") == files
    assert list((folder / "run" / "checkpoints").glob(".*")) == []
    # A kill after the last save and before older ones are dropped leaves those.
    assert len(list((folder / "run" / "checkpoints").iterdir())) in (2, 3)


def killed_twice(folder: Path, first: int, second: int, uninterrupted: tuple[Any, ...]) -> None:
    write_corpus(folder / "text")
    for kill_at in (first, second):
        status = finish(start(folder, "training.resume=auto", kill_at=kill_at))
        assert status == -signal.SIGKILL or (status == 0 and kill_at == second)  # the second time it may have come to its end
    assert finish(start(folder, "training.resume=auto")) == 0
    is_the_same_run(folder, uninterrupted)


@pytest.mark.parametrize("share", [0.15, 0.3, 0.45, 0.6, 0.75, 0.9])
def test_killed_while_it_writes(tmp_path: Path, share: float, uninterrupted: tuple[Any, ...]) -> None:
    touched = uninterrupted[2]
    killed_twice(tmp_path, round(share * touched), random.Random(share).randint(1, touched // 2), uninterrupted)


@pytest.mark.slow
def test_killed_at_every_touch_of_a_file(tmp_path: Path, uninterrupted: tuple[Any, ...]) -> None:
    touched = uninterrupted[2]
    for kill_at in range(1, touched + 1):
        killed_twice(tmp_path / str(kill_at), kill_at, random.Random(kill_at).randint(1, touched // 2), uninterrupted)


def test_killed_at_random_moments(tmp_path: Path, uninterrupted: tuple[Any, ...]) -> None:
    write_corpus(tmp_path / "text")
    rng = random.Random()
    for _ in range(4):
        process = start(tmp_path, "training.resume=auto")
        time.sleep(rng.uniform(0.02, 0.4))
        with suppress(ProcessLookupError):  # it may have come to its end
            os.kill(process.pid, signal.SIGKILL)
        assert finish(process) in (-signal.SIGKILL, 0)
    assert finish(start(tmp_path, "training.resume=auto")) == 0
    is_the_same_run(tmp_path, uninterrupted)


def test_a_signal_between_two_passes_gives_the_step_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save does not wait for a long step; the resumed run makes that step whole."""
    settings = ("training.batch_size=4", "training.micro_batch_size=1", "training.max_steps=3")
    write_corpus(tmp_path / "a" / "text")
    write_corpus(tmp_path / "b" / "text")
    assert Trainer(small_config(tmp_path / "a", *settings)).train() == 0
    forward, passes = Transformer.forward, 0

    def counted(self: Transformer, *args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += self.training and "targets" in kwargs
        if passes == 6:  # the second pass of the second step
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "forward", counted)
        assert Trainer(small_config(tmp_path / "b", *settings)).train() == 143
        # Again before the first step of the resumed run: its checkpoint is the newest whole one, and stays in its place.
        saved = next((tmp_path / "b" / "run" / "checkpoints").iterdir()).stat().st_ino
        passes = 4
        assert Trainer(small_config(tmp_path / "b", *settings, "training.resume=auto")).train() == 143
        assert next((tmp_path / "b" / "run" / "checkpoints").iterdir()).stat().st_ino == saved
    assert passes == 6
    assert [path.name for path in (tmp_path / "b" / "run" / "checkpoints").iterdir()] == ["step_00000001"]
    assert Trainer(small_config(tmp_path / "b", *settings, "training.resume=auto")).train() == 0
    assert steady_rows(tmp_path / "b" / "run") == steady_rows(tmp_path / "a" / "run")
    assert final_files(tmp_path / "b" / "run")["model.safetensors"] == final_files(tmp_path / "a" / "run")["model.safetensors"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_by_a_signal(tmp_path: Path, number: int, status: int, uninterrupted: tuple[Any, ...]) -> None:
    """Twice in a row: each time the step is finished and saved, and the next run goes on from it."""
    write_corpus(tmp_path / "text")
    for step in (1, 3):
        process = start(tmp_path, "training.resume=auto", "training.checkpoint_every=2")
        metrics = tmp_path / "run" / "metrics.jsonl"
        while process.is_alive() and not (metrics.exists() and any(row["step"] >= step for row in read_metrics(metrics))):
            time.sleep(0.001)
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
        assert finish(process) in (status, 0)
        saved = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
        assert saved and int(saved[-1].name[5:]) == max(row["step"] for row in read_metrics(metrics))
    assert finish(start(tmp_path, "training.resume=auto")) == 0
    rows, files, _ = uninterrupted
    assert steady_rows(tmp_path / "run") == rows
    assert final_files(tmp_path / "run") == files


def test_a_second_signal_stops_at_once() -> None:
    with StopSignal() as stop, stop.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_command_saves_on_ctrl_c(work: Path) -> None:
    """The command itself, started and stopped as a person does."""
    arguments = [sys.executable, str(ENTRY), *overrides(work, *QUIET, "training.max_steps=100000", "training.checkpoint_every=0")]
    process = subprocess.Popen(arguments, cwd=work, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == "stopping after this step; a second signal stops at once, without saving\n"
    assert "training.resume=auto" in out
    assert len(list((work / "run" / "checkpoints").iterdir())) == 1


def test_a_resume_on_other_data_is_refused(work: Path) -> None:
    trained(work)
    with open(work / "text" / "00.txt", "a") as file:
        file.write("more text\n")
    with pytest.raises(ConfigError, match=r"the data is not what .* was trained on"):
        Trainer(small_config(work, *QUIET, "training.resume=auto", "training.max_steps=8")).train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        write_corpus(Path(temporary) / "text")
        golden_rows = trained(Path(temporary), *GOLDEN_RUN)
    values = {key: losses(golden_rows, key) for key in ("loss", "val_loss", "tokens")}
    GOLDEN.write_text(json.dumps(values, indent=1) + "\n")


@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones_do(tmp_path: Path) -> None:
    """One graph per kind of block, without a break, whatever the number of documents in a pack."""
    import torch._dynamo

    losses = []
    for name, compiled in (("a", "false"), ("b", "true")):
        write_corpus(tmp_path / name / "text")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        assert Trainer(small_config(tmp_path / name, f"training.compile={compiled}")).train() == 0
        losses.append([row["loss"] for row in steady_rows(tmp_path / name / "run") if "loss" in row])
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
