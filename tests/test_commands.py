"""The commands as a user types them, and what each says when it is typed wrong."""

from __future__ import annotations

import contextlib
import io
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
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from nsa_transformer import cli
from nsa_transformer.config import ExpertOffloadingConfig
from nsa_transformer.data.tokenizer import train_tokenizer
from nsa_transformer.kernels.dispatch import interpreted
from nsa_transformer.training.trainer import Trainer
from tests.runs import ENTRY, QUIET, ROOT, SMALL, command, entry, environment, overrides, small_config, steady_rows, write_corpus

Answer = tuple[int, str, str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a cache and a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    write_corpus(folder / "text")
    assert Trainer(small_config(folder, *QUIET)).train() == 0
    return folder


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """`python training/trainer.py …` in this process, in an empty working directory: status, stdout, stderr."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", [str(ENTRY), *arguments])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = entry().main()
            except SystemExit as stopped:  # argparse
                status = stopped.code if isinstance(stopped.code, int) else 1
        return status, out.getvalue(), err.getvalue()

    return call


def nsa(*arguments: str) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(arguments)
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else 1
    return status, out.getvalue(), err.getvalue()


def is_one_message(answer: Answer, pattern: str) -> None:
    status, _, err = answer
    assert status == 2, answer
    assert err.startswith("error: ") and err.count("error:") == 1 and "Traceback" not in err, err
    assert re.search(pattern, err, re.DOTALL), err


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
    import shutil

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


# --------------------------------------------------------------------------------------------------------------- nsa


def test_generate(finished: Path) -> None:
    run, ask = str(finished / "run"), ["--prompt", "abc de", "--max-new-tokens", "12", "--seed", "3", "--device", "cpu"]
    status, out, err = nsa("generate", run, *ask, "--json")
    answer = json.loads(out)
    assert status == 0 and set(answer) == {"prompt_ids", "ids", "text"}
    # Two layers of a key and value head of 16 in float32, one compressed row every 4 tokens.
    assert err == "cache: 320 bytes a token (selected 256, compressed 64), and 18,432 a sequence (window 16,384, not yet compressed 2,048)\n"
    assert len(answer["ids"]) <= 12 and answer["prompt_ids"]
    assert nsa("generate", run, *ask) == (0, f"abc de{answer['text']}\n", err)
    status, small, err = nsa("generate", run, *ask, "--json", "--kv-cache", "fp8")
    assert (status, small) == (0, out) and "selected 64, scales 16" in err, "nothing here is old enough to be rounded"
    stop = answer["text"][2:4]
    stopped = json.loads(nsa("generate", run, *ask, "--json", "--stop", stop)[1])
    assert stopped["text"] == answer["text"][: answer["text"].find(stop)]
    # On a CPU the experts are in host memory as it is.
    status, out, err = nsa("generate", run, *ask, "--json", "--expert-offloading", "--gpu-budget-gib", "1")
    assert (status, json.loads(out)) == (0, answer) and err.startswith("expert offloading: the model runs on the CPU") and err.count("\n") == 2


@pytest.mark.skipif(not interpreted(), reason="on the CPU the kernels are interpreted or not there")
def test_generate_with_experts_in_host_memory(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_transformer.inference import load

    settings = ExpertOffloadingConfig(enabled=True, gpu_budget_gib=0.01)
    monkeypatch.setattr(load, "_whole", lambda *inputs: load._offloaded(*inputs, settings))
    ask = [str(finished / "run"), "--prompt", "abc de", "--max-new-tokens", "3", "--temperature", "0", "--device", "cpu"]
    status, out, err = nsa("generate", *ask, "--json")
    found = json.loads(out)["expert_offloading"]
    assert status == 0 and err.startswith("expert offloading: 1 x 4 experts in") and err.count("\n") == 2
    copies = found["misses"] + found["streamed"]
    assert copies >= 4 and found["copied_bytes"] == copies * found["expert_bytes"]
    assert found["hit_rate"] == found["hits"] / (found["hits"] + found["misses"])
    status, out, err = nsa("generate", *ask)
    assert status == 0 and out.startswith("abc de") and err.count("\n") == 3 and "lookups found their expert; copied 0.0" in err


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["generate", "{folder}", "--prompt", "a"], r"no checkpoint"),
        (["generate", "/nope", "--prompt", "a"], r"/nope does not exist"),
        (["generate", "~nobody-here/x", "--prompt", "a"], r"~nobody-here/x does not exist"),
        (["generate", "{run}", "--prompt", ""], r"the prompt has no token"),
        (["generate", "{run}", "--prompt", "a\udcff"], r"--prompt is not valid UTF-8"),
        (["generate", "{run}", "--prompt", "a", "--max-new-tokens", "99999"], r"max_position_embeddings=2048; ask for \d+ new tokens or fewer"),
        (["generate", "{run}", "--prompt", "a", "--temperature", "-1"], r"temperature=-1"),
        (["generate", "{run}", "--prompt", "a", "--top-p", "0"], r"top_p=0"),
        (["generate", "{run}", "--prompt", "a", "--stop", ""], r"a stop text is empty"),
        (["generate", "{run}", "--prompt", "a", "--min-p", "2"], r"min_p=2\.0 must lie between 0 and 1"),
        (["generate", "{run}", "--prompt", "a", "--repetition-penalty", "0"], r"repetition_penalty=0\.0 must be a positive number"),
        (["generate", "{run}", "--prompt", "a", "--gpu-budget-gib", "2"], r"--gpu-budget-gib 2 needs offloading; add --expert-offloading"),
        (["generate", "{run}", "--prompt", "a", "--expert-offloading", "--gpu-budget-gib", "-2"], r"gpu_budget_gib=-2\.0 must be greater than 0"),
        (["inspect", "{folder}"], r"is no run"),
        (["plan", "/nope"], r"/nope does not exist, and is no override"),
        (["plan", "~model"], r"~model does not exist, and is no override.*such as model=large"),
        (["plan", "memory.expert_offloading.enabled=true", "model.moe.num_experts=0"], r"has no experts; write memory\.expert_offloading\.enabled=false"),
        (["plan", "modl=tiny"], r"unknown key modl; did you mean model"),
        (["plan", "model=huge"], r"model=huge does not exist; write .*model=tiny"),
        (["plan", "model=tiny,base"], r"model=tiny,base has several values; write one, KEY=\[A,B\] for a list"),
        (["plan", "~model.nsa=1"], r"would delete a setting"),
        (["plan", "{run}", "model=tiny"], r"write one run, whose settings are saved, or overrides"),
        (["plan", "model=tiny", "--length", "4k"], r"--length 4096 passes .*=2048; write --length 2048 or less, or model\.max_position_embeddings=4096$"),
        (["plan", "{run}", "--length", "4k"], r"write --length 2048 or less$"),
        (["plan", "model.attention=dense", "--kv-cache", "fp8"], r"is for model\.attention=nsa, not dense"),
        (["tokenizer", "train", "{folder}/text", "--vocab-size", "9", "--output", "{tmp}/t"], r"--vocab-size 9 is too small"),
        (["tokenizer", "train", "/nope", "--vocab-size", "300", "--output", "{tmp}/t"], r"/nope does not exist"),
        (["tokenizer", "encode", "{run}", "/nope", "--output", "{tmp}/ids.npy"], r"/nope: No such file"),
        (["tokenizer", "encode", "{run}", "{run}", "--output", "{tmp}/ids.npy"], r"run: Is a directory"),
        (["tokenizer", "encode", "{run}", "{run}/config.yaml", "--output", "{tmp}/no/ids.npy"], r"no/ids.npy cannot be written"),
        (["tokenizer", "decode", "{run}", "{run}/config.yaml", "--output", "{tmp}/x"], r"is no \.npy of token ids"),
        (["tokenizer", "decode", "{run}", "/nope.npy", "--output", "{tmp}/x"], r"/nope.npy: No such file"),
        *(([name, "x", "--any", "thing"], rf"nsa {name} is not built yet") for name in cli.PLANNED),
    ],
)
def test_a_mistake_to_nsa_is_one_message(finished: Path, tmp_path: Path, arguments: list[str], pattern: str) -> None:
    answer = nsa(*(argument.format(folder=finished, run=finished / "run", tmp=tmp_path) for argument in arguments))
    is_one_message(answer, pattern)
    assert answer[1] == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["bogus"],
        ["generate", "x"],
        ["generate", "x", "--prompt", "a", "--device", "tpu"],
        ["inspect", "x", "--foo"],
        ["plan", "--batch", "0"],
        ["plan", "--length", "8m"],
        ["plan", "--memory", "0"],
    ],
)
def test_a_mistake_that_argparse_finds(arguments: list[str]) -> None:
    status, out, err = nsa(*arguments)
    assert (status, out) == (2, "") and "error: " in err


def test_tokens_of_another_tokenizer_are_refused(finished: Path, tmp_path: Path) -> None:
    for ids in ([5, 300], [-1, 5]):
        np.save(tmp_path / "ids.npy", np.array(ids))
        is_one_message(nsa("tokenizer", "decode", str(finished / "run"), str(tmp_path / "ids.npy"), "--output", str(tmp_path / "x")), r"which is no token of")


def contents() -> Iterator[bytes]:
    yield b""
    yield b"plain\r\n\ttext  with   blanks \n\n\n"
    yield "".join(chr(c) for c in range(0x2500)).encode()
    yield "\ufeff日本語 🏖️ e\u0301 <|endoftext|> \0 \x7f".encode() * 50
    yield b"x" * 20_000
    yield "naïve".encode("utf-16")
    yield bytes(range(256)) * 9
    yield np.random.default_rng(0).bytes(100_000)


def test_tokenizer_round_trip(finished: Path, tmp_path: Path) -> None:
    assert nsa("tokenizer", "train", str(finished / "text"), "--vocab-size", "280", "--output", str(tmp_path / "tok"))[0] == 0
    for content in contents():
        (tmp_path / "in.txt").write_bytes(content)
        assert nsa("tokenizer", "encode", str(tmp_path / "tok"), str(tmp_path / "in.txt"), "--output", str(tmp_path / "ids.npy"))[0] == 0
        assert nsa("tokenizer", "decode", str(tmp_path / "tok"), str(tmp_path / "ids.npy"), "--output", str(tmp_path / "out.txt"))[0] == 0
        assert (tmp_path / "out.txt").read_bytes() == content


def test_a_cache_that_outgrows_the_memory_is_one_message(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_transformer.models.cache import SparseLayerCache

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 …")

    monkeypatch.setattr(SparseLayerCache, "_pool", full)
    for json_too in ([], ["--json"]):
        answer = nsa("generate", str(finished / "run"), "--prompt", "abc", "--device", "cpu", *json_too)
        is_one_message(answer, r"out of memory as the cache grew to \d+ tokens.*--kv-cache fp8.*Tried to allocate 2\.00 GiB\.\)$")
        assert answer[1] == "" and answer[2].count("\n") == 1


def test_chat(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line is a message; the end of the input ends it. A run whose tokenizer knows no turns is refused."""
    is_one_message(nsa("chat", str(finished / "run"), "--device", "cpu"), r"the tokenizer has no <\|im_start\|>")
    (newest,) = (finished / "run" / "checkpoints").glob("*06")
    for name in ("config.yaml", "model.safetensors"):
        shutil.copy(newest / name, tmp_path)
    train_tokenizer(["user assistant line of a small text " * 50], 290, chat_tokens=True).save(tmp_path)
    ask = ["chat", str(tmp_path), "--device", "cpu", "--max-new-tokens", "7", "--seed", "1", "--system", "line"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a small text\n\nline\n"))
    status, out, err = nsa(*ask)
    assert status == 0 and err.startswith("cache: ") and err.count("\n") == 1 and out.endswith("\n") and len(out) > 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("a small text\n\nline"))
    assert nsa(*ask) == (0, out, err), "the same seed, the same answers"
    monkeypatch.setattr(sys, "stdin", io.StringIO("text " * 3000 + "\nline\n"))
    status, out, err = nsa(*ask)
    assert status == 0 and err.count("error:") == 1 and "max_position_embeddings=2048" in err and out.strip()


def test_inspect_and_doctor(finished: Path) -> None:
    status, out, err = nsa("inspect", str(finished / "run"))
    assert (status, err) == (0, "") and "step 6 of 6" in out and out.count("verified") == 2
    status, out, err = nsa("doctor")
    assert (status, err) == (0, "") and "reference" in out


def test_plan(finished: Path) -> None:
    large = ["plan", "model=large", "--length", "32k", "--batch", "2"]
    status, out, err = nsa(*large, "--memory", "80")
    assert (status, err) == (0, "")
    assert "1794.1 M parameters, 425.7 M active" in out and "weights  3.34 GiB in bfloat16\n" in out
    assert "cache    17,408 bytes a token (selected 16,384, compressed 1,024)" in out
    # 65 pages of 1,024 tokens, and two sequences' rings.
    assert f"2 x 32,768 tokens: {(65 * 1024 * 17408 + 2 * 8912896) / 2**30:.2f} GiB at once" in out and "of --memory: fits\n" in out
    verdicts = {nsa(*large, "--memory", memory)[1].splitlines()[4].rsplit(": ")[1] for memory in ("4", "5", "6")}
    assert verdicts == {"does not fit", "fits if the cache is filled at once", "fits"}
    assert "memory " not in nsa(*large)[1] or torch.cuda.is_available()
    # FP8 by the configuration or by the option, and the experts' weights elsewhere.
    fp8 = nsa(*large, "memory.kv_cache.quantization=fp8")[1]
    assert "selected 8,192, scales 256" in fp8 and nsa(*large, "--kv-cache", "fp8")[1] == fp8
    out = nsa(*large, "memory.expert_offloading.enabled=true", "memory.expert_offloading.gpu_budget_gib=1", "--memory", "3.4")[1]
    assert "2.81 of them experts in host memory, with slots of 1.00 GiB" in out and out.rstrip().count(": fits") == 1
    # All experts and two buffers of 64 MiB, not three quarters of what is free.
    out = nsa("plan", "model=large", "memory.expert_offloading.enabled=true", "--memory", "80")[1]
    assert "with slots of 2.94 GiB" in out and "memory   4.0" in out
    assert "with slots of 0.00 GiB" in nsa("plan", "model=large", "memory.expert_offloading.enabled=true", "--memory", "0.1")[1]
    assert "slots of 75% of what is free" in nsa("plan", "model=large", "memory.expert_offloading.enabled=true")[1] or torch.cuda.is_available()
    assert f"{10**12} x 1,024 tokens" in nsa("plan", "model=large", "--length", "1k", "--batch", str(10**12))[1]
    dense = nsa("plan", "model=large", "model.attention=dense", "--memory", "80")[1]
    assert "keys and values 16,384" in dense and "at once\n" in dense and "to" not in dense.splitlines()[4].split("of")[0]
    # What a run is planned to take is what generating with it says.
    out = nsa("plan", str(finished / "run"), "--dtype", "float32")[1]
    assert "320 bytes a token (selected 256, compressed 64)" in out and "1 x 2,048 tokens" in out


def test_nsa_is_a_command(tmp_path: Path) -> None:
    done = command("-m", "nsa_transformer.cli", "serve", "runs/x", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: nsa serve is not built yet\n")
    assert 'nsa = "nsa_transformer.cli:main"' in (ROOT / "pyproject.toml").read_text()


def test_generate_without_enough_memory_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def exhausted(_options: object) -> int:
        raise MemoryError

    monkeypatch.setattr(cli, "_doctor", exhausted)
    assert cli.main(["doctor"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory") and message.count("\n") == 1
