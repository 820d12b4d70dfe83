"""Generating with `model=large`, sparse beside dense attention: steps of decoding from caches of several lengths, and the first token of a long prompt.

    python benchmarks/generate.py [--sizes 1x1k 32x32k ...] [--rows sparse sparse-fp8 dense] [--prefill 64k] [--time-limit SECONDS] [--out DIR]

One CUDA GPU, bf16, random weights. A step goes through `inference.decoder.Decoder`, so through its CUDA graphs; what `generate` does with the logits is left
out. Caches are filled with random rows, since what a step costs does not depend on them. Before anything is timed, a model's steps must give the logits of
one prefill, and replayed steps those of the model called directly. What does not fit the memory says so. Writes a page and the raw numbers.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record, timing
from benchmarks.decode import Size, copy_rate, parse_size
from benchmarks.page import markdown_table
from benchmarks.shapes import length_name, parse_length
from nsa_transformer.cli import compose_config
from nsa_transformer.config import Config, KVCacheConfig, ModelConfig
from nsa_transformer.inference.decoder import Decoder, why_not_recorded
from nsa_transformer.inference.generate import PREFILL_CHUNK
from nsa_transformer.inference.load import on_meta
from nsa_transformer.kernels.paged import SCALE, quantize_rows
from nsa_transformer.models import attention as attention_layers
from nsa_transformer.models.cache import KVCache
from nsa_transformer.models.cache_size import cache_size
from nsa_transformer.models.transformer import Transformer, count_parameters, mixtures

Attention = Literal["nsa", "dense"]
SIZES = ("1x1k", "1x32k", "1x128k", "32x1k", "32x32k", "32x128k")
ROWS: dict[str, tuple[Attention, Literal["none", "fp8"]]] = {"sparse": ("nsa", "none"), "sparse-fp8": ("nsa", "fp8"), "dense": ("dense", "none")}
ROUNDS = 3
PATIENCE = 15.0  # seconds for one way, after which nothing is timed once more
CHECKED = 3000  # tokens of the check, of which the last CHECKED_STEPS are decoded
CHECKED_STEPS = 80  # with a threshold of 512, a block of 64 is rounded in them
CLOSE = {"none": 0.02, "fp8": 0.1}  # relative error of logits that passes, or three times that of a prefill in two chunks
# The same for replayed steps beside the model called directly, where a prefill in two chunks is not further away: a library may choose another kernel there.
SAME = 1e-3
GIB = 2**30


def products_of_groups(q: Tensor, k: Tensor, v: Tensor, t: Tensor, window: int | None) -> Tensor:
    """The model's own dense attention of a step as two plain products, without repeating keys and values for the query heads of a group; the second one in
    pieces, since its output alone would keep few multiprocessors busy. q [B, Hq, D], k, v [B, Hkv, S, D], newest positions t [B]."""
    assert window is None
    grouped, pieces = q.unflatten(1, (k.shape[1], -1)), max(1, k.shape[2] // 1024)
    later = torch.arange(k.shape[2], device=t.device) > t[:, None]
    scores = (grouped @ k.mT).float() * q.shape[-1] ** -0.5
    p = scores.masked_fill(later[:, None, None], -torch.inf).softmax(-1).to(v.dtype)
    parts = p.unflatten(-1, (pieces, -1)).transpose(2, 3) @ v.unflatten(2, (pieces, -1))
    return parts.float().sum(2).flatten(1, 2).to(q.dtype)


# A step of dense attention has a mask, which FlashAttention-2 does not take. The fastest way counts, so that dense attention is not worse than it must be.
Ways = dict[str, Callable[[], AbstractContextManager[Any]]]
WAYS: dict[Attention, Ways] = {"nsa": {"": nullcontext}, "dense": {"torch's choice": nullcontext, "cuDNN": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION)}}
STEP_WAYS: dict[Attention, Ways] = {
    "nsa": WAYS["nsa"],
    "dense": WAYS["dense"] | {"products of groups": lambda: patch.object(attention_layers, "_attend_newest", products_of_groups)},
}


def build_model(config: Config, attention: Attention, device: torch.device, dtype: torch.dtype) -> Transformer:
    model = on_meta(replace(config, model=replace(config.model, attention=attention)), dtype).to_empty(device=device)
    model.init_weights(0)
    return model.requires_grad_(False).eval()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_tokens(model: ModelConfig, shape: Sequence[int], device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randint(0, model.vocab_size, tuple(shape), generator=generator, device=device)


def fill(model: Transformer, size: Size, settings: KVCacheConfig, device: torch.device, steps: int = 0) -> KVCache:
    """A cache of `size.length` random tokens of each sequence, all room taken at once, with that of `steps` more: nothing moves in them."""
    cache = model.new_cache(size.batch, settings)
    for sequence in range(size.batch):
        cache.extend(sequence, size.length + steps - 1, device)
    model.decode(random_tokens(model.config, [size.batch], device), cache)  # makes the stores
    assert cache.device_lengths is not None
    cache.lengths = [size.length] * size.batch
    cache.device_lengths.fill_(size.length)
    generator = torch.Generator(device).manual_seed(0)
    for layer in cache.layers:
        for store in layer.stores:
            if store.dtype == SCALE and store.dim() == 3:  # scales of normal rows in e4m3
                store.fill_(3.0 / 448)
                continue
            for part in store.split(max(1, (1 << 26) * len(store) // store.numel())):
                if store.dtype == torch.float8_e4m3fn:
                    part.copy_(quantize_rows(torch.randn(part.shape, generator=generator, device=device))[0])
                else:
                    part.normal_(generator=generator)
    return cache


# ------------------------------------------------------------------------------------------------------------ the check


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The median over tokens: a router or a selection may turn over at a near tie, and one token is another then."""
    return float(((found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-9)).median())


@torch.no_grad()
def check(model: Transformer, settings: KVCacheConfig, device: torch.device, length: int = CHECKED, steps: int = CHECKED_STEPS) -> tuple[bool, str]:
    """Whether decoding the last `steps` tokens gives one prefill's logits, and replayed steps those of `model.decode`; in words."""
    tokens = random_tokens(model.config, [length], device)
    whole = model(tokens)[-steps:]
    chunks = model.new_cache(1, KVCacheConfig())
    model(tokens[: -2 * steps], cache=chunks)
    two = relative_error(model(tokens[-2 * steps :], cache=chunks)[-steps:], whole)
    caches = [model.new_cache(1, settings) for _ in range(2)]
    for cache in caches:
        model(tokens[:-steps], cache=cache, last_only=True)
    decoder, replayed, direct = Decoder(model, caches[0]), [], []
    for token in tokens[-steps:].split(1):
        replayed.append(decoder(token)[0].clone())
        direct.append(model.decode(token, caches[1])[0])
    far = relative_error(torch.stack(replayed), whole)
    apart = relative_error(torch.stack(replayed), torch.stack(direct))
    passed = far <= max(CLOSE[settings.quantization], 3 * two) and apart <= max(SAME, two)
    return passed, f"{far:.4f} from one prefill (two chunks: {two:.4f}), {apart:.1e} replayed from direct"


# --------------------------------------------------------------------------------------------------------------- steps


def weights_bytes(model: Transformer) -> int:
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def bytes_read(model: Transformer, size: Size, settings: KVCacheConfig) -> float:
    """What a step cannot do without: weights, of the experts those that `batch` tokens visit if each draws at random, and of the cache what is attended."""
    config = model.config
    moe, nsa = config.moe, config.nsa
    routed = sum(mixture.w13.nbytes + mixture.w2.nbytes for mixture in mixtures(model))
    visited = 1 - (1 - moe.top_k / moe.num_experts) ** size.batch if moe.num_experts else 0.0
    table = 0 if model.head is None else model.embedding.weight.nbytes  # of which a step reads a row a sequence
    weights = weights_bytes(model) - table - routed * (1 - visited)
    width, dtype = config.num_layers * config.num_kv_heads * (config.head_dim + config.value_dim), model.embedding.weight.dtype.itemsize
    if config.attention == "dense":
        return weights + size.batch * size.length * width * dtype
    compressed = max(0, (size.length - nsa.compress_block) // nsa.compress_stride + 1)
    selected = min(size.length, nsa.num_selected * nsa.select_block)
    per_row = width + 2 * SCALE.itemsize * config.num_layers * config.num_kv_heads if settings.quantization == "fp8" else width * dtype
    return weights + size.batch * ((compressed + min(size.length, nsa.window)) * width * dtype + selected * per_row)


def time_steps(model: Transformer, cache: KVCache, tokens: Tensor, deadline: float) -> tuple[list[float], int]:
    """Seconds a step in each round, from lengths that end with the tokens [steps, B], and how many steps were warm-up: until steps with and without a
    compression have both been recorded and replayed."""
    device, cycle = tokens.device, cycle_steps(model.config)
    decoder, waiting = Decoder(model, cache), list(tokens)
    for token in waiting[: 2 * cycle + 1]:
        decoder(token)
    synchronize(device)
    seconds: list[float] = []
    for number in range(ROUNDS):
        if seconds and time.monotonic() > deadline:
            break
        at = (2 + number) * cycle + 1
        began = time.perf_counter()
        for token in waiting[at : at + cycle]:
            decoder(token)
        synchronize(device)
        seconds.append((time.perf_counter() - began) / cycle)
    return seconds, 2 * cycle + 1


def cycle_steps(config: ModelConfig) -> int:
    """After so many steps all happens again: each sequence has compressed once."""
    return config.nsa.compress_stride


def measured_steps(config: ModelConfig) -> int:
    return (2 + ROUNDS) * cycle_steps(config) + 1


@torch.no_grad()
def measure(model: Transformer, name: str, size: Size, device: torch.device, room: float) -> dict[str, Any]:
    """A row of steps that end at `size.length` tokens; `room`: bytes of memory that there are."""
    settings = KVCacheConfig(ROWS[name][1])
    config, dtype = model.config, model.embedding.weight.dtype
    row: dict[str, Any] = {"size": size.name, "row": name, "status": "ok", "times": {}, "problems": {}}
    if size.length > config.max_position_embeddings:
        return row | {"status": f"error: longer than max_position_embeddings={config.max_position_embeddings}"}
    steps = measured_steps(config)
    if size.length <= steps + 1:
        return row | {"status": f"error: the steps alone are {steps} tokens"}
    row["cache_bytes"] = cache_size(config, settings, dtype).total([size.length] * size.batch)
    needed = weights_bytes(model) + row["cache_bytes"]
    if needed > room:
        return row | {"status": f"does not fit: {needed / GIB:.1f} GiB of weights and cache, {room / GIB:.1f} GiB here"}
    row["bytes"] = bytes_read(model, size, settings)
    tokens = random_tokens(config, [steps, size.batch], device)
    for way, context in STEP_WAYS[ROWS[name][0]].items():
        try:
            with context():
                cache = fill(model, replace(size, length=size.length - steps), settings, device, steps)
                seconds, row["warm_up"] = time_steps(model, cache, tokens, time.monotonic() + PATIENCE)
            row["times"][way] = statistics.median(seconds)
            assert cache.nbytes == row["cache_bytes"] and cache.lengths == [size.length] * size.batch
            row["not_recorded"] = why_not_recorded(model, cache)
        except (RuntimeError, ValueError) as error:  # memory, or a backend that takes no such shape: the others have their turn
            row["problems"][way] = timing.describe(error)
        cache = None  # type: ignore[assignment]
        release(device)
    if not row["times"]:
        out = any("out of memory" in problem for problem in row["problems"].values())
        row["status"] = ("does not fit: " if out else "error: ") + "; ".join(row["problems"].values())
    return row


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------- prefill


@torch.no_grad()
def prefill(model: Transformer, length: int, device: torch.device, repeats: int = 2) -> dict[str, Any]:
    """Seconds from an empty cache to the most likely first token, on the host: in chunks as `generate` goes, and in one pass."""
    attention: Attention = "nsa" if model.config.attention == "nsa" else "dense"
    row: dict[str, Any] = {"attention": attention, "status": "ok", "times": {}, "problems": {}, "peak_bytes": {}}
    tokens = random_tokens(model.config, [length], device)
    for way, context in WAYS[attention].items():
        for chunk in dict.fromkeys((PREFILL_CHUNK, length)):
            label = ("one pass" if chunk == length else f"chunks of {chunk}") + (f", {way}" if way else "")
            try:
                with context():
                    seconds: list[float] = []
                    while len(seconds) < 2 or (len(seconds) <= repeats and sum(seconds) < PATIENCE):  # the first one compiles
                        if device.type == "cuda":
                            torch.cuda.reset_peak_memory_stats(device)
                        synchronize(device)
                        began, cache = time.perf_counter(), model.new_cache()
                        for part in tokens.split(chunk):
                            logits = model(part, cache=cache, last_only=True)
                        int(logits[-1].argmax())
                        seconds.append(time.perf_counter() - began)
                row["times"][label] = min(seconds[1:])
                if device.type == "cuda":
                    row["peak_bytes"][label] = torch.cuda.max_memory_allocated(device)
            except (RuntimeError, ValueError) as error:
                row["problems"][label] = timing.describe(error)
            cache = logits = None  # type: ignore[assignment]
            release(device)
    if not row["times"]:
        row["status"] = "error: " + "; ".join(row["problems"].values())
    return row


# ---------------------------------------------------------------------------------------------------------------- page


def best(row: dict[str, Any]) -> tuple[str, float] | None:
    """The fastest way and its seconds."""
    return min(row.get("times", {}).items(), key=lambda item: item[1], default=None)


def render(results: dict[str, Any]) -> str:
    facts, rate = results["facts"], results["copy_rate"]
    dense = {row["size"]: best(row) for row in results["rows"] if row["row"] == "dense"}
    table, notes = [], []
    for row in results["rows"]:
        found, other = best(row), dense.get(row["size"])
        batch = int(row["size"].split("x")[0])
        cache = f"{row['cache_bytes'] / GIB:.2f}" if "cache_bytes" in row else "–"
        if row["status"] != "ok" or found is None:
            table.append([row["size"], row["row"], "–", "–", "–", "–", cache, row["status"].replace("|", "/")])
            continue
        way, seconds = found
        floor = "–" if not rate else f"{row['bytes'] / rate * 1e3:.2f} ({row['bytes'] / rate / seconds:.0%})"
        ratio = "–" if row["row"] == "dense" or other is None else f"{other[1] / seconds:.2f}"
        said = "; ".join(filter(None, (way, row.get("not_recorded") and f"not recorded: {row['not_recorded']}")))
        table.append([row["size"], row["row"], f"{batch / seconds:,.0f}", f"{seconds * 1e3:.2f}", ratio, floor, cache, said])
        others = [f"{name} {value * 1e3:.2f} ms" for name, value in row["times"].items() if name != way]
        others += [f"{name}: {problem}" for name, problem in row["problems"].items()]
        if others:
            notes.append(f"- {row['size']} {row['row']}: {'; '.join(others)}")
    text = [
        f"# Generating with `{results['model']}` on {facts['gpu']}, {facts['date']}",
        record.machine_lines(facts),
        f"{results['parameters'][0] / 1e6:.0f} M parameters ({results['parameters'][1] / 1e6:.0f} M active), random weights in {results['dtype']}; dense is "
        "the same model with `model.attention=dense`. FP8: selected keys and values older than 512 tokens in e4m3.",
        "## Steps of decoding\n\nSequences x tokens: each step gives every sequence one token, and the last one ends at that length. Through `Decoder`, so "
        "CUDA graphs; sampling, and reading the tokens on the host, are left out. Median of rounds of as many steps as there are between two compressions, "
        "by the host's clock. Caches hold random rows. *Floor*: bytes of weights (of the experts those that random routing visits), compressed "
        f"keys and values, window and chosen blocks, or of all keys and values, at the {rate / 1e12:.2f} TB/s of a copy on this card; in brackets its share "
        "of the time. A step of dense attention is timed in several ways, of which the fastest counts: *products of groups* is in the benchmark alone.",
        markdown_table(["sequences x tokens", "", "tokens/s", "ms a step", "× dense", "floor, ms", "cache, GiB", ""], table),
        "\n".join(notes),
        "## Check before timing\n\nRelative error of logits, median over tokens:\n",
        "\n".join(_verdict(name, **found) for name, found in results["checks"].items()),
    ]
    if results["prefill"]:
        text += [f"## First token of a prompt of {length_name(results['prefill_length'])}", _prefill_table(results)]
    return "\n\n".join(part for part in text if part) + "\n"


def _verdict(name: str, passed: bool, said: str) -> str:
    return f"- {name}: {'passed' if passed else '**FAILED**, so no speed is given'}: {said}"


def _prefill_table(results: dict[str, Any]) -> str:
    rows = []
    for row in results["prefill"]:
        for label, seconds in row["times"].items():
            peak = f"{row['peak_bytes'][label] / GIB:.1f}" if label in row["peak_bytes"] else "–"
            rows.append([row["attention"], label, f"{seconds * 1e3:,.0f}", f"{results['prefill_length'] / seconds:,.0f}", peak])
        rows += [[row["attention"], label, "–", "–", problem.replace("|", "/")] for label, problem in row["problems"].items()]
        if row["status"] != "ok" and not row["problems"]:
            rows.append([row["attention"], "", "–", "–", row["status"]])
    found = {row["attention"]: best(row) for row in results["prefill"]}
    ratio = ""
    if (sparse := found.get("nsa")) and (dense := found.get("dense")):
        ratio = f"\n\nThe fastest of each: sparse {dense[1] / sparse[1]:.2f} times as fast as dense."
    note = "From an empty cache to the most likely first token, by the host's clock; the best of up to two after one that compiles."
    return note + "\n\n" + markdown_table(["attention", "", "ms", "prompt tokens/s", "peak, GiB"], rows) + ratio


def run(
    config: Config, names: Sequence[str], sizes: Sequence[Size], prefill_length: int | None, device: torch.device, dtype: torch.dtype, room: float,
    results: dict[str, Any], keep: Callable[[str], None], deadline: float = math.inf, checked: int = CHECKED,
) -> None:  # fmt: skip
    """All rows into `results`; `keep` is called with a line after each."""

    def late() -> bool:
        return time.monotonic() > deadline

    for attention in dict.fromkeys(ROWS[name][0] for name in names):
        mine = [name for name in names if ROWS[name][0] == attention]
        model = None if late() else build_model(config, attention, device, dtype)
        for name in mine:
            if model is not None and not late():
                try:
                    passed, said = check(model, KVCacheConfig(ROWS[name][1]), device, checked)
                except RuntimeError as error:
                    passed, said = False, timing.describe(error)
                results["checks"][name] = {"passed": passed, "said": said}
                keep(f"{name}: check {'passed' if passed else 'FAILED'}: {said}")
        if prefill_length is not None:
            if any(not results["checks"].get(name, {}).get("passed", True) for name in mine if ROWS[name][1] == "none"):
                row: dict[str, Any] = {"attention": attention, "status": "FAILED the check", "times": {}, "problems": {}, "peak_bytes": {}}
            elif model is None or late():
                row = {"attention": attention, "status": "not started: out of time", "times": {}, "problems": {}, "peak_bytes": {}}
            else:
                row = prefill(model, prefill_length, device)
            results["prefill"].append(row)
            shown = ", ".join(f"{label} {seconds * 1e3:,.0f} ms" for label, seconds in row["times"].items())
            keep(f"prefill of {length_name(prefill_length)}, {attention}: {row['status']} {shown}")
        for size in sizes:
            for name in mine:
                row = {"size": size.name, "row": name, "times": {}, "problems": {}}
                if model is None or late():
                    row["status"] = "not started: out of time"
                elif not results["checks"][name]["passed"]:
                    row["status"] = f"FAILED the check: {results['checks'][name]['said']}"
                else:
                    row = measure(model, name, size, device, room)
                results["rows"].append(row)
                found = best(row)
                keep(f"{size.name} {name}: {row['status']} " + (f"{found[1] * 1e3:.2f} ms a step, {size.batch / found[1]:,.0f} tokens/s" if found else ""))
        del model
        release(device)
    order = {name: number for number, name in enumerate(names)}
    results["rows"].sort(key=lambda row: ([size.name for size in sizes].index(row["size"]), order[row["row"]]))
    keep("")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="SIZE", help=f"sequences x tokens, such as 32x32k (default: {' '.join(SIZES)})")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, help=f"default: {' '.join(ROWS)}")
    parser.add_argument("--prefill", default="64k", metavar="TOKENS", help="prompt whose first token is timed; none: leave it out (64k)")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="after which no row is started")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    options = parser.parse_args(argv)
    began = time.monotonic()
    try:
        sizes = [parse_size(size) for size in dict.fromkeys(options.sizes)]
        prefill_length = None if options.prefill == "none" else parse_length(options.prefill)
        longest = max(prefill_length or 0, *(size.length for size in sizes))
        config = compose_config(["model=large", f"model.max_position_embeddings={max(longest, 32768)}"])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: the benchmark needs a CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    facts = record.facts(argv, options.commit)
    path = record.new_file(options.out, "generate", facts)
    results: dict[str, Any] = {
        "facts": facts, "model": "model=large", "dtype": "bfloat16", "parameters": count_parameters(config.model), "prefill_length": prefill_length,
        "copy_rate": copy_rate(timing.CudaTimer(device), device), "checks": {}, "prefill": [], "rows": [],
    }  # fmt: skip
    release(device)

    def keep(line: str) -> None:
        """After every row, so that whatever ends this program loses nothing."""
        record.save(path, results)
        path.with_suffix(".md").write_text(render(results), encoding="utf-8")
        if line:
            print(f"[{time.monotonic() - began:.0f} s] {line}", flush=True)

    room = float(torch.cuda.mem_get_info(device)[0])
    run(config, list(dict.fromkeys(options.rows)), sizes, prefill_length, device, torch.bfloat16, room, results, keep, began + options.time_limit)
    print(f"wrote {path.with_suffix('.md')}")
    done = [row["status"] for row in (*results["rows"], *results["prefill"])]
    return int(not all(status == "ok" or status.startswith("does not fit") for status in done))


if __name__ == "__main__":
    sys.exit(main())
