"""Small runs for the tests of training: a corpus, a configuration, a command, and what a run left behind."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nsa_transformer.config import Config, build_config
from nsa_transformer.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
ENTRY = ROOT / "training" / "trainer.py"
# What depends on the clock and the machine, not on the run.
UNSTEADY = {"tokens_per_second", "mfu", "max_memory_gib", "data_wait_fraction", "update_wait_fraction"}
SMALL = (
    "model=tiny",
    "model.vocab_size=300",
    "model.hidden_size=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_dim=16",
    "model.intermediate_size=64",
    "model.moe.num_experts=4",
    "model.moe.expert_size=32",
    "model.init_std=0.02",  # and the learning rate: whatever tiny is tuned to, the golden losses stay
    "data.max_length=96",
    "training.batch_size=2",
    "training.learning_rate=0.003",
    "training.max_steps=6",
    "training.warmup_steps=2",
    "training.eval_packs=2",
    "training.eval_every=3",
    "training.checkpoint_every=2",
    "training.device=cpu",
    "logging.log_every=1",
)
QUIET = ("logging.tensorboard=false", "logging.plots=false", "logging.sample_tokens=0")


def write_corpus(folder: Path, documents: int = 10, seed: int = 0) -> Path:
    """Documents of a few hundred words with a grammar of their own, the same on every machine."""
    rng = random.Random(seed)
    words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 5))) for _ in range(40)]
    follows = {word: rng.sample(words, 3) for word in words}
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        word, text = rng.choice(words), []
        for place in range(rng.randint(100, 400)):
            text.append(word + (".\n" if place % 9 == 8 else " "))
            word = rng.choice(follows[word])
        (folder / f"{number:02}.txt").write_text("".join(text), encoding="utf-8")
    return folder


def overrides(folder: Path, *more: str) -> list[str]:
    """A small run in `folder`/run, on the corpus in `folder`/text."""
    return [*SMALL, f"data.path={folder / 'text'}", f"data.cache_dir={folder / 'cache'}", f"run_dir={folder / 'run'}", *more]


def small_config(folder: Path, *more: str) -> Config:
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        values: Any = OmegaConf.to_container(compose("config", overrides(folder, *more)), resolve=True)
    return build_config(values)


def steady_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what the clock decides."""
    return [{key: value for key, value in row.items() if key not in UNSTEADY} for row in read_metrics(run_dir / "metrics.jsonl")]


def final_files(run_dir: Path) -> dict[str, bytes]:
    """Weights, moments and state of the newest checkpoint, byte for byte."""
    newest = max((run_dir / "checkpoints").glob("step_*"))
    return {name: (newest / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors", "state.json")}


@cache
def entry() -> ModuleType:
    """`training/trainer.py` as a module; `run_entry` calls its `main`, without the seconds that a new process takes."""
    spec = importlib.util.spec_from_file_location("trainer_entry", ENTRY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(**more: str) -> dict[str, str]:
    """Of a child process: this checkout first, and nothing of a torchrun around the tests."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"} | more


def command(*arguments: str, cwd: Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS…` as a user starts it."""
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=timeout)
