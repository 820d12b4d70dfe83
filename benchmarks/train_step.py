"""Speed and memory of whole training steps of `model=large`, sparse and dense attention in the same trainer, on one CUDA GPU.

    python benchmarks/train_step.py [--lengths 8k 32k 64k] [--attention nsa dense] [--steps 8] [--checkpointing auto] [--out DIR]

Every run is `training/trainer.py` itself in a process of its own, ended once it has written its steps: saving and reporting are not measured.
The text is Python's standard library joined to documents longer than a pack, so that every pack is one document.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record
from benchmarks.page import markdown_table
from benchmarks.shapes import length_name, parse_length
from nsa_transformer.training.metrics import read_metrics

MODES = ("none", "selective", "full")
WARM_UP = 3  # steps left out of the figures: kernels are compiled, memory is found
DOCUMENT_BYTES = 1 << 21  # of a document; at 64k tokens a pack takes some 250 KB
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


def write_corpus(folder: Path, size: int = DOCUMENT_BYTES, most: int = 24) -> None:
    """Long documents: the standard library's files one after the other, cut at about `size` bytes; the last one is for validation."""
    documents: list[str] = []
    parts: list[str] = []
    held = 0
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if len(documents) == most:
            break
        if {"site-packages", "dist-packages"} & set(file.relative_to(root).parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if "\0" in text:
            continue
        parts.append(text)
        held += len(text)
        if held >= size:
            documents.append("\n".join(parts))
            parts, held = [], 0
    if parts and len(documents) < 2:
        documents.append("\n".join(parts))
    if len(documents) < 2:
        raise ValueError("Python's standard library has too little source here; install it whole")
    for part in ("train", "validation"):
        (folder / part).mkdir(parents=True)
    for number, text in enumerate(documents):
        (folder / ("validation" if number == len(documents) - 1 else "train") / f"{number:02d}.txt").write_text(text, encoding="utf-8")


def run_steps(arguments: list[str], run_dir: Path, steps: int, patience: float) -> tuple[list[dict[str, Any]], str]:
    """Rows of metrics of the first `steps` steps, and the trainer's last words where it ended before them, or nothing came for `patience` seconds."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(record.ROOT), os.environ.get("PYTHONPATH"))))}
    metrics = run_dir / "metrics.jsonl"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(arguments, cwd=record.ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            rows: list[dict[str, Any]] = []
            heard = time.monotonic()
            while len(rows) < steps:
                ended = process.poll() is not None  # before reading, so that its last rows are seen
                found = [row for row in read_metrics(metrics) if "tokens_per_second" in row] if metrics.exists() else []
                if len(found) > len(rows):
                    rows, heard = found, time.monotonic()
                elif ended:
                    said.seek(0)
                    return rows, last_words(said.read(), process.returncode)
                elif time.monotonic() - heard > patience:
                    return rows, f"no step within {patience:.0f} seconds; it was ended"
                else:
                    time.sleep(POLL_SECONDS)
            return rows[:steps], ""
        finally:
            process.kill()  # not a signal that would have it save a checkpoint first
            process.wait()


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


Runner = Callable[[str, Path], tuple[list[dict[str, Any]], str]]  # (activation checkpointing, folder of the run) -> rows, problem


def measure(length: int, attention: str, modes: Iterable[str], steps: int, runner: Runner) -> list[dict[str, Any]]:
    """A row of results for each activation checkpointing tried: until one fits, or a failure that is not about memory."""
    found = []
    for mode in modes:
        with tempfile.TemporaryDirectory(prefix="train_step_") as folder:
            rows, problem = runner(mode, Path(folder) / "run")
        row: dict[str, Any] = {"length": length, "attention": attention, "checkpointing": mode, "problem": problem}
        if not problem and len(rows) == steps:
            row |= summarize(rows)
        found.append(row)
        if "out of memory" not in problem:
            break
    return found


def render(results: dict[str, Any]) -> str:
    facts = results["facts"]
    rows = []
    dense = {row["length"]: row["tokens_per_second"] for row in results["rows"] if row["attention"] == "dense" and not row["problem"]}
    for row in results["rows"]:
        head = [length_name(row["length"]), row["attention"], row["checkpointing"]]
        if row["problem"]:
            rows.append([*head, *["–"] * 4, row["problem"].replace("|", "/")])
            continue
        ratio = f"{row['tokens_per_second'] / dense[row['length']]:.2f}" if row["length"] in dense else "–"
        mfu = "–" if row["mfu"] is None else f"{row['mfu']:.1%}"
        rows.append([*head, f"{row['tokens_per_second'] / 1e3:.2f} k", ratio, mfu, f"{row['peak_gib']:.1f}", f"{row['data_wait']:.0%} waiting for data"])
    text = [
        f"# Training steps of `model=large` on {facts['gpu']}, {facts['date']}",
        record.machine_lines(facts),
        f"One pack per step, each one document ({results['corpus']}); forward, backward, clipping and AdamW, in bf16 autocast. Median of the steps after the "
        f"first {WARM_UP} of {results['steps']}, a trainer of its own per row. MFU counts what the row's own attention has to compute, without "
        "recomputation, so compare attentions by tokens/s. Checkpointing is `memory.activation_checkpointing`: the first of none, selective, full that "
        "fits, unless one was asked for. "
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
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more overrides for the trainer")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    options = parser.parse_args(argv)
    try:
        lengths = [parse_length(text) for text in options.lengths]
        if options.steps <= WARM_UP:
            raise ValueError(f"--steps {options.steps} leaves nothing after the {WARM_UP} steps of warm-up; write {WARM_UP + 1} or more")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: the benchmark needs a CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    facts = record.facts(argv, options.commit)
    path = record.new_file(options.out, "train_step", facts)
    modes = MODES if options.checkpointing == "auto" else (options.checkpointing,)
    results: dict[str, Any] = {"facts": facts, "steps": options.steps, "rows": []}
    results["corpus"] = f"Python's standard library, joined to documents of some {DOCUMENT_BYTES >> 20} MiB and cut to packs"
    with tempfile.TemporaryDirectory(prefix="train_step_corpus_") as folder:
        corpus = Path(folder)
        write_corpus(corpus)
        shown = command(0, "", "", Path("CORPUS"), Path("DIR"), options.set)[2:]
        of_rows = ("model.attention", "model.max_position_embeddings", "memory.activation_checkpointing", "data.path", "data.val_path")
        named = (*of_rows, "data.max_length", "run_dir")
        results["settings"] = " ".join(word for word in shown if word.split("=")[0] not in named)
        for length in lengths:
            for attention in options.attention:

                def runner(mode: str, run_dir: Path, length: int = length, attention: str = attention) -> tuple[list[dict[str, Any]], str]:
                    return run_steps(command(length, attention, mode, corpus, run_dir, options.set), run_dir, options.steps, options.patience)

                for row in measure(length, attention, modes, options.steps, runner):
                    results["rows"].append(row)
                    said = row["problem"] or f"{row['tokens_per_second']:,.0f} tokens/s, {row['peak_gib']:.1f} GiB"
                    print(f"{length_name(length):>6} {attention:>6} {row['checkpointing']:>10}  {said}", flush=True)
                record.save(path, results)
                path.with_suffix(".md").write_text(render(results), encoding="utf-8")
    print(f"wrote {path.with_suffix('.md')}")
    fitted = {(row["length"], row["attention"]) for row in results["rows"] if not row["problem"]}
    return int(len(fitted) < len(lengths) * len(options.attention))


if __name__ == "__main__":
    sys.exit(main())
