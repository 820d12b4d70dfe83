"""Generating text, a token at a time for one prompt or many, with the keys and values of what came before in a cache."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_transformer.config import KVCacheConfig
from nsa_transformer.data.tokenizer import Tokenizer
from nsa_transformer.inference.decoder import Decoder
from nsa_transformer.inference.faults import memory_explained
from nsa_transformer.models.cache import KVCache
from nsa_transformer.models.transformer import Transformer

# Prompt tokens per pass, which bounds the memory of a long prompt. A pass takes the host about as long whatever its length: with 4,096 tokens an H200 was
# idle for most of it, and 64k tokens of model=large took three times as long (benchmarks/log.md).
PREFILL_CHUNK = 32768


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn. temperature 0: the most likely one. top_k None, top_p 1 and min_p 0: from all. repetition_penalty 1: none."""

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be 0 (the most likely token) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; leave it out to draw from all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie between 0 and 1, above 0; 1 draws from all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must lie between 0 and 1; 0 draws from all tokens")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be a positive number; 1 is none")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must lie in 0 … 2**63 - 1")


def next_token_probabilities(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """Logits `[..., vocab]` to float32 probabilities `[..., vocab]` after the repetition penalty, temperature, top-k, top-p and min-p, in this order.

    The penalty (arXiv 1909.05858) divides positive logits of the tokens in `seen`, bool `[..., vocab]`, and multiplies negative ones. top-p keeps the fewest
    most likely tokens whose probabilities reach it; min-p those with at least this share of the most likely one's probability (arXiv 2407.01082).
    """
    logits = logits.float()
    if seen is not None and config.repetition_penalty != 1:
        wide = logits.double()
        largest = torch.finfo(logits.dtype).max  # beyond it, two infinities would have no difference
        penalized = torch.where(wide > 0, wide / config.repetition_penalty, wide * config.repetition_penalty).clamp(-largest, largest).float()
        logits = torch.where(seen & logits.isfinite(), penalized, logits)
    if config.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    # In float64 and from the largest down, so that a tiny temperature gives the most likely token and not infinities.
    logits = ((logits - logits.amax(-1, keepdim=True)).double() / config.temperature).float()
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        kept = logits.topk(config.top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, kept.indices, kept.values)
    p = logits.softmax(-1)
    if config.top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        p = p.scatter(-1, order, ordered.masked_fill(ordered.cumsum(-1) - ordered >= config.top_p, 0.0))
    if config.min_p > 0:
        p = p.masked_fill(p < config.min_p * p.amax(-1, keepdim=True), 0.0)
    return p / p.sum(-1, keepdim=True)


def draw_tokens(
    logits: Tensor, config: SamplingConfig, seen: Tensor | None, generators: Sequence[torch.Generator], rows: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """A token for each of `rows` of logits `[B, vocab]`, drawn from `next_token_probabilities` with a number of its row's generator, which is one of the CPU:
    int64 `[B]`, 0 in the other rows, and the same on the host.

    Raises `ValueError` where the largest logit of a row is no finite number.
    """
    sound = logits.amax(-1).isfinite()
    p = next_token_probabilities(torch.where(sound[:, None], logits, 0), config, seen)
    # The first token at which the sum of the probabilities passes a number in [0, 1): all rows in a few kernels, whatever their number. -1 is passed at once.
    level = torch.full((len(logits), 1), -1.0, dtype=torch.float64)
    for row in rows:
        level[row] = 0.0 if config.temperature == 0 else torch.rand(1, dtype=torch.float64, generator=generators[row])
    sums = p.double().cumsum(-1)
    tokens = torch.searchsorted(sums, level.to(p.device, non_blocking=True) * sums[:, -1:], right=True)[:, 0]
    tokens = torch.minimum(tokens, sums.argmax(-1))  # where rounding makes the level the whole sum: the last token that has a share
    drawn: list[int] = torch.where(sound, tokens, -1).tolist()  # in one wait for the device
    if any(drawn[row] < 0 for row in rows):
        raise ValueError(
            "the model's logits are not finite, so no token can be drawn: its weights are damaged, or something in it overflows in "
            f"{str(logits.dtype).removeprefix('torch.')}; try another checkpoint, or another dtype of the weights (--dtype)"
        )
    return tokens, drawn


def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingConfig,
    eod_id: int | None = None,
    num_tokens: int | None = None,
    kv_cache: KVCacheConfig | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids after `prompt`, ending before `eod_id`: `generate_batch` for one prompt."""
    for _, token in generate_batch(model, [prompt], max_new_tokens, sampling, eod_id, num_tokens, kv_cache):
        yield token


@torch.no_grad()
def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingConfig,
    eod_id: int | None = None,
    num_tokens: int | None = None,
    kv_cache: KVCacheConfig | None = None,
) -> Iterator[tuple[int, int]]:
    """Yield pairs of a prompt's number and its next id, up to `max_new_tokens` for each, ending before `eod_id` (None: never). The model should be in eval
    mode.

    Prompts of any lengths are decoded together; what all of them begin with is computed once. Prompt i draws with the seed `sampling.seed + i`, so its text
    does not depend on the others but for rounding. Only ids below `num_tokens` are drawn (None: all): a model may have more rows than its tokenizer has
    tokens. `kv_cache` as in `memory.kv_cache`.

    Raises `ValueError` before the first token for an empty prompt, or where prompt and new tokens would pass the model's positions, and later where the model's
    logits are not finite; `OutOfMemory`, a ValueError, where the memory does not suffice for the tokens so far and the next.
    """
    _check_prompts(prompts, max_new_tokens, model.config.max_position_embeddings)
    generators = seeded_generators(sampling.seed, len(prompts))
    if max_new_tokens == 0 or not prompts:
        return
    cache = model.new_cache(len(prompts), kv_cache)
    with memory_explained(model, cache):
        yield from _decode_all(model, cache, prompts, max_new_tokens, sampling, eod_id, num_tokens, generators)


def _decode_all(
    model: Transformer,
    cache: KVCache,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingConfig,
    eod_id: int | None,
    num_tokens: int | None,
    generators: Sequence[torch.Generator],
) -> Iterator[tuple[int, int]]:
    device = next(model.parameters()).device
    decoder = Decoder(model, cache)  # before the prefill: it changes where weights lie, and by that last bits of what they give
    logits = _prefill(model, cache, prompts, device)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(len(prompts), logits.shape[-1], dtype=torch.bool, device=device)
        for number, prompt in enumerate(prompts):
            seen[number, torch.tensor(prompt, device=device)] = True
    live = list(range(len(prompts)))
    for turn in range(max_new_tokens):
        tokens, drawn = draw_tokens(logits[:, :num_tokens], sampling, None if seen is None else seen[:, :num_tokens], generators, live)
        if seen is not None:
            seen.scatter_(1, tokens[:, None], True)
        for number in live:
            if drawn[number] == eod_id:
                cache.free(number)
            else:
                yield number, drawn[number]
        live = [number for number in live if drawn[number] != eod_id]
        if not live or turn == max_new_tokens - 1:
            return
        logits = decoder(tokens)


def seeded_generators(seed: int | None, count: int) -> list[torch.Generator]:
    """Generators of the CPU, so that a seed means the same on every device, with seeds `seed`, `seed + 1`, …; None: whatever the machine makes up."""
    generators = [torch.Generator() for _ in range(count)]
    for number, generator in enumerate(generators):
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed((seed + number) % 2**63)
    return generators


def _check_prompts(prompts: Sequence[Sequence[int]], max_new_tokens: int, limit: int) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more")
    for prompt in prompts:
        if not prompt:
            raise ValueError("the prompt has no token; give at least one character")
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"{len(prompt)} prompt tokens and {max_new_tokens} new ones pass max_position_embeddings={limit}; "
                f"ask for {max(limit - len(prompt), 0)} new tokens or fewer"
            )


def _prefill(model: Transformer, cache: KVCache, prompts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Logits [B, vocab] after each prompt."""
    shortest = min(len(prompt) for prompt in prompts) - 1  # the last token gives the logits
    shared = next((i for i in range(shortest) if len({prompt[i] for prompt in prompts}) > 1), shortest) if len(prompts) > 1 else 0
    if shared:
        for chunk in torch.tensor(prompts[0][:shared], dtype=torch.int64, device=device).split(PREFILL_CHUNK):
            model(chunk, cache=cache, last_only=True)
        for number in range(1, len(prompts)):
            cache.fork(0, number)
    logits = []
    for number, prompt in enumerate(prompts):
        for chunk in torch.tensor(prompt[shared:], dtype=torch.int64, device=device).split(PREFILL_CHUNK):
            last = model(chunk, cache=cache, sequence=number, last_only=True)
        logits.append(last[-1])
    return torch.stack(logits)


def generate_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingConfig,
    stop: Sequence[str] = (),
    kv_cache: KVCacheConfig | None = None,
) -> Iterator[tuple[list[int], str]]:
    """Yield new ids with the text they complete, ending at end-of-document or before any of the `stop` texts.

    The ids of a stop text are yielded, since a token may carry more than it; its text is not.
    """
    stream, pending = TextStream(tokenizer, stop), []
    for token in generate(model, prompt_ids, max_new_tokens, sampling, tokenizer.eod_id, tokenizer.vocab_size, kv_cache):
        pending.append(token)
        piece = stream.add(token)
        if piece or stream.stopped:
            yield pending, piece
            pending = []
        if stream.stopped:
            return
    piece = stream.rest()
    if pending or piece:
        yield pending, piece


class TextStream:
    """The text of ids that come one by one. What could be the beginning of a stop text, or of a character whose bytes are not all there, waits for what
    follows; `stopped` once a stop text has come, of which nothing is given out. A token costs the same however long the text is."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if any(not text for text in stop):
            raise ValueError("a stop text is empty; leave it out")
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self._waiting = ""  # text that is not given out yet
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []  # where a token's text depends on the one before: the last ones decoded, `_known` of them, and those whose text is not whole
        self._known = 0

    def add(self, token: int) -> str:
        """What is certain now and was not before."""
        self._waiting += self._text(token)
        found = [(place + len(text), place) for text in self.stop if (place := self._waiting.find(text)) >= 0]
        if found:  # the one that is whole first, however the text is cut into tokens; of several the longest
            self.stopped = True
            return self._give(min(found)[1])
        return self._give(len(self._waiting) - max((_overlap(self._waiting, text) for text in self.stop), default=0))

    def rest(self) -> str:
        """What waited for more, once no more comes."""
        if self.tokenizer.is_byte_level:
            self._waiting += self._decoder.decode(b"", final=True)
        else:
            self._waiting += self._behind()
            self._ids = self._ids[: self._known]
        return self._give(len(self._waiting))

    def _text(self, token: int) -> str:
        if self.tokenizer.is_byte_level:
            return self._decoder.decode(self.tokenizer.decode_bytes([token]))
        self._ids.append(token)
        text = self._behind()
        # A character is at most four bytes, each at least a part of a token: what is none by then will not become one.
        if (not text or text.endswith("\ufffd")) and len(self._ids) - self._known < 4:
            return ""
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        return text

    def _behind(self) -> str:
        """The text of the ids behind those that are known."""
        return self.tokenizer.decode(self._ids)[len(self.tokenizer.decode(self._ids[: self._known])) :]

    def _give(self, end: int) -> str:
        piece, self._waiting = self._waiting[:end], self._waiting[end:]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
