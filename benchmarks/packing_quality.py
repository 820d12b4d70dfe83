"""Does packing matter to what is learned? The tiny model on packs of best fit and on documents laid end to end and cut, several seeds, equal tokens.

    python benchmarks/packing_quality.py [--steps 300] [--seeds 0 1 2] [--out DIR] [key=value …]

Both ways mask attention at the boundaries of documents; only what lies in which pack differs. Every run is validated on the held-out documents
in both arrangements. One process on one core, about three minutes a run; needs no GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record
from benchmarks.packers import concatenate_and_split
from benchmarks.page import markdown_table
from nsa_transformer.config import Config, ConfigError, build_config
from nsa_transformer.data.loader import PackStream
from nsa_transformer.data.packing import PackPlan
from nsa_transformer.training.evaluate import evaluate
from nsa_transformer.training.trainer import Trainer
from nsa_transformer.utils.hardware import cpu_model

BEST_FIT, CONCATENATE = "best fit", "concatenate and cut"
QUIET = (
    "logging.tensorboard=false",
    "logging.plots=false",
    "logging.sample_tokens=0",
    "training.checkpoint_every=0",
    "training.eval_every=0",
    "training.eval_packs=128",
)
Row = dict[str, Any]


class Concatenated(PackStream):
    """The same documents in the same order of each epoch, end to end and cut at the length of a pack."""

    def plan_in_order(self, order: np.ndarray) -> PackPlan:
        return concatenate_and_split(self._lengths, self.max_length, order)


def concatenated(stream: PackStream) -> Concatenated:
    return Concatenated(stream.split, max_length=stream.max_length, seed=stream.seed, pack_buffer=stream.pack_buffer, eod_id=stream.eod_id)


class Run(Trainer):
    """A run on one of the two ways, and its losses on both arrangements of the held-out documents."""

    def __init__(self, config: Config, way: str) -> None:
        super().__init__(config)
        self.way = way
        self.losses: dict[str, float] = {}

    def _set_up(self, world: Any) -> None:
        super()._set_up(world)
        validation = self.data.validation
        count = self.config.training.eval_packs
        train = self.data.train
        assert isinstance(train, PackStream) and isinstance(validation, PackStream)
        self.arrangements = {BEST_FIT: self.validation, CONCATENATE: concatenated(validation).first_epoch(count)}
        if self.way == CONCATENATE:
            self.data.train = concatenated(train)

    def _evaluate(self) -> Any:
        lengths = self.data.tokenizer.byte_lengths
        for name, packs in self.arrangements.items():
            self.losses[name] = evaluate(self.model, packs, lengths, self.world, self._autocast(), self.config.training.loss_chunk_size).loss
        return super()._evaluate()


def configured(overrides: list[str]) -> Config:
    with initialize_config_dir(str(record.ROOT / "configs"), version_base=None):
        values: Any = OmegaConf.to_container(compose("config", ["model=tiny", *QUIET, *overrides]), resolve=True)
    return build_config(values)


def measure(way: str, seed: int, overrides: list[str], folder: Path) -> Row:
    began = time.perf_counter()
    run = Run(configured([*overrides, f"training.seed={seed}", f"run_dir={folder}"]), way)
    status = run.train()
    if status:
        raise SystemExit(status)
    train = run.data.train
    assert isinstance(train, PackStream)
    plan = train._plan(0)
    return {
        "way": way,
        "seed": seed,
        "tokens": run.progress.tokens,
        "tokens_per_fragment": float(plan.length.sum() / len(plan.document)),
        "seconds": time.perf_counter() - began,
        "losses": run.losses,
    }


# ---------------------------------------------------------------------------------------------------------------------- the page


def render(results: dict[str, Any]) -> str:
    facts, rows = results["facts"], results["rows"]
    cells = [
        [
            str(row["seed"]),
            row["way"],
            f"{row['tokens']:,}",
            f"{row['tokens_per_fragment']:.0f}",
            *(f"{row['losses'][name]:.4f}" for name in (BEST_FIT, CONCATENATE)),
        ]
        for row in sorted(rows, key=lambda row: (row["seed"], row["way"]))
    ]
    head = ["seed", "trained on", "tokens seen", "tokens per fragment", f"loss, {BEST_FIT}", f"loss, {CONCATENATE}"]
    machine = f"Machine: one core of {results['cpu']}, beside other work; Python {facts['python']}, torch {facts['torch']}. Commit {facts['commit']}."
    setting = (
        f"The tiny model, {results['steps']} steps of {results['batch_size']} packs of {results['max_length']} tokens, {facts['corpus']}. The two ways differ\n"
        "in what lies in which pack; attention stops at the boundaries of documents in both, and positions restart. Losses in nats per token, over\n"
        f"the first {results['eval_packs']} packs of the held-out documents, arranged in either way."
    )
    paragraphs = [
        f"# Packing and what is learned, {facts['date']}",
        f"{machine}\nCommand: `{facts['command']}`",
        setting,
        markdown_table(head, cells),
        verdict(rows),
    ]
    return "\n\n".join(paragraphs) + "\n"


def verdict(rows: list[Row]) -> str:
    """Differences of pairs of equal seed, with their mean and spread."""
    lines = []
    for name in (BEST_FIT, CONCATENATE):
        by = {(row["way"], row["seed"]): row["losses"][name] for row in rows}
        differences = [by[CONCATENATE, seed] - by[BEST_FIT, seed] for seed in sorted({row["seed"] for row in rows})]
        spread = f", standard deviation {statistics.stdev(differences):.4f}" if len(differences) > 1 else ""
        listed = ", ".join(f"{difference:+.4f}" for difference in differences)
        lines.append(f"- validated on {name}: {CONCATENATE} less {BEST_FIT} by seed {listed}; mean {statistics.mean(differences):+.4f}{spread}.")
    return "Above zero best fit is better.\n\n" + "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a run (default: 300)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the runs, beside model=tiny")
    options = parser.parse_intermixed_args(argv)
    overrides = [f"training.max_steps={options.steps}", *options.overrides]
    try:
        config = configured(overrides)
        corpus = "on Python's own standard library" if config.data.path is None else f"on {config.data.path}"
        results: dict[str, Any] = {
            "facts": record.facts(argv, options.commit) | {"corpus": corpus},
            "cpu": cpu_model(),
            "steps": options.steps,
            "batch_size": config.training.batch_size,
            "max_length": config.data.max_length,
            "eval_packs": config.training.eval_packs,
            "rows": [],
        }
        with tempfile.TemporaryDirectory() as folder:
            for seed in options.seeds:
                for way in (BEST_FIT, CONCATENATE):
                    row = measure(way, seed, overrides, Path(folder, f"{way.split()[0]}_{seed}"))
                    results["rows"].append(row)
                    print(f"seed {seed}, {way}: {row['losses']}, {row['seconds']:.0f} s", flush=True)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"packing_quality_{results['facts']['date']}.json"
    record.save(path, results)
    path.with_suffix(".md").write_text(render(results), encoding="utf-8")
    print(f"wrote {path.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
