"""Speed and memory of whole training steps of `model=large`, sparse and dense attention in the same trainer, on one CUDA GPU.

    python benchmarks/train_step.py [--lengths 8k 32k 64k] [--attention nsa dense] [--steps 8] [--checkpointing auto] [--time-limit SECONDS] [--out DIR]

Every run is `training/trainer.py` itself in a process of its own, ended once it has written its steps: saving and reporting are not measured.
The text is Python's standard library as one document, so that every pack, but for the end of the text, is of one document. The first run trains a
tokenizer on it and the others find that in the trainer's cache, as they find compiled kernels in Triton's. Results are written after every run.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record
from benchmarks.page import markdown_table
from benchmarks.shapes import length_name, parse_length
from nsa_transformer.training.metrics import read_metrics

MODES = ("none", "selective", "full")
OUT_OF_TIME = "the time limit was reached"
WARM_UP = 3  # steps left out of the figures: kernels are compiled, memory is found
TEXT_SIZE = 6 << 20  # characters of the text, or BYTES_PER_TOKEN of them for every token where that is more
BYTES_PER_TOKEN = 5
POLL_SECONDS = 0.2


def command(length: int, attention: str, checkpointing: str, corpus: Path, run_dir: Path, extra: Iterable[str] = ()) -> list[str]:
    """The trainer's own command line. It would train on for long; it is stopped once its steps are there."""
    return [
        sys.executable,
        "training/trainer.py",
        "model=large",
        f"model.attention={attention}",
        f"model.max_position_embeddings={max(length, 32768)}",
        f"data.path={corpus / 'train'}",
        f"data.val_path={corpus / 'validation'}",
        f"data.max_length={length}",
        "training.batch_size=1",
        "training.max_steps=100000",
        "training.eval_every=0",
        "training.eval_packs=1",
        "training.checkpoint_every=0",
        f"memory.activation_checkpointing={checkpointing}",
        "logging.log_every=1",
        "logging.tensorboard=false",
        "logging.plots=false",
        f"run_dir={run_dir}",
        *extra,
    ]


def write_corpus(folder: Path, size: int) -> None:
    """The standard library's files one after the other: a document of about `size` characters to train on, and a smaller one for validation."""
    wanted = {"train": size, "validation": max(size // 16, 1)}
    parts: dict[str, list[str]] = {name: [] for name in wanted}
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(file.relative_to(root).parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if "\0" in text:
            continue
        name = "validation" if wanted["validation"] > 0 else "train"
        parts[name].append(text)
        wanted[name] -= len(text)
        if wanted["train"] <= 0:
            break
    if not all(parts.values()):
        raise ValueError("Python's standard library has too little source here; install it whole")
    for name, texts in parts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "text.txt").write_text("\n".join(texts), encoding="utf-8")


@dataclass
class Ran:
    """What came of one run of the trainer: rows of metrics, its last words where it ended before all steps, and what it said of itself."""

    rows: list[dict[str, Any]]
    problem: str = ""
    backend: str | None = None  # of sparse attention
    parameters: float = 0.0
    first_step: float | None = None  # seconds from the start of the process to the end of its first step
    seconds: float = 0.0


def run_steps(arguments: list[str], run_dir: Path, steps: int, patience: float, deadline: float = math.inf) -> Ran:
    """Run the trainer for `steps` steps, unless it ends before them, nothing comes for `patience` seconds, or the clock passes `deadline`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(record.ROOT), os.environ.get("PYTHONPATH"))))}
    metrics, ran = run_dir / "metrics.jsonl", Ran([])
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        began = heard = time.monotonic()
        process = subprocess.Popen(arguments, cwd=record.ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            while len(ran.rows) < steps:
                ended = process.poll() is not None  # before reading, so that its last rows are seen
                found = [row for row in read_metrics(metrics) if "tokens_per_second" in row] if metrics.exists() else []
                now = time.monotonic()
                if len(found) > len(ran.rows):
                    ran.first_step = now - began if ran.first_step is None else ran.first_step
                    ran.rows, heard = found, now
                elif ended:
                    ran.problem = last_words(_text(said), process.returncode)
                    break
                elif now > deadline:
                    ran.problem = OUT_OF_TIME
                    break
                elif now - heard > patience:
                    ran.problem = f"no step within {patience:.0f} seconds; it was ended"
                    break
                else:
                    time.sleep(POLL_SECONDS)
        finally:
            process.kill()  # not a signal that would have it save a checkpoint first
            process.wait()
        ran.rows, ran.seconds, text = ran.rows[:steps], time.monotonic() - began, _text(said)
    ran.parameters, ran.backend = announced(text)
    return ran


def announced(text: str) -> tuple[float, str | None]:
    """Parameters, and the backend of sparse attention, from the trainer's first line."""
    match = re.search(r"^([\d.]+) M parameters.*? attention(?: \((\w+)\))?;", text, re.MULTILINE)
    return (float(match[1]) * 1e6, match[2]) if match else (0.0, None)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def last_words(text: str, status: int) -> str:
    """The trainer's error, or its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return ((errors or lines or [""])[-1].removeprefix("error: ") or f"ended with status {status}")[:400]


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median speed after the warm-up, and the most memory of any step."""
    timed = rows[WARM_UP:]
    mfu = [row["mfu"] for row in timed if row["mfu"] is not None]
    return {
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in timed),
        "mfu": statistics.median(mfu) if mfu else None,
        "peak_gib": max(row["max_memory_gib"] for row in rows),
        "data_wait": statistics.median(row["data_wait_fraction"] for row in timed),
        "steps": len(timed),
    }


class Memory:
    """What is known of the memory that runs take, so that none is started which cannot fit: finding that out costs its start and a step."""

    def __init__(self, gpu_bytes: float) -> None:
        self.gpu = gpu_bytes / 2**30
        self.peaks: dict[tuple[str, str], dict[int, float]] = {}  # (attention, checkpointing) -> tokens -> GiB; inf: it did not fit
        self.fixed = 0.0  # weights, gradients and two moments in float32, and the weights in bf16: GiB

    def note(self, length: int, attention: str, mode: str, ran: Ran) -> None:
        self.fixed = max(self.fixed, 18 * ran.parameters / 2**30)
        if "out of memory" in ran.problem:
            self.peaks.setdefault((attention, mode), {})[length] = math.inf
        elif ran.rows and not ran.problem:
            self.peaks.setdefault((attention, mode), {})[length] = max(row["max_memory_gib"] for row in ran.rows)

    def expected(self, length: int, attention: str, mode: str) -> float:
        """GiB, from shorter packs, since all but the fixed part is linear in the tokens; 0 where nothing is known."""
        known = sorted((tokens, gib) for tokens, gib in self.peaks.get((attention, mode), {}).items() if tokens <= length)
        if not known:
            return 0.0
        tokens, gib = known[-1]
        before, before_gib = known[-2] if len(known) > 1 else (0, self.fixed)
        return gib if tokens == length or gib == math.inf else gib + (gib - before_gib) * (length - tokens) / (tokens - before)


Runner = Callable[[str, Path], Ran]  # (activation checkpointing, folder of the run)


def measure(length: int, attention: str, modes: Sequence[str], steps: int, runner: Runner, memory: Memory) -> Iterator[dict[str, Any]]:
    """A row of results for each activation checkpointing tried: until one fits, or a failure that is not about memory."""
    for mode in modes:
        row: dict[str, Any] = {"length": length, "attention": attention, "checkpointing": mode}
        gib = memory.expected(length, attention, mode)
        if gib > memory.gpu and mode != modes[-1]:
            grown = "shorter packs did not fit" if gib == math.inf else f"by shorter packs it would take {gib:.0f} GiB of {memory.gpu:.0f}"
            yield row | {"problem": f"not tried: {grown}"}
            continue
        with tempfile.TemporaryDirectory(prefix="train_step_") as folder:
            ran = runner(mode, Path(folder) / "run")
        memory.note(length, attention, mode, ran)
        row |= {"problem": ran.problem, "backend": ran.backend, "first_step": ran.first_step, "seconds": ran.seconds}
        if len(ran.rows) == steps or (ran.problem == OUT_OF_TIME and len(ran.rows) > WARM_UP):
            row |= summarize(ran.rows)
        yield row
        if "out of memory" not in ran.problem:
            return


def render(results: dict[str, Any]) -> str:
    facts = results["facts"]
    rows = []
    dense = {row["length"]: row["tokens_per_second"] for row in results["rows"] if row["attention"] == "dense" and "tokens_per_second" in row}
    for row in results["rows"]:
        backend = f" ({row['backend']})" if row.get("backend") else ""
        head = [length_name(row["length"]), row["attention"] + backend, row["checkpointing"]]
        problem = row["problem"].replace("|", "/")
        if "tokens_per_second" not in row:
            rows.append([*head, *["–"] * 4, problem])
            continue
        ratio = f"{row['tokens_per_second'] / dense[row['length']]:.2f}" if row["length"] in dense else "–"
        mfu = "–" if row["mfu"] is None else f"{row['mfu']:.1%}"
        said = "; ".join(filter(None, (f"{row['data_wait']:.0%} waiting for data", problem and f"{problem} after {row['steps']} steps")))
        rows.append([*head, f"{row['tokens_per_second'] / 1e3:.2f} k", ratio, mfu, f"{row['peak_gib']:.1f}", said])
    text = [
        f"# Training steps of `model=large` on {facts['gpu']}, {facts['date']}",
        record.machine_lines(facts),
        f"One pack per step, of one document ({results['corpus']}); forward, backward, clipping and AdamW, in bf16 autocast. Median of the steps after the "
        f"first {WARM_UP} of {results['steps']}, a trainer of its own per row. MFU counts what the row's own attention has to compute, without "
        "recomputation, so compare attentions by tokens/s. Checkpointing is `memory.activation_checkpointing`: the first of none, selective, full that "
        "fits, unless one was asked for. In brackets what the trainer says sparse attention runs on. "
        f"Settings beside the table's: `{results['settings']}`.",
        markdown_table(["tokens per pack", "attention", "checkpointing", "tokens/s", "× dense", "MFU", "peak, GiB", ""], rows),
    ]
    return "\n\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lengths", nargs="+", default=["8k", "32k", "64k"], metavar="TOKENS", help="tokens per pack (default: 8k 32k 64k)")
    parser.add_argument("--attention", nargs="+", default=["nsa", "dense"], choices=("nsa", "dense", "window"), help="default: nsa dense")
    parser.add_argument("--steps", type=int, default=8, help=f"of each run, the first {WARM_UP} of them as warm-up (default: 8)")
    parser.add_argument("--checkpointing", default="auto", choices=("auto", *MODES), help="auto (default): the first of none, selective, full that fits")
    parser.add_argument("--patience", type=float, default=240.0, metavar="SECONDS", help="without a new step, after which a run is ended (default: 240)")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="for all runs together; what was measured by then is kept")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more overrides for the trainer")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    options = parser.parse_args(argv)
    try:
        lengths = sorted({parse_length(text) for text in options.lengths})  # short ones tell what memory long ones need
        if options.steps <= WARM_UP:
            raise ValueError(f"--steps {options.steps} leaves nothing after the {WARM_UP} steps of warm-up; write {WARM_UP + 1} or more")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: the benchmark needs a CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.time_limit
    facts = record.facts(argv, options.commit)
    path = record.new_file(options.out, "train_step", facts)
    modes = MODES if options.checkpointing == "auto" else (options.checkpointing,)
    results: dict[str, Any] = {"facts": facts, "steps": options.steps, "rows": []}
    results["corpus"] = "Python's standard library as one text, cut to packs"
    memory = Memory(facts["memory_bytes"])

    def keep(row: dict[str, Any]) -> None:
        """After every run, so that whatever ends this program loses nothing."""
        results["rows"].append(row)
        speed = f"{row['tokens_per_second']:,.0f} tokens/s, {row['peak_gib']:.1f} GiB" if "tokens_per_second" in row else ""
        took = f"{row['seconds']:.0f} s, {row['first_step'] or math.nan:.0f} s of them to the end of the first step" if "seconds" in row else ""
        name = row["attention"] + (f" ({row['backend']})" if row.get("backend") else "")
        parts = "; ".join(filter(None, (speed, row["problem"], took)))
        print(f"{length_name(row['length']):>6} {name:>16} {row['checkpointing']:>10}  {parts}", flush=True)
        record.save(path, results)
        path.with_suffix(".md").write_text(render(results), encoding="utf-8")

    with tempfile.TemporaryDirectory(prefix="train_step_corpus_") as folder:
        corpus = Path(folder)
        write_corpus(corpus, max(TEXT_SIZE, options.steps * lengths[-1] * BYTES_PER_TOKEN))
        shown = command(0, "", "", Path("CORPUS"), Path("DIR"), options.set)[2:]
        of_rows = ("model.attention", "model.max_position_embeddings", "memory.activation_checkpointing", "data.path", "data.val_path")
        named = (*of_rows, "data.max_length", "run_dir")
        results["settings"] = " ".join(word for word in shown if word.split("=")[0] not in named)
        for length in lengths:
            for attention in options.attention:

                def runner(mode: str, run_dir: Path, length: int = length, attention: str = attention) -> Ran:
                    words = command(length, attention, mode, corpus, run_dir, options.set)
                    return run_steps(words, run_dir, options.steps, options.patience, deadline)

                if time.monotonic() > deadline:
                    keep({"length": length, "attention": attention, "checkpointing": options.checkpointing, "problem": f"not started: {OUT_OF_TIME}"})
                    continue
                for row in measure(length, attention, modes, options.steps, runner, memory):
                    keep(row)
    print(f"wrote {path.with_suffix('.md')}")
    fitted = {(row["length"], row["attention"]) for row in results["rows"] if not row["problem"]}
    return int(len(fitted) < len(lengths) * len(options.attention))


if __name__ == "__main__":
    sys.exit(main())
