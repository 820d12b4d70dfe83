"""What the FP8 cache does to loss and retrieval: a small model learns to find pairs in filler, then reads held-out sequences through each kind of cache.

    python benchmarks/kv_quantization.py [--length 4096] [--sequences 16] [--run RUN] [--time-limit SECONDS] [--device cuda] [--out DIR]

The cache as it is, at several thresholds, beside other ways to scale, which are emulated in the 16-bit cache, once more with outliers in the keys, and with old
blocks wiped, which shows what they are good for. Sequences go through the cache in chunks with the true tokens given. With --run the model is a run of this
code, read on text, without retrieval. Training takes two to three minutes on an H100, and each kind of cache some seconds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record
from benchmarks.needles import Sequences, Source, curriculum, model_config, train, with_geometry
from benchmarks.page import markdown_table
from benchmarks.recorded_selections import read_text, record_blocks
from benchmarks.roundings import (
    Variant,
    by_block,
    by_channel,
    by_row,
    by_row_32,
    forgotten,
    key_error,
    queries_and_keys,
    synthetic,
    tokens_ratio,
    unscaled,
    with_outliers,
)
from benchmarks.shapes import length_name, parse_length
from benchmarks.timing import describe as describe_error
from nsa_transformer.config import NSAConfig
from nsa_transformer.inference.load import load_checkpoint
from nsa_transformer.models.loss import IGNORE
from nsa_transformer.models.transformer import Transformer

WIPED = Variant("old blocks wiped", forgotten, forgotten, 512)
WAYS = (
    Variant("K a channel of a block, V a row", by_channel, by_row),
    Variant("a block", by_block, by_block),
    Variant("a row, in float32", by_row_32, by_row_32),
    Variant("a row, compressed ones too", by_row, by_row, compressed=by_row),
    Variant("none", unscaled, unscaled),
)
CACHES = (Variant("16 bit"), *(Variant("a row (the cache)", by_row, by_row, threshold, shipped=True) for threshold in (512, 64, 0)), *WAYS, WIPED)
WITH_OUTLIERS = (CACHES[0], CACHES[3], *WAYS)
WITH_ALL = (CACHES[0], CACHES[1], CACHES[3], *WAYS, WIPED)
SYNTHETIC = ("normal", "scaled", "shifted", "uneven")
DEPTHS = 8
LATE = "not measured: the time limit was reached"
Row = dict[str, Any]


def parse_geometry(text: str) -> NSAConfig:
    """`32/16/64/16/512`: compressed block, stride, selection block, selected blocks, window. Compressed are means, which learn to point to blocks sooner."""
    try:
        block, stride, select, count, window = (int(part) for part in text.split("/"))
    except ValueError:
        raise ValueError(f"geometry {text!r} is not five numbers; write l/d/l'/n/w, such as 32/16/64/16/512") from None
    return NSAConfig(block, stride, select, count, window=window, compression="mean")


def chopped(ids: list[int], length: int, count: int, device: torch.device) -> Sequences:
    """Text as sequences without needles."""
    if len(ids) < length * count:
        raise ValueError(f"the text has {len(ids)} tokens, {length * count} are needed; write fewer --sequences, a shorter --length or a longer --text")
    tokens = torch.tensor(ids[: length * count], dtype=torch.int64, device=device).view(count, length)
    none = tokens[:, :0]
    return Sequences(tokens, torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)], 1), none, none)


@torch.no_grad()
def through(model: Transformer, tokens: Tensor, variant: Variant, chunk: int) -> Tensor:
    """Logits float32 [T, V] of tokens [T] that come in chunks."""
    cache = variant.cache(model)
    parts = [model(piece, cache=cache) for piece in tokens.split(chunk)]
    return torch.cat(parts).float()


def read(model: Transformer, data: Sequences, variant: Variant, chunk: int) -> tuple[Tensor, Tensor]:
    """Nats of each token, float32 [B, T], 0 where no target is, and the likeliest next token, int64 [B, T]."""
    losses, guesses = [], []
    for tokens, targets in zip(data.tokens, data.targets, strict=True):
        logits = through(model, tokens, variant, chunk)
        losses.append(F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none"))
        guesses.append(logits.argmax(-1))
    return torch.stack(losses), torch.stack(guesses)


def describe(data: Sequences, losses: Tensor, guesses: Tensor, right: tuple[Tensor, Tensor] | None) -> Row:
    """Means of what `read` gave, beside `right`, that of the 16-bit cache: mean loss and its difference with a standard error over sequences, and for needles
    the answers' loss, the share found, in all and by depth, and the answers that are others."""
    known = data.targets != IGNORE
    row: Row = {"loss": float(losses[known].double().mean())}
    if right is not None:
        change = ((losses - right[0]).double() * known).sum(1) / known.sum(1)
        base = float(right[0][known].double().mean())
        error = float(change.std()) / math.sqrt(len(change)) if len(change) > 1 else math.nan
        row |= {"change": float(change.mean()) / base, "change_error": error / base}
    if data.answers.shape[1]:
        said = guesses.gather(1, data.answers)
        found = said == data.targets.gather(1, data.answers)
        depth = data.needles * DEPTHS // (int(data.needles.max()) + 1)
        row |= {"answers": float(losses.gather(1, data.answers).double().mean()), "found": float(found.double().mean())}
        row["by_depth"] = [float(found[depth == index].double().mean()) for index in range(DEPTHS)]
        row["asked"] = found.numel()
        row["others"] = 0 if right is None else int((said != right[1].gather(1, data.answers)).sum())
    return row


def measure(model: Transformer, data: Sequences, variants: tuple[Variant, ...], chunk: int, deadline: float, keep: Any) -> None:
    """A row for each variant, handed to `keep` as it is there; the first is the 16-bit cache."""
    right: tuple[Tensor, Tensor] | None = None
    for variant in variants:
        row: Row = {"scale": variant.name, "threshold": None if variant.keys is None else variant.threshold, "shipped": variant.shipped}
        if time.monotonic() > deadline:
            keep(row | {"problem": LATE})
            continue
        began = time.monotonic()
        try:
            losses, guesses = read(model, data, variant, chunk)
        except RuntimeError as error:  # a kind of cache that fails leaves the others their turn
            keep(row | {"problem": f"error: {describe_error(error)}".replace("|", "/")})
            continue
        row |= describe(data, losses, guesses, right)
        right = (losses, guesses) if right is None else right
        keep(row | {"problem": "", "seconds": time.monotonic() - began})


def errors(model: Transformer, tokens: Tensor) -> list[Row]:
    """Errors of keys in each way: the model's own, mean over layers, and synthetic ones."""
    size = model.config.nsa.select_block
    sets = {"the model's": queries_and_keys(model, tokens)} | {f"synthetic, {kind}": [synthetic(kind)] for kind in SYNTHETIC}
    rows = []
    for name, pairs in sets.items():
        for way in (by_row, by_row_32, by_channel, by_block, unscaled):
            found = [key_error(q, k, way, size if name == "the model's" else 64) for q, k in pairs]
            rows.append({"set": name, "way": way.__name__} | {part: sum(each[part] for each in found) / len(found) for part in found[0]})
    return rows


def pointed(model: Transformer, data: Sequences) -> float:
    """Share of the questions at which some layer and head selects the block that holds the pair."""
    hits = []
    for tokens, answers, needles in zip(data.tokens, data.answers, data.needles, strict=True):
        wanted = (needles // model.config.nsa.select_block)[:, None, None]
        hits.append(torch.stack([(blocks[answers] == wanted).any(-1).any(-1) for blocks in record_blocks(model, tokens)]).any(0))
    return float(torch.stack(hits).double().mean())


# ---------------------------------------------------------------------------------------------------------------------- the page


def _quality(rows: list[Row]) -> str:
    table = []
    for row in rows:
        head = [row["scale"], "–" if row["threshold"] is None else str(row["threshold"])]
        if row["problem"]:
            table.append([*head, row["problem"], *[""] * 5])
            continue
        change = "–" if "change" not in row else f"{row['change']:+.4%} ± {row['change_error']:.4%}"
        needles = ["–"] * 4
        if "found" in row:
            needles = [f"{row['answers']:.5f}", f"{row['found']:.2%}", f"{min(row['by_depth']):.2%}", f"{row['others']} of {row['asked']}"]
        table.append([*head, f"{row['loss']:.5f}", change, *needles])
    return markdown_table(["a scale for", "threshold", "loss, nats", "beside 16 bit", "of answers", "found", "at the worst depth", "other answers"], table)


def _depths(rows: list[Row]) -> str:
    rows = [row for row in rows if "by_depth" in row]
    cells = [[row["scale"], "–" if row["threshold"] is None else str(row["threshold"]), *(f"{share:.1%}" for share in row["by_depth"])] for row in rows]
    return markdown_table(["a scale for", "threshold", *(f"{index + 1}/{DEPTHS}" for index in range(DEPTHS))], cells)


def _memory(config: NSAConfig) -> str:
    cells = []
    for width in (64, 128):
        for variant in (*CACHES[1:4], *WAYS):
            ratios = [f"{tokens_ratio(variant, tokens, width, config):.2f}" for tokens in (8192, 65536, None)]
            cells.append([str(width), variant.name, str(variant.threshold), f"{variant.row_bytes(width, config):.1f}", *ratios])
    return markdown_table(["width", "a scale for", "threshold", "bytes a token and head", "× tokens at 8k", "at 64k", "without rings"], cells)


def _errors(rows: list[Row]) -> str:
    names = {"by_row": "a row", "by_row_32": "a row, in float32", "by_channel": "a channel of a block", "by_block": "a block", "unscaled": "none"}
    cells = [[row["set"], names[row["way"]], f"{row['keys']:.2%}", f"{row['scores']:.2%}", f"{row['nats']:.4f}"] for row in rows]
    return markdown_table(["keys", "a scale for", "error of keys", "of scores", "of scores, nats"], cells)


def render(results: dict[str, Any]) -> str:
    facts, config = results["facts"], NSAConfig(**results["nsa"])
    geometry = "/".join(str(results["nsa"][name]) for name in ("compress_block", "compress_stride", "select_block", "num_selected", "window"))
    text = [
        f"# The FP8 cache: loss and retrieval, {facts['date']}",
        record.machine_lines(facts) if facts["memory_bytes"] else f"Machine: a CPU. Commit {facts['commit']}.\nCommand: `{facts['command']}`",
        f"{results['model']}; geometry {geometry}, compression {results['nsa']['compression']}. {results['data']}",
        f"Read in chunks of {results['chunk']} tokens, which see their own keys and values unrounded. *A row* is a token and head, *a block* "
        f"{config.select_block} tokens of a head. All but *the cache* is emulated: the 16-bit cache with old blocks rounded in place. *Wiped* puts zeros "
        "there: what it leaves was not read from old blocks of the selected branch. Compressed keys and values and the window stay in 16 bits everywhere. "
        "Differences with their standard error over sequences. Wanted: at most +0.5 %, and the answers of 16 bits.",
    ]
    if results["training"]:
        cells = [[str(row["length"]), str(row["pairs"]), str(row["steps"]), f"{row['loss']:.3f}", f"{row['accuracy']:.1%}"] for row in results["training"]]
        said = f"Afterwards some layer selects the block of the pair at {results['pointed']:.1%} of the questions."
        text += ["## Training", markdown_table(["tokens", "pairs", "steps", "loss", "found"], cells), said]
    text += ["## Loss and retrieval", _quality(results["rows"])]
    if results["outliers"]:
        text += [
            "## The same model with outliers in its keys",
            "Four pairs of channels of all keys 16 times as large, the queries as much smaller: in 16 bits the same model.",
            _quality(results["outliers"]),
        ]
    if any("by_depth" in row for row in results["rows"]):
        text += ["## Found, by depth", "Eighths of the part that holds pairs, from the beginning.", _depths(results["rows"])]
    if results["all"]:
        said = "No pair is missed for a block that was not selected: what is not found here was not told from the others."
        text += ["## The same model with all blocks selected", said, _quality(results["all"])]
    text += [
        "## Memory",
        "Times the tokens of the 16-bit cache in the same memory, for sequences of that many tokens with their rings, at this geometry.",
        _memory(config),
    ]
    if results["errors"]:
        said = (
            "RMS, relative to the keys, and to the spread of a query's scores. Synthetic ones in bf16, width 128; of *scaled* and *shifted* every twentieth "
            "channel is 16 times as large (its query as much smaller), or has a mean of 16; *uneven*: sizes of tokens differ by e^(2 n), n normal."
        )
        text += ["## Errors of keys", said, _errors(results["errors"])]
    return "\n\n".join(text) + "\n"


# ------------------------------------------------------------------------------------------------------------------- the command


def prepare(options: argparse.Namespace, device: torch.device, deadline: float, results: dict[str, Any]) -> tuple[Transformer, Sequences]:
    """The model in the dtype it is read in, and held-out sequences; `results` learns what they are."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    length = parse_length(options.length)
    if options.run is not None:
        model, tokenizer = load_checkpoint(options.run, device, dtype)
        ids = tokenizer.encode(read_text(options.text, 12 * length * options.sequences))
        results["training"] = []
        results["data"] = f"{options.sequences} pieces of {length} tokens of {options.text.name if options.text else 'Python’s standard library'}."
        data = chopped(ids, length, options.sequences, device)
        name = Path(options.run).name
    else:
        stages = curriculum(parse_geometry(options.geometry), length, options.steps)
        task, nsa = stages[-1].task, stages[-1].nsa
        model = Transformer(model_config(task, nsa, options.hidden, options.layers)).to(device)
        model.init_weights(0)
        until = min(options.train_seconds, deadline - time.monotonic())
        results["training"] = train(model, Source(task, device, seed=1), stages, options.batch_tokens, until, options.rate)
        model = model.to(dtype).requires_grad_(False).eval()
        data = Source(task, device, seed=2).draw(task, options.sequences)
        results["pointed"] = pointed(model, data)
        print(f"blocks of the pairs selected: {results['pointed']:.1%}", flush=True)
        results["data"] = (
            f"{options.sequences} sequences of {length} tokens with {task.pairs} pairs of a key and a value in filler, asked for from token {task.questions} "
            f"on; each pair is {task.margin} tokens or more before that."
        )
        name = "A model trained for this"
    config = model.config
    results["nsa"] = {field: getattr(config.nsa, field) for field in config.nsa.__dataclass_fields__}
    shape = f"{config.num_layers} layers, width {config.hidden_size}, heads {config.num_heads}/{config.num_kv_heads} of {config.head_dim}"
    results["model"] = f"{name}: {shape}, {str(dtype).removeprefix('torch.')}"
    if config.attention != "nsa":
        raise ValueError("the model has no NSA attention: give a run trained with model.attention=nsa")
    return model, data


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--length", default="4096", metavar="TOKENS", help="of a sequence (default: 4096)")
    parser.add_argument("--sequences", type=int, default=16, help="held out, to be read (default: 16)")
    parser.add_argument("--chunk", type=int, default=64, metavar="TOKENS", help="that come at once (default: 64)")
    parser.add_argument("--run", metavar="RUN", help="a run, checkpoint or exported folder instead of a model trained here")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text for --run instead of Python's standard library")
    parser.add_argument("--geometry", default="32/16/64/16/512", metavar="l/d/l'/n/w", help="of the model trained here (default: the paper's)")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model trained here (default: 256)")
    parser.add_argument("--layers", type=int, default=2, help="of the model trained here (default: 2)")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="peak learning rate (default: 0.0015)")
    parser.add_argument("--steps", type=int, nargs=3, default=(1500, 1000, 1500), help="at most, of the three stages of training (default: 1500 1000 1500)")
    parser.add_argument("--batch-tokens", type=int, default=32768, help="tokens of a step (default: 32768)")
    parser.add_argument("--train-seconds", type=float, default=180.0, metavar="SECONDS", help="after which training ends (default: 180)")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="for all; what was measured by then is kept")
    parser.add_argument("--device", default="cuda", help="cuda (default) or cpu, for small sizes")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    options = parser.parse_args(argv)
    deadline = time.monotonic() + options.time_limit
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: torch sees no CUDA GPU here; write --device cpu and small sizes", file=sys.stderr)
        return 2
    facts = record.facts(argv, options.commit)
    results: dict[str, Any] = {"facts": facts, "chunk": options.chunk, "rows": [], "outliers": [], "all": [], "errors": []}
    try:
        if min(options.sequences, options.chunk, options.layers, options.batch_tokens, *options.steps) < 1:
            raise ValueError("--sequences, --chunk, --layers, --batch-tokens and --steps must be at least 1")
        model, data = prepare(options, torch.device(options.device), deadline, results)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = record.new_file(options.out, "kv_quantization", facts)

    def keeper(rows: list[Row], what: str) -> Any:
        def keep(row: Row) -> None:
            """After every kind of cache, so that whatever ends this program loses nothing."""
            rows.append(row)
            record.save(path, results)
            path.with_suffix(".md").write_text(render(results), encoding="utf-8")
            found = f", found {row['found']:.2%}, {row['others']} others" if "found" in row else ""
            change = f" ({row['change']:+.4%})" if "change" in row else ""
            said = row["problem"] or f"loss {row['loss']:.5f}{change}{found}, {row['seconds']:.0f} s"
            print(f"{what}{row['scale']}, threshold {row['threshold']}: {said}", flush=True)

        return keep

    measure(model, data, CACHES, options.chunk, deadline, keeper(results["rows"], ""))
    if time.monotonic() <= deadline:
        results["errors"] = errors(model, data.tokens[0])
    measure(with_outliers(model), data, WITH_OUTLIERS, options.chunk, deadline, keeper(results["outliers"], "with outliers, "))
    if options.run is None:
        whole = replace(model.config.nsa, num_selected=-(-data.tokens.shape[1] // model.config.nsa.select_block))
        measure(with_geometry(model, whole), data, WITH_ALL, options.chunk, deadline, keeper(results["all"], "all selected, "))
    print(f"wrote {path.with_suffix('.md')}; {length_name(len(data.tokens[0]))} tokens a sequence")
    return int(any(row["problem"] for row in results["rows"] + results["outliers"] + results["all"]))


if __name__ == "__main__":
    sys.exit(main())
