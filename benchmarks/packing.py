"""How full packs are, how often documents are cut, and how fast packs are made: this project's packing beside the usual ways, on the same files.

    python benchmarks/packing.py [--corpus NAME=PATH …] [--lengths 2k 8k 64k] [--buffers 64 256 1024 4096] [--out DIR]

Without --corpus it reads Python's own standard library. One process on one core; needs no GPU. Hugging Face's ways need `datasets`.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # before tokenizers
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import packers, record
from benchmarks.page import markdown_table
from benchmarks.shapes import length_name, parse_length
from nsa_transformer.config import ConfigError, DataConfig
from nsa_transformer.data.corpus import Split, cache_folder, cached_tokenizer, tokenized_corpus
from nsa_transformer.data.loader import lay_pack
from nsa_transformer.data.packing import PackPlan, plan_packs
from nsa_transformer.data.sources import FileSource, open_source
from nsa_transformer.utils.hardware import cpu_model, installed_version

UTILISATION, FRAGMENTS = 0.995, 1.05  # what the project promises at every length
CONCATENATE, FIRST_FIT, PADDED, GROUPED = "concatenate and split", "greedy first-fit", "HF, truncate and pad", "HF, group_texts"
SECONDS = 2.0  # of making packs, per row
Row = dict[str, Any]


def best_fit(buffer: int) -> str:
    return f"best fit, buffer {buffer}"


def open_corpus(path: str | None, vocab_size: int, cache: Path) -> tuple[Split, int, int]:
    """The whole of a corpus, tokenised with a tokenizer of its own; its end-of-document token, and its bytes."""
    source = open_source(path, key="--corpus")
    if not isinstance(source, FileSource):
        raise ConfigError(f"--corpus {path} is no file, folder or glob; name one")
    tokenizer = cached_tokenizer([(source, "text")], vocab_size, cache, print)
    (split,) = tokenized_corpus(source, "text", tokenizer, None, cache, print)
    return split, tokenizer.eod_id, source.num_bytes


def plan_row(split: Split, eod_id: int, max_length: int, way: str, plan: PackPlan, plan_seconds: float) -> Row:
    """What a plan comes to, and how fast its packs are made in an order at random."""
    lengths = np.diff(split.offsets)
    cuts = np.bincount(plan.document, minlength=len(lengths))
    kept = int(plan.length.sum())
    boundaries = int(np.diff(plan.offsets).max()) + 2

    def batches() -> Iterator[int]:
        for pack in np.random.default_rng(1).permutation(len(plan)).tolist():
            lay_pack(split, plan.fragments(pack), max_length, eod_id, boundaries)
            yield int(plan.length[plan.offsets[pack] : plan.offsets[pack + 1]].sum())

    return {
        "way": way,
        "packs": len(plan),
        "utilisation": kept / (len(plan) * max_length),
        "dropped": int(lengths.sum()) - kept,
        "fragments": len(plan.document),
        "cut_short": int(((cuts > 1) & (lengths <= max_length)).sum()),
        "plan_seconds": plan_seconds,
        "tokens_per_second": speed(batches()),
    }


def speed(batches: Iterator[int]) -> float:
    """Tokens of documents per second over whole batches, until there are no more or `SECONDS` have passed."""
    next(batches)  # warms up
    began, tokens = time.perf_counter(), 0
    for count in batches:
        tokens += count
        if time.perf_counter() - began > SECONDS:
            break
    return tokens / (time.perf_counter() - began)


def measure(split: Split, eod_id: int, max_length: int, buffers: list[int], dataset: Any) -> list[Row]:
    lengths = np.diff(split.offsets)
    order = np.random.default_rng(0).permutation(len(lengths))
    rows = []
    ways: list[tuple[str, Any]] = [(best_fit(buffer), lambda b=buffer: plan_packs(lengths, max_length, order, b)) for buffer in buffers]
    ways.append((CONCATENATE, lambda: packers.concatenate_and_split(lengths, max_length, order)))
    ways.append((FIRST_FIT, lambda: packers.first_fit(lengths, max_length, order)))
    for way, make in ways:
        began = time.perf_counter()
        plan = make()
        rows.append(plan_row(split, eod_id, max_length, way, plan, time.perf_counter() - began))
    if dataset is not None:
        rows += hf_rows(dataset, lengths, max_length, eod_id)
    return rows


def hf_rows(dataset: Any, lengths: np.ndarray, max_length: int, eod_id: int) -> list[Row]:
    total = int(lengths.sum())
    kept, cells = packers.padded_counts(lengths, max_length)
    padded = {"way": PADDED, "packs": len(lengths), "utilisation": kept / cells, "dropped": total - kept, "fragments": len(lengths), "cut_short": 0}
    padded |= {"plan_seconds": 0.0, "tokens_per_second": speed(packers.padded_batches(dataset, max_length, eod_id))}
    began = time.perf_counter()
    joined = packers.grouped(dataset, max_length)
    seconds = time.perf_counter() - began
    kept, fragments = packers.grouped_counts(lengths, max_length)
    assert len(joined) * max_length == kept
    row = {"way": GROUPED, "packs": len(joined), "utilisation": 1.0, "dropped": total - kept, "fragments": fragments, "cut_short": None}
    return [padded, row | {"plan_seconds": seconds, "tokens_per_second": speed(packers.grouped_batches(joined))}]


# ---------------------------------------------------------------------------------------------------------------------- the page


def render(results: dict[str, Any], picture: str | None) -> str:
    facts = results["facts"]
    text = [
        f"# Packing, {facts['date']}",
        f"Machine: one core of {facts['cpu']}; Python {facts['python']}, torch {facts['torch']}, NumPy {facts['numpy']}, tokenizers {facts['tokenizers']}, "
        f"datasets {facts['datasets'] or 'not installed'}, pyarrow {facts['pyarrow']}. Commit {facts['commit']}.\nCommand: `{facts['command']}`",
        f"Promised, at every length: utilisation ≥ {UTILISATION:.1%}, fragments ≤ {FRAGMENTS} ×, no token dropped. {verdict(results)}",
        f"One epoch of all documents of a corpus, a file each, tokenised with a byte-level BPE of at most {results['vocab_size']:,} tokens trained on it.",
        EXPLAINED,
        million_line(results["million"]),
    ]
    if picture:
        text.append(f"![Padding against extra fragments, by length]({picture})\n\nA point for each corpus; what is promised lies in the shaded corner.")
    for corpus in results["corpora"]:
        text.append(
            f"## {corpus['name']}\n\n{corpus['bytes'] / 1e6:.1f} MB, {corpus['documents']:,} documents, {corpus['tokens'] / 1e6:.2f} M tokens; "
            f"document lengths, 10th, 50th, 90th percentile and longest: {', '.join(f'{n:,}' for n in corpus['percentiles'])}."
        )
        head = ["tokens per pack", "way", "packs", "fewest", "utilisation", "dropped", "fragments", "cut", "planning", "tokens/s", "with planning"]
        text.append(markdown_table(head, [cells(row, corpus) for row in results["rows"] if row["corpus"] == corpus["name"]]))
    return "\n\n".join(text) + "\n"


EXPLAINED = f"""- *Packs*, *fewest*: packs there are, and the fewest that hold all tokens. An epoch's last pack is not full, and may be nearly empty:
  an epoch of fewer than {1 / (1 - UTILISATION):.0f} packs can fall short of {UTILISATION:.1%} however it is packed.
- *Utilisation*: tokens of documents over tokens of packs.
- *Fragments*: over the sum of ceil(length / tokens per pack), the fewest there can be; below 1 where tokens are dropped. *Cut*: documents
  that would have fitted a pack whole.
- *Planning*: choosing what lies in which pack, for the whole epoch; `Dataset.map` for group_texts. *Tokens/s*: making packs (tokens, targets, boundaries) from
  the memory-mapped cache, already in memory, in an order at random. *With planning*: its time spread over the epoch.
- *{CONCATENATE}* and *{FIRST_FIT}* have their packs made by this project's code. Documents come in an order at random, for Hugging Face's ways in the order of
  their files (shuffling slows those down).
- *{PADDED}*: a row per document, cut off at the length of a pack, {packers.HF_BATCH} to a batch, padded to the longest of the batch; packs are rows there.
- *{GROUPED}*: concatenation within {packers.HF_MAP_BATCH:,} documents, as in the language modelling examples; no boundaries between documents."""


def million_line(rows: list[Row]) -> str:
    seconds = ", ".join(f"{row['seconds']:.1f} s at {length_name(row['length'])}" for row in rows)
    return f"Planning 1,000,000 documents with log-normal lengths (median 403 tokens, mean 1.2 k), buffer {DataConfig().pack_buffer}: {seconds}."


def plan_million(max_length: int) -> Row:
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(6, 1.5, 1_000_000)).astype(np.int64)
    order = rng.permutation(len(lengths))
    began = time.perf_counter()
    plan_packs(lengths, max_length, order, DataConfig().pack_buffer)
    return {"length": max_length, "seconds": time.perf_counter() - began}


def cells(row: Row, corpus: Row) -> list[str]:
    whole = corpus["tokens"] / (corpus["tokens"] / row["tokens_per_second"] + row["plan_seconds"])
    return [
        length_name(row["length"]),
        row["way"],
        f"{row['packs']:,}",
        f"{-(-corpus['tokens'] // row['length']):,}",
        f"{row['utilisation']:.2%}",
        f"{row['dropped']:,}",
        f"{row['fragments'] / row['least']:.3f} ×",
        "–" if row["cut_short"] is None else f"{row['cut_short']:,}",
        f"{row['plan_seconds']:.3f} s",
        f"{row['tokens_per_second'] / 1e6:.1f} M",
        f"{whole / 1e6:.1f} M",
    ]


def kept_promise(row: Row) -> bool:
    return row["utilisation"] >= UTILISATION and row["fragments"] <= FRAGMENTS * row["least"] and not row["dropped"]


def verdict(results: dict[str, Any]) -> str:
    """Which rows of the default buffer keep the promise."""
    default = best_fit(DataConfig().pack_buffer)
    rows = [row for row in results["rows"] if row["way"] == default]
    if not rows:
        return "The default buffer was not measured."
    missed = [
        f"{row['corpus']} at {length_name(row['length'])} ({row['utilisation']:.2%}, where {row['most']:.2%} is the most there can be)"
        for row in rows
        if not kept_promise(row)
    ]
    return f"The default, *{default}*, keeps it in {len(rows) - len(missed)} of {len(rows)} cases{'; not for ' + ', '.join(missed) if missed else ''}."


def draw(results: dict[str, Any], path: Path) -> bool:
    """Padding against extra fragments, a panel for each length, a point for each corpus and way; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    lengths = list(dict.fromkeys(row["length"] for row in results["rows"]))
    figure = Figure(figsize=(3.6 * len(lengths), 4.2), layout="constrained", facecolor="white")
    default = best_fit(DataConfig().pack_buffer)
    styles = {CONCATENATE: ("#D55E00", "^"), FIRST_FIT: ("#009E73", "s"), default: ("#0072B2", "o")}
    shared = None
    for number, length in enumerate(lengths, 1):
        axes = figure.add_subplot(1, len(lengths), number, sharex=shared, sharey=shared)
        shared = shared or axes
        right, top = (FRAGMENTS - 1) * 100, (1 - UTILISATION) * 100
        axes.fill([-2, right, right, -2], [0, 0, top, top], color="#0072B2", alpha=0.1, linewidth=0)
        for way, (colour, marker) in styles.items():
            rows = [row for row in results["rows"] if row["length"] == length and row["way"] == way]
            x = [(row["fragments"] / row["least"] - 1) * 100 for row in rows]
            axes.plot(x, [(1 - row["utilisation"]) * 100 for row in rows], marker, color=colour, markersize=6, label=way, linestyle="none")
        axes.set_title(f"{length_name(length)} tokens per pack", loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("fragments beyond the fewest, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#E5E5E5", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.axes[0].set_yscale("symlog", linthresh=0.1)
    figure.axes[0].set_yticks([0, 0.1, 0.5, 1, 2, 5, 10], ["0", "0.1", "0.5", "1", "2", "5", "10"])
    figure.axes[0].set_ylim(bottom=-0.005)
    figure.axes[0].set_xlim(left=-1.5)
    figure.axes[0].set_ylabel("padding, % of all tokens")
    figure.axes[-1].legend(frameon=False, fontsize=9, loc="upper right")
    figure.savefig(path, dpi=120)
    return True


def find_facts(argv: list[str], commit: str | None) -> dict[str, Any]:
    facts = {key: value for key, value in record.facts(argv, commit).items() if key in ("python", "torch", "commit", "date", "command")}
    return (
        facts | {"cpu": cpu_model(), "system": platform.platform()} | {name: installed_version(name) for name in ("numpy", "tokenizers", "datasets", "pyarrow")}
    )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", nargs="+", default=[], metavar="NAME=PATH", help="file, folder or glob of text, beside Python's standard library")
    parser.add_argument("--lengths", nargs="+", default=["2k", "8k", "64k"], metavar="TOKENS", help="tokens per pack (default: 2k 8k 64k)")
    parser.add_argument("--buffers", nargs="+", type=int, default=[64, 256, 1024, 4096], metavar="DOCUMENTS", help="default: 64 256 1024 4096")
    parser.add_argument("--vocab-size", type=int, default=32768, help="of the tokenizers (default: 32768)")
    parser.add_argument("--cache", type=Path, default=cache_folder(DataConfig()), metavar="DIR", help="of tokenised corpora")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"facts": find_facts(argv, options.commit), "vocab_size": options.vocab_size, "corpora": [], "rows": []}
    try:
        lengths = [parse_length(text) for text in options.lengths]
        named = [("Python's standard library", None), *(text.split("=", 1) for text in options.corpus if _named(text))]
        for name, path in named:
            split, eod_id, size = open_corpus(path, options.vocab_size, options.cache)
            measure_corpus(results, name, split, eod_id, size, lengths, options.buffers)
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results["million"] = [plan_million(length) for length in lengths]
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"packing_{results['facts']['date']}.json"
    record.save(path, results)
    picture = path.with_suffix(".png")
    path.with_suffix(".md").write_text(render(results, picture.name if draw(results, picture) else None), encoding="utf-8")
    print(f"wrote {path.with_suffix('.md')}")
    return 0


def _named(text: str) -> bool:
    if "=" not in text:
        raise ValueError(f"--corpus {text} is not NAME=PATH; write one such as linux=/usr/src/linux")
    return True


def measure_corpus(results: dict[str, Any], name: str, split: Split, eod_id: int, size: int, lengths: list[int], buffers: list[int]) -> None:
    """The rows of one corpus, printed as they come."""
    documents = np.diff(split.offsets)
    tokens = int(documents.sum())
    percentiles = [int(n) for n in np.percentile(documents, [10, 50, 90, 100])]
    results["corpora"].append({"name": name, "bytes": size, "documents": len(documents), "tokens": tokens, "percentiles": percentiles})
    dataset = None if results["facts"]["datasets"] is None else packers.hf_dataset(split)
    int(split.tokens.max())  # reads the file once, so that no side pays for the disk
    for length in lengths:
        about = {"corpus": name, "length": length, "least": int((-(-documents // length)).sum()), "most": tokens / (-(-tokens // length) * length)}
        for row in measure(split, eod_id, length, buffers, dataset):
            results["rows"].append(about | row)
            print(f"{name:>28} {length_name(length):>4}  {row['way']:>22}  {row['utilisation']:.2%}  {row['fragments'] / about['least']:.3f} ×", flush=True)


if __name__ == "__main__":
    sys.exit(main())
