"""Speed and memory of the expert kernels beside torch's grouped products, on one CUDA GPU.

    python benchmarks/experts.py [--shapes 2048/768/128/8@32768 ...] [--routing balanced skewed] [--out DIR]

Each shape is checked first, on fewer tokens; what computes something else than the float64 loop gets no speed. Writes a page and the raw numbers.
Routing is drawn at random: it says what the kernels take for evenly or unevenly loaded experts, and nothing about a trained router.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record, timing
from benchmarks.page import markdown_table
from nsa_transformer.kernels import experts

NAMES = ("x", "weights", "w13", "w2")
ROUTINGS = {"balanced": 0.0, "skewed": 1.0}  # spread of the experts' popularity, in logits
CHECKED_TOKENS = 512


@dataclass(frozen=True)
class Shape:
    """`2048/768/128/8@32768`: hidden width / expert width / experts / experts per token @ tokens."""

    hidden: int
    width: int
    num: int
    top_k: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.hidden}/{self.width}/{self.num}/{self.top_k}@{self.tokens}"

    @property
    def flops(self) -> float:
        """Of the forward; the backward has twice as many."""
        return 6.0 * self.tokens * self.top_k * self.hidden * self.width


DEFAULT = ("2048/768/128/8@32768", "2048/768/128/8@4096", "1024/512/64/6@32768", "1024/512/64/6@8192")


def parse_shape(text: str) -> Shape:
    match = re.fullmatch(r"(\d+)/(\d+)/(\d+)/(\d+)@(\d+)", text)
    if match is None or not all(int(part) for part in match.groups()) or int(match[4]) > int(match[3]):
        raise ValueError(f"shape {text!r} is not HIDDEN/WIDTH/EXPERTS/TOP_K@TOKENS with TOP_K of at most EXPERTS; write one such as 2048/768/128/8@32768")
    return Shape(*(int(part) for part in match.groups()))


def random_inputs(shape: Shape, routing: str, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

    popularity = torch.randn(shape.num, generator=generator, device=device) * ROUTINGS[routing]
    logits = torch.randn(shape.tokens, shape.num, generator=generator, device=device) + popularity
    chosen = logits.topk(shape.top_k, dim=-1)
    return {
        "x": normal(shape.tokens, shape.hidden),
        "indices": chosen.indices,
        "weights": chosen.values.softmax(-1),
        "w13": normal(shape.num, 2 * shape.width, shape.hidden, scale=shape.hidden**-0.5),
        "w2": normal(shape.num, shape.hidden, shape.width, scale=shape.width**-0.5),
        "grad": normal(shape.tokens, shape.hidden),
    }


def plain(x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """What one writes with torch today: sort, gather, grouped products under autograd, index_add."""
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    offsets = torch.bincount(flat, minlength=w13.shape[0]).cumsum(0).to(torch.int32)
    token = order // indices.shape[1]
    gate, up = F.grouped_mm(x[token], w13.mT, offs=offsets).chunk(2, dim=-1)
    y = F.grouped_mm(F.silu(gate) * up, w2.mT, offs=offsets)
    return torch.zeros_like(x).index_add(0, token, y * weights.flatten()[order, None].to(y.dtype))


def answer(function: Callable[..., Tensor], case: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: case[name].detach().requires_grad_() for name in NAMES}
    out = function(leaves["x"], case["indices"], leaves["weights"], leaves["w13"], leaves["w2"])
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), case["grad"])]


def check(shape: Shape, routing: str, backend: str, dtype: torch.dtype, device: torch.device | str) -> tuple[bool, float, str]:
    """Whether output and every gradient are within twice the error of plain autograd through the loop; the worst ratio, and of what."""
    small = Shape(shape.hidden, shape.width, shape.num, shape.top_k, min(shape.tokens, CHECKED_TOKENS))
    case = random_inputs(small, routing, dtype, device, seed=1)
    loop = partial(experts, backend="reference")
    exact = answer(loop, {name: x.double() if x.is_floating_point() else x for name, x in case.items()})
    rounded = answer(loop, case)
    found = answer(partial(experts, backend=backend), case)
    worst, worst_of = 0.0, ""
    for name, mine, other, value in zip(("output", *NAMES), found, rounded, exact, strict=True):
        ratio = float((mine.double() - value).norm() / (other.double() - value).norm())
        if not ratio <= worst:  # NaN too
            worst, worst_of = ratio, name
    return worst <= 2.0, worst, worst_of


def without_gradients(function: Callable[..., Tensor], case: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return function(*(case[name] for name in ("x", "indices", "weights", "w13", "w2")))


def saved_bytes(function: Callable[..., Tensor], case: dict[str, Tensor]) -> int:
    """What a forward leaves allocated for its backward, its output and inputs aside."""
    leaves = {name: case[name].detach().requires_grad_() for name in NAMES}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = function(leaves["x"], case["indices"], leaves["weights"], leaves["w13"], leaves["w2"])
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated() - before - out.numel() * out.element_size()


def measure(shape: Shape, routing: str, timer: timing.Timer, device: torch.device) -> dict[str, Any]:
    """One row of results; status `ok`, `FAILED` (of the check; no times then) or an error."""
    row: dict[str, Any] = {"shape": shape.name, "routing": routing, "flops": shape.flops, "status": "ok"}
    try:
        passed, worst, of = check(shape, routing, "triton", torch.bfloat16, device)
        row["check"] = {"worst": worst, "of": of}
        if not passed:
            return row | {"status": "FAILED"}
        case = random_inputs(shape, routing, torch.bfloat16, device)
        loads = torch.bincount(case["indices"].flatten(), minlength=shape.num)
        row["load_max_over_mean"] = float(loads.max() / loads.float().mean())
        sides: dict[str, Callable[..., Tensor]] = {
            "triton": partial(experts, backend="triton"),
            "torch": partial(experts, backend="torch"),
            "plain": plain,
            "plain, compiled": torch.compile(plain, dynamic=False),
        }
        calls: dict[str, timing.Call] = {}
        for name, function in sides.items():
            calls[f"{name}|forward"] = partial(without_gradients, function, case)
            calls[f"{name}|forward+backward"] = partial(answer, function, case)
        found = timing.measure(calls, timer)
        row["times"] = {key: {"ms": value.ms, "problem": value.problem} for key, value in found.items()}
        row["saved_bytes"] = {name: saved_bytes(function, case) for name, function in sides.items() if found[f"{name}|forward+backward"].ms is not None}
        row["kernels"] = timing.kernels_of(calls["triton|forward+backward"])
    except Exception as error:  # a shape that fails, for memory or otherwise, leaves the others their turn
        row["status"] = f"error: {timing.describe(error)}"
    return row


def render(results: dict[str, Any]) -> str:
    facts = results["facts"]
    text = [
        f"# Experts on {facts['gpu']}, {facts['date']}",
        record.machine_lines(facts),
        "bfloat16, normal random data, routing weights in float32. Shapes are hidden width / expert width / experts / experts per token @ tokens. "
        "Milliseconds, CUDA events, L2 flushed before each call, all sides in turn within one process, best of 3 rounds' medians; TFLOP/s count "
        "6 T K H I forward and three times that in all. *balanced*: every expert as likely; *skewed*: experts' popularity normal in logits. Random "
        "routers say nothing of trained ones. *torch* is our backend on torch's grouped products, *plain* those with gather and index_add under "
        "autograd, also compiled.",
    ]
    for what, times in (("forward", 1), ("forward+backward", 3)):
        rows = []
        for row in results["rows"]:
            head = [row["shape"], row["routing"]]
            if row["status"] != "ok":
                rows.append([*head, row["status"].replace("|", "/"), *[""] * 4])
                continue
            ms = {key.split("|")[0]: value["ms"] for key, value in row["times"].items() if key.endswith(f"|{what}")}
            cells = ["–" if ms[name] is None else f"{ms[name]:.2f}" for name in ("triton", "torch", "plain", "plain, compiled")]
            ours = ms["triton"]
            rate = "–" if ours is None else f"{times * row['flops'] / ours / 1e9:.0f}"
            ratios = " / ".join("–" if ours is None or ms[name] is None else f"{ms[name] / ours:.2f}" for name in ("plain", "plain, compiled"))
            rows.append([*head, *cells, rate, ratios])
        title = ["shape", "routing", "triton", "torch", "plain", "plain, compiled", "TFLOP/s", "× plain / compiled"]
        text += [f"## {what.capitalize()}", markdown_table(title, rows)]
    rows = [
        [row["shape"], row["routing"], f"{row['load_max_over_mean']:.2f}", f"{row['check']['worst']:.2f} ({row['check']['of']})"]
        + [f"{row['saved_bytes'][name] / 2**30:.2f}" if name in row["saved_bytes"] else "–" for name in ("triton", "torch", "plain")]
        for row in results["rows"]
        if row["status"] == "ok"
    ]
    head = ["shape", "routing", "load, max / mean", "worst error / plain", "saved by triton, GiB", "torch", "plain"]
    text += ["## Load, check and memory saved for the backward", markdown_table(head, rows), "## Kernels, forward and backward"]
    for row in results["rows"]:
        if row["status"] == "ok":
            kernels = sorted(row["kernels"].items(), key=lambda item: -item[1])
            shown = [[f"`{name[:60]}`", f"{ms:.3f}"] for name, ms in kernels if ms > 0.01]
            text += [f"### {row['shape']}, {row['routing']}", markdown_table(["kernel", "ms"], shown)]
    return "\n\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=DEFAULT, metavar="SHAPE", help="such as 2048/768/128/8@32768; default: all of the page")
    parser.add_argument("--routing", nargs="+", default=["balanced", "skewed"], choices=tuple(ROUTINGS), help="default: both")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    options = parser.parse_args(argv)
    try:
        shapes = [parse_shape(text) for text in options.shapes]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: the benchmark needs a CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    facts = record.facts(argv, options.commit)
    path = record.new_file(options.out, "experts", facts)
    timer = timing.CudaTimer(device)
    results: dict[str, Any] = {"facts": facts, "rows": []}
    for shape in shapes:
        for routing in options.routing:
            row = measure(shape, routing, timer, device)
            results["rows"].append(row)
            record.save(path, results)
            path.with_suffix(".md").write_text(render(results), encoding="utf-8")
            shown = ", ".join(f"{key} {value['ms']:.2f}" for key, value in row.get("times", {}).items() if value["ms"] is not None)
            print(f"{row['shape']} {routing}: {row['status']} {shown}", flush=True)
            torch.cuda.empty_cache()
    print(f"wrote {path.with_suffix('.md')}")
    return int(any(row["status"] != "ok" for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
