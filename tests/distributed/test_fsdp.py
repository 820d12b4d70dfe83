"""FSDP2 on two ranks of gloo against a world of one: the same weights, gradients, loads and checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nsa_transformer.distributed.checkpoint import checkpoint_path, find_damage
from nsa_transformer.distributed.world import World, open_world
from nsa_transformer.models.transformer import Transformer

from .worker import config_of, train

ROOT = Path(__file__).resolve().parents[2]
CPU = World(0, 1, torch.device("cpu"), None)


def job(out: Path, start: Path | None = None, first: int = 0, steps: int = 2, checkpointing: str = "none") -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return {"out": str(out), "start": start and str(start), "first": first, "steps": steps, "checkpointing": checkpointing}


def launch(*jobs: dict[str, Any], ranks: int = 2) -> None:
    """One torchrun for several jobs: starting takes longer than running."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", "tests.distributed.worker", json.dumps(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one, two: two steps on one rank and on two. one_two, two_one: two more steps, after changing the number of ranks."""
    folder = tmp_path_factory.mktemp("fsdp")
    one = folder / "one"
    train(job(one), CPU)
    launch(
        job(folder / "two"),
        job(folder / "one_two", checkpoint_path(one, 2), first=2),
        job(folder / "two_selective", checkpointing="selective"),
    )
    train(job(folder / "two_one", checkpoint_path(folder / "two", 2), first=2), CPU)
    train(job(folder / "one_one", checkpoint_path(one, 2), first=2), CPU)
    return folder


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


def test_the_initial_weights_do_not_depend_on_the_number_of_ranks(runs: Path):
    model = Transformer(config_of("none").model)
    model.init_weights(3)
    assert_same(tensors(runs / "one", 0), model.state_dict())
    assert_same(tensors(runs / "two", 0), model.state_dict())


def test_gradients_and_loads_are_those_of_one_rank(runs: Path):
    for step in (0, 1):
        one, two = (torch.load(runs / name / f"step_{step}.pt") for name in ("one", "two"))
        assert_close(two["grads"], one["grads"], 1e-4)
        assert torch.equal(two["load"], one["load"]), "each token counted once over all ranks"
        assert float(two["norm"]) == pytest.approx(float(one["norm"]), rel=1e-5)


def test_weights_after_two_steps_are_those_of_one_rank(runs: Path):
    before, one, two = tensors(runs / "one", 0), tensors(runs / "one", 2), tensors(runs / "two", 2)
    assert_close(two, one, 1e-3)
    assert all(not torch.equal(one[name], before[name]) for name in before), "every one has moved, router biases too"
    moments = [tensors(runs / name, 2, "optimizer.safetensors") for name in ("one", "two")]
    assert_close(*({k: v for k, v in m.items() if k.startswith("exp_avg/")} for m in moments), 1e-3)  # type: ignore[misc]


def test_activation_checkpointing_changes_nothing(runs: Path):
    assert_same(tensors(runs / "two_selective", 2), tensors(runs / "two", 2))


@pytest.mark.parametrize(("source", "target"), [("one", "one_two"), ("two", "two_one")])
def test_a_checkpoint_loads_exactly_on_another_number_of_ranks(runs: Path, source: str, target: str):
    assert_same(tensors(runs / target, 2), tensors(runs / source, 2))
    saved, loaded = (tensors(runs / name, 2, "optimizer.safetensors") for name in (source, target))
    assert_same({k: v for k, v in loaded.items() if k != "rng/cpu"}, {k: v for k, v in saved.items() if k != "rng/cpu"})


def test_and_training_goes_on_alike(runs: Path):
    assert_close(tensors(runs / "one_two", 4), tensors(runs / "one_one", 4), 2e-3)
    assert_close(tensors(runs / "two_one", 4), tensors(runs / "one_one", 4), 2e-3)


def test_a_world_of_one_needs_no_process_group(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with open_world("cpu") as world:
        assert (world.rank, world.size, world.mesh, world.is_main) == (0, 1, None, True)
        value = torch.tensor([3.0])
        assert world.sum(value) is value and world.largest(7) == 7 and world.broadcast_text("x") == "x"
        with world.main_first():
            world.barrier()
    assert not torch.distributed.is_initialized()
