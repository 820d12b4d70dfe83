"""Speed and memory of Native Sparse Attention against dense attention, on one CUDA GPU.

    python benchmarks/attention.py [--quick] [--shapes 64/4/128@32k ...] [--out DIR]

Each shape is checked first; what computes something else than the float64 reference gets no speed. Writes a page, a plot and the raw numbers.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import counts, gate, page, record, timing
from benchmarks.baselines import DENSE, dense_calls, forward_and_backward, peer_calls, peers, without_gradients
from benchmarks.selections import make_blocks, mean_union
from benchmarks.shapes import DEFAULT, LONG, QUICK, Heads, Shape, parse_shape
from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels import available_backends, nsa_attention

LONG_BYTES = 80e9  # a GPU with less does not try the longest shape


@dataclass
class Bench:
    """How to measure; the tests put their own clock and profiler here."""

    backend: str
    device: torch.device
    timer: timing.Timer
    kernels_of: Callable[[timing.Call], dict[str, float]] = timing.kernels_of
    peak_bytes: Callable[[timing.Call], int] = timing.peak_bytes
    config: NSAConfig = field(default_factory=NSAConfig)
    dtype: torch.dtype = torch.bfloat16
    dense: Mapping[str, SDPBackend] = field(default_factory=lambda: DENSE)
    peers: Mapping[str, Any] = field(default_factory=dict)
    documents: tuple[int, ...] = gate.DOCUMENTS
    seconds: float = 0.5
    rounds: int = 3
    checked: dict[Heads, gate.Verdict] = field(default_factory=dict)

    def check(self, heads: Heads) -> gate.Verdict:
        if heads not in self.checked:
            self.checked[heads] = gate.check_documents(heads, self.config, self.backend, self.device, self.dtype, self.documents)
        return self.checked[heads]


def measure_shape(shape: Shape, bench: Bench) -> dict[str, Any]:
    """One row of results. `status` is ok, FAILED (of the gate; no times then) or an error."""
    row: dict[str, Any] = {"shape": shape.name, "heads": shape.heads.name, "length": shape.length, "backward": shape.backward, "status": "ok"}
    try:
        _measure(shape, bench, row)
    except Exception as error:  # a shape that fails, for memory or otherwise, leaves the others their turn
        row["status"] = f"error: {timing.describe(error)}"
    return row


def _measure(shape: Shape, bench: Bench, row: dict[str, Any]) -> None:
    config, heads = bench.config, shape.heads
    inputs, grad = gate.random_inputs(heads, shape.length, counts.num_compressed(shape.length, config), bench.dtype, bench.device)
    kinds = [] if shape.length >= LONG else ["iid", "drift"]
    blocks: dict[str, Tensor | None] = {kind: make_blocks(kind, shape.length, heads.hkv, config, bench.device) for kind in kinds}
    row["union_of_4"] = {kind: mean_union(given) for kind, given in blocks.items() if given is not None}

    verdicts = {"documents": bench.check(heads), "rows": gate.check_rows(heads, shape.length, config, bench.backend, inputs, grad, blocks.get("iid"))}
    row["gate"] = {name: asdict(verdict) for name, verdict in verdicts.items()}
    if not all(verdict.passed for verdict in verdicts.values()):
        row["status"] = "FAILED"
        return
    cu = torch.tensor([0, shape.length], dtype=torch.int32, device=bench.device)

    def ours(given: Tensor | None) -> dict[str, timing.Call]:
        def forward(*tensors: Tensor) -> Tensor:
            out = nsa_attention(*gate.as_arguments(list(tensors)), config, cu_seqlens=cu, blocks=given, backend=bench.backend)
            assert isinstance(out, Tensor)
            return out

        calls: dict[str, timing.Call] = {"forward": without_gradients(forward, inputs)}
        if shape.backward:
            calls["forward+backward"] = forward_and_backward(forward, [x.detach().requires_grad_() for x in inputs], grad)
        return calls

    last = "forward+backward" if shape.backward else "forward"
    if shape.length >= LONG:
        call = ours(None)[last]
        row["peak_bytes"] = {"NSA": bench.peak_bytes(call)}  # and the warm-up
        found = timing.Timing((min(bench.timer(call, 2)),), 2)
        row["times"] = {"own": {last: asdict(found) | {"ms": found.ms}}}
        return

    with torch.no_grad():
        _, own = nsa_attention(*gate.as_arguments(inputs), config, cu_seqlens=cu, backend=bench.backend, return_blocks=True)
    sides: dict[str, dict[str, timing.Call]] = {kind: ours(given) for kind, given in blocks.items()}
    sides["own"], sides["own, given"] = ours(None), {"forward": ours(own)["forward"]}
    row["ways"], row["refused"] = {}, {}
    for name, backend in bench.dense.items():
        for backward in (True, False) if shape.backward else (False,):
            try:
                sides[name], row["ways"][name] = dense_calls(backend, inputs, grad, backward)
                break
            except RuntimeError as error:
                row["refused"][f"{name}, {'forward+backward' if backward else 'forward'}"] = timing.describe(error)
    for name, function in bench.peers.items():
        sides[name] = peer_calls(function, inputs, grad, config, shape.backward)

    flat = {f"{side}|{what}": call for side, calls in sides.items() for what, call in calls.items()}
    times: dict[str, dict[str, Any]] = {}
    for key, found in timing.measure(flat, bench.timer, bench.seconds, bench.rounds).items():
        side, what = key.split("|")
        times.setdefault(side, {})[what] = asdict(found) | {"ms": found.ms}
    row["times"] = times

    try:
        row["kernels"] = {"own": bench.kernels_of(sides["own"]["forward"])} | {kind: bench.kernels_of(sides[kind][last]) for kind in kinds}
    except RuntimeError as error:  # of the profiler: the times above stand without it
        row["kernels"], row["refused"]["profiler"] = {}, timing.describe(error)
    row["selection_ms"], row["selection_from"] = selection_time(row)
    row["peak_bytes"] = {"NSA": bench.peak_bytes(sides["own"][last])}
    for name in bench.dense:
        if times.get(name, {}).get(last, {}).get("ms") is not None:
            row["peak_bytes"][name] = bench.peak_bytes(sides[name][last])
    row["flops"] = counts.part_flops(shape, config)
    row["bytes"] = counts.part_bytes(shape, config, inputs[0].element_size())
    row["dense_flops"] = counts.dense_flops(shape, config)


def selection_time(row: dict[str, Any]) -> tuple[float | None, str]:
    """What choosing the blocks takes: its kernel's own time, or where the profiler saw none, the forward with it less the one on the same
    blocks given."""
    parts, _ = counts.by_part(row["kernels"].get("own", {}))
    if "score + top-n" in parts:
        return parts["score + top-n"], "profiler"
    whole, given = (row["times"][side]["forward"]["ms"] for side in ("own", "own, given"))
    return (None, "") if whole is None or given is None else (max(0.0, whole - given), "difference")


def run(shapes: list[Shape], bench: Bench, results: dict[str, Any], path: Path) -> int:
    """Measure every shape, write after each; 1 where one of them failed."""
    for shape in shapes:
        began = time.perf_counter()
        if shape.length >= LONG and results["facts"]["memory_bytes"] < LONG_BYTES:
            row: dict[str, Any] = {"shape": shape.name, "heads": shape.heads.name, "length": shape.length, "backward": shape.backward}
            row["status"] = "skipped: it needs a GPU with 80 GB or more"
        else:
            row = measure_shape(shape, bench)
        row["seconds"] = time.perf_counter() - began
        results["rows"].append(row)
        record.save(path, results)
        path.with_suffix(".md").write_text(page.render(results, None), encoding="utf-8")
        print(page.one_line(row), flush=True)
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return int(any(row["status"] == "FAILED" or row["status"].startswith("error") for row in results["rows"]))


def write_page(path: Path, results: dict[str, Any]) -> None:
    """Page and plot beside the JSON; without matplotlib the page alone."""
    picture = path.with_suffix(".png")
    drawn = page.draw(results, picture)
    path.with_suffix(".md").write_text(page.render(results, picture.name if drawn else None), encoding="utf-8")
    print(f"wrote {path.with_suffix('.md')}" + (f" and {picture.name}" if drawn else " (no plot)"))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="64/4/128 at 8k, 32k and 64k alone, and shorter measurements")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="such as 64/4/128@32k or 64/4/192/128@64k; default: all of the page")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page, plot and numbers go (default: benchmarks/results)")
    parser.add_argument("--backend", default="triton", help="of nsa_attention (default: triton)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    parser.add_argument("--page", type=Path, metavar="FILE.json", help="only write the page and the plot of earlier numbers; needs no GPU")
    options = parser.parse_args(argv)
    try:
        if options.page is not None:
            write_page(options.page, json.loads(options.page.read_text(encoding="utf-8")))
            return 0
        shapes = [parse_shape(name) for name in options.shapes] if options.shapes else list(QUICK if options.quick else DEFAULT)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: the benchmark needs a CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    if options.backend not in available_backends():
        print(f"error: --backend {options.backend} is not available here; write one of {', '.join(available_backends())}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    known = record.facts(argv, options.commit)
    path = record.new_file(options.out, "attention", known)
    bench = Bench(options.backend, device, timing.CudaTimer(device), peers=peers(), seconds=0.2 if options.quick else 0.5)
    results: dict[str, Any] = {
        "facts": known,
        "backend": options.backend,
        "dtype": "bfloat16",
        "rounds": bench.rounds,
        "config": asdict(bench.config),
        "rows": [],
    }
    status = run(shapes, bench, results, path)
    write_page(path, results)
    return status


if __name__ == "__main__":
    sys.exit(main())
