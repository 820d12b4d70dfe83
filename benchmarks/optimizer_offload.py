"""What the optimizer in host memory costs and saves: training steps of `model=large` without it, with it, with the experts in host memory too, and by
FSDP2's own CPU offload, on one CUDA GPU.

    python benchmarks/optimizer_offload.py [--rows none optimizer fsdp2 both fsdp2-fused] [--length 32k] [--accumulation 4] [--steps 4] [--out DIR]

The first three are `training/trainer.py` itself (`benchmarks/train_step.py` says how). FSDP2 is `fully_shard(…, offload_policy=CPUOffloadPolicy())` on each
block and the model, on one rank, with the same model, autocast, activation checkpointing and clipping, on tokens drawn at random; its optimizer is
`torch.optim.AdamW` as it comes, or `fused=True`. Results are written after every run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import record, train_step
from benchmarks.page import markdown_table
from benchmarks.shapes import length_name, parse_length
from nsa_transformer.config import Config
from nsa_transformer.distributed.checkpoint import read_config
from nsa_transformer.memory.activation_checkpointing import apply_activation_checkpointing
from nsa_transformer.models.transformer import LossOutput, Transformer, initial_value
from nsa_transformer.training.meter import peak_memory_gib

WARM_UP = 2
OPTIMIZER = "memory.optimizer_offloading.enabled=true"
EXPERTS = "memory.expert_offloading.enabled=true"
TRAINER_ROWS: dict[str, tuple[str, ...]] = {"none": (), "optimizer": (OPTIMIZER,), "both": (OPTIMIZER, EXPERTS)}
NAMES = {
    "none": "nothing in host memory",
    "optimizer": "optimizer",
    "fsdp2": "FSDP2 `CPUOffloadPolicy`, AdamW",
    "both": "optimizer and experts",
    "fsdp2-fused": "FSDP2 `CPUOffloadPolicy`, fused AdamW",
}


# -------------------------------------------------------------------------------------------------------------- FSDP2


def fsdp2_steps(config: Config, steps: int, fused: bool, folder: Path, device: torch.device) -> None:
    """Train for `steps` steps under FSDP2's CPU offload; rows as the trainer writes them, in `folder`/metrics.jsonl. `config` is of a run of the trainer."""
    training, length = config.training, config.data.max_length
    folder.mkdir(parents=True)
    dist.init_process_group("cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo", init_method=f"file://{folder / 'peers'}", rank=0, world_size=1)
    try:
        model = fsdp2_model(config, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, fused=fused or None)
        with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
            for step in range(steps):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                begun = time.perf_counter()
                for _ in range(training.batch_size):
                    tokens = torch.randint(config.model.vocab_size, (length,), device=device)
                    with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
                        out = model(tokens, targets=tokens.roll(-1), loss_chunk_size=training.loss_chunk_size)
                    assert isinstance(out, LossOutput)
                    ((out.loss + out.auxiliary) / (length * training.batch_size)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                speed = length * training.batch_size / (time.perf_counter() - begun)
                row = {"step": step + 1, "loss": float(out.loss.detach()) / length, "tokens_per_second": speed, "max_memory_gib": peak_memory_gib(device)}
                print(json.dumps(row), file=file, flush=True)
    finally:
        dist.destroy_process_group()


def fsdp2_model(config: Config, device: torch.device) -> Transformer:
    """Sharded over this rank alone, its float32 parameters in host memory, page-locked where there is a GPU."""
    mesh = init_device_mesh(device.type, (1,))
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    with torch.device("meta"):
        model = Transformer(config.model)
    apply_activation_checkpointing(model, config.memory.activation_checkpointing)
    for block in model.layers:
        fully_shard(block, mesh=mesh, offload_policy=policy)
    fully_shard(model, mesh=mesh, offload_policy=policy)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, torch.distributed.tensor.DTensor)
            parameter.to_local().copy_(initial_value(name, parameter.shape, config.model, config.training.seed, device))
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros_like(buffer, device=device))
    return model


# --------------------------------------------------------------------------------------------------------------- rows


def overrides(row: str, accumulation: int) -> list[str]:
    return [f"training.batch_size={accumulation}", "training.micro_batch_size=1", *TRAINER_ROWS.get(row, ())]


def summarize(rows: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    timed = rows[WARM_UP:]
    speed = statistics.median(row["tokens_per_second"] for row in timed)
    waits = [row["update_wait_fraction"] for row in timed if "update_wait_fraction" in row]
    waited = {"update_wait_seconds": statistics.median(waits) * tokens / speed} if waits else {}
    return {"tokens_per_second": speed, "step_seconds": tokens / speed, "peak_gib": max(row["max_memory_gib"] for row in rows), "steps": len(timed)} | waited


def render(results: dict[str, Any]) -> str:
    facts, found = results["facts"], {row["row"]: row for row in results["rows"]}
    base = found.get("none", {})
    parameters = max((row.get("parameters", 0) for row in results["rows"]), default=0)
    lines = []
    for row in results["rows"]:
        if "tokens_per_second" not in row:
            lines.append([NAMES[row["row"]], *["–"] * 6, row["problem"].replace("|", "/")])
            continue
        ratio = f"{row['tokens_per_second'] / base['tokens_per_second']:.2f}" if "tokens_per_second" in base else "–"
        saved = f"{(base['peak_gib'] - row['peak_gib']) * 2**30 / parameters:.1f}" if "peak_gib" in base and parameters and row is not base else "–"
        waited = f"{row['update_wait_seconds']:.2f}" if "update_wait_seconds" in row else "–"
        lines.append(
            [
                NAMES[row["row"]],
                f"{row['tokens_per_second'] / 1e3:.2f} k",
                ratio,
                f"{row['step_seconds']:.2f}",
                waited,
                f"{row['peak_gib']:.1f}",
                saved,
                row["problem"].replace("|", "/"),
            ]
        )
    header = ["in host memory", "tokens/s", "× without", "step, s", "GPU waits for the update, s", "peak, GiB", "bytes saved per parameter", ""]
    text = [
        f"# The optimizer in host memory, `model=large` on {facts['gpu']}, {facts['date']}",
        record.machine_lines(facts),
        f"{results['accumulation']} passes of {length_name(results['length'])} tokens a step, {parameters / 1e9:.2f} billion parameters, activation "
        f"checkpointing {results['checkpointing']}, bf16 autocast. Median of the steps after the first {WARM_UP} of {results['steps']}, one process "
        "per row. Bytes saved are the difference of the peaks, over the parameters. The GPU waits where it has nothing to do until gradients are added up or "
        "weights updated. FSDP2 runs on one rank, with autocast over float32 parameters as the trainer's, and adds up gradients in host memory in each pass.",
        markdown_table(header, lines),
    ]
    return "\n\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=" ".join((__doc__ or "").split("\n\n")[0].split()))
    parser.add_argument("--rows", nargs="+", default=list(NAMES)[:4], choices=list(NAMES), help="default: all but fsdp2-fused")
    parser.add_argument("--length", default="32k", metavar="TOKENS", help="tokens per pass (default: 32k)")
    parser.add_argument("--accumulation", type=int, default=4, help="passes per step (default: 4)")
    parser.add_argument("--steps", type=int, default=4, help=f"of each run, the first {WARM_UP} of them as warm-up (default: 4)")
    parser.add_argument("--checkpointing", default="selective", choices=train_step.MODES, help="of activations (default: selective)")
    parser.add_argument("--patience", type=float, default=120.0, metavar="SECONDS", help="without a new step, after which a run is ended (default: 120)")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS", help="for all runs together; what was measured by then is kept")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="more overrides for the trainer, and the same model for FSDP2")
    parser.add_argument("--out", type=Path, default=record.RESULTS, metavar="DIR", help="where page and numbers go (default: benchmarks/results)")
    parser.add_argument("--commit", help="what the page says; for a copy without its git folder")
    parser.add_argument("--fsdp2-of", type=Path, help=argparse.SUPPRESS)  # a child process: the run whose config.yaml counts; --out is its folder
    options = parser.parse_args(argv)
    try:
        length = parse_length(options.length)
        if options.steps <= WARM_UP:
            raise ValueError(f"--steps {options.steps} leaves nothing after the {WARM_UP} steps of warm-up; write {WARM_UP + 1} or more")
        if options.accumulation < 1:
            raise ValueError(f"--accumulation {options.accumulation} must be at least 1")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("error: the benchmark needs a CUDA GPU, and torch sees none here", file=sys.stderr)
        return 2
    if options.fsdp2_of is not None:
        fsdp2_steps(read_config(options.fsdp2_of), options.steps, "fsdp2-fused" in options.rows, options.out, torch.device("cuda", 0))
        return 0
    return measure(options, length, argv)


def measure(options: argparse.Namespace, length: int, argv: list[str]) -> int:
    deadline = time.monotonic() + options.time_limit
    facts = record.facts(argv, options.commit)
    path = record.new_file(options.out, "optimizer_offload", facts)
    tokens = length * options.accumulation
    results: dict[str, Any] = {"facts": facts, "steps": options.steps, "length": length, "accumulation": options.accumulation}
    results |= {"checkpointing": options.checkpointing, "rows": []}
    with tempfile.TemporaryDirectory(prefix="optimizer_offload_") as scratch:
        corpus, runs = Path(scratch) / "corpus", Path(scratch) / "runs"
        corpus.mkdir()
        runs.mkdir()
        train_step.write_corpus(corpus, max(train_step.TEXT_SIZE, options.steps * tokens * train_step.BYTES_PER_TOKEN))
        described: Path | None = None  # a run of the trainer, whose model FSDP2 takes
        for row in sorted(options.rows, key=list(NAMES).index):
            run_dir = runs / row
            words = train_step.command(length, "nsa", options.checkpointing, corpus, run_dir, [*overrides(row, options.accumulation), *options.set])
            result: dict[str, Any] = {"row": row, "problem": ""}
            if row not in TRAINER_ROWS and described is None:
                result["problem"] = "not started: FSDP2 takes the model of a run of the trainer; ask for none too"
            elif time.monotonic() > deadline:
                result["problem"] = f"not started: {train_step.OUT_OF_TIME}"
            else:
                if row not in TRAINER_ROWS:
                    child = ["--fsdp2-of", str(described), "--rows", row, "--steps", str(options.steps), "--out", str(run_dir)]
                    words = [sys.executable, str(Path(__file__).resolve()), *child]
                ran = train_step.run_steps(words, run_dir, options.steps, options.patience, deadline)
                result |= {"problem": ran.problem, "parameters": ran.parameters, "seconds": ran.seconds, "first_step": ran.first_step}
                if len(ran.rows) > WARM_UP:
                    result |= summarize(ran.rows, tokens)
                if (run_dir / "config.yaml").exists():
                    described = run_dir
            results["rows"].append(result)
            speed = f"{result['tokens_per_second']:,.0f} tokens/s, {result['peak_gib']:.1f} GiB" if "tokens_per_second" in result else ""
            took = f"{result['seconds']:.0f} s" if "seconds" in result else ""
            print(f"{row:>12}  {'; '.join(filter(None, (speed, result['problem'], took)))}", flush=True)
            record.save(path, results)
            path.with_suffix(".md").write_text(render(results), encoding="utf-8")
    print(f"wrote {path.with_suffix('.md')}")
    return int(any(row["problem"] for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
