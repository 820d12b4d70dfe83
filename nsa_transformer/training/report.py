"""The end of a run: what it reached beside simple models, plots, and a sample of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from nsa_transformer.config import Config
from nsa_transformer.data.loader import TextData
from nsa_transformer.data.pack import Pack
from nsa_transformer.distributed.world import World
from nsa_transformer.inference.generate import SamplingConfig, generate
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.training.baselines import bigram_baseline, byte_order2_bpb
from nsa_transformer.training.console import Console
from nsa_transformer.training.evaluate import EARLY, LATE, Evaluation
from nsa_transformer.training.plots import write_plots
from nsa_transformer.utils.files import write_atomic

BASELINE_TOKENS = 20_000_000  # counting more changes an n-gram model little and takes long
PROMPT_TOKENS = 32


def write_report(
    config: Config,
    run_dir: Path,
    model: Transformer,
    data: TextData,
    validation: Sequence[Pack],
    evaluation: Evaluation,
    next_pack: int,
    world: World,
    console: Console,
) -> None:
    """Print the comparison and write `plots/*.png` and `sample.txt`. Every rank must call, since the sample needs all weights."""
    text = _sample(config, model, data, validation, world)
    if not world.is_main:
        return
    _compare(config, data, validation, evaluation, next_pack, console)
    if config.logging.plots:
        for path in write_plots(run_dir):
            console.info(f"wrote {path}")
    if text is not None:
        write_atomic(run_dir / "sample.txt", text)
        console.info(f"wrote {run_dir / 'sample.txt'}:\n{text}")


def _compare(config: Config, data: TextData, validation: Sequence[Pack], evaluation: Evaluation, next_pack: int, console: Console) -> None:
    max_length = config.data.max_length
    seen = range(min(next_pack, max(1, BASELINE_TOKENS // max_length)))
    bigram = bigram_baseline(_pairs(data.train.pack(i) for i in seen), _pairs(iter(validation)), data.tokenizer.vocab_size)
    # Of all text; with a loss on the assistant alone there is nothing it could be compared with.
    order2 = None if config.data.assistant_only_loss else byte_order2_bpb(_texts((data.train.pack(i) for i in seen), data), _texts(iter(validation), data))
    note = "" if len(seen) == next_pack else f" (counted on the first {len(seen) * max_length / 1e6:.0f} M of them)"
    console.info(
        f"validation loss {evaluation.loss:.4f} nats per token, {evaluation.bits_per_byte:.4f} bits per byte\n"
        f"  bigram model of the same tokens{note}: {bigram:.4f} nats per token"
        + ("" if order2 is None else f"\n  order-2 byte model of the same text{note}: {order2:.4f} bits per byte")
    )
    if evaluation.early_loss is not None and evaluation.late_loss is not None:
        console.info(f"  loss at positions <= {EARLY}: {evaluation.early_loss:.4f}, at positions >= {LATE}: {evaluation.late_loss:.4f}")


def _pairs(packs: Iterator[Pack]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return ((pack.tokens.numpy(), pack.targets.numpy()) for pack in packs)


def _texts(packs: Iterator[Pack], data: TextData) -> Iterator[bytes]:
    """The bytes of each fragment's tokens."""
    for pack in packs:
        for tokens, valid in zip(*(x.split(pack.cu_seqlens.diff().tolist()) for x in (pack.tokens, pack.valid)), strict=True):
            if bool(valid.any()):
                yield data.tokenizer.decode_bytes(tokens.tolist())


def _sample(config: Config, model: Transformer, data: TextData, validation: Sequence[Pack], world: World) -> str | None:
    """The start of a validation document, continued by the model. A sharded model is whole only in its own forward: every rank generates."""
    if not config.logging.sample_tokens:
        return None
    length = min(PROMPT_TOKENS, max(1, int(validation[0].cu_seqlens[1]) // 2))
    prompt = validation[0].tokens[:length].tolist()
    count = min(config.logging.sample_tokens, config.model.max_position_embeddings - length)
    model.eval()
    sampling = SamplingConfig(temperature=0.8, top_p=0.95, seed=config.training.seed)
    autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=config.training.precision == "bf16")
    # A growing cache would compile the blocks anew at each token.
    with torch.compiler.set_stance("force_eager"), autocast:
        ids = list(generate(model, prompt, count, sampling, data.tokenizer.eod_id, data.tokenizer.vocab_size, config.memory.kv_cache))
    model.train()
    return f"{data.tokenizer.decode(prompt)}⟨the model goes on⟩{data.tokenizer.decode(ids)}\n"
