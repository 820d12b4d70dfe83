"""Runs of tests/distributed/worker.py on several ranks, and what they left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from nsa_transformer.distributed.checkpoint import checkpoint_path, find_damage

from .worker import Job

ROOT = Path(__file__).resolve().parents[2]


def launch(*jobs: Job, ranks: int = 2) -> None:
    """One torchrun for several jobs: starting takes longer than running."""
    text = json.dumps([asdict(each) for each in jobs])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", "tests.distributed.worker", text]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def tensors(run: Path, step: int, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    path = checkpoint_path(run, step)
    assert find_damage(path) is None
    return load_file(path / file)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape
        assert float((found[name] - value).norm()) <= rtol * float(value.norm()) + 1e-9, name
