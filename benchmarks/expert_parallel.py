"""A layer of experts on several ranks: all of them on each (FSDP2 alone) beside expert parallelism, with and without the shared expert meanwhile.

    torchrun --nproc_per_node=N benchmarks/expert_parallel.py [--shapes 1024/512/64/6@32768 ...] [--out DIR]

On GPUs in bf16; without any, as CPU processes in float32, whose times say nothing. Gradients are compared before anything is timed. Writes a page and
the raw numbers. Routers are random, so loads are nearly even: what a trained model's imbalance costs is not measured here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record
from benchmarks.experts import Shape, parse_shape
from benchmarks.page import markdown_table
from nsa_transformer.config import MoEConfig
from nsa_transformer.distributed.expert_parallel import open_expert_mesh, spread_experts
from nsa_transformer.distributed.parallelize import Shards, shard_spread_experts
from nsa_transformer.distributed.world import World, open_world
from nsa_transformer.models.moe import Arrive, MixtureOfExperts

DEFAULT = ("1024/512/64/6@8192", "1024/512/64/6@32768", "2048/768/128/8@32768")
SIDES = ("together", "apart", "apart, one after the other")
LAYERS, CHECKED_TOKENS = 4, 256


class Stack(nn.Module):
    """Layers that are experts alone, one after the other as blocks are, so that FSDP2 gathers one while another computes."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        config = MoEConfig(num_experts=shape.num, top_k=shape.top_k, expert_size=shape.width, num_shared_experts=1)
        self.layers = nn.ModuleList(MixtureOfExperts(shape.hidden, config) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        document = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for layer in self.layers:
            x = x + layer(x, document, 1)[0]
        return x


def waiting(dispatch: Callable[..., Arrive], x: Tensor, indices: Tensor, weights: Tensor) -> Arrive:
    """Tokens arrive before anything else is done. Forward alone: in the backward the order stays that of expert parallelism."""
    arrive = dispatch(x, indices, weights)
    if x.device.type == "cuda":
        torch.cuda.synchronize()  # NCCL's streams as well
    return arrive


def build(shape: Shape, side: str, world: World) -> Stack:
    with torch.device("meta"):
        model = Stack(shape)
    assert world.mesh is not None
    mesh = None if side == "together" else open_expert_mesh(world.size, world)
    if mesh is not None:
        spread_experts(model, mesh)
    shards = Shards(model)
    for layer in model.layers:
        assert isinstance(layer, MixtureOfExperts)
        if mesh is None:
            fully_shard(layer, mesh=world.mesh)
        else:
            shard_spread_experts(layer, world.mesh, mesh)
    fully_shard(model, mesh=world.mesh)
    model.to_empty(device=world.device)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            generator = torch.Generator(world.device).manual_seed(number)
            full = torch.randn(shards.shape(name, parameter), generator=generator, device=world.device)
            shards.assign(name, parameter, full * full.shape[-1] ** -0.5)
        for buffer in model.buffers():
            buffer.zero_()
    if side == SIDES[2]:
        for layer in model.layers:
            assert isinstance(layer, MixtureOfExperts)
            layer.dispatch = partial(waiting, layer.dispatch)
    return model


def inputs(tokens: int, shape: Shape, world: World) -> Tensor:
    generator = torch.Generator(world.device).manual_seed(1000 + world.rank)
    return torch.randn(tokens, shape.hidden, generator=generator, device=world.device)


def gradients(shape: Shape, side: str, world: World) -> dict[str, Tensor]:
    """Of a few tokens, in float32."""
    model = build(shape, side, world)
    shards = Shards(model)
    x = inputs(CHECKED_TOKENS, shape, world).requires_grad_()
    model(x).square().sum().backward()
    assert x.grad is not None
    found = {name: shards.whole(name, p.grad).cpu() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"input": x.grad.cpu()}


def measure(shape: Shape, side: str, world: World, repeats: int) -> dict[str, float]:
    """Milliseconds of a layer, forward and backward, of the slowest rank; and the peak of memory in bytes."""
    model, x = build(shape, side, world), inputs(shape.tokens, shape, world).requires_grad_()
    cuda = world.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats + 2):
        world.barrier()
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast(world.device.type, torch.bfloat16, enabled=cuda):
            y = model(x)
        y.sum().backward()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(world.largest(round(1e9 * (time.perf_counter() - began))) / 1e9)
        model.zero_grad(set_to_none=True)
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {"ms": 1e3 * statistics.median(seconds[2:]) / LAYERS, "peak_bytes": world.largest(peak)}


def run(shape: Shape, world: World, repeats: int) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": shape.name, "status": "ok"}
    sides = [gradients(shape, side, world) for side in SIDES[:2]]
    row["worst_error"] = max(float((sides[1][name] - value).norm() / value.norm().clamp(min=1e-12)) for name, value in sides[0].items())
    del sides
    if not row["worst_error"] <= 1e-4:
        return row | {"status": "FAILED"}
    return row | {"sides": {side: measure(shape, side, world, repeats) for side in SIDES}}


def render(results: dict[str, Any]) -> str:
    rows = []
    for row in results["rows"]:
        sides = row.get("sides")
        cells = [f"{sides[s]['ms']:.2f} ({sides[s]['peak_bytes'] / 2**30:.1f})" for s in SIDES] if sides else [row["status"], "", ""]
        rows.append([row["shape"], *cells, f"{row['worst_error']:.1e}"])
    facts = results["facts"]
    text = [
        f"# Experts on {results['ranks']} ranks, {facts['gpu']}, {facts['date']}",
        record.machine_lines(facts),
        f"Shapes are hidden width / expert width / experts / experts per token @ tokens of each rank; one shared expert, {LAYERS} layers in a row, random "
        "routers. Milliseconds of a layer, forward and backward, median, slowest rank (peak memory in GiB). *together*: every rank computes with all experts, "
        "which FSDP2 gathers; *apart*: expert parallelism over all ranks; *one after the other*: in the forward the shared expert waits, and the host with it, "
        f"until tokens have arrived. *error*: the worst relative difference of a gradient between together and apart, float32, {CHECKED_TOKENS} tokens.",
        markdown_table(["shape", *SIDES, "error"], rows),
    ]
    return "\n\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=DEFAULT, metavar="SHAPE", help="such as 1024/512/64/6@32768; default: all of the page")
    parser.add_argument("--repeats", type=int, default=20, help="timed passes of each side (default: 20)")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    options = parser.parse_args(argv)
    try:
        shapes = [parse_shape(text) for text in options.shapes]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with open_world("auto") as world:
        if world.size == 1 or any(shape.num % world.size for shape in shapes):
            if world.is_main:
                print("error: start this with torchrun --nproc_per_node=N, where N is at least 2 and divides the experts of each shape", file=sys.stderr)
            return 2
        rows = [run(shape, world, options.repeats) for shape in shapes]
        if world.is_main:
            facts = record.facts(argv, options.commit)
            path = record.new_file(options.out, "expert_parallel", facts)
            results = {"facts": facts, "ranks": world.size, "rows": rows}
            record.save(path, results)
            path.with_suffix(".md").write_text(render(results), encoding="utf-8")
            print(f"{render(results)}\nwrote {path.with_suffix('.md')}")
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
