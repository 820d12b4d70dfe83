"""What a page of results says about its run, and where its files go."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from nsa_transformer.utils.files import write_atomic
from nsa_transformer.utils.hardware import describe_machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def facts(argv: list[str], commit: str | None = None) -> dict[str, Any]:
    """The machine, the versions, the commit and the command."""
    machine = describe_machine()
    power, driver = _nvidia_smi("power.limit"), _nvidia_smi("driver_version")
    return {
        "gpu": machine["gpus"][0]["name"] if machine["gpus"] else "none",
        "memory_bytes": machine["gpus"][0]["memory_bytes"] if machine["gpus"] else 0,
        "power_limit": power,
        "driver": driver,
        "python": machine["python"],
        "torch": machine["torch"],
        "triton": machine["triton"],
        "cudnn": _cudnn(),
        "commit": commit or _commit(),
        "date": f"{datetime.now():%Y-%m-%d}",
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *argv]),
    }


def machine_lines(known: dict[str, Any]) -> str:
    """The first paragraph of a page."""
    return (
        f"Machine: one {known['gpu']} ({known['memory_bytes'] / 1e9:.0f} GB), power limit {known['power_limit']}, driver {known['driver']}; "
        f"Python {known['python']}, torch {known['torch']}, Triton {known['triton']}, cuDNN {known['cudnn']}. Commit {known['commit']}.\n"
        f"Command: `{known['command']}`"
    )


def new_file(folder: Path, what: str, known: dict[str, Any]) -> Path:
    """`what_<gpu>_<date>.json` in `folder`, with a number where that is taken; the page and the plot lie beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu = re.sub(r"[^a-z0-9]+", "-", known["gpu"].lower().removeprefix("nvidia ")).strip("-")
    name, number = f"{what}_{gpu}_{known['date']}", 1
    while (folder / f"{name}{f'_{number}' if number > 1 else ''}.json").exists():
        number += 1
    return folder / f"{name}{f'_{number}' if number > 1 else ''}.json"


def save(path: Path, results: dict[str, Any]) -> None:
    write_atomic(path, json.dumps(results, indent=1) + "\n")


def _nvidia_smi(field: str) -> str:
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else "unknown"


def _cudnn() -> str:
    """`9.19.0` of 91900."""
    number = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return "none" if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _commit() -> str:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return "unknown (no git checkout)" if not head else f"{head}{' with uncommitted changes' if changed else ''}"
