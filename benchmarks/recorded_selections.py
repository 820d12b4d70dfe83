"""What a trained model selects: how many blocks neighbouring queries share, layer by layer, beside the two ends of the scale that `attention.py` measures at.

    python benchmarks/recorded_selections.py runs/x [--lengths 8k 32k] [--text FILE] [--out DIR]

RUN is a run or checkpoint of this code with NSA attention. It reads one document of each length, by default Python's standard library end to end.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record
from benchmarks.page import markdown_table
from benchmarks.selections import KEEP, make_blocks, mean_union
from benchmarks.shapes import length_name, parse_length
from nsa_transformer.config import NSAConfig
from nsa_transformer.inference.load import load_checkpoint
from nsa_transformer.kernels import nsa_attention
from nsa_transformer.models.attention import NativeSparseAttention
from nsa_transformer.models.transformer import Transformer

NEIGHBOURS = (2, 4, 8, 12)


def read_text(path: Path | None, size: int) -> str:
    """At least `size` characters of a file, or of the standard library's sources one after the other; fewer where there are no more."""
    if path is not None:
        return path.read_text(encoding="utf-8")[:size]
    parts: list[str] = []
    held = 0
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if held >= size:
            break
        if not {"site-packages", "dist-packages", "test", "tests"} & set(file.relative_to(root).parts):
            parts.append(file.read_text(encoding="utf-8", errors="ignore"))
            held += len(parts[-1])
    return "\n".join(parts)


@torch.no_grad()
def record_blocks(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Blocks int32 [T, Hkv, n] that each layer's queries select in one document `tokens` int64 [T]; ascending, -1 padded."""
    found: list[Tensor] = []

    def attend(*args: Any, **keywords: Any) -> Tensor:
        out, blocks = nsa_attention(*args, **keywords, return_blocks=True)
        found.append(blocks)
        return out

    layers = [module for module in model.modules() if isinstance(module, NativeSparseAttention)]
    if not layers:
        raise ValueError("the model has no NSA attention: give a run trained with model.attention=nsa")
    before: list[Callable[..., Tensor]] = [layer.attend for layer in layers]
    try:
        for layer in layers:
            layer.attend = attend
        mixed = torch.autocast("cuda", torch.bfloat16) if tokens.is_cuda else nullcontext()
        with mixed:
            model(tokens, last_only=True)
    finally:
        for layer, kept in zip(layers, before, strict=True):
            layer.attend = kept
    return found


def kept_share(blocks: Tensor, config: NSAConfig) -> float:
    """Of the free blocks of a query, the share that the next query of the same place in the blocks selects too; only where not all are taken."""
    t = torch.arange(len(blocks), device=blocks.device)
    own = t // config.select_block
    usable = (own[1:] >= config.num_selected) & (own[1:] == own[:-1])
    free = (blocks >= config.num_initial) & (blocks <= own[:, None, None] - config.num_local)
    again = (blocks[:-1, :, :, None] == blocks[1:, :, None, :]).any(-1) & free[:-1]
    chosen = free[:-1][usable].sum()
    return float(again[usable].sum() / chosen) if chosen else float("nan")


def unions(blocks: Tensor, config: NSAConfig) -> list[float]:
    """Mean number of different blocks of so many neighbours, from the first query on that leaves a block out."""
    first = config.num_selected * config.select_block
    return [mean_union(blocks[first:], count) for count in NEIGHBOURS]


def measure(model: Transformer, tokens: Tensor) -> dict[str, Any]:
    config = model.config.nsa
    rows = []
    for layer, blocks in enumerate(record_blocks(model, tokens)):
        rows.append({"layer": layer, "kept": kept_share(blocks, config), "unions": unions(blocks, config)})
    ends = {}
    for kind in KEEP:
        blocks = make_blocks(kind, len(tokens), model.config.num_kv_heads, config)
        ends[kind] = {"kept": kept_share(blocks, config), "unions": unions(blocks, config)}
    return {"length": len(tokens), "layers": rows, "ends": ends}


def render(results: dict[str, Any]) -> str:
    text = [
        f"# What {results['run']} selects, {results['facts']['date']}",
        record.machine_lines(results["facts"]),
        f"Model: {results['model']}. Text: {results['text']}, one document per length. *kept*: of a query's free blocks, the share that the next query "
        f"selects too. Then the mean number of different blocks that {', '.join(map(str, NEIGHBOURS))} neighbouring queries select together. *iid* and *drift* "
        "are the made-up selections of `benchmarks/attention.py`. Only queries that leave a block out count.",
    ]
    for part in results["lengths"]:
        table = [[str(row["layer"]), f"{row['kept']:.2f}", *(f"{union:.1f}" for union in row["unions"])] for row in part["layers"]]
        table += [[f"*{kind}*", f"{end['kept']:.2f}", *(f"{union:.1f}" for union in end["unions"])] for kind, end in part["ends"].items()]
        text += [f"## {length_name(part['length'])} tokens", markdown_table(["layer", "kept", *(f"{count} queries" for count in NEIGHBOURS)], table)]
    return "\n\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", metavar="RUN", help="a run, a checkpoint of it, or an exported folder")
    parser.add_argument("--lengths", nargs="+", default=["8k"], metavar="TOKENS", help="of the documents (default: 8k)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text instead of Python's standard library")
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    options = parser.parse_args(argv)
    try:
        lengths = [parse_length(text) for text in options.lengths]
        model, tokenizer = load_checkpoint(options.run, options.device)
        least = model.config.nsa.num_selected * model.config.nsa.select_block + max(NEIGHBOURS)
        for length in lengths:
            if not least <= length <= model.config.max_position_embeddings:
                raise ValueError(
                    f"--lengths {length}: this model selects among blocks from {least} tokens on, and is built for {model.config.max_position_embeddings}"
                )
        ids = tokenizer.encode(read_text(options.text, 8 * max(lengths)))
        if len(ids) < max(lengths):
            raise ValueError(f"the text has {len(ids)} tokens, {max(lengths)} are needed: give a longer --text")
        device = next(model.parameters()).device
        facts = record.facts(argv, options.commit)
        results: dict[str, Any] = {"facts": facts, "run": Path(options.run).name, "lengths": []}
        results["model"] = f"{model.config.num_layers} layers, {model.config.num_heads} / {model.config.num_kv_heads} heads, {replace(model.config.nsa)}"
        results["text"] = str(options.text.name) if options.text else "Python's standard library"
        for length in lengths:
            results["lengths"].append(measure(model, torch.tensor(ids[:length], dtype=torch.int64, device=device)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = record.new_file(options.out, "selections", facts)
    record.save(path, results)
    path.with_suffix(".md").write_text(render(results), encoding="utf-8")
    print(f"wrote {path.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
