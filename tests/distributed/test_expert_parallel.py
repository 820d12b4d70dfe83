"""Expert parallelism on two and four ranks of gloo against a world of one that holds all experts."""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess, Popen
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_transformer.distributed.checkpoint import checkpoint_path, find_damage, list_checkpoints, step_of
from nsa_transformer.distributed.expert_parallel import KEPT, ExpertParallel
from nsa_transformer.distributed.world import World
from nsa_transformer.kernels import experts
from nsa_transformer.memory.activation_checkpointing import apply_activation_checkpointing
from nsa_transformer.models.transformer import mixtures
from nsa_transformer.training.metrics import read_metrics

from ..memory.test_activation_checkpointing import step as train_once
from ..models.small import small_config, small_model
from ..runs import ENTRY, QUIET, SMALL, command, environment, write_corpus
from .launch import assert_close, assert_same, launch, tensors
from .worker import Job, train


class OperatorOrder(TorchDispatchMode):
    """The names of operators as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().split("::")[1].split(".")[0])
        return func(*args, **(kwargs or {}))


CPU = World(0, 1, torch.device("cpu"), None)


def job(folder: Path, name: str, start: str | None = None, **fields: Any) -> Job:
    """Three steps from the beginning, or two more after those of `start`."""
    path = start and str(checkpoint_path(folder / start, 3))
    return Job(out=str(folder / name), start=path, first=3 if start else 0, steps=2 if start else 3, **{"num_experts": 6, "global_loss": 0.1} | fields)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one, one_skewed: all experts on one rank. two…: two ranks with three experts each. Both see the same packs in a pass, since its load enters its loss."""
    folder = tmp_path_factory.mktemp("expert_parallel")
    train(job(folder, "one", packs_per_pass=2), CPU)
    train(job(folder, "one_skewed", packs_per_pass=2, skewed=True), CPU)
    launch(
        job(folder, "two", expert_parallel=2),
        job(folder, "two_selective", expert_parallel=2, checkpointing="selective"),
        job(folder, "two_full", expert_parallel=2, checkpointing="full"),
        job(folder, "two_skewed", expert_parallel=2, skewed=True),
        job(folder, "one_two", "one", expert_parallel=2),
    )
    train(job(folder, "two_one", "two", packs_per_pass=2), CPU)
    train(job(folder, "one_one", "one", packs_per_pass=2), CPU)
    return folder


def assert_the_same_run(found: Path, expected: Path, rtol: float = 1e-5) -> None:
    """Three steps: loss, every gradient, loads, weights."""
    for step in range(3):
        one, other = (torch.load(run / f"step_{step}.pt", map_location="cpu") for run in (expected, found))
        # AdamW's first steps divide tiny gradients by their own size, which magnifies rounding: later gradients are of weights a little apart.
        assert_close(other["grads"], one["grads"], 10 * rtol if step else rtol)
        assert torch.equal(other["load"], one["load"])
        for key in ("norm", "loss"):
            assert float(other[key]) == pytest.approx(float(one[key]), rel=1e-5)
    before, one, other = tensors(expected, 0), tensors(expected, 3), tensors(found, 3)
    assert_same(tensors(found, 0) if "skewed" not in expected.name else before, before)
    assert_close(other, one, 1e-3)


def test_two_ranks_are_one(runs: Path) -> None:
    assert_the_same_run(runs / "two", runs / "one")


def test_a_rank_without_any_token(runs: Path) -> None:
    """All tokens visit the experts 0 and 1, and both are of rank 0."""
    assert_the_same_run(runs / "two_skewed", runs / "one_skewed")
    load = torch.load(runs / "two_skewed" / "step_2.pt")["load"]
    assert bool((load[:, :2] > 0).all()) and not load[:, 2:].any()


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation_changes_no_bit(runs: Path, mode: str) -> None:
    for step in range(3):
        plain, again = (torch.load(runs / name / f"step_{step}.pt") for name in ("two", f"two_{mode}"))
        assert_same(again["grads"], plain["grads"])
        assert torch.equal(again["load"], plain["load"]), "counted once"
    assert_same(tensors(runs / f"two_{mode}", 3), tensors(runs / "two", 3))


@pytest.mark.parametrize(("source", "target"), [("one", "one_two"), ("two", "two_one")])
def test_a_checkpoint_resumes_with_another_number_of_ranks(runs: Path, source: str, target: str) -> None:
    assert_same(tensors(runs / target, 3), tensors(runs / source, 3))
    saved, loaded = (tensors(runs / name, 3, "optimizer.safetensors") for name in (source, target))
    assert_same({k: v for k, v in loaded.items() if k != "rng/cpu"}, {k: v for k, v in saved.items() if k != "rng/cpu"})
    assert_close(tensors(runs / target, 5), tensors(runs / "one_one", 5), 2e-3)


# ------------------------------------------------------------------------------------------------- one rank as a group of its own


@pytest.fixture
def alone() -> Iterator[ExpertParallel]:
    """A group of one rank: the same way through all-to-all, in this process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield ExpertParallel(torch.distributed.group.WORLD, 4)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("tokens", [0, 1, 37])
def test_there_and_back_is_as_if_tokens_had_stayed(alone: ExpertParallel, tokens: int) -> None:
    torch.manual_seed(0)
    w13, w2 = torch.randn(4, 10, 6, dtype=torch.float64), torch.randn(4, 6, 5, dtype=torch.float64)
    x, weights, indices = torch.randn(tokens, 6, dtype=torch.float64), torch.rand(tokens, 2), torch.rand(tokens, 4).topk(2).indices
    leaves, grad = [t.requires_grad_() for t in (x, weights, w13, w2)], torch.randn(tokens, 6, dtype=torch.float64)
    expected = experts(x, indices, weights, w13, w2)
    found = alone(x, indices, weights)(experts, w13, w2)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b)


def test_results_are_not_sent_back_again_where_activations_are_recomputed(alone: ExpertParallel) -> None:
    """Two layers with experts, each with three ways forward, of rows, weights and results, and three back."""
    calls = {}
    for mode in ("none", "selective", "full"):
        model = small_model(small_config(num_layers=3))
        for mixture in mixtures(model):
            mixture.dispatch = alone
        apply_activation_checkpointing(model, mode, KEPT)
        with OperatorOrder() as order:
            train_once(model)
        calls[mode] = [order.names.count(name) for name in ("all_to_all_single", "wait_tensor", "exchange_counts")]
    assert calls == {"none": [12, 12, 2], "selective": [16, 16, 2], "full": [16, 16, 2]}


def test_the_shared_expert_runs_while_tokens_travel(alone: ExpertParallel) -> None:
    """Forward and backward: its products lie between the start of an all-to-all and the wait for it, and those of the experts do not."""
    mixture = next(mixtures(small_model(small_config(num_layers=2))))
    mixture.dispatch = alone
    x = torch.randn(20, 24, requires_grad=True)
    with OperatorOrder() as order:
        y, _ = mixture(x, torch.zeros(20, dtype=torch.int64), 1)
        forward = len(order.names)
        y.sum().backward()
    for names, products, kernel in ((order.names[:forward], 2, "experts_grouped"), (order.names[forward:], 4, "experts_grouped_backward")):
        under_way, meanwhile = 0, []
        for name in names:
            under_way += {"all_to_all_single": 1, "wait_tensor": -1}.get(name, 0)
            meanwhile += [name] if under_way else []
        assert meanwhile.count("mm") == products and kernel in names and kernel not in meanwhile, names


# ------------------------------------------------------------------------------------------------------------------ whole runs


@pytest.mark.slow
def test_a_run_of_the_command(tmp_path: Path) -> None:
    """Two ranks against one: losses, loads, validation and a sample; then one rank goes on alone."""
    write_corpus(tmp_path / "text")
    settings = [*SMALL, "training.precision=fp32", "logging.tensorboard=false", "logging.plots=false", "logging.sample_tokens=8"]
    settings += [f"data.path={tmp_path / 'text'}", f"data.cache_dir={tmp_path / 'cache'}"]

    def run(name: str, *more: str, launcher: tuple[str, ...] = ()) -> CompletedProcess[str]:
        return command(*launcher, str(ENTRY), *settings, f"run_dir={tmp_path / name}", *more, cwd=tmp_path, timeout=170)

    two_ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for done in (run("one"), run("two", "training.expert_parallel_size=2", launcher=two_ranks)):
        assert done.returncode == 0, done.stderr
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert two[0]["expert_load"] == one[0]["expert_load"]
    for key in ("loss", "grad_norm", "val_loss"):
        assert [row[key] for row in two if key in row] == pytest.approx([row[key] for row in one if key in row], rel=1e-3)
    assert (tmp_path / "two" / "sample.txt").exists()
    done = run("two", "training.resume=auto", "training.max_steps=8")
    assert done.returncode == 2 and "expert_parallel_size=2 does not divide the number of ranks, 1" in done.stderr
    done = run("two", "training.resume=auto", "training.max_steps=8", "training.expert_parallel_size=1")
    assert done.returncode == 0, done.stderr
    assert read_metrics(tmp_path / "two" / "metrics.jsonl")[-1]["step"] == 8


@pytest.mark.slow
def test_a_rank_that_is_killed(tmp_path: Path) -> None:
    """The other one says so in a line, and what was saved goes on, alone and with the experts in host memory."""
    write_corpus(tmp_path / "text")
    run = [*SMALL, *QUIET, f"data.path={tmp_path / 'text'}", f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in ("0", "1"):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        more = ("training.expert_parallel_size=2", "training.max_steps=100000", "training.eval_every=0")
        with open(tmp_path / rank, "w") as said:
            ranks.append(Popen([sys.executable, str(ENTRY), *run, *more], env=environment(**world), stdout=said, stderr=said))
    try:
        until = time.monotonic() + 120
        while not checkpoint_path(tmp_path / "run", 4).exists() and time.monotonic() < until:
            time.sleep(0.01)
        ranks[1].kill()
        assert ranks[0].wait(60) == 1
    finally:
        for rank in ranks:
            rank.kill()
    said = (tmp_path / "0").read_text()
    assert re.search(r"^error: another rank ended while \w.*continue with run_dir=\S+run training\.resume=auto$", said, re.MULTILINE), said
    assert "Traceback" not in said
    reached = list_checkpoints(tmp_path / "run")[-1]
    assert find_damage(reached) is None
    more = ("training.resume=auto", "training.expert_parallel_size=1", "memory.expert_offloading.enabled=true", f"training.max_steps={step_of(reached) + 1}")
    done = command(str(ENTRY), *run, *more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"continuing {reached} at step {step_of(reached)}" in done.stdout


@pytest.mark.slow
def test_compiled_blocks(tmp_path: Path) -> None:
    launch(
        job(tmp_path, "plain", expert_parallel=2),
        job(tmp_path, "compiled", expert_parallel=2, compile=True),
        job(tmp_path, "compiled_full", expert_parallel=2, compile=True, checkpointing="full"),
    )
    assert_the_same_run(tmp_path / "compiled", tmp_path / "plain")
    assert_the_same_run(tmp_path / "compiled_full", tmp_path / "plain")


@pytest.mark.slow
def test_four_ranks_in_two_groups(tmp_path: Path) -> None:
    """Two sets of experts, each on two ranks, and three experts of a rank sharded over two; beside one group of all four."""
    train(job(tmp_path, "six", packs_per_pass=4), CPU)
    train(job(tmp_path, "eight", packs_per_pass=4, num_experts=8), CPU)
    launch(
        job(tmp_path, "groups", expert_parallel=2),
        job(tmp_path, "groups_full", expert_parallel=2, checkpointing="full"),
        job(tmp_path, "group", num_experts=8, expert_parallel=4),
        ranks=4,
    )
    assert_the_same_run(tmp_path / "groups", tmp_path / "six")
    assert_the_same_run(tmp_path / "group", tmp_path / "eight")
    assert_same(tensors(tmp_path / "groups_full", 3), tensors(tmp_path / "groups", 3))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path: Path) -> None:
    """All-to-all over NCCL: as two GPUs that each hold all experts, and in bf16 near that."""
    on_gpu: dict[str, Any] = {"device": "cuda"}
    launch(
        job(tmp_path, "together", **on_gpu),
        job(tmp_path, "apart", expert_parallel=2, **on_gpu),
        job(tmp_path, "apart_full", expert_parallel=2, checkpointing="full", **on_gpu),
        job(tmp_path, "skewed", skewed=True, **on_gpu),
        job(tmp_path, "apart_skewed", expert_parallel=2, skewed=True, **on_gpu),
        job(tmp_path, "bf16", precision="bf16", **on_gpu),
        job(tmp_path, "apart_bf16", expert_parallel=2, precision="bf16", **on_gpu),
    )
    assert_the_same_run(tmp_path / "apart", tmp_path / "together", 1e-4)
    assert_the_same_run(tmp_path / "apart_full", tmp_path / "together", 1e-4)
    assert_the_same_run(tmp_path / "apart_skewed", tmp_path / "skewed", 1e-4)
    exact, plain, apart = (torch.load(tmp_path / name / "step_0.pt", map_location="cpu")["grads"] for name in ("together", "bf16", "apart_bf16"))
    for name, value in exact.items():
        error = float((plain[name] - value).norm())
        assert float((apart[name] - value).norm()) <= 2 * error + 1e-6, name
