"""A step of sparse attention in decoding beside torch's dense attention of the same keys and values, on one CUDA GPU.

    python benchmarks/decode.py [--heads 64/4/128] [--sizes 1x8k 1x64k 16x8k 16x64k] [--out DIR]

Sparse attention by what `auto` takes and, where that is the CUDA extension, by the Triton kernels beside it. Each side is one CUDA graph, replayed; before
each, something else is read until the L2 cache holds nothing of it. What chooses other blocks than the float64 reference, or errs more than twice as much as
plain PyTorch in bf16, gets no speed. Keys and values are normal random data. Writes a page and the raw numbers.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record, timing
from benchmarks.baselines import DENSE
from benchmarks.page import markdown_table
from benchmarks.shapes import Heads, length_name, parse_length, parse_shape
from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels import PagedKeysValues, available_backends, nsa_attention, nsa_decode
from nsa_transformer.kernels.decode import gather_sequence
from nsa_transformer.kernels.paged import page_rows, page_tokens, quantize_rows, recent_tokens, ring_tokens

DEFAULT = ("1x8k", "1x64k", "16x8k", "16x64k")
CHECKED = (1, 700, 5000, 8192)  # tokens of the sequences that are checked
THRESHOLD = 512


@dataclass(frozen=True)
class Size:
    """`16x64k`: sequences, tokens of each."""

    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.batch}x{length_name(self.length)}"


def parse_size(text: str) -> Size:
    match = re.fullmatch(r"([1-9]\d*)x(\w+)", text)
    if match is None:
        raise ValueError(f"size {text!r} is not BATCHxTOKENS; write one such as 16x64k")
    return Size(int(match[1]), parse_length(match[2]))


def random_cache(lengths: list[int], heads: Heads, config: NSAConfig, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> PagedKeysValues:
    """Sequences of these lengths with normal random keys and values, pages in a row."""
    generator = torch.Generator(device).manual_seed(seed)
    span, count = page_tokens(config), len(lengths)
    pages = max(-(-length // span) for length in lengths)

    def pair(*size: int) -> tuple[Tensor, Tensor]:
        first, second = (torch.randn(*size, width, generator=generator, device=device).to(dtype) for width in (heads.dk, heads.dv))
        return first, second

    table = torch.arange(count * pages, dtype=torch.int32, device=device).view(count, pages)
    stores = (*pair(count * pages, heads.hkv, page_rows(config)), *pair(count * pages, heads.hkv, span), *pair(count, heads.hkv, ring_tokens(config)))
    return PagedKeysValues(table, torch.tensor(lengths, dtype=torch.int32, device=device), *stores)


def quantized(cache: PagedKeysValues, config: NSAConfig) -> PagedKeysValues:
    """The same with older selection blocks in e4m3. What the rings hold is not what the pages held, which no time depends on."""
    k, v = quantize_rows(cache.k_slc), quantize_rows(cache.v_slc)
    size = (len(cache.lengths), cache.k_slc.shape[1], recent_tokens(config, THRESHOLD))
    recent = [x.new_zeros(*size, x.shape[3]).normal_() for x in (cache.k_slc, cache.v_slc)]
    return replace(cache, k_slc=k[0], v_slc=v[0], k_scale=k[1], v_scale=v[1], k_recent=recent[0], v_recent=recent[1], threshold=THRESHOLD)


def queries(batch: int, heads: Heads, dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(7)
    q = torch.randn(batch, heads.hq, heads.dk, generator=generator, device=device).to(dtype)
    return q, torch.rand(batch, heads.hq, 3, generator=generator, device=device)


def check(heads: Heads, config: NSAConfig, lengths: list[int], dtype: torch.dtype, device: torch.device | str, backend: str = "triton") -> tuple[bool, str]:
    """Whether blocks are the reference's but for near ties, and errors at most twice plain PyTorch's; in words."""
    cache = random_cache(lengths, heads, config, dtype, device)
    q, gates = queries(len(lengths), heads, dtype, device)
    out, blocks = nsa_decode(q, gates, cache, config, backend=backend, return_blocks=True)
    worst, same, total = 0.0, 0, 0
    for b in range(len(lengths)):
        one = slice(b, b + 1)
        k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = gather_sequence(cache, b, config, dtype)
        rows = [k_cmp, v_cmp, k_slc, v_slc, k_win, v_win]
        wide = [x.double() for x in rows]
        _, chosen = nsa_attention(q[one].double(), *wide, gates[one].double(), config, backend="reference", return_blocks=True)  # type: ignore[arg-type, call-arg]
        same += int((blocks[one] == chosen).all(-1).sum())
        total += blocks.shape[1]
        given = {"backend": "reference", "blocks": blocks[one].contiguous()}
        exact = nsa_attention(q[one].double(), *wide, gates[one].double(), config, **given)  # type: ignore[arg-type, call-arg]
        plain = nsa_attention(q[one], *rows, gates[one], config, **given)  # type: ignore[arg-type, call-arg]
        assert isinstance(exact, Tensor) and isinstance(plain, Tensor)
        ratio = float((out[one].double() - exact).norm() / (plain.double() - exact).norm().clamp(min=1e-9))
        worst = max(worst, ratio) if ratio == ratio else float("inf")
    return worst <= 2.0 and same >= 0.9 * total, f"error {worst:.2f} of plain, {same} of {total} choices the reference's"


def recorded(call: Callable[[], object]) -> timing.Call:
    """The call as a CUDA graph."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def bytes_read(size: Size, heads: Heads, config: NSAConfig, item: int) -> int:
    """What a step cannot do without: compressed keys and values, the window, the chosen blocks."""
    rows = max(0, (size.length - config.compress_block) // config.compress_stride + 1)
    tokens = rows + min(size.length, config.window) + min(size.length, config.num_selected * config.select_block)
    return size.batch * heads.hkv * tokens * (heads.dk + heads.dv) * item


def measure(size: Size, heads: Heads, config: NSAConfig, timer: timing.Timer, device: torch.device) -> dict[str, Any]:
    row: dict[str, Any] = {"size": size.name, "status": "ok", "bytes": bytes_read(size, heads, config, 2)}
    try:
        for backend in [name for name in available_backends() if name != "reference"]:
            passed, said = check(heads, config, [min(n, size.length) for n in CHECKED], torch.bfloat16, device, backend)
            row["check"] = f"{row['check']}; {backend}: {said}" if "check" in row else f"{backend}: {said}"
            if not passed:
                return row | {"status": f"FAILED: {row['check']}"}
        cache = random_cache([size.length] * size.batch, heads, config, torch.bfloat16, device)
        q, gates = queries(size.batch, heads, torch.bfloat16, device)
        small = quantized(cache, config)
        k, v = ((torch.randn(size.batch, heads.hkv, size.length, width, device=device)).bfloat16() for width in (heads.dk, heads.dv))
        calls = {
            "sparse": recorded(lambda: nsa_decode(q, gates, cache, config)),
            "sparse, FP8": recorded(lambda: nsa_decode(q, gates, small, config)),
        }
        row["kernels"] = timing.kernels_of(lambda: nsa_decode(q, gates, cache, config))
        if not any(name.startswith("decode_") for name in row["kernels"]):
            calls["Triton"] = recorded(lambda: nsa_decode(q, gates, cache, config, backend="triton"))
            calls["Triton, FP8"] = recorded(lambda: nsa_decode(q, gates, small, config, backend="triton"))
        for name, kind in DENSE.items():
            with sdpa_kernel(kind):
                calls[name] = recorded(lambda: scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True))
        found = timing.measure(calls, timer)
        row["times"] = {name: value.ms for name, value in found.items()}
        row["problems"] = {name: value.problem for name, value in found.items() if value.problem}
    except Exception as error:  # a size that fails leaves the others their turn
        row["status"] = f"error: {timing.describe(error)}"
    return row


def copy_rate(timer: timing.Timer, device: torch.device) -> float:
    """Bytes a second of the card's own copies, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = timing.measure({"copy": lambda: target.copy_(source)}, timer)["copy"].ms
    assert ms is not None
    return 2 * len(source) / ms * 1e3


def render(results: dict[str, Any]) -> str:
    facts, rate = results["facts"], results["copy_rate"]
    table, parts = [], []
    for row in results["rows"]:
        if row["status"] != "ok":
            table.append([row["size"], row["status"].replace("|", "/"), *[""] * 7])
            continue
        times = row["times"]
        us = {name: "–" if ms is None else f"{ms * 1e3:.1f}" for name, ms in times.items()}
        ours, dense = times["sparse"], times["cuDNN"]
        ratio = "–" if ours is None or dense is None else f"{dense / ours:.2f}"
        share = "–" if ours is None else f"{row['bytes'] / ours * 1e3 / rate:.0%}"
        table.append(
            [
                row["size"],
                us["sparse"],
                us["sparse, FP8"],
                f"{us['Triton']}, {us['Triton, FP8']}" if "Triton" in us else "the same",
                us["cuDNN"],
                us["FA2"],
                ratio,
                share,
                row["check"],
            ]
        )
        parts.append([row["size"], ", ".join(f"`{name[:40]}` {ms * 1e3:.1f}" for name, ms in row["kernels"].items() if "decode" in name)])
    text = [
        f"# A step of decoding on {facts['gpu']}, {facts['date']}",
        record.machine_lines(facts),
        f"Heads {results['heads']}, geometry of the paper, bf16, normal random data, sequences of equal length; microseconds of a CUDA graph, the L2 "
        "cache taken by other data, read, before each, all sides in turn, best of 3 rounds' medians. "
        f"FP8: blocks older than {THRESHOLD} tokens in e4m3. *Of the copy rate*: "
        f"bytes of compressed keys and values, window and chosen blocks, over the time, beside {rate / 1e12:.2f} TB/s of a copy on this card. Random "
        "scores choose the blocks; what a trained model chooses costs the same. Sparse is what `auto` takes: the CUDA "
        "extension where there are many sequences, else the Triton kernels, which are timed beside it (*by Triton*: 16 bits, FP8).",
        markdown_table(["sequences x tokens", "sparse", "sparse, FP8", "by Triton", "cuDNN dense", "FA2 dense", "× cuDNN", "of the copy rate", "check"], table),
        "## Its kernels, microseconds, not in a graph",
        markdown_table(["sequences x tokens", "kernels"], parts),
    ]
    return "\n\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--heads", default="64/4/128", help="query heads / key and value heads / width (64/4/128)")
    parser.add_argument("--sizes", nargs="+", default=DEFAULT, metavar="SIZE", help="such as 16x64k; default: all of the page")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    options = parser.parse_args(argv)
    try:
        heads, sizes = parse_shape(f"{options.heads}@8k").heads, [parse_size(size) for size in options.sizes]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: the benchmark needs a CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    device, config = torch.device("cuda", torch.cuda.current_device()), NSAConfig()
    facts, timer = record.facts(argv, options.commit), timing.CudaTimer(device)
    path = record.new_file(options.out, "decode", facts)
    results: dict[str, Any] = {"facts": facts, "heads": heads.name, "copy_rate": copy_rate(timer, device), "rows": []}
    for size in sizes:
        row = measure(size, heads, config, timer, device)
        results["rows"].append(row)
        record.save(path, results)
        path.with_suffix(".md").write_text(render(results), encoding="utf-8")
        shown = ", ".join(f"{name} {ms * 1e3:.1f} us" for name, ms in row.get("times", {}).items() if ms is not None)
        print(f"{row['size']}: {row['status']} {shown}", flush=True)
        torch.cuda.empty_cache()
    print(f"wrote {path.with_suffix('.md')}")
    return int(any(row["status"] != "ok" for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
