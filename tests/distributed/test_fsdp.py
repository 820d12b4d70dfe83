"""FSDP2 on two ranks of gloo against a world of one: the same weights, gradients, loads and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_transformer.distributed.checkpoint import checkpoint_path
from nsa_transformer.distributed.world import World, open_world
from nsa_transformer.models.transformer import Transformer

from .launch import assert_close, assert_same, launch, tensors
from .worker import Job, config_of, train

CPU = World(0, 1, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one, two: two steps on one rank and on two. one_two, two_one: two more steps, after changing the number of ranks."""
    folder = tmp_path_factory.mktemp("fsdp")

    def job(name: str, start: str | None = None, **fields: Any) -> Job:
        return Job(out=str(folder / name), start=start and str(checkpoint_path(folder / start, 2)), first=2 if start else 0, **fields)

    train(job("one"), CPU)
    train(job("plain", packs_per_pass=4), CPU)
    # The load of a pass enters its loss: two packs a pass on one rank are one on each of two.
    train(job("one_global", packs_per_pass=2, global_loss=1.0), CPU)
    launch(
        job("two"),
        job("one_two", "one"),
        job("two_selective", checkpointing="selective"),
        job("two_full", checkpointing="full"),
        job("two_global", global_loss=1.0),
        job("two_global_full", global_loss=1.0, checkpointing="full"),
    )
    train(job("two_one", "two"), CPU)
    train(job("one_one", "one"), CPU)
    return folder


def test_the_initial_weights_do_not_depend_on_the_number_of_ranks(runs: Path):
    model = Transformer(config_of(Job("")).model)
    model.init_weights(3)
    assert_same(tensors(runs / "one", 0), model.state_dict())
    assert_same(tensors(runs / "two", 0), model.state_dict())


@pytest.mark.parametrize(
    "names", [("plain", "one"), ("plain", "two"), ("plain", "two_full"), ("one_global", "two_global"), ("one_global", "two_global_full")], ids=" ".join
)
def test_gradients_and_loads_are_those_of_one_rank(runs: Path, names: tuple[str, str]):
    """plain is one pass over all packs of the step: neither accumulation nor ranks nor recomputation change it."""
    for step in (0, 1):
        one, two = (torch.load(runs / name / f"step_{step}.pt") for name in names)
        assert_close(two["grads"], one["grads"], 1e-4)
        assert torch.equal(two["load"], one["load"]), "each token counted once over all ranks"
        for key in ("norm", "loss"):
            assert float(two[key]) == pytest.approx(float(one[key]), rel=1e-5)


def test_weights_after_two_steps_are_those_of_one_rank(runs: Path):
    before, one, two = tensors(runs / "one", 0), tensors(runs / "one", 2), tensors(runs / "two", 2)
    assert_close(two, one, 1e-3)
    assert all(not torch.equal(one[name], before[name]) for name in before), "every one has moved, router biases too"
    moments = [tensors(runs / name, 2, "optimizer.safetensors") for name in ("one", "two")]
    assert_close(*({k: v for k, v in m.items() if k.startswith("exp_avg/")} for m in moments), 1e-3)  # type: ignore[misc]


def test_the_global_loss_shows(runs: Path):
    one, other = (torch.load(runs / name / "step_0.pt")["grads"] for name in ("one", "one_global"))
    name = "layers.1.mlp.router.weight"
    assert float((one[name] - other[name]).norm()) > 0.01 * float(one[name].norm())


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_changes_nothing(runs: Path, mode: str):
    assert_same(tensors(runs / f"two_{mode}", 2), tensors(runs / "two", 2))


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
