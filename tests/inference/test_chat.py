"""A conversation in a cache against the same conversation computed anew for each answer."""

from __future__ import annotations

import pytest
import torch

from nsa_transformer import Transformer
from nsa_transformer.config import ConfigError, KVCacheConfig
from nsa_transformer.data.tokenizer import Tokenizer, train_tokenizer
from nsa_transformer.inference.chat import Chat
from nsa_transformer.inference.generate import SamplingConfig, generate

from ..models.small import small_model

GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["user assistant system hello there, how are you? well. " * 30], 300, chat_tokens=True)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return small_model(vocab_size=320, max_position_embeddings=400, tie_embeddings=False).eval()


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=1.0, top_k=30, seed=3, repetition_penalty=1.1)], ids=["greedy", "drawn"])
def test_answers_are_those_of_the_whole_conversation(model: Transformer, tokenizer: Tokenizer, sampling: SamplingConfig) -> None:
    chat = Chat(model, tokenizer, sampling, 20, system="be well")
    ids = chat.template.encode([{"role": "system", "content": "be well"}]).ids
    for message in ("hello there", "how are you?", "ü"):
        ids += chat.template.prompt([{"role": "user", "content": message}])
        before = len(ids)
        said = "".join(chat.say(message))
        assert chat.ids[:before] == ids
        answer = chat.ids[before : len(chat.ids) - len(chat.template.closing)]
        assert said == tokenizer.decode_bytes(answer).decode(errors="replace") and len(answer) <= 20
        if sampling is GREEDY:
            alone = list(generate(model, ids, 20, GREEDY, chat.template.end_id, tokenizer.vocab_size))
            assert answer == (alone[: alone.index(tokenizer.eod_id)] if tokenizer.eod_id in alone else alone)
        ids = list(chat.ids)
        assert ids[-len(chat.template.closing) :] == chat.template.closing
    again = Chat(model, tokenizer, sampling, 20, system="be well")
    for message in ("hello there", "how are you?", "ü"):
        list(again.say(message))
    assert again.ids == chat.ids


def test_an_answer_that_nobody_hears_to_its_end(model: Transformer, tokenizer: Tokenizer) -> None:
    chat = Chat(model, tokenizer, GREEDY, 20)
    answer = chat.say("hello there")
    next(answer)
    answer.close()
    assert chat.ids[-len(chat.template.closing) :] == chat.template.closing
    heard = len(chat.ids)
    said = "".join(chat.say("well"))
    expected = list(
        generate(model, chat.ids[: heard + len(chat.template.prompt([{"role": "user", "content": "well"}]))], 20, GREEDY, chat.template.end_id, 300)
    )
    assert said == tokenizer.decode_bytes(expected).decode(errors="replace")


@pytest.mark.parametrize("passes", [1, 6], ids=["message", "answer"])
def test_an_interrupt_in_the_middle_of_a_pass(model: Transformer, tokenizer: Tokenizer, passes: int) -> None:
    """By Ctrl-C, when the first layer has tokens that the second has not."""
    chat, left = Chat(model, tokenizer, GREEDY, 20), passes

    def interrupt(*_: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    hook = model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(chat.say("hello there"))
    hook.remove()
    asked = len(chat.template.prompt([{"role": "user", "content": "hello there"}]))
    assert len(chat.ids) == asked + passes - 1 + len(chat.template.closing)
    other = Chat(model, tokenizer, GREEDY, 20)
    other.ids = list(chat.ids)
    assert "".join(chat.say("well")) == "".join(other.say("well")) and chat.ids == other.ids, "from the cache, or from nothing"


def test_a_conversation_that_grows_too_long_is_refused_and_goes_on(model: Transformer, tokenizer: Tokenizer) -> None:
    chat = Chat(model, tokenizer, GREEDY, 30, kv_cache=KVCacheConfig("fp8", 16))
    list(chat.say("hello"))
    before = list(chat.ids)
    with pytest.raises(ValueError, match=r"an answer of 30 tokens takes \d+, and the model has max_position_embeddings=400"):
        chat.say("well. " * 400)
    assert chat.ids == before
    list(chat.say("hello"))
    assert chat.ids[: len(before)] == before and len(chat.ids) > len(before)


def test_what_cannot_chat(model: Transformer) -> None:
    plain = train_tokenizer(["no chat here " * 30], 280)
    with pytest.raises(ConfigError, match="no <|im_start|>".replace("|", r"\|")):
        Chat(model, plain, GREEDY)
    chatty = train_tokenizer(["a b c " * 30], 290, chat_tokens=True)
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        Chat(model, chatty, GREEDY, 0)
    with pytest.raises(ValueError, match=r"for an answer of max_new_tokens=400.*max_position_embeddings=400; ask for at most (\d+)$") as caught:
        Chat(model, chatty, GREEDY, 400)
    most = int(str(caught.value).split()[-1])
    assert "".join(Chat(model, chatty, GREEDY, most).say("")) is not None
    with pytest.raises(ValueError, match=f"ask for at most {most}$"):
        Chat(model, chatty, GREEDY, most + 1)
    with pytest.raises(ValueError, match=r"write a shorter system message$"):
        Chat(model, chatty, GREEDY, 20, system="x y z " * 200)


def test_the_model_is_left_without_gradients(model: Transformer, tokenizer: Tokenizer) -> None:
    list(Chat(model, tokenizer, GREEDY, 3).say("hello"))
    assert torch.is_grad_enabled()
