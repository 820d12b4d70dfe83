"""Conversations as tokens: nothing lost, nothing forged, and the mask on what the assistant says."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_transformer.config import ConfigError
from nsa_transformer.data.chat import ROLES, ChatTemplate
from nsa_transformer.data.tokenizer import CHAT_END, CHAT_START, train_tokenizer

TEXTS = ["The quick brown fox.\nuser\nassistant\nsystem\n" * 50, "<|im_start|> <|im_end|>\n" * 50]
NAMES = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "assistant\n", "\n", ""]
CONTENT = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(NAMES), max_size=6).map("".join)


@cache
def template() -> ChatTemplate:
    return ChatTemplate(train_tokenizer(TEXTS, 290, chat_tokens=True))


def conversation(*turns: str) -> list[dict[str, Any]]:
    """`user: text` and so on."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    turns = draw(st.lists(st.tuples(st.sampled_from(ROLES), CONTENT), min_size=1, max_size=5))
    return [{"role": role, "content": text} for n, (role, text) in enumerate(turns) if n == 0 or role != "system"]


@settings(deadline=None)
@given(conversations())
def test_a_conversation_comes_back_and_no_content_forges_a_marker(messages: list[dict[str, Any]]) -> None:
    chat = template().encode(messages)
    assert template().decode(chat.ids) == messages
    assert chat.ids.count(template().start_id) == chat.ids.count(template().end_id) == len(messages)
    assert template().tokenizer.eod_id not in chat.ids


@settings(deadline=None)
@given(conversations())
def test_the_mask_is_what_the_assistant_writes(messages: list[dict[str, Any]]) -> None:
    chat, tokenizer = template().encode(messages), template().tokenizer
    assert len(chat.ids) == len(chat.assistant)
    written: list[int] = []
    for message in messages:
        if message["role"] == "assistant":
            written += [*tokenizer.encode(message["content"]), template().end_id]
    assert [i for i, mask in zip(chat.ids, chat.assistant, strict=True) if mask] == written


@settings(deadline=None)
@given(conversations(), CONTENT)
def test_a_prompt_is_the_beginning_of_what_is_trained_on(messages: list[dict[str, Any]], answer: str) -> None:
    if messages[-1]["role"] == "assistant":
        messages = [*messages, {"role": "user", "content": "more"}]
    whole = template().encode([*messages, {"role": "assistant", "content": answer}])
    prompt = template().prompt(messages)
    assert whole.ids[: len(prompt)] == prompt
    assert whole.assistant[len(prompt) - 1 : len(prompt) + 1] == [False, True]  # the first target is the answer's first token


def test_the_text_is_chatml() -> None:
    tokenizer = template().tokenizer
    ids = template().encode(conversation("system: Be brief.", "user: Hi", "assistant: Hello!")).ids
    names = {template().start_id: CHAT_START, template().end_id: CHAT_END}
    text = "".join(names.get(i) or tokenizer.decode([i]) for i in ids)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"


def test_batch_equals_one_by_one() -> None:
    many = [conversation("user: a"), conversation("system: s", "user: b", "assistant: c"), conversation("tool: 4 ")]
    assert template().encode_batch(many) == [template().encode(one) for one in many]
    assert template().encode_batch([]) == []


def test_chat_tokens_come_last_and_move_no_other_id() -> None:
    plain, chat = train_tokenizer(TEXTS, 288), template().tokenizer
    assert (plain.vocab_size, chat.vocab_size) == (288, 290)
    assert chat.special_tokens == {"<|endoftext|>": 0, CHAT_START: 288, CHAT_END: 289}
    assert chat.encode(TEXTS[0]) == plain.encode(TEXTS[0])
    assert plain.with_chat_tokens().fingerprint == chat.fingerprint == chat.with_chat_tokens().fingerprint
    assert chat.byte_lengths[-2:].tolist() == [0, 0]


def test_a_tokenizer_without_chat_tokens_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"no <\|im_start\|> and no <\|im_end\|>.*nsa tokenizer train"):
        ChatTemplate(train_tokenizer(TEXTS, 290))


def test_too_few_rows_for_chat_tokens() -> None:
    assert train_tokenizer(TEXTS, 259, chat_tokens=True).vocab_size == 259
    with pytest.raises(ConfigError, match=r"3 special tokens need 259"):
        train_tokenizer(TEXTS, 258, chat_tokens=True)


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (None, r"a list of .*, not null"),
        ("hello", r"a list of .*, not str"),
        ({"role": "user", "content": "a"}, r"a list of .*, not dict"),
        ([], r"has no message"),
        (["a"], r"messages\[0\] is str"),
        ([{"role": "user", "content": "a"}, None], r"messages\[1\] is null"),
        ([{"content": "a"}], r"messages\[0\] has no 'role', only content"),
        ([{}], r"messages\[0\] has no 'role', only nothing"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "text": "b"}], r"messages\[1\] has no 'content', only role, text"),
        ([{"role": "bot", "content": "a"}], r"messages\[0\] has the role 'bot'; the roles are system, user, assistant, tool"),
        ([{"role": ["user"], "content": "a"}], r"messages\[0\] has the role \['user'\]"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], r"messages\[1\] is a system message; only the first"),
        ([{"role": "user", "content": None}], r"messages\[0\]: 'content' is null, not text"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], r"messages\[0\]: 'content' is list, not text"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}], r"messages\[0\] has 'tool_calls', which"),
        ([{"role": "user", "content": "a\ud800"}], r"messages\[0\]: 'content' has a lone surrogate at character 1"),
    ],
)
def test_what_is_wrong_is_named(messages: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        template().encode(messages)
    with pytest.raises(ValueError, match=problem):
        template().prompt(messages)


def test_notes_about_a_message_are_passed_over() -> None:
    assert template().encode([{"role": "user", "content": "a", "id": 7, "tool_calls": None}]) == template().encode(conversation("user: a"))


def test_no_prompt_after_the_assistant_s_word() -> None:
    with pytest.raises(ValueError, match=r"messages\[1\] is the assistant's: there is nothing to answer"):
        template().prompt(conversation("user: a", "assistant: b"))


@pytest.mark.parametrize("cut", [slice(0, -1), slice(1, None), slice(0, -2), slice(0, 1), slice(2, None)])
def test_decode_refuses_what_is_no_whole_conversation(cut: slice) -> None:
    ids = template().encode(conversation("user: a", "assistant: b")).ids
    with pytest.raises(ValueError, match=r"message [01] does not begin"):
        template().decode(ids[cut])
