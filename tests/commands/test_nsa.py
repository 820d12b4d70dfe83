"""`nsa` as a user types it, and what it says when it is typed wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from nsa_transformer import cli
from nsa_transformer.config import ExpertOffloadingConfig
from nsa_transformer.data.tokenizer import train_tokenizer
from nsa_transformer.distributed import checkpoint
from nsa_transformer.kernels.dispatch import interpreted
from tests.commands.answers import is_one_message, nsa
from tests.runs import ROOT, command


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
    assert (status, small) == (0, out) and "selected 64, scales 8" in err, "nothing here is old enough to be rounded"
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
        (["generate", "{folder}", "--prompt", "a"], r"^error: RUN=\S+ holds no checkpoint; name a run"),
        (["chat", "{folder}"], r"^error: RUN=\S+ holds no checkpoint"),
        (["plan", "{folder}"], r"^error: RUN=\S+ holds no checkpoint"),
        (["generate", "{run}/config.yaml", "--prompt", "a"], r"^error: RUN=\S+run/config\.yaml is a file"),
        (["generate", "/nope", "--prompt", "a"], r"^error: RUN=/nope does not exist"),
        (["generate", "~nobody-here/x", "--prompt", "a"], r"^error: RUN=~nobody-here/x does not exist"),
        (["generate", "{run}", "--prompt", ""], r"the prompt has no token"),
        (["generate", "{run}", "--prompt", "a\udcff"], r"--prompt is not valid UTF-8"),
        (["generate", "{run}", "--prompt", "a", "--stop", "b", "--stop", "\udcff"], r"--stop is not valid UTF-8"),
        (["chat", "{run}", "--system", "a\udcff"], r"--system is not valid UTF-8"),
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
        (
            ["plan", "model=tiny", "memory.expert_offloading.enabled=true", "memory.expert_offloading.gpu_budget_gib=0.0001", "--memory", "80"],
            r"gpu_budget_gib: 0\.000 GiB do not hold the 2 experts that a token needs in each of 3 layers, and two to stream; write 0\.001 or more$",
        ),
        (["plan", "modl=tiny"], r"unknown key modl; did you mean model"),
        (["plan", "model=huge"], r"model=huge does not exist; write .*model=tiny"),
        (["plan", "model=tiny,base"], r"model=tiny,base has several values; write one, KEY=\[A,B\] for a list"),
        (["plan", "model=tiny", "hydra.run.dir=/tmp/x"], r"^error: hydra\.run\.dir=/tmp/x says how Hydra runs a job, and a plan runs none; leave it out$"),
        (["plan", "+hydra.job.name=x"], r"^error: \+hydra\.job\.name=x says"),
        (["plan", "hydra/launcher=basic"], r"^error: hydra/launcher=basic says"),
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
    assert status == 2 and err.count("error:") == 1 and "max_position_embeddings=2048" in err and out.strip(), "a script learns that an answer is missing"
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\udcff\nline\n"))
    status, out, err = nsa(*ask)
    assert status == 2 and err.count("error:") == 1 and "error: the message is not valid UTF-8\n" in err and out.strip()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8"))
    status, out, err = nsa(*ask)
    assert status == 2 and out == "" and err.endswith("\nerror: the input is not valid utf-8\n")
    is_one_message(nsa(*ask, "--max-new-tokens", "2048"), r"no message leaves room for an answer of max_new_tokens=2048.*ask for at most \d+$")
    monkeypatch.setattr(sys, "stdin", None)
    is_one_message(nsa(*ask), r"standard input is closed")


def test_output_that_cannot_be_written(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = [sys.executable, "-m", "nsa_transformer.cli", "plan", str(finished / "run")]
    reading, writing = os.pipe()
    os.close(reading)
    outputs = [(writing, (141, ""))]
    if os.path.exists("/dev/full"):
        outputs.append((os.open("/dev/full", os.O_WRONLY), (2, "error: [Errno 28] No space left on device\n")))
    for output, answer in outputs:
        done = subprocess.run(ask, stdout=output, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        os.close(output)
        assert (done.returncode, done.stderr) == answer
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it where it is closed
    assert cli.main(ask[3:]) == 0
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="ascii"), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["generate", str(finished / "run"), "--prompt", "é", "--max-new-tokens", "1", "--device", "cpu"])
    assert status == 2 and err.getvalue() == "error: '\\xe9' cannot be written in ascii; set PYTHONIOENCODING=utf-8 in the environment\n"


def test_inspect_and_doctor(finished: Path) -> None:
    status, out, err = nsa("inspect", str(finished / "run"))
    assert (status, err) == (0, "") and "step 6 of 6" in out and out.count("verified") == 2
    status, out, err = nsa("doctor")
    assert (status, err) == (0, "") and "reference" in out


def test_plan(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = ["plan", "model=large", "--length", "32k", "--batch", "2"]
    status, out, err = nsa(*large, "--memory", "80")
    assert (status, err) == (0, "")
    assert "1794.1 M parameters, 425.7 M active" in out and "weights  3.34 GiB in bfloat16\n" in out
    assert "cache    17,408 bytes a token (selected 16,384, compressed 1,024)" in out
    # 65 pages of 1,024 tokens, or 128 where they doubled from 64, and two sequences' rings, which do not grow.
    least, most = ((pages * 1024 * 17408 + 2 * 8912896) / 2**30 for pages in (65, 128))
    assert f"2 x 32,768 tokens: {least:.2f} GiB at once, up to {most:.2f} as it grows token by token\n" in out and "of --memory: fits\n" in out
    verdicts = {nsa(*large, "--memory", memory)[1].splitlines()[4].rsplit(": ")[1] for memory in ("4", "5", "6")}
    assert verdicts == {"does not fit", "fits if the cache is filled at once", "fits"}
    assert "memory " not in nsa(*large)[1] or torch.cuda.is_available()
    # FP8 by the configuration or by the option, and the experts' weights elsewhere.
    fp8 = nsa(*large, "memory.kv_cache.quantization=fp8")[1]
    assert "selected 8,192, scales 128" in fp8 and nsa(*large, "--kv-cache", "fp8")[1] == fp8
    out = nsa(*large, "memory.expert_offloading.enabled=true", "memory.expert_offloading.gpu_budget_gib=1", "--memory", "3.4")[1]
    assert "2.81 of them experts in host memory, with slots of 1.00 GiB" in out and out.rstrip().count(": fits") == 1
    # All experts and two buffers of 64 MiB, not three quarters of what is free.
    out = nsa("plan", "model=large", "memory.expert_offloading.enabled=true", "--memory", "80")[1]
    assert "with slots of 2.94 GiB" in out and "memory   4.0" in out
    assert "with slots of 0.00 GiB" in nsa("plan", "model=large", "memory.expert_offloading.enabled=true", "--memory", "0.1")[1]
    # Where generating would refuse: three quarters of what is free, or a budget that is not there.
    large = ["plan", "model=large", "--length", "1k", "memory.expert_offloading.enabled=true"]
    assert "does not fit, the experts of a token and two to stream take 0.27 GiB, more than 75% of what is free\n" in nsa(*large, "--memory", "0.8")[1]
    out = nsa(*large, "memory.expert_offloading.gpu_budget_gib=3", "--memory", "3.52")[1]
    assert "does not fit, memory.expert_offloading.gpu_budget_gib=3 is more than the 2.99 GiB that are free\n" in out
    assert "slots of 75% of what is free" in nsa("plan", "model=large", "memory.expert_offloading.enabled=true")[1] or torch.cuda.is_available()
    assert f"{10**12} x 1,024 tokens" in nsa("plan", "model=large", "--length", "1k", "--batch", str(10**12))[1]
    dense = nsa("plan", "model=large", "model.attention=dense", "--memory", "80")[1]
    assert "keys and values 16,384" in dense and "at once\n" in dense and "to" not in dense.splitlines()[4].split("of")[0]
    # What a run is planned to take is what generating with it says.
    out = nsa("plan", str(finished / "run"), "--dtype", "float32")[1]
    assert "320 bytes a token (selected 256, compressed 64)" in out and "1 x 2,048 tokens" in out
    (tmp_path / "hydra").symlink_to(finished / "run")
    monkeypatch.chdir(tmp_path)
    assert nsa("plan", "hydra", "--dtype", "float32")[1] == out, "a run may be called so"


def test_an_older_checkpoint_is_not_taken_silently(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    older, newest = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-2:]
    (newest / "model.safetensors").write_bytes(b"cut")
    status, _, err = nsa("generate", str(tmp_path / "run"), "--prompt", "abc", "--max-new-tokens", "1", "--device", "cpu")
    assert status == 0 and err.startswith("warning: passing over a damaged checkpoint: ") and f"; taking {older}\ncache: " in err and err.count("\n") == 2


@pytest.mark.parametrize("name", ["", "config.yaml"], ids=["a run", "a run without its own settings"])
def test_a_checkpoint_is_verified_once(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Which takes minutes for a large one; and a mistake in the options is found without."""
    shutil.copytree(finished / "run", tmp_path / "run", ignore=lambda folder, _: [name] if Path(folder) == finished / "run" else [])
    older, newest = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-2:]
    (newest / "model.safetensors").write_bytes(b"cut")
    find_damage, verified = checkpoint.find_damage, []
    monkeypatch.setattr(checkpoint, "find_damage", lambda path: verified.append(path) or find_damage(path))  # type: ignore[func-returns-value]
    ask = [str(tmp_path / "run"), "--device", "cpu"]
    status, _, err = nsa("generate", *ask, "--prompt", "abc", "--max-new-tokens", "1")
    assert status == 0 and verified == [newest, older] and err.count("warning: ") == 1
    verified.clear()
    assert nsa("chat", *ask)[0] == 2 and verified == [newest, older], "its tokenizer knows no turns"
    verified.clear()
    assert nsa("generate", *ask, "--prompt", "abc", "--gpu-budget-gib", "2")[0] == 2 and verified == ([newest, older] if name else [])


def test_nsa_is_a_command(tmp_path: Path) -> None:
    done = command("-m", "nsa_transformer.cli", "serve", "runs/x", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: nsa serve is not built yet\n")
    assert 'nsa = "nsa_transformer.cli:main"' in (ROOT / "pyproject.toml").read_text()


def test_too_little_memory_for_a_command_is_one_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def exhausted(_options: object) -> int:
        raise MemoryError

    monkeypatch.setattr(cli, "_doctor", exhausted)
    assert cli.main(["doctor"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory") and message.count("\n") == 1
