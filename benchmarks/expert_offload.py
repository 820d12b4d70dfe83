"""Decoding with experts in host memory, at given miss rates, beside what the link allows; on one CUDA GPU.

    python benchmarks/expert_offload.py [--shape 48/128/2048/768/8] [--budget-gib 20] [--cap-gb 24] [--miss-rates 0.1 ... 1] [--run RUN --text FILE] [--out DIR]

A stack of mixture-of-experts layers alone, random bf16 weights in host memory, one CUDA graph a token. Which experts a token visits is written down beforehand,
so that a LABELLED share of them is missing: a random router's hit rate says nothing of a trained one's. With --run the routing of a trained model on a text
is replayed as well, under both policies, with slots for half of the experts.

The link's rate is that of copies by the driver from the same page-locked memory in the same run. The bound of a token is the larger of its bytes at that rate
and the time of a token without misses. Baselines move parameters when a layer runs and wait for them, as accelerate's hooks do.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record, timing
from benchmarks.page import markdown_table
from nsa_transformer.config import ConfigError, ExpertOffloadingConfig
from nsa_transformer.kernels import experts
from nsa_transformer.memory.expert_offload import STREAM_BYTES, ExpertStore, OffloadStatistics

STEPS = 64  # tokens that are timed for a row
WARM_UP = 4  # of so many parts of a recorded trace the first is not counted: its misses fill the slots
BASELINE_LAYERS = 4  # that a baseline is timed on; its time a token is that of so many layers more
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """`48/128/2048/768/8`: layers / experts / hidden width / expert width / experts per token."""

    layers: int
    num: int
    hidden: int
    width: int
    top_k: int

    @property
    def name(self) -> str:
        return f"{self.layers}/{self.num}/{self.hidden}/{self.width}/{self.top_k}"

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.width * 2

    @property
    def model_bytes(self) -> int:
        return self.layers * self.num * self.expert_bytes


def parse_shape(text: str) -> Shape:
    match = re.fullmatch(r"(\d+)/(\d+)/(\d+)/(\d+)/(\d+)", text)
    if match is None or not all(int(part) for part in match.groups()) or int(match[5]) > int(match[2]):
        raise ValueError(f"shape {text!r} is not LAYERS/EXPERTS/HIDDEN/WIDTH/TOP_K with TOP_K of at most EXPERTS; write one such as 48/128/2048/768/8")
    return Shape(*(int(part) for part in match.groups()))


# --------------------------------------------------------------------------------------------------------------- routing


class Residents:
    """Which experts of a layer lie in which slots under the LRU policy: what the store's kernel decides, foreseen."""

    def __init__(self, num: int, slots: int) -> None:
        self.owner = np.full(slots, -1)
        self.last = np.zeros(num, dtype=np.int64)
        self.clock = 0

    def choose(self, count: int, misses: int, rng: np.random.Generator) -> list[int]:
        """`count` experts of which so many are missing, and what becomes of the slots. Raises `ValueError` where so many cannot be missing or there."""
        there = self.owner[self.owner >= 0]
        absent = np.setdiff1d(np.arange(len(self.last)), there)
        if misses > len(absent) or count - misses > len(there):
            raise ValueError(f"of {count} experts {misses} cannot be missing where {len(there)} of {len(self.last)} are there")
        missing = np.sort(rng.choice(absent, misses, replace=False))
        chosen = np.concatenate([rng.choice(there, count - misses, replace=False), missing])
        self.clock += 1
        self.last[chosen] = self.clock
        for expert in missing:
            cost = np.where(self.owner < 0, -1, self.last[self.owner])
            cost[np.isin(self.owner, chosen)] = self.clock + 1
            self.owner[int(cost.argmin())] = expert
        return rng.permutation(chosen).tolist()


def make_trace(layers: Sequence[Residents], count: int, rate: float, steps: int, seed: int) -> tuple[Tensor, int]:
    """Experts int64 [steps, layers, count] of which the share `rate` is missing, and how many that is. Spread evenly over steps, by layers in turn."""
    rng = np.random.default_rng(seed)
    trace = torch.empty(steps, len(layers), count, dtype=torch.int64)
    total = 0
    for index, layer in enumerate(layers):
        owed = index / len(layers)
        for step in range(steps):
            owed += rate * count
            misses = int(owed + 1e-9)
            owed -= misses
            total += misses
            trace[step, index] = torch.tensor(layer.choose(count, misses, rng))
    return trace, total


def fill(layers: Sequence[Residents], count: int, seed: int) -> Tensor:
    """A trace that misses as long as a slot is free."""
    steps = -(-len(layers[0].owner) // count)
    rng = np.random.default_rng(seed)
    return torch.tensor([[layer.choose(count, min(count, int((layer.owner < 0).sum())), rng) for layer in layers] for _ in range(steps)])


def record_trace(run: str, text: Path, tokens: int, device: torch.device) -> tuple[Shape, Tensor, Tensor]:
    """The routing of a trained model on a text: its experts' shape, int64 [tokens, layers, top_k], and what each layer's router but the first's would have
    chosen from the input of the layer before, int64 [tokens, layers - 1, top_k], the likeliest first. Raises `ValueError` for a text of fewer tokens than
    `WARM_UP`, or a run without experts."""
    from nsa_transformer.inference.load import load_checkpoint
    from nsa_transformer.models.moe import MixtureOfExperts

    model, tokenizer = load_checkpoint(run, device, expert_offloading=ExpertOffloadingConfig())
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if not mixtures:
        raise ValueError(f"--run {run} has no experts")
    routers = [mixture.router for mixture in mixtures]
    found: list[Tensor] = []
    guesses: list[Tensor] = []

    def keep(number: int, x: Tensor, chosen: Tensor) -> None:
        found.append(chosen.cpu())
        if number + 1 < len(routers):
            guesses.append(routers[number + 1].forward(x)[0].cpu())  # not by a call, which would be kept as well

    for number, router in enumerate(routers):
        router.register_forward_hook(lambda _module, inputs, output, number=number: keep(number, inputs[0], output[0]))
    ids = tokenizer.encode(text.read_text(encoding="utf-8", errors="replace")[: 8 * tokens])[: min(tokens, model.config.max_position_embeddings)]
    if len(ids) < WARM_UP:
        raise ValueError(f"--text {text} is {len(ids)} tokens long; give one of {WARM_UP} or more")
    with torch.no_grad():
        model(torch.tensor(ids, device=device))
    num, hidden, width = mixtures[0].w2.shape
    chosen = torch.stack(found, 1)
    return Shape(len(mixtures), num, hidden, width, routers[0].config.top_k), chosen, torch.stack(guesses, 1) if guesses else chosen[:, :0]


# ---------------------------------------------------------------------------------------------------------------- the stack


class Stack:
    """All layers of a store as one step, captured: `indices` int64 [layers, 1, top_k] says whom the token visits."""

    def __init__(self, shape: Shape, config: ExpertOffloadingConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.device = shape, device
        self.store = ExpertStore(shape.layers, shape.num, shape.hidden, shape.width, shape.top_k, dtype, device, config)
        generator = torch.Generator(device).manual_seed(0)
        # A block of noise a layer, at another offset for each expert: drawing all of it would take longer than the measurement.
        size = shape.expert_bytes // 2
        for layer in range(shape.layers):
            noise = torch.randn(size + 8 * shape.num, device=device, generator=generator).to(dtype)
            for expert in range(shape.num):
                block = noise[8 * expert : 8 * expert + size]
                w13, w2 = self.store.weights(layer, expert)
                w13.copy_((block[: w13.numel()] * shape.hidden**-0.5).view_as(w13))
                w2.copy_((block[w13.numel() :] * shape.width**-0.5).view_as(w2))
        self.x = torch.randn(1, shape.hidden, device=device, generator=generator).to(dtype)
        self.indices = torch.arange(shape.top_k, device=device).expand(shape.layers, 1, -1).contiguous()
        self.weights = torch.full((shape.layers, 1, shape.top_k), 1.0 / shape.top_k, device=device)
        self.y = torch.empty_like(self.x)
        self._replay: Callable[[], object] = self._eager

    def step(self) -> Tensor:
        y = self.x
        for layer in range(self.shape.layers):
            y = self.x + self.store.run(layer, y, self.indices[layer], self.weights[layer])
        return y

    def _eager(self) -> None:
        self.y = self.step()

    def decode(self, trace: Tensor) -> tuple[float, OffloadStatistics, bool]:
        """Milliseconds a token over a trace [steps, layers, top_k] on the GPU; the experts it counted; whether the last output is finite."""
        before = self.store.statistics()

        def run() -> None:
            for indices in trace:
                self.indices.copy_(indices[:, None])
                self._replay()

        ms = elapsed_ms(run, self.device)
        after = self.store.statistics()
        counted = replace(after, hits=after.hits - before.hits, misses=after.misses - before.misses)
        assert after.prefetched == after.streamed == 0, "neither is asked for here"
        return ms / len(trace), counted, bool(self.y.isfinite().all())

    def capture(self) -> None:
        """From now on a step is a graph. The first, uncaptured one compiles; both visit the experts that `indices` holds, but capturing runs nothing."""
        self._eager()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.y = self.step()
            self._replay = graph.replay

    def check(self) -> float:
        """Error of the first layer's output over that of plain PyTorch in bf16, both against float64; at most 2 is right."""
        assert torch.equal(self.indices[0, 0].cpu(), torch.arange(self.shape.top_k))
        w13, w2 = (torch.stack(matrices).to(self.device) for matrices in zip(*(self.store.weights(0, e) for e in range(self.shape.top_k)), strict=True))
        x, indices, weights = self.x, self.indices[0], self.weights[0]
        exact = experts(x.double(), indices, weights.double(), w13.double(), w2.double(), backend="reference")
        plain = experts(x, indices, weights, w13, w2, backend="reference")
        found = self.store.run(0, x, indices, weights)
        return float((found.double() - exact).norm() / (plain.double() - exact).norm())

    def link_rate(self) -> float:
        """Bytes a second of copies by the driver from the experts' memory, 256 MiB or all of it at a time."""
        source = self.store.arena.bytes[: min(256 << 20, self.store.host_bytes)]
        target = torch.empty_like(source, device=self.device)
        ms = timing.measure({"copy": lambda: target.copy_(source, non_blocking=True)}, timing.CudaTimer(self.device))["copy"].ms
        assert ms is not None
        return len(source) / ms * 1e3


def prefill_ms(stack: Stack, tokens: int) -> float:
    """Milliseconds of the whole stack for a prompt of so many tokens, whose layers are streamed."""
    shape = stack.shape
    x = torch.randn(tokens, shape.hidden, device=stack.device).to(stack.x.dtype)
    indices = torch.rand(tokens, shape.num, device=stack.device).topk(shape.top_k).indices
    weights = torch.full((tokens, shape.top_k), 1.0 / shape.top_k, device=stack.device)

    def run() -> None:
        for layer in range(shape.layers):
            stack.store.run(layer, x, indices, weights)

    run()
    return elapsed_ms(run, stack.device)


def elapsed_ms(call: Callable[[], object], device: torch.device) -> float:
    """On the device's own clock; on a CPU, for tests, the wall's."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


# ---------------------------------------------------------------------------------------------------------------- baselines


def whole_layer(x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, device: torch.device | str) -> Tensor:
    """As accelerate's hook does for a layer with stacked experts: its parameters are moved when it runs, each by itself, and dropped afterwards."""
    return experts(x, indices, weights, w13.to(device), w2.to(device))


def chosen_modules(x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, device: torch.device | str) -> Tensor:
    """As accelerate's hooks do where each expert is a module of three matrices: those of the chosen experts are moved, one after the other."""
    gate, up = w13.chunk(2, dim=1)
    out = torch.zeros_like(x)
    for expert in indices.unique().tolist():
        token, place = torch.where(indices == expert)
        rows = x[token]
        hidden = torch.nn.functional.silu(rows @ gate[expert].to(device).mT) * (rows @ up[expert].to(device).mT)
        out.index_add_(0, token, (hidden @ w2[expert].to(device).mT) * weights[token, place, None].to(x.dtype))
    return out


BASELINES: dict[str, Callable[..., Tensor]] = {"all experts of the layer": whole_layer, "the chosen experts": chosen_modules}


def time_baselines(shape: Shape, device: torch.device) -> dict[str, float]:
    """Milliseconds a token of each baseline, from pageable and from page-locked memory: a few layers' times, scaled to all. Each layer is waited for."""
    w13 = torch.randn(shape.num, 2 * shape.width, shape.hidden, device=device).mul(shape.hidden**-0.5).bfloat16().cpu()
    w2 = torch.randn(shape.num, shape.hidden, shape.width, device=device).mul(shape.width**-0.5).bfloat16().cpu()
    x = torch.randn(1, shape.hidden, device=device).bfloat16()
    weights = torch.full((1, shape.top_k), 1.0 / shape.top_k, device=device)
    found = {}
    for memory in ("pageable", "page-locked"):
        if memory == "page-locked":
            w13, w2 = w13.pin_memory(), w2.pin_memory()
        for name, function in BASELINES.items():
            times = []
            for seed in range(BASELINE_LAYERS + 1):  # the first one is a warm-up
                indices = torch.randperm(shape.num, generator=torch.Generator().manual_seed(seed))[None, : shape.top_k].to(device)
                torch.cuda.synchronize()
                start = time.perf_counter()
                function(x, indices, weights, w13, w2, device)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
            found[f"{name}, {memory}"] = sum(times[1:]) / BASELINE_LAYERS * shape.layers * 1e3
    return found


# ---------------------------------------------------------------------------------------------------------------------- rows


def make_row(label: str, ms: float, counted: OffloadStatistics, steps: int, rate: float, compute_ms: float) -> dict[str, Any]:
    """What a trace took, beside its bound; `rate` is the link's, in bytes a second."""
    moved = counted.copied_bytes / steps
    link_ms = moved / rate * 1e3
    lookups = counted.hits + counted.misses
    return {
        "label": label,
        "ms": ms,
        "miss_rate": counted.misses / lookups,
        "bytes": moved,
        "gb_per_second": moved / ms / 1e6,
        "link_ms": link_ms,
        "compute_ms": compute_ms,
        "of_bound": max(link_ms, compute_ms) / ms,
        "of_sum": (link_ms + compute_ms) / ms,
    }


def measure(stack: Stack, rates: Sequence[float], prompt: int = 4096) -> dict[str, Any]:
    """All rows of a stack under LRU, and a prompt; `status` is `ok`, or says what is wrong, and then there are no rows."""
    shape, store, device = stack.shape, stack.store, stack.device
    result: dict[str, Any] = {"store": store.describe(), "slots": store.slots, "status": "ok", "rows": [], "worst": stack.check()}
    if not result["worst"] <= 2.0:
        return result | {"status": f"FAILED: error {result['worst']:.2f} times that of plain PyTorch"}
    rate = result["link_rate"] = stack.link_rate()
    layers = [Residents(shape.num, store.slots) for _ in range(shape.layers)]
    stack.capture()
    # The check and the step before the capture have brought experts 0 … top_k - 1 into the first slots.
    for layer in layers:
        layer.owner[: shape.top_k] = np.arange(shape.top_k)
        layer.last[: shape.top_k] = layer.clock = 1
    stack.decode(fill(layers, shape.top_k, 0).to(device))
    hits, _ = make_trace(layers, shape.top_k, 0.0, STEPS, 1)
    stack.decode(hits[:4].to(device))
    compute_ms, _, _ = stack.decode(hits.to(device))
    torch.cuda.reset_peak_memory_stats(device)
    for number, wanted in enumerate((0.0, *rates)):
        if wanted and shape.num - store.slots < round(wanted * shape.top_k):
            continue  # too few experts are absent for that
        trace, misses = make_trace(layers, shape.top_k, wanted, STEPS, 2 + number)
        ms, counted, finite = stack.decode(trace.to(device))
        if counted.misses != misses or not finite:
            return result | {"status": f"FAILED: {counted.misses} misses where the trace has {misses}, output {'' if finite else 'not '}finite", "rows": []}
        result["rows"].append(make_row(f"{wanted:.0%}", ms, counted, STEPS, rate, compute_ms))
    result["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    result["prefill"] = {"tokens": prompt, "ms": prefill_ms(stack, prompt), "bytes": shape.model_bytes}
    return result


def replay(shape: Shape, trace: Tensor, policy: str, device: torch.device) -> dict[str, Any]:
    """A recorded trace, the first of WARM_UP parts as warm-up, with slots for half of the experts."""
    slots = max(shape.top_k, shape.num // 2)
    buffers = 2 * min(shape.num, max(1, STREAM_BYTES // shape.expert_bytes))
    budget = ((shape.layers * slots + buffers) * shape.expert_bytes + shape.layers * (6 * shape.num + 32) * 4) / GIB
    stack = Stack(shape, ExpertOffloadingConfig(enabled=True, gpu_budget_gib=budget, policy=policy), device)  # type: ignore[arg-type]
    stack.capture()
    rate = stack.link_rate()
    one = trace[:1].expand(STEPS, -1, -1).to(device)
    stack.decode(one)
    compute_ms, _, _ = stack.decode(one)
    begin = len(trace) // WARM_UP
    stack.decode(trace[:begin].to(device))
    ms, counted, _ = stack.decode(trace[begin:].to(device))
    return make_row(f"trained router, {policy}, {stack.store.slots} slots for {shape.num}", ms, counted, len(trace) - begin, rate, compute_ms)


# ---------------------------------------------------------------------------------------------------------------------- page


def render(results: dict[str, Any]) -> str:
    facts, found, shape = results["facts"], results["result"], parse_shape(results["shape"])
    text = [
        f"# Experts in host memory on {facts['gpu']}, {facts['date']}",
        record.machine_lines(facts),
        f"Mixture-of-experts layers alone, layers / experts / hidden width / expert width / experts per token = {results['shape']}: "
        f"{shape.model_bytes / 1e9:.1f} GB of bf16, {shape.expert_bytes / 1e6:.2f} MB an expert. {found['store']}. One token at a time, a CUDA graph a token, "
        f"{STEPS} tokens a row. The share of missing experts is that of a trace written for it, LRU. *link*: the token's bytes at the rate of the driver's "
        "copies from the same memory; *compute*: a token without misses; the bound is the larger of the two.",
    ]
    if found["status"] != "ok":
        return "\n\n".join([*text, f"**{found['status']}**, so no speed is given."]) + "\n"
    head = ["missing", "counted", "ms a token", "GB a token", "GB/s", "link, ms", "compute, ms", "of the bound", "of the sum"]
    table = [
        [
            row["label"],
            f"{row['miss_rate']:.1%}",
            f"{row['ms']:.2f}",
            f"{row['bytes'] / 1e9:.3f}",
            f"{row['gb_per_second']:.1f}",
            f"{row['link_ms']:.2f}",
            f"{row['compute_ms']:.2f}",
            f"{row['of_bound']:.0%}",
            f"{row['of_sum']:.0%}",
        ]
        for row in [*found["rows"], *results["recorded"]]
    ]
    prefill, all_hit = found["prefill"], found["rows"][0]
    cap = f", cap of the process {results['cap_gb']} GB" if results["cap_gb"] else ""
    read = shape.layers * shape.top_k * shape.expert_bytes / all_hit["ms"] / 1e9
    text += [
        f"Link: {found['link_rate'] / 1e9:.1f} GB/s. Without misses weights are read from the GPU's memory at {read:.2f} TB/s, plans, sums and empty passes "
        f"included. Error of a layer over that of plain PyTorch: {found['worst']:.2f}.",
        markdown_table(head, table),
        f"Peak of torch's memory while decoding: {found['peak_bytes'] / 1e9:.2f} GB ({found['peak_bytes'] / GIB:.2f} GiB); budget for experts "
        f"{results['budget_gib']} GiB{cap}. A prompt of {prefill['tokens']} tokens through all layers: {prefill['ms']:.0f} ms, "
        f"{prefill['bytes'] / prefill['ms'] / 1e6:.1f} GB/s of experts, slots' ones included.",
    ]
    if results["baselines"]:
        rows = []
        for name, ms in results["baselines"].items():
            ratios = " / ".join(f"{ms / row['ms']:.1f}" for row in found["rows"])
            rows.append([name, f"{ms:.0f}", ratios])
        text += [
            "## Like accelerate's offload",
            f"Parameters are moved when a layer runs, each by itself and waited for, and dropped afterwards; {BASELINE_LAYERS} layers timed, scaled to all. "
            "Not accelerate itself, which adds the work of its hooks.",
            markdown_table(["moved", "ms a token", "times ours, at " + " / ".join(row["label"] for row in found["rows"])], rows),
        ]
    return "\n\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", default="48/128/2048/768/8", help="LAYERS/EXPERTS/HIDDEN/WIDTH/TOP_K (48/128/2048/768/8, as Qwen3-30B-A3B)")
    parser.add_argument("--budget-gib", type=float, default=20.0, help="GPU memory for experts (20)")
    parser.add_argument("--cap-gb", type=float, help="most that torch may take of the GPU, in 10^9 bytes")
    parser.add_argument("--miss-rates", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.5, 0.75, 1.0], metavar="SHARE", help="shares of missing experts")
    parser.add_argument("--no-baselines", action="store_true", help="leave out what accelerate's offload would do")
    parser.add_argument("--run", help="replay the routing of this run's model as well")
    parser.add_argument("--text", type=Path, help="with --run: the text it reads")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    options = parser.parse_args(argv)
    try:
        shape = parse_shape(options.shape)
        if not all(0 < rate <= 1 for rate in options.miss_rates):
            raise ValueError(f"--miss-rates {options.miss_rates} must lie between 0 and 1")
        if (options.run is None) != (options.text is None):
            raise ValueError("--run and --text go together: the model, and what it reads")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: the benchmark needs a CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    if options.cap_gb is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap_gb * 1e9 / torch.cuda.mem_get_info(device)[1]), device)
    results: dict[str, Any] = {"facts": record.facts(argv, options.commit), "shape": shape.name, "budget_gib": options.budget_gib, "cap_gb": options.cap_gb}
    path = record.new_file(options.out, "expert_offload", results["facts"])
    try:
        results["baselines"] = {} if options.no_baselines else time_baselines(shape, device)
        torch.cuda.empty_cache()
        results["result"] = measure(
            Stack(shape, ExpertOffloadingConfig(enabled=True, gpu_budget_gib=options.budget_gib, policy="lru"), device), options.miss_rates
        )
        results["recorded"] = []
        if options.run is not None:
            torch.cuda.empty_cache()
            own, trace, _ = record_trace(options.run, options.text, 2048, device)
            # The model's routing over experts of the size in question: what counts is how long one takes.
            wide = replace(own, hidden=shape.hidden, width=shape.width)
            results["recorded"] = [replay(wide, trace, policy, device) for policy in ("lru", "frequency")]
    except (ConfigError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    record.save(path, results)
    path.with_suffix(".md").write_text(render(results), encoding="utf-8")
    print(render(results))
    print(f"wrote {path.with_suffix('.md')}")
    return int(results["result"]["status"] != "ok")


if __name__ == "__main__":
    sys.exit(main())
