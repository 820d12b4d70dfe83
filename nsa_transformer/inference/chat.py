"""A conversation with a model: what has been said stays in the cache, and only what is new is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nsa_transformer.config import KVCacheConfig
from nsa_transformer.data.chat import ChatTemplate
from nsa_transformer.data.tokenizer import Tokenizer
from nsa_transformer.inference.decoder import Decoder
from nsa_transformer.inference.faults import OutOfMemory, memory_explained
from nsa_transformer.inference.generate import PREFILL_CHUNK, SamplingConfig, TextStream, draw_tokens, seeded_generators
from nsa_transformer.models.transformer import Transformer


class Chat:
    """`for piece in chat.say("Hello"): print(piece, end="")`. The model should be in eval mode.

    Args:
        system: a first message that says how to answer; None: none.
        max_new_tokens: of one answer, which then ends as if it were finished.
        kv_cache: as in `memory.kv_cache`.

    Raises:
        ValueError: no message would leave room for an answer; a ConfigError where the tokenizer has no tokens for the turns of a conversation.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        sampling: SamplingConfig,
        max_new_tokens: int = 512,
        system: str | None = None,
        kv_cache: KVCacheConfig | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        self.template = ChatTemplate(tokenizer)
        self.model, self.sampling, self.max_new_tokens = model, sampling, max_new_tokens
        self.ids: list[int] = []  # of the conversation; the cache holds all but the last few
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        limit = model.config.max_position_embeddings
        least = len(self.template.prompt([*self._opening, {"role": "user", "content": ""}]))
        if least + max_new_tokens > limit:
            instead = f"ask for at most {limit - least}" if least < limit else "write a shorter system message"
            raise ValueError(
                f"no message leaves room for an answer of max_new_tokens={max_new_tokens}: the turns around it and the system message take {least} tokens, "
                f"and the model has max_position_embeddings={limit}; {instead}"
            )
        self._cache = model.new_cache(1, kv_cache)
        self._decoder = Decoder(model, self._cache)
        self._device = next(model.parameters()).device
        (self._generator,) = seeded_generators(sampling.seed, 1)

    def say(self, text: str) -> Iterator[str]:
        """The answer to `text`, in pieces as they become certain.

        Raises `ValueError`, before anything is computed, where the conversation and an answer of `max_new_tokens` would pass the model's positions: it
        is then as it was before. Raises `OutOfMemory`, a ValueError, where the memory does not suffice: what was heard of the answer stays, and where that
        is nothing the conversation is as it was before.
        """
        new = self.template.prompt([*self._opening, {"role": "user", "content": text}])
        limit = self.model.config.max_position_embeddings
        needed = len(self.ids) + len(new) + self.max_new_tokens
        if needed > limit:
            raise ValueError(
                f"the conversation with this message and an answer of {self.max_new_tokens} tokens takes {needed}, and the model has "
                f"max_position_embeddings={limit}; say less, ask for shorter answers, or begin anew"
            )
        return self._answer(new)

    @torch.no_grad()
    def _answer(self, new: list[int]) -> Iterator[str]:
        before = self._opening, self.ids
        self._opening, self.ids = [], self.ids + new
        asked = len(self.ids)
        try:
            with memory_explained(self.model, self._cache):
                yield from self._decode()
        except GeneratorExit:  # between two tokens
            raise
        except BaseException as error:  # Ctrl-C too may come when some layers have the last tokens and others not
            self._cache = self.model.new_cache(1, self._cache.settings)  # the next answer computes all of the conversation anew
            self._decoder = Decoder(self.model, self._cache)
            if isinstance(error, OutOfMemory) and len(self.ids) == asked:
                self._opening, self.ids = before
            raise
        finally:  # whoever stops listening has heard an answer that ends here
            if self.ids is not before[1]:
                self.ids += self.template.closing

    def _decode(self) -> Iterator[str]:
        tokenizer, answer = self.template.tokenizer, TextStream(self.template.tokenizer)
        count = tokenizer.vocab_size  # a model may have more rows
        for chunk in torch.tensor(self.ids[self._cache.length :], device=self._device).split(PREFILL_CHUNK):
            logits = self.model(chunk, cache=self._cache, last_only=True)
        seen = torch.zeros(count, dtype=torch.bool, device=self._device)
        seen[torch.tensor(self.ids, device=self._device)] = True
        for turn in range(self.max_new_tokens):
            token, (number,) = draw_tokens(logits[-1:, :count], self.sampling, seen, [self._generator], [0])
            if number in (self.template.end_id, tokenizer.eod_id):
                break
            self.ids.append(number)
            seen[token] = True
            if piece := answer.add(number):
                yield piece
            if turn < self.max_new_tokens - 1:
                logits = self._decoder(token)
        if piece := answer.rest():
            yield piece
