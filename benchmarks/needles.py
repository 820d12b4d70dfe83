"""A task of retrieval, and a small model that learns it: pairs of a key and a value hidden in filler, asked for at the end.

A sequence is filler from a Markov source with pairs at random places, then questions: a key, and after it its value. A pair is one token, so that one look
finds both and the task is learned in minutes. Pairs, keys, values and filler have symbols of their own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsa_transformer.config import ModelConfig, MoEConfig, NSAConfig, TrainingConfig
from nsa_transformer.models.attention import NativeSparseAttention
from nsa_transformer.models.loss import IGNORE
from nsa_transformer.models.transformer import LossOutput, Transformer
from nsa_transformer.training.optimizer import build_optimizer

SUCCESSORS = (0.5, 0.25, 0.15, 0.1)  # of a symbol of the filler, by their probabilities: 1.21 nats
FILLER_SHARE = 0.1  # of the filler's tokens that training counts, so that answers weigh something beside them
LEARNED = 0.99
GAIN = 4.0  # of compressed keys at their beginning: a pair is one of many tokens of a mean


@dataclass(frozen=True)
class Task:
    """Sequences of `length` tokens with `pairs` pairs, `clump` of them side by side, all more than `margin` tokens before the first question.

    Clumps, because a compressed block can carry a pair by itself: its value could be told without a look at any token, and no rounding of tokens would show.
    """

    length: int
    pairs: int
    margin: int
    clump: int = 4
    keys: int = 64
    values: int = 16
    filler: int = 64

    def __post_init__(self) -> None:
        most = min(self.keys, self.places * self.clump)
        if self.pairs % self.clump or not 0 < self.pairs <= most:
            raise ValueError(f"pairs={self.pairs} is no multiple of clump={self.clump} up to {most}, the keys or places of {self}; write one, or more tokens")

    @property
    def first_key(self) -> int:
        """Symbols: key * values + value for a pair, then keys, values, filler."""
        return self.keys * self.values

    @property
    def first_value(self) -> int:
        return self.first_key + self.keys

    @property
    def first_filler(self) -> int:
        return self.first_value + self.values

    @property
    def vocabulary(self) -> int:
        return self.first_filler + self.filler

    @property
    def questions(self) -> int:
        """Position of the first question."""
        return self.length - 2 * self.pairs

    @property
    def places(self) -> int:
        """Clumps begin at multiples of their size, this many."""
        return max(0, (self.questions - self.margin) // self.clump)


@dataclass(frozen=True)
class Sequences:
    """tokens, targets int64 [B, length], targets IGNORE where nothing could be known; answers int64 [B, pairs], the positions whose targets are the values
    asked for; needles int64 [B, pairs], where their pairs are."""

    tokens: Tensor
    targets: Tensor
    answers: Tensor
    needles: Tensor


class Source:
    """Draws sequences of any task over the same symbols; which symbols of the filler follow which is the same for every seed."""

    def __init__(self, task: Task, device: torch.device, seed: int, chains: int = 512) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)
        fixed = torch.Generator().manual_seed(0)
        follow = torch.stack([torch.randperm(task.filler, generator=fixed)[: len(SUCCESSORS)] for _ in range(task.filler)]).to(device)
        chance = torch.tensor(SUCCESSORS, device=device).expand(chains, -1)
        symbol, steps = torch.randint(task.filler, (chains,), generator=self.generator, device=device), []
        for _ in range(2 * task.length):
            steps.append(symbol)
            symbol = follow[symbol, torch.multinomial(chance, 1, generator=self.generator).squeeze(1)]
        self.stream = torch.stack(steps, 1) + task.first_filler

    def _ranks(self, count: int, size: int, of: int) -> Tensor:
        """`of` different numbers below `size`, in random order, int64 [count, of]."""
        return torch.rand(count, size, generator=self.generator, device=self.device).argsort(1)[:, :of]

    def draw(self, task: Task, count: int) -> Sequences:
        chains, length = self.stream.shape
        row = torch.randint(chains, (count, 1), generator=self.generator, device=self.device)
        start = torch.randint(length - task.length + 1, (count, 1), generator=self.generator, device=self.device)
        tokens = self.stream[row, start + torch.arange(task.length, device=self.device)]
        clumps = task.clump * self._ranks(count, task.places, task.pairs // task.clump)
        needles = (clumps[:, :, None] + torch.arange(task.clump, device=self.device)).flatten(1)
        needles = needles.gather(1, self._ranks(count, task.pairs, task.pairs))  # the order of the questions
        keys = self._ranks(count, task.keys, task.pairs)
        values = torch.randint(task.values, (count, task.pairs), generator=self.generator, device=self.device)
        answers = (task.questions + 2 * torch.arange(task.pairs, device=self.device)).expand(count, -1)
        for place, symbols in ((needles, keys * task.values + values), (answers, task.first_key + keys), (answers + 1, task.first_value + values)):
            tokens.scatter_(1, place, symbols)
        targets = torch.cat([tokens[:, 1:], tokens.new_full((count, 1), IGNORE)], 1)
        # After a pair the chain has lost its last symbol, and where pairs come nobody knows.
        targets = targets.where((tokens >= task.first_filler) & (targets >= task.first_filler), IGNORE)
        targets.scatter_(1, answers, task.first_value + values)
        return Sequences(tokens, targets, answers, needles)


@dataclass(frozen=True)
class Stage:
    """At most so many steps on a task under a geometry; it ends before them once what it teaches is learned."""

    task: Task
    nsa: NSAConfig
    steps: int


def curriculum(nsa: NSAConfig, length: int, steps: Sequence[int]) -> list[Stage]:
    """Three stages of growing length, the last with the geometry itself. In the first all blocks are selected and the window is too short for any pair, so that
    the selected branch learns to copy; in the second few blocks are selected, so that compressed keys have to point to the right ones."""
    block, whole = nsa.select_block, nsa.num_selected * nsa.select_block
    near = replace(nsa, window=min(nsa.window, block))
    few = replace(near, num_selected=max(nsa.num_initial + nsa.num_local + 1, nsa.num_selected // 2))

    def task(size: int, margin: int) -> Task:
        return Task(size, 4 * min(16, max(1, size // 64)), margin)

    tasks = task(min(whole // 2, length), near.window), task(min(2 * whole, length), near.window), task(length, nsa.window + block)
    return [Stage(*each) for each in zip(tasks, (near, few, nsa), steps, strict=True)]


def model_config(task: Task, nsa: NSAConfig, hidden_size: int, num_layers: int) -> ModelConfig:
    """Heads of 64, or four where that is too wide; two query heads share a key."""
    head_dim = min(64, hidden_size // 4)
    return ModelConfig(
        vocab_size=task.vocabulary,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=hidden_size // head_dim,
        num_kv_heads=max(1, hidden_size // head_dim // 2),
        head_dim=head_dim,
        intermediate_size=2 * hidden_size,
        nsa=nsa,
        moe=MoEConfig(num_experts=0),
        max_position_embeddings=task.length,
        rope_theta=1e8,  # half of the channels hardly turn over the length, and can hold a key wherever it is
        init_std=hidden_size**-0.5,
    )


def with_geometry(model: Transformer, nsa: NSAConfig) -> Transformer:
    """The same parameters under another window or number of blocks: none depends on these."""
    with torch.device("meta"):
        other = Transformer(replace(model.config, nsa=nsa))
    other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return other


@torch.no_grad()
def point_by_selected_keys(model: Transformer) -> None:
    """Let compressed keys and values, which are means, begin as those of the selected branch: a block is then as near to a query as its tokens are on average.
    It is a beginning from which pointing to blocks is learned; from nothing that takes longer than all the rest."""
    for layer in (block.attention for block in model.layers):
        assert isinstance(layer, NativeSparseAttention) and layer.config.compression == "mean"
        for projection, factor in ((layer.k_proj, GAIN), (layer.v_proj, 1.0)):
            compressed, selected, _ = projection.weight.chunk(3)
            compressed.copy_(selected * factor)


def packed(drawn: Sequences) -> tuple[Tensor, Tensor]:
    """Tokens of all sequences one after the other, and their boundaries."""
    count, length = drawn.tokens.shape
    return drawn.tokens.flatten(), torch.arange(count + 1, dtype=torch.int32, device=drawn.tokens.device) * length


def mixed(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def accuracy(model: Transformer, drawn: Sequences) -> float:
    """Share of the questions whose likeliest next token is the value, in one pass without a cache."""
    with mixed(drawn.tokens.device):
        logits = model(*packed(drawn))
    assert isinstance(logits, Tensor)
    found = logits.view(*drawn.tokens.shape, -1).argmax(-1).gather(1, drawn.answers)
    return float((found == drawn.targets.gather(1, drawn.answers)).float().mean())


def train(model: Transformer, source: Source, stages: Sequence[Stage], batch_tokens: int, seconds: float, rate: float) -> list[dict[str, Any]]:
    """What each stage came to: steps, loss, accuracy. After `seconds` what is left is cut to a step a stage."""
    device, began, rows = source.device, time.monotonic(), []
    optimizer = build_optimizer(model, TrainingConfig(learning_rate=rate, weight_decay=0.01))
    done = 0
    for stage in stages:
        running, task = with_geometry(model, stage.nsa), stage.task
        count, row = max(1, batch_tokens // task.length), {"length": task.length, "pairs": task.pairs, "steps": 0, "loss": float("nan"), "accuracy": 0.0}
        for step in range(1, stage.steps + 1):
            drawn, done = source.draw(task, count), done + 1
            counted = torch.rand(drawn.targets.shape, generator=source.generator, device=device) < FILLER_SHARE
            counted.scatter_(1, drawn.answers, True)
            targets = drawn.targets.where(counted, IGNORE).flatten()
            with mixed(device):
                out = running(*packed(drawn), targets=targets)
            assert isinstance(out, LossOutput)
            loss = out.loss / (targets != IGNORE).sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            left = 1.0 if stage is not stages[-1] else 1.0 - 0.9 * (step - 1) / stage.steps
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, done / 100) * left
            optimizer.step()
            late = time.monotonic() - began > seconds
            if step % 50 == 0 or step == stage.steps or late:
                row |= {
                    "steps": step,
                    "loss": float(loss.detach()),
                    "accuracy": accuracy(running, source.draw(task, count)),
                    "seconds": time.monotonic() - began,
                }
                print(f"{row['seconds']:4.0f} s, {task.length} tokens, step {step}: loss {row['loss']:.3f}, found {row['accuracy']:.1%}", flush=True)
                if row["accuracy"] >= LEARNED or late:
                    break
        rows.append(row)
        if stage is stages[0]:
            point_by_selected_keys(model)
    return rows
