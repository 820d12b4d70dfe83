"""How often the experts of a trained model are missing: its routing of texts, token by token, against slots for a share of its experts. Needs no GPU.

    python benchmarks/expert_traces.py --run RUN --text FILE [FILE ...] [--tokens 2048] [--shares 0.25 0.5 0.75] [--out DIR]

The policies are the store's (`memory/expert_offload.py`), in words of Python (`slot_policies.py`); *best* knows the future, and no policy is better. Beside
them a router that draws experts at random, evenly: what is saved by one that was trained. What a miss costs is in the pages of `expert_offload.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record
from benchmarks.expert_offload import WARM_UP, record_trace
from benchmarks.page import markdown_table
from benchmarks.slot_policies import SlotPolicy, misses
from nsa_transformer.config import ConfigError

POLICIES = ("lru", "frequency", "best")
AHEAD = (0, 1, 2)  # experts copied on a guess


def miss_rate(trace: Tensor, slots: int, policy: str) -> float:
    """Missing experts over chosen ones, all layers of a trace [tokens, layers, top_k] together, after its warm-up."""
    begin = len(trace) // WARM_UP
    missing = sum(sum(misses(layer, slots, policy)[begin:]) for layer in trace.transpose(0, 1).tolist())
    return missing / trace[begin:].numel()


def with_prefetch(trace: Tensor, guesses: Tensor, slots: int, ahead: int) -> dict[str, float]:
    """`frequency`, with the `ahead` likeliest experts by the router of each layer on the input of the one before copied beforehand: missing ones and copies in
    all, over chosen ones."""
    layers = [SlotPolicy(slots, "frequency") for _ in range(trace.shape[1])]
    begin = len(trace) // WARM_UP
    for token, (chosen, guessed) in enumerate(zip(trace.tolist(), guesses.tolist(), strict=True)):
        if token == begin:
            for layer in layers:
                layer.counts = [0, 0, 0, 0]
        for number, layer in enumerate(layers):
            if number and ahead:
                layer.plan(guessed[number - 1][:ahead], demand=False)
            layer.plan(chosen[number])
    _, missing, prefetched, _ = (sum(layer.counts[place] for layer in layers) for place in range(4))
    return {"missing": missing / trace[begin:].numel(), "copied": (missing + prefetched) / trace[begin:].numel()}


def random_trace(tokens: int, layers: int, num: int, top_k: int) -> Tensor:
    """int64 [tokens, layers, top_k]: different experts, all equally likely."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(tokens, layers, num, generator=generator).argsort(-1)[..., :top_k]


def busiest(trace: Tensor, num: int) -> float:
    """The load of a layer's busiest expert over the mean, the mean of the layers."""
    loads = torch.stack([torch.bincount(layer.flatten(), minlength=num) for layer in trace.unbind(1)]).double()
    return float((loads.max(1).values / loads.mean(1)).mean())


def measure(trace: Tensor, num: int, shares: list[float]) -> list[dict[str, Any]]:
    """A row for each share of experts that has a slot: the miss rate under each policy, and a random router's."""
    tokens, layers, top_k = trace.shape
    drawn = random_trace(tokens, layers, num, top_k)
    rows = []
    for share in shares:
        slots = round(share * num)
        if slots < top_k:
            raise ValueError(f"--shares {share:g} of {num} experts are {slots} slots, and a token visits {top_k}; write {top_k / num:g} or more")
        rates = {policy: miss_rate(trace, slots, policy) for policy in POLICIES}
        rows.append({"share": share, "slots": slots, **rates, "random": miss_rate(drawn, slots, "lru")})
    return rows


def render(results: dict[str, Any]) -> str:
    facts = results["facts"]
    table = []
    for text in results["texts"]:
        for row in text["rows"]:
            rates = [f"{row[name]:.1%}" for name in (*POLICIES, "random")]
            table.append([text["name"], str(text["tokens"]), f"{text['busiest']:.2f}", f"{row['slots']} of {results['experts']}", *rates])
    guessed = [[text["name"], *(f"{found['missing']:.1%}, {found['copied']:.1%}" for found in text["prefetch"])] for text in results["texts"]]
    parts = [
        f"# Missing experts of a trained router, {facts['date']}",
        f"Python {facts['python']}, torch {facts['torch']}. Commit {facts['commit']}.\nCommand: `{facts['command']}`",
        f"{results['layers']} layers of {results['experts']} experts, {results['top_k']} a token, weights {results['weights']}: {results['model']}. Texts it "
        f"was not trained on, one token after the other as in decoding; the first of {WARM_UP} parts of each is warm-up. *Busiest*: load of a layer's busiest "
        "expert over the mean. *Best* knows the future. *Random*: a router that draws evenly, LRU.",
        markdown_table(["text", "tokens", "busiest", "slots", "LRU", "frequency", "best", "random"], table),
        "## Prefetch",
        "Slots for half of the experts, frequency. The likeliest experts by the router of each layer but the first, on the input of the layer before, are "
        "copied beforehand: what is missing all the same, and what is copied in all.",
        markdown_table(["text", *(f"{ahead} ahead: missing, copied" for ahead in AHEAD)], guessed),
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", required=True, help="of the trainer, with experts")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="what it reads")
    parser.add_argument("--tokens", type=int, default=2048, help="of each text, at most; the model's positions are a limit too (default: 2048)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75], metavar="SHARE", help="of the experts that have a slot")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    options = parser.parse_args(argv)
    try:
        if not all(0 < share <= 1 for share in options.shares):
            raise ValueError(f"--shares {options.shares} must lie between 0 and 1")
        if options.tokens < WARM_UP:
            raise ValueError(f"--tokens {options.tokens} must be at least {WARM_UP}")
        results = collect(options, argv)
    except (ConfigError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = record.new_file(options.out, "expert_traces", results["facts"] | {"gpu": "cpu"})
    record.save(path, results)
    path.with_suffix(".md").write_text(render(results), encoding="utf-8")
    print(render(results))
    print(f"wrote {path.with_suffix('.md')}")
    return 0


def collect(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    from nsa_transformer.inference.load import SavedModel

    saved = SavedModel(options.run, "--run")
    model = saved.config.model
    described = (
        f"hidden {model.hidden_size}, expert width {model.moe.expert_size}, {model.moe.num_shared_experts} shared, bias step {model.moe.bias_update_rate:g}"
    )
    results: dict[str, Any] = {"facts": record.facts(argv, options.commit), "weights": saved.folder.name, "model": described, "texts": []}
    for file in options.text:
        shape, trace, guesses = record_trace(options.run, file, options.tokens, torch.device("cpu"))
        results |= {"layers": shape.layers, "experts": shape.num, "top_k": shape.top_k}
        rows = measure(trace, shape.num, options.shares)
        prefetch = [with_prefetch(trace, guesses, max(shape.num // 2, shape.top_k), ahead) for ahead in AHEAD]
        results["texts"].append({"name": file.name, "tokens": len(trace), "busiest": busiest(trace, shape.num), "rows": rows, "prefetch": prefetch})
    return results


if __name__ == "__main__":
    sys.exit(main())
