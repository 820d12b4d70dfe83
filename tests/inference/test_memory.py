"""A cache that outgrows the memory: one message, and a conversation that is whole afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nsa_transformer import Transformer
from nsa_transformer.config import KVCacheConfig
from nsa_transformer.data.tokenizer import Tokenizer, train_tokenizer
from nsa_transformer.inference.chat import Chat
from nsa_transformer.inference.faults import OutOfMemory
from nsa_transformer.inference.generate import SamplingConfig, generate_batch
from nsa_transformer.models import cache as cache_module
from nsa_transformer.training.faults import describe_out_of_memory
from tests.runs import small_config as run_config

from ..models.small import random_tokens, small_model

GREEDY = SamplingConfig(temperature=0)
TOO_MUCH = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of …"


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """`pages(n)`: from now on no pool of the second layer gets more than n pages; None: as many as it likes."""
    limit: list[int | None] = [None]
    grow = cache_module.SparseLayerCache._pool

    def pool(self: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, count: int) -> None:
        if limit[0] is not None and count > limit[0] and self is self.owner.layers[1] and name == "v_slc":  # in the middle of a step
            raise torch.OutOfMemoryError(TOO_MUCH)
        grow(self, name, shape, dtype, device, count)

    def set_limit(count: int | None) -> None:
        limit[0] = count

    monkeypatch.setattr(cache_module.SparseLayerCache, "_pool", pool)
    return set_limit


@pytest.fixture(scope="module")
def model() -> Transformer:
    return small_model(vocab_size=320, max_position_embeddings=2000, tie_embeddings=False).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["user assistant system hello there, how are you? well. " * 30], 300, chat_tokens=True)


def test_generation_says_how_far_it_came(model: Transformer, pages: Callable[[int | None], None]) -> None:
    prompts = [random_tokens(100).tolist(), random_tokens(90, 1).tolist()]
    pages(3)  # page 0 and one of 128 tokens for each
    found = []
    with pytest.raises(OutOfMemory) as caught:
        for pair in generate_batch(model, prompts, 60, GREEDY):
            found.append(pair)
    message = str(caught.value)
    assert len(found) == 2 * 29, "28 steps fill the first one's page"
    assert "as the cache grew to 248 tokens in 2 sequences; so far it takes 0.000 GiB" in message and message.count("\n") == 0
    for help in ("--kv-cache fp8", "fewer prompts at once", "--max-new-tokens", "--dtype bfloat16", "Tried to allocate 2.00 GiB"):
        assert help in message
    assert isinstance(caught.value, ValueError)
    pages(1)
    with pytest.raises(OutOfMemory) as caught:
        list(generate_batch(model, prompts[:1], 5, GREEDY, kv_cache=KVCacheConfig("fp8", 16)))
    assert "--kv-cache" not in str(caught.value) and "prompts at once" not in str(caught.value)


def test_other_errors_stay_what_they_are(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(cache_module.SparseLayerCache, "_pool", broken)
    with pytest.raises(RuntimeError, match="a shape is wrong") as caught:
        list(generate_batch(model, [[1, 2]], 3, GREEDY))
    assert not isinstance(caught.value, ValueError)


def test_training_knows_it_for_what_it_is(tmp_path: Any) -> None:
    """Its sample is generated too."""
    message = describe_out_of_memory(OutOfMemory("out of memory as the cache grew"), "finishing", run_config(tmp_path))
    assert message is not None and message.startswith("out of memory while finishing") and issubclass(OutOfMemory, RuntimeError)


def test_a_conversation_is_whole_afterwards(model: Transformer, tokenizer: Tokenizer, pages: Callable[[int | None], None]) -> None:
    chat, same = (Chat(model, tokenizer, GREEDY, 60, system="be well") for _ in range(2))
    pages(2)
    with pytest.raises(OutOfMemory, match="--kv-cache fp8"):
        list(chat.say("well. " * 60))  # no room for the message: as if it had not been said
    assert chat.ids == []
    first = "".join(chat.say("hello there"))
    pages(None)
    assert first == "".join(same.say("hello there")) and chat.ids == same.ids, "the system's message is still there"
    pages(2)
    heard, before = [], list(chat.ids)
    with pytest.raises(OutOfMemory):
        for piece in chat.say("how are you?"):
            heard.append(piece)
    assert heard and chat.ids[: len(before)] == before and chat.ids[-len(chat.template.closing) :] == chat.template.closing, "cut in its middle"
    pages(None)
    other = Chat(model, tokenizer, GREEDY, 60)
    other.ids = list(chat.ids)
    assert "".join(chat.say("well")) == "".join(other.say("well")) and chat.ids == other.ids, "from the cache, or from nothing"
