"""What each rank of tests/distributed/test_fsdp.py runs: `python -m tests.distributed.worker JOB`, alone or under torchrun.

JOB is a JSON object: `out`, a folder for this run's checkpoints; `start`, null to draw the weights or a checkpoint to load; `first`, `steps`;
`checkpointing`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from nsa_transformer.config import Config, DataConfig, MemoryConfig, TrainingConfig
from nsa_transformer.data.pack import Pack, merge_packs
from nsa_transformer.distributed.checkpoint import load_checkpoint_into, save_checkpoint, write_config
from nsa_transformer.distributed.parallelize import build_model, draw_weights, whole
from nsa_transformer.distributed.world import World, open_world
from nsa_transformer.models.transformer import LossOutput
from nsa_transformer.training.optimizer import build_optimizer

from ..models.small import VOCABULARY, small_config

PACKS_PER_STEP = 4


def config_of(checkpointing: str) -> Config:
    # Widths that two ranks do not divide evenly: 61 rows of the embedding, 5 experts.
    return Config(
        model=small_config(init_std=0.1, tie_embeddings=False, moe={"num_experts": 5, "top_k": 2, "z_loss_weight": 0.01, "bias_update_rate": 0.01}),
        data=DataConfig(max_length=64),
        training=TrainingConfig(precision="fp32", batch_size=PACKS_PER_STEP, learning_rate=1e-3),
        memory=MemoryConfig(activation_checkpointing=checkpointing),  # type: ignore[arg-type]
    )


def pack(number: int) -> Pack:
    """Two documents and some padding, more of it in some packs than in others, so that ranks differ in their targets."""
    tokens = torch.randint(0, VOCABULARY, (64,), generator=torch.Generator().manual_seed(number))
    end = 64 - 7 * (number % 4)
    valid = torch.arange(64) < end
    cu_seqlens = torch.tensor([0, 20, end, 64], dtype=torch.int32)
    return Pack(tokens, tokens.roll(-1).where(valid, -100), cu_seqlens, valid)


def train(job: dict[str, Any], world: World) -> None:
    config, out = config_of(job["checkpointing"]), Path(job["out"])
    model = build_model(config, world)
    optimizer = build_optimizer(model, config.training)
    if job["start"] is None:
        draw_weights(model, config.model, 3, world.device)
    else:
        load_checkpoint_into(Path(job["start"]), model, optimizer, world)
    texts = {"config.yaml": write_config(config)}
    save_checkpoint(out, job["first"], model, optimizer, {}, texts, world, 9)
    for step in range(job["first"], job["first"] + job["steps"]):
        packs = [pack(step * PACKS_PER_STEP + world.rank + n * world.size) for n in range(PACKS_PER_STEP // world.size)]
        targets = int(world.sum(sum((p.targets >= 0).sum() for p in packs)))  # type: ignore[arg-type]
        load = torch.zeros(1, 5, dtype=torch.int64)
        for each in packs:
            each = merge_packs([each])
            result = model(each.tokens, each.cu_seqlens, targets=each.targets, valid=each.valid)
            assert isinstance(result, LossOutput)
            ((result.loss + result.auxiliary) * (world.size / targets)).backward()
            load += result.load
        grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        model.update_router_bias(world.sum(load))
        if world.is_main:
            torch.save({"grads": grads, "norm": norm, "load": load}, out / f"step_{step}.pt")
    save_checkpoint(out, job["first"] + job["steps"], model, optimizer, {"note": "ü"}, texts, world, 9)


if __name__ == "__main__":
    with open_world("cpu") as this_world:
        for each_job in json.loads(sys.argv[1]):
            train(each_job, this_world)
