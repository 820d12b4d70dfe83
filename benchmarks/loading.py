"""How fast data come: tokenised cold, packed from the cache, at a start, at a resume far into a run, with a huge document; and what a training step waits.

    python benchmarks/loading.py [--corpus NAME=PATH …] [--cores 1 2] [--out DIR]

Without --corpus it reads Python's own standard library. Every measurement is a process of its own; needs no GPU. Other work on the cores lengthens
wall time; the seconds of CPU beside it show by how much.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record
from benchmarks.page import markdown_table
from benchmarks.shapes import length_name
from nsa_transformer.config import ConfigError, DataConfig
from nsa_transformer.data.corpus import Split, cached_tokenizer, tokenized_corpus
from nsa_transformer.data.loader import open_data
from nsa_transformer.data.mixture import MixtureStream
from nsa_transformer.data.sources import FileSource, open_source
from nsa_transformer.data.stream import PackStream
from nsa_transformer.utils.hardware import cpu_model, installed_version

COLD, CACHED = 2.3, 5.0  # what the project promises: MB/s per core tokenised and packed, M tokens/s from the cache
VOCAB_SIZE = 32768
LENGTHS = (2048, 8192, 65536)
FAR = 1_000_000  # a pack far into a run
SPEEDS = (30e3, 100e3, 1e6)  # tokens/s of one rank
BIG_BYTES = 50_000_000
SECONDS = 3.0  # of making packs, per figure
Row = dict[str, Any]


def clock(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `call` returns, its seconds, and the CPU seconds of all threads and of processes that it started."""
    wall, cpu = time.perf_counter(), sum(os.times()[:4])
    result = call()
    return result, time.perf_counter() - wall, sum(os.times()[:4]) - cpu


def stream_of(split: Split, max_length: int) -> PackStream:
    return PackStream(split, max_length=max_length, seed=0, pack_buffer=DataConfig().pack_buffer, eod_id=0)


def packs_per_second(stream: PackStream | MixtureStream, numbers: range) -> tuple[float, float]:
    """(packs, tokens) per second, until the numbers end or `SECONDS` have passed."""
    began, tokens, done = time.perf_counter(), 0, 0
    for number in numbers:
        tokens += stream.pack(number).num_tokens
        done += 1
        if time.perf_counter() - began > SECONDS:
            break
    seconds = time.perf_counter() - began
    return done / seconds, tokens / seconds


# --------------------------------------------------------------------------------------------------------------- measurements


def cold(path: str | None, cache: str, workers: int = 0) -> Row:
    """Hash, tokenise and pack a corpus whose tokenizer is there already, into a cache of its own."""
    prepared = open_source(path, key="--corpus")
    tokenizer = cached_tokenizer([(prepared, "text")], VOCAB_SIZE, Path(cache), print_to_stderr)
    source = open_source(path, key="--corpus")
    if not isinstance(source, FileSource):
        raise ConfigError(f"--corpus {path} is no file, folder or glob; name one")
    with tempfile.TemporaryDirectory() as fresh:

        def work() -> tuple[Split, int]:
            (split,) = tokenized_corpus(source, "text", tokenizer, None, Path(fresh), print_to_stderr, num_workers=workers)
            stream = stream_of(split, 8192)
            count = stream.packs_in_epoch(0)
            for number in range(count):
                stream.pack(number)
            return split, count

        (split, count), wall, cpu = clock(work)
        return {"bytes": source.num_bytes, "documents": len(split.documents), "tokens": split.num_tokens, "packs": count, "seconds": wall, "cpu": cpu}


def cached(path: str | None, cache: str) -> Row:
    """Packs in the order of training, planning included, of a tokenised corpus that lies in memory."""
    source = open_source(path, key="--corpus")
    tokenizer = cached_tokenizer([(source, "text")], VOCAB_SIZE, Path(cache), print_to_stderr)
    (split,) = tokenized_corpus(source, "text", tokenizer, None, Path(cache), print_to_stderr)
    int(split.tokens.max())  # reads the file once
    return {str(length): packs_per_second(stream_of(split, length), range(10**9))[1] for length in LENGTHS}


def start(path: str | None, cache: str) -> Row:
    """Seconds of `open_data` up to the first pack: this process's own."""
    config = DataConfig(path=path, cache_dir=cache, max_length=8192)
    _, wall, cpu = clock(lambda: open_data(config, VOCAB_SIZE, 0, print_to_stderr).train.pack(0))
    return {"seconds": wall, "cpu": cpu}


def resume(length: int, _cache: str) -> Row:
    """Seconds to a pack at the start and far into a run, on a million documents of random lengths."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(6, 1.5, 1_000_000)).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    split = Split(np.zeros(offsets[-1], dtype=np.uint16), offsets, np.arange(len(lengths)), "made up")

    def opened(number: int, position: list[list[int]] | None = None) -> PackStream:
        stream = stream_of(split, length)
        assert stream.fingerprint  # a resume compares it
        if position is not None:
            stream.start_at(position)
        stream.pack(number)
        return stream

    _, first, _ = clock(lambda: opened(0))
    far, without, _ = clock(lambda: opened(FAR))
    _, with_position, _ = clock(lambda: opened(FAR, far.position(FAR)))
    return {"tokens": int(offsets[-1]), "epoch": far.locate(FAR)[0], "first": first, "with": with_position, "without": without}


def big(kind: str, cache: str) -> Row:
    """A document of 50 MB, as a text file or as one line of JSONL: seconds and memory from nothing to the first pack."""
    folder = Path(cache, f"big_{kind}")
    folder.mkdir()
    target = folder / f"big.{kind}"
    with target.open("w", encoding="utf-8") as stream:  # piece by piece, so that making it takes no memory that would be counted
        stream.write('{"text": "' if kind == "jsonl" else "")
        written = 0
        while written < BIG_BYTES:
            for file in open_source(None).files:  # type: ignore[attr-defined]
                text = file.path.read_text(encoding="utf-8", errors="ignore")[: BIG_BYTES - written]
                stream.write(json.dumps(text)[1:-1] if kind == "jsonl" else text)
                written += len(text)
        stream.write('"}\n' if kind == "jsonl" else "")
    (folder / "small.txt").write_text("a line\nand another\n" * 50)
    tokenizer = cached_tokenizer([(open_source(None), "text")], VOCAB_SIZE, Path(cache), print_to_stderr)
    tokenizer.save(folder.parent / "tokenizer.json")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = DataConfig(path=str(folder), cache_dir=cache, max_length=8192, tokenizer=str(folder.parent / "tokenizer.json"), val_fraction=0.5)
    _, wall, cpu = clock(lambda: open_data(config, VOCAB_SIZE, 0, print_to_stderr).train.pack(0))
    return {"seconds": wall, "cpu": cpu, "gib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20}


def wait(path: str | None, cache: str) -> Row:
    """Milliseconds that a pack takes, in the order of training: the tokens on the disk alone, and in memory."""
    source = open_source(path, key="--corpus")
    tokenizer = cached_tokenizer([(source, "text")], VOCAB_SIZE, Path(cache), print_to_stderr)
    row: Row = {}
    for length in LENGTHS:
        for where in ("disk", "memory"):
            (split,) = tokenized_corpus(source, "text", tokenizer, None, Path(cache), print_to_stderr)
            stream = stream_of(split, length)
            stream.packs_in_epoch(0)
            if where == "disk":
                forget(Path(str(split.tokens.filename)))  # type: ignore[attr-defined]
            else:
                int(split.tokens.max())
            row[f"{length} {where}"] = 1000 / packs_per_second(stream, range(min(200, stream.packs_in_epoch(0))))[0]
    return row


def forget(file: Path) -> None:
    """Drop a file from the system's cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


MEASUREMENTS: dict[str, Callable[..., Row]] = {"cold": cold, "cached": cached, "start": start, "resume": resume, "big": big, "wait": wait}


def print_to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def measured(what: str, *arguments: str | int | None, cache: Path) -> Row:
    """A measurement in a process of its own."""
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", what, json.dumps(arguments), "--cache", str(cache)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    row: Row = json.loads(done.stdout)
    print_to_stderr(f"{what} {arguments} {row}")
    return row


# ---------------------------------------------------------------------------------------------------------------------- the page


def render(results: Row) -> str:
    facts, cores = results["facts"], results["cores"]
    cold_cells = [
        [
            row["name"], f"{row['bytes'] / 1e6:.1f}", f"{row['tokens'] / 1e6:.2f} M",
            *(f"{run['bytes'] / 1e6 / run['seconds']:.1f} ({run['bytes'] / 1e6 / run['seconds'] / n:.1f})" for n, run in zip(cores, row["cold"], strict=True)),
            " / ".join(f"{run['bytes'] / 1e6 / run['cpu']:.1f}" for run in row["cold"]),
            " / ".join(f"{run['cpu'] / run['seconds']:.2f}" for run in row["cold"]),
            *(f"{row['cached'][str(length)] / 1e6:.0f}" for length in LENGTHS),
            *(f"{run['seconds']:.1f}" for run in row["starts"]),
        ]
        for row in results["corpora"]
    ]  # fmt: skip
    head = ["corpus", "MB", "tokens", *(f"cold, {n} core{'s' * (n > 1)}, MB/s (per core)" for n in cores), "MB per CPU second", "cores it got"]
    head += [*(f"cached, {length_name(length)}, M tokens/s" for length in LENGTHS), "start 1, s", "start 2, s", "start 3, s"]
    far = [[length_name(row["length"]), str(row["epoch"]), *(f"{row[key]:.1f} s" for key in ("first", "with", "without"))] for row in results["resume"]]
    wait_cells = [
        [length_name(length), where, f"{results['wait'][f'{length} {where}']:.2f}"]
        + [f"{results['wait'][f'{length} {where}'] / 1000 * speed / length:.2%}" for speed in SPEEDS]
        for length in LENGTHS
        for where in ("memory", "disk")
    ]
    kinds = {"txt": "a text file", "jsonl": "a line of JSONL"}
    big_cells = [[kinds[kind], f"{row['seconds']:.1f} s", f"{row['gib']:.2f} GiB"] for kind, row in results["big"].items()]
    versions = f"Python {facts['python']}, torch {facts['torch']}, NumPy {facts['numpy']}, tokenizers {facts['tokenizers']}. Commit {facts['commit']}."
    parts = [
        f"# Loading, {facts['date']}",
        f"Machine: {os.cpu_count()} cores of {facts['cpu']}, other work on them at times; {versions}\nCommand: `{facts['command']}`",
        verdict(results),
        EXPLAINED,
        markdown_table(head, cold_cells),
        f"## A resume\n\nSeconds to the first pack on {results['resume'][0]['tokens'] / 1e9:.2f} G tokens in a million documents, hash of the order included,\n"
        f"at pack 0 and at pack {FAR:,}, with the position that a checkpoint keeps and without it, as from a checkpoint of an older version.",
        markdown_table(["tokens per pack", "epoch of that pack", "pack 0", "with position", "without"], far),
        WAITING,
        markdown_table(["tokens per pack", "tokens lie", "ms per pack", *(f"at {speed / 1000:,.0f}k tokens/s" for speed in SPEEDS)], wait_cells),
        f"## A document of {BIG_BYTES / 1e6:.0f} MB\n\nFrom nothing to the first pack, one core, given tokenizer; memory beyond what the process had before.",
        markdown_table(["as", "time", "memory"], big_cells),
    ]
    return "\n\n".join(parts) + "\n"


WAITING = """## What a step waits

Milliseconds to make a pack, in the order of training, with the tokens in memory or on the disk alone (the system's cache dropped), and the share of
a training step that this is at so many tokens per second and rank. Nothing is made ahead in the background: this is the whole wait but for the transfer
to the device, and for planning an epoch (most of *pack 0* above) once in it."""

EXPLAINED = """- *Cold*: hash, read, tokenise, write the cache, and make all packs of 8k once; the tokenizer is there. On one core
  `data.num_workers=0`, on N cores N. By the clock, and by the seconds of CPU of all processes, which other work on the machine lengthens less;
  *cores it got* is the second over the first, less than was asked for where other work had them.
- *Cached*: packs in the order of training, planning of the epochs included, on one core.
- *Start*: `open_data` and the first pack, in a new process: with an empty cache (the tokenizer is trained too), again (entries
  of the cache are checked once after they were made), and a third time (no content is read)."""


def verdict(results: Row) -> str:
    runs = [(run, cores) for row in results["corpora"] for cores, run in zip(results["cores"], row["cold"], strict=True)]
    by_clock = min(run["bytes"] / 1e6 / run["seconds"] / cores for run, cores in runs)
    by_cpu = min(run["bytes"] / 1e6 / run["cpu"] for run, _ in runs)
    cached_worst = min(min(row["cached"].values()) for row in results["corpora"]) / 1e6
    return (
        f"Promised: {COLD} MB/s per core cold, {CACHED:.0f} M tokens/s from the cache. The slowest here: {by_clock:.1f} MB/s per core by the clock\n"
        f"({_kept(by_clock >= COLD)}), {by_cpu:.1f} by seconds of CPU ({_kept(by_cpu >= COLD)}), "
        f"{cached_worst:.0f} M tokens/s ({_kept(cached_worst >= CACHED)})."
    )


def _kept(promise: bool) -> str:
    return "kept" if promise else "not kept"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", nargs="+", default=[], metavar="NAME=PATH", help="file, folder or glob of text, beside Python's standard library")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="of the cold runs: 1, or so many processes that tokenise (default: 1 2)")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "JSON"), help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        try:
            argument, *more = json.loads(options.measure[1])
            print(json.dumps(MEASUREMENTS[options.measure[0]](argument, options.cache, *more)))
        except ConfigError as error:
            print_to_stderr(f"error: {error}")
            return 2
        return 0
    if not all("=" in text for text in options.corpus):
        print_to_stderr("error: --corpus takes NAME=PATH; write one such as linux=/usr/src/linux")
        return 2
    facts = {key: value for key, value in record.facts(argv, options.commit).items() if key in ("python", "torch", "commit", "date", "command")}
    facts |= {"cpu": cpu_model(), "system": platform.platform(), "numpy": installed_version("numpy"), "tokenizers": installed_version("tokenizers")}
    results: Row = {"facts": facts, "cores": options.cores, "corpora": []}
    named: list[tuple[str, str | None]] = [("Python's standard library", None), *(tuple(text.split("=", 1)) for text in options.corpus)]
    try:
        for _, path in named:
            open_source(path, key="--corpus")
    except ConfigError as error:
        print_to_stderr(f"error: {error}")
        return 2
    for name, path in named:
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder)
            starts = [measured("start", path, cache=cache)]
            time.sleep(3)  # younger files are read again, since their times say too little
            starts += [measured("start", path, cache=cache) for _ in range(2)]
            runs = [measured("cold", path, 0 if cores == 1 else cores, cache=cache) for cores in options.cores]
            row = {"name": name, "bytes": runs[0]["bytes"], "tokens": runs[0]["tokens"], "starts": starts, "cold": runs}
            results["corpora"].append(row | {"cached": measured("cached", path, cache=cache)})
            if path is named[-1][1]:
                results["wait"] = measured("wait", path, cache=cache)
    with tempfile.TemporaryDirectory() as folder:
        results["resume"] = [{"length": length} | measured("resume", length, cache=Path(folder)) for length in LENGTHS[1:]]
        results["big"] = {kind: measured("big", kind, cache=Path(folder)) for kind in ("txt", "jsonl")}
    options.out.mkdir(parents=True, exist_ok=True)
    path_of_page = options.out / f"loading_{facts['date']}.json"
    record.save(path_of_page, results)
    path_of_page.with_suffix(".md").write_text(render(results), encoding="utf-8")
    print_to_stderr(f"wrote {path_of_page.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
