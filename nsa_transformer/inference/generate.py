"""Generating text, a token at a time, with the keys and values of what came before in a cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_transformer.data.tokenizer import Tokenizer
from nsa_transformer.models.transformer import Transformer

PREFILL_CHUNK = 4096  # prompt tokens per pass, which bounds the memory of a long prompt


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. temperature 0: the most likely one. top_k None and top_p 1: from all."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be 0 (the most likely token) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; leave it out to draw from all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie between 0 and 1, above 0; 1 draws from all tokens")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must lie in 0 … 2**63 - 1")


def next_token_probabilities(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Logits `[vocab]` to float32 probabilities `[vocab]` after temperature, top-k and top-p, in this order.

    top-p keeps the fewest most likely tokens whose probabilities reach it.
    """
    logits = logits.float()
    if config.temperature == 0:
        return torch.zeros_like(logits).index_fill_(0, logits.argmax(), 1.0)
    # In float64 and from the largest down, so that a tiny temperature gives the most likely token and not infinities.
    logits = ((logits - logits.max()).double() / config.temperature).float()
    if config.top_k is not None and config.top_k < len(logits):
        kept = logits.topk(config.top_k).indices
        logits = torch.full_like(logits, -torch.inf).index_copy_(0, kept, logits[kept])
    p = logits.softmax(-1)
    if config.top_p < 1:
        ordered, order = p.sort(descending=True, stable=True)
        p = p.index_fill(0, order[ordered.cumsum(0) - ordered >= config.top_p], 0.0)
    return p / p.sum()


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingConfig,
    eod_id: int | None = None,
    num_tokens: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids after `prompt`, ending before `eod_id` (None: never). The model should be in eval mode.

    Only ids below `num_tokens` are drawn (None: all): a model may have more rows than its tokenizer has tokens.

    Raises `ValueError` before the first token for an empty prompt, or where prompt and new tokens would pass the model's positions.
    """
    if not prompt:
        raise ValueError("the prompt has no token; give at least one character")
    limit = model.config.max_position_embeddings
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more")
    if len(prompt) + max_new_tokens > limit:
        raise ValueError(
            f"{len(prompt)} prompt tokens and {max_new_tokens} new ones pass max_position_embeddings={limit}; "
            f"ask for {max(limit - len(prompt), 0)} new tokens or fewer"
        )
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    cache = model.new_cache()
    tokens = torch.tensor(prompt, dtype=torch.int64, device=device)
    for _ in range(max_new_tokens):
        for chunk in tokens.split(PREFILL_CHUNK):
            logits = model(chunk, cache=cache, last_only=True)
        tokens = torch.multinomial(next_token_probabilities(logits[-1, :num_tokens], sampling), 1, generator=generator)
        token = int(tokens)
        if token == eod_id:
            return
        yield token


def generate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop: Sequence[str] = (),
) -> Iterator[tuple[list[int], str]]:
    """Yield new ids with the text they complete, ending at end-of-document or before any of the `stop` texts.

    Text that could be the beginning of a stop text, or of a character whose bytes are not all there, waits for what follows.
    The ids of a stop text are yielded, since a token may carry more than it; its text is not.
    """
    if any(not text for text in stop):
        raise ValueError("a stop text is empty; leave it out")
    ids: list[int] = []
    shown, pending = 0, []
    for token in generate(model, prompt_ids, max_new_tokens, sampling, tokenizer.eod_id, tokenizer.vocab_size):
        ids.append(token)
        pending.append(token)
        text = tokenizer.decode_bytes(ids).decode(errors="replace")
        found = [place for place in (text.find(s, max(0, shown - len(s))) for s in stop) if place >= 0]
        if found:
            yield pending, text[shown : min(found)]
            return
        safe = text.rstrip("\ufffd")
        end = len(safe) - max((_overlap(safe, s) for s in stop), default=0)
        if end > shown:
            yield pending, text[shown:end]
            shown, pending = end, []
    text = tokenizer.decode_bytes(ids).decode(errors="replace")
    if pending or shown < len(text):
        yield pending, text[shown:]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
