"""`training/trainer.py` as a user types it, and what it says when it is typed wrong."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.commands.answers import Answer, is_one_message, nsa
from tests.runs import ENTRY, QUIET, SMALL, command, environment, overrides, steady_rows, write_corpus

# -------------------------------------------------------------------------------------------- the README's commands


README_COMMANDS = {
    "custom": ["model=large", "data.max_length=16384"],
    "example": ["model=large", "model.max_position_embeddings=32768", "training.batch_size=16", "memory.kv_cache.quantization=fp8"],
    "kv_cache": ["memory.kv_cache.quantization=fp8", "memory.kv_cache.threshold=512"],
    "offloading": ["memory.expert_offloading.enabled=true", "memory.expert_offloading.pin_memory=true"],
    "kernels": ["memory.cuda_kernels.enable_hbm_optimizations=true", "memory.cuda_kernels.enable_bank_conflict_avoidance=true"],
    "wandb": ["logging.wandb.project=your-project", "logging.wandb.entity=your-username"],
    "profiling": ["logging.profiling.enabled=true", "logging.profiling.trace_memory=true"],
}


@pytest.mark.parametrize("name", README_COMMANDS)
def test_the_readme_composes(train: Callable[..., Answer], name: str) -> None:
    status, out, err = train(*README_COMMANDS[name], "--cfg", "job")
    assert (status, err) == (0, "")
    shown = yaml.safe_load(out)
    for override in README_COMMANDS[name]:
        key, value = override.split("=")
        if key != "model":
            found = shown
            for part in key.split("."):
                found = found[part]
            assert str(found).lower() == value


@pytest.mark.parametrize("name", ["kernels"])
def test_what_is_not_built_is_refused_by_name_when_a_run_starts(train: Callable[..., Answer], name: str, tmp_path: Path) -> None:
    for override in README_COMMANDS[name][-1:]:
        is_one_message(train(*README_COMMANDS[name]), re.escape(override.split("=")[0]) + r"=\w+ is not built yet")
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("arguments", [["--cfg", "job", "-p", "training"], ["--cfg=all"], ["-c", "hydra"], ["--help"], ["--info", "defaults"]])
def test_hydra_shows(train: Callable[..., Answer], arguments: list[str]) -> None:
    status, out, err = train(*arguments)
    assert (status, err) == (0, "") and out


@pytest.mark.parametrize("cfg", [["--cfg", "job"], ["--cfg=job"], ["-c", "job"]])
def test_a_bad_value_is_refused_when_it_is_only_shown(train: Callable[..., Answer], cfg: list[str]) -> None:
    answer = train(*cfg, "training.max_steps=0")
    is_one_message(answer, r"training\.max_steps=0")
    assert answer[1] == ""


def test_the_command_trains_and_leaves_only_the_run(tmp_path: Path) -> None:
    """In a process and a folder of its own: every file it leaves is in the run, and nothing is on stderr."""
    write_corpus(tmp_path / "text")
    (tmp_path / "work").mkdir()
    done = command(str(ENTRY), *overrides(tmp_path, "run_dir=null"), cwd=tmp_path / "work")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "bigram model" in done.stdout and "order-2 byte model" in done.stdout and "⟨the model goes on⟩" in done.stdout
    (run,) = (tmp_path / "work" / "runs").iterdir()
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["runs"]
    assert {p.name for p in run.iterdir()} == {"checkpoints", "config.yaml", "metrics.jsonl", "plots", "sample.txt", "tensorboard", "tokenizer.json"}
    for plot in ("loss", "gates", "expert_load"):
        assert (run / "plots" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "max_memory_gib", "data_wait_fraction"} <= set(
        json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    )


def test_the_default_says_on_a_cpu_how_long_it_takes(tmp_path: Path) -> None:
    """`python training/trainer.py`, stopped before it reads data: base on a CPU is a matter of weeks."""
    process = subprocess.Popen(
        [sys.executable, str(ENTRY), "training.device=cpu", f"data.cache_dir={tmp_path / 'cache'}"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=60)
    finally:
        process.kill()
    assert re.search(r"warning: no GPU: .* takes about \d+ hours; model=tiny", first)
    assert status == 143
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_torchrun_trains_as_one_rank_does(finished: Path, tmp_path: Path) -> None:
    data = [f"data.path={finished / 'text'}", f"data.cache_dir={finished / 'cache'}"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", str(ENTRY)]
    done = command(*torchrun, *SMALL, *data, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 6/6 | loss") == 1  # one rank speaks
    rows, alone = steady_rows(tmp_path / "run"), steady_rows(finished / "run")
    assert [row["step"] for row in rows] == [row["step"] for row in alone]
    for row, other in zip(rows, alone, strict=True):
        assert set(row) == set(other)
        for key in ("tokens", "loss", "lr", "grad_norm", "expert_load_max_over_mean", "val_loss", "val_bpb"):
            assert row.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-3), key
    refused = command(*torchrun, *SMALL, *data, "data.path=/nope", f"run_dir={tmp_path / 'no'}", cwd=tmp_path)
    assert refused.returncode != 0 and refused.stderr.count("error: data.path=/nope does not exist") == 1
    assert "trainer.py" not in "".join(line for line in refused.stderr.splitlines() if "rank1" in line)  # no traceback of the other rank


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(finished: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, f"data.path={finished / 'text'}", f"data.cache_dir={finished / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    arguments += ["training.max_steps=100000", "training.checkpoint_every=0", "training.eval_every=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ENTRY), *arguments],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("step "))
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "stopped by a signal after saving step" in out
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 1


def test_profiling_writes_a_trace(train: Callable[..., Answer], finished: Path, tmp_path: Path) -> None:
    arguments = overrides(finished, *QUIET, f"run_dir={tmp_path / 'run'}", "logging.profiling.start_step=2", "logging.profiling.num_steps=2")
    status, out, err = train(*arguments, *README_COMMANDS["profiling"])
    assert (status, err) == (0, "")
    assert (tmp_path / "run" / "profiler" / "trace_rank0.json.gz").stat().st_size > 1000
    assert "ui.perfetto.dev" in out


@pytest.mark.slow
def test_wandb_without_account_or_network(finished: Path, tmp_path: Path) -> None:
    arguments = overrides(finished, *QUIET, f"run_dir={tmp_path / 'run'}", "logging.wandb.project=x")
    done = command(str(ENTRY), *arguments, cwd=tmp_path, HOME=str(tmp_path / "home"), WANDB_API_KEY="")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.slow
def test_the_panel_on_a_terminal(finished: Path, tmp_path: Path) -> None:
    arguments = overrides(finished, f"run_dir={tmp_path / 'run'}", "training.max_steps=30")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, str(ENTRY), *arguments], environment(TERM="xterm", COLUMNS="100", LINES="30"))
    shown, ends = b"", time.monotonic() + 120
    with contextlib.suppress(OSError):  # EIO: the other side has closed
        while time.monotonic() < ends:
            if select.select([terminal], [], [], 1)[0]:
                shown += os.read(terminal, 65536)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "step 30/30" in text and "val bpb" in text and "saved " in text and "Traceback" not in text
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l")  # the cursor is back


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["training.max_step=3"], r"unknown key training\.max_step; did you mean training\.max_steps"),
        (["+training.max_step=3"], r"unknown key training\.max_step; did you mean training\.max_steps"),
        (["model.nsa.windw=3"], r"did you mean model\.nsa\.window"),
        (["+model.nsa.windw=3"], r"did you mean model\.nsa\.window"),
        (["learning_rate=3"], r"did you mean .*training\.learning_rate"),
        (["+foo=3"], r"unknown key foo"),
        (["modle=tiny"], r"unknown key modle; did you mean model"),
        (["model=tinny"], r"model=tinny does not exist; write .*model=tiny"),
        (["data=web"], r"data=web does not exist"),
        (["model=3"], r"such as model=tiny"),
        (["training=null"], r"such as model=tiny"),
        (["~training.seed"], r"~training\.seed would delete"),
        (["training.max_steps=abc"], r"training\.max_steps=abc must be a whole number"),
        (["training.max_steps=1.5"], r"must be a whole number"),
        (["training.learning_rate=inf"], r"training\.learning_rate=inf is not a finite number"),
        (["training.schedule=linear"], r"write one of cosine, wsd"),
        (["training.max_steps=-1"], r"must be greater than 0"),
        (["training.max_steps=${{nope}}"], r"nope"),
        (["training.max_steps=[1"], r"is not KEY=VALUE"),
        (["training.max_steps"], r"is not KEY=VALUE"),
        (["a b"], r"is not KEY=VALUE"),
        (["data.path=a=b"], r"quotes"),
        (["--multirun"], r"--multirun is not supported"),
        (["data.max_length=4096"], r"data\.max_length=4096 is longer than model\.max_position_embeddings=2048; write"),
        (["training.batch_size=3", "training.micro_batch_size=2"], r"micro_batch_size=2 must divide batch_size=3"),
        (["training.context_parallel_size=2"], r"training\.context_parallel_size=2 is not built yet"),
        (["training.expert_parallel_size=2"], r"expert_parallel_size=2 does not divide the number of ranks, 1; .*torchrun --nproc_per_node=2"),
        (["training.expert_parallel_size=3"], r"expert_parallel_size=3 does not divide model\.moe\.num_experts=4; write one of 1, 2, 4"),
        (["training.expert_parallel_size=2", "model.moe.num_experts=0"], r"expert_parallel_size=2, and no layer of the model has experts"),
        (["training.expert_parallel_size=2", "model.moe.num_dense_layers=9"], r"expert_parallel_size=2, and no layer of the model has experts"),
        (["data.path=/nope/text"], r"data\.path=/nope/text does not exist"),
        (["data.path="], r"data\.path= is empty"),
        (["data.path={folder}/empty"], r"corpus is empty"),
        (["data.path={folder}/no_files"], r"has no text files in it"),
        (["data.path={folder}/binary"], r"is a binary file"),
        (["data.path={folder}/latin1"], r"is not valid UTF-8"),
        (["data.tokenizer={folder}/empty"], r"not a valid tokenizer"),
        (["data.tokenizer={run}", "model.vocab_size=299"], r"the tokenizer has \d+ tokens but model\.vocab_size=299; write model\.vocab_size=300"),
        (["data.cache_dir={folder}/empty/x"], r"cannot be written.*data\.cache_dir=FOLDER"),
        (["model.vocab_size=200"], r"write model\.vocab_size=257"),
        (["run_dir={folder}/empty"], r"run_dir=.*is a file"),
        (["run_dir={folder}/empty/x"], r"run_dir=.*cannot be written"),
        (["run_dir=/proc/x"], r"run_dir=/proc/x cannot be written"),
        (["run_dir={run}"], r"already holds step_00000006; write training\.resume=auto"),
        (["training.init_from=/nope"], r"training\.init_from=/nope does not exist"),
        (["training.init_from={folder}"], r"holds no checkpoint"),
        (["training.init_from={run}", "model.hidden_size=64"], r"of shape \[\d+, 32\] where this model has \[\d+, 64\]"),
        (["training.init_from={run}", "model.num_layers=3"], r"is of another architecture"),
        (["training.init_from={run}", "training.resume=auto"], r"exclude each other"),
        (["run_dir={run}", "training.resume=auto", "model.hidden_size=64"], r"model\.hidden_size=64 differs from the resumed run's"),
        (["training.resume=/nope"], r"training\.resume=/nope does not exist"),
        (["training.resume={run}"], r"is a run; write run_dir="),
    ],
)
def test_a_mistake_is_one_message(train: Callable[..., Answer], finished: Path, tmp_path: Path, arguments: list[str], pattern: str) -> None:
    folder = tmp_path / "folder"
    (folder / "no_files").mkdir(parents=True)
    (folder / "empty").write_bytes(b"")
    (folder / "binary").write_bytes(b"\x7fELF\0\1")
    (folder / "latin1").write_bytes("ein schönes Wort\n".encode("latin1") * 9)

    def present() -> list[Path]:  # a run may remember hashes of files in the cache before it refuses
        return [path for root in (tmp_path, finished) for path in sorted(root.rglob("*")) if "hashes" not in path.parts]

    before = present()
    given = [argument.format(folder=folder, run=finished / "run") for argument in arguments]
    is_one_message(train(*overrides(finished, *QUIET, f"run_dir={tmp_path / 'new'}"), *given), pattern)
    assert present() == before  # nothing written


@pytest.mark.parametrize(("rank", "prefix"), [("0", "error: out of"), ("3", "error: rank 3: out of")])
def test_out_of_memory_on_any_rank_is_said(
    train: Callable[..., Answer], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, prefix: str
) -> None:
    def too_large(*_arguments: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("nsa_transformer.training.trainer.build_model", too_large)
    monkeypatch.setenv("RANK", rank)  # and no WORLD_SIZE: alone, but with the voice of that rank
    status, _, err = train(*overrides(finished, f"run_dir={tmp_path / 'new'}"))
    assert status == 1 and err.startswith(prefix) and "while building the model" in err and err.count("error:") == 1


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_init_from_a_damaged_checkpoint(train: Callable[..., Answer], finished: Path, tmp_path: Path, file: str) -> None:

    shutil.copytree(finished / "run", tmp_path / "bad")
    for checkpoint in (tmp_path / "bad" / "checkpoints").iterdir():
        os.truncate(checkpoint / file, 100)
    is_one_message(train(*overrides(finished, f"run_dir={tmp_path / 'new'}", f"training.init_from={tmp_path / 'bad'}")), "damaged")
    is_one_message(nsa("generate", str(tmp_path / "bad"), "--prompt", "a"), "damaged")


def test_a_corpus_with_fewer_tokens_than_the_model_has_rows(train: Callable[..., Answer], tmp_path: Path) -> None:
    """The sample at the end draws no token that the tokenizer does not have."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("one\ntwo\n")
    status, _, err = train(*overrides(tmp_path, "model.vocab_size=2048", "training.max_steps=1"))
    assert (status, err) == (0, "")
    assert nsa("generate", str(tmp_path / "run"), "--prompt", "o", "--temperature", "9", "--device", "cpu")[0] == 0
