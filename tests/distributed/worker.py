"""What each rank of the tests of FSDP2 and of expert parallelism runs: `python -m tests.distributed.worker JOBS`, alone or under torchrun.

JOBS is a JSON list of `Job`s as objects.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from nsa_transformer.config import Config, DataConfig, MemoryConfig, TrainingConfig
from nsa_transformer.data.pack import Pack, merge_packs
from nsa_transformer.distributed.checkpoint import load_checkpoint_into, save_checkpoint, write_config
from nsa_transformer.distributed.parallelize import Shards, build_model, clip_gradients, draw_weights
from nsa_transformer.distributed.world import World, open_world
from nsa_transformer.models.transformer import LossOutput, mixtures
from nsa_transformer.training.balance import StepLoad
from nsa_transformer.training.optimizer import build_optimizer

from ..models.small import VOCABULARY, small_config

PACKS_PER_STEP = 4


@dataclass(frozen=True)
class Job:
    """Some optimizer steps, with checkpoints before and after."""

    out: str  # folder for the checkpoints and for step_N.pt, what rank 0 saw of a step
    start: str | None = None  # a checkpoint to load; None: draw the weights
    first: int = 0
    steps: int = 2
    checkpointing: str = "none"
    packs_per_pass: int = 1
    num_experts: int = 5  # and 61 rows of the embedding: neither is divided evenly by two ranks
    expert_parallel: int = 1
    global_loss: float = 0.0
    skewed: bool = False  # all tokens visit the experts 0 and 1
    compile: bool = False
    precision: str = "fp32"
    device: str = "cpu"


def config_of(job: Job) -> Config:
    moe = {"num_experts": job.num_experts, "top_k": 2, "z_loss_weight": 0.01, "bias_update_rate": 0.01, "global_loss_weight": job.global_loss}
    return Config(
        model=small_config(init_std=0.1, tie_embeddings=False, num_layers=3, moe=moe),
        data=DataConfig(max_length=64),
        training=TrainingConfig(
            precision=job.precision,  # type: ignore[arg-type]
            batch_size=PACKS_PER_STEP,
            learning_rate=1e-3,
            expert_parallel_size=job.expert_parallel,
            compile=job.compile,
        ),
        memory=MemoryConfig(activation_checkpointing=job.checkpointing),  # type: ignore[arg-type]
    )


def pack(number: int) -> Pack:
    """Two documents and some padding, more of it in some packs than in others, so that ranks differ in their targets."""
    tokens = torch.randint(0, VOCABULARY, (64,), generator=torch.Generator().manual_seed(number))
    end = 64 - 7 * (number % 4)
    valid = torch.arange(64) < end
    cu_seqlens = torch.tensor([0, 20, end, 64], dtype=torch.int32)
    return Pack(tokens, tokens.roll(-1).where(valid, -100), cu_seqlens, valid)


def train(job: Job, world: World) -> None:
    config, out = config_of(job), Path(job.out)
    model = build_model(config, world)
    optimizer = build_optimizer(model, config.training)
    if job.start is None:
        draw_weights(model, config.model, 3, world.device)
    else:
        load_checkpoint_into(Path(job.start), model, optimizer, world)
    if job.skewed:
        for mixture in mixtures(model):
            mixture.router.bias[:2] = 100.0
    shards, texts = Shards(model), {"config.yaml": write_config(config)}
    save_checkpoint(out, job.first, model, optimizer, {}, texts, world, 9)
    for step in range(job.first, job.first + job.steps):
        packs = [pack(step * PACKS_PER_STEP + world.rank + n * world.size) for n in range(PACKS_PER_STEP // world.size)]
        targets = int(world.sum(sum((p.targets >= 0).sum() for p in packs)))  # type: ignore[arg-type]
        load, loss = StepLoad(job.global_loss, world), torch.zeros((), device=world.device)
        for start in range(0, len(packs), job.packs_per_pass):
            each = merge_packs(packs[start : start + job.packs_per_pass]).to(world.device)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=job.precision == "bf16"):
                result = model(each.tokens, each.cu_seqlens, targets=each.targets, valid=each.valid)
            assert isinstance(result, LossOutput)
            total = load.add(result)
            (total * (world.size / targets)).backward()
            loss += total.detach()
        grads = {name: shards.whole(name, p.grad) for name, p in model.named_parameters() if p.grad is not None}
        norm = clip_gradients(model.parameters(), 1.0, world)
        optimizer.step()
        optimizer.zero_grad()
        visits = load.total()
        model.update_router_bias(visits)
        seen = {"grads": grads, "norm": norm, "load": visits, "loss": world.sum(loss) / targets}
        if world.is_main:
            torch.save(seen, out / f"step_{step}.pt")
    save_checkpoint(out, job.first + job.steps, model, optimizer, {"note": "ü"}, texts, world, 9)


def main(text: str) -> None:
    jobs = [Job(**each) for each in json.loads(text)]
    with open_world(jobs[0].device) as world:
        for job in jobs:
            train(job, world)


if __name__ == "__main__":
    main(sys.argv[1])
    # Threads of gloo end with the process group, which models and their mesh hold, in cycles. Those that are left when the interpreter ends abort the process
    # now and then, when all is done (pytorch/pytorch#179291).
    gc.collect()
