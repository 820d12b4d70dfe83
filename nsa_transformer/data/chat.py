"""Conversations as token ids: ChatML, with a mask of what the assistant says.

    <|im_start|>user⏎What is 2 + 2?<|im_end|>⏎<|im_start|>assistant⏎4<|im_end|>⏎

The two markers are special tokens, which no text encodes to. A message that holds their names holds them as text, so nothing written
in a message can end it or speak for another role. The text of a message is taken as it is: `ChatTemplate.decode` gives it back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nsa_transformer.config import ConfigError
from nsa_transformer.data.tokenizer import CHAT_END, CHAT_START, Tokenizer

__all__ = ["ROLES", "ChatTemplate", "ChatTokens", "check_conversation"]

ROLES = ("system", "user", "assistant", "tool")
# What belongs to a message and is not in its content. Other keys are notes about it, as columns are that nobody asked for.
_CARRIES_TEXT = ("tool_calls", "function_call", "reasoning_content", "thinking")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTokens:
    """A conversation as token ids.

    ids        whole numbers; no end-of-document among them
    assistant  as many bools: True where the token is one that the assistant writes, its content and the <|im_end|> that ends it.
               A loss on the assistant alone keeps the targets that are such tokens.
    """

    ids: list[int]
    assistant: list[bool]


class ChatTemplate:
    """Renders conversations for a tokenizer that has <|im_start|> and <|im_end|> as special tokens.

    start_id, end_id: their ids; an answer that is generated ends at `end_id`. closing: the ids behind the content of each message.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises `ConfigError` naming the tokens that the tokenizer lacks."""
        missing = [name for name in (CHAT_START, CHAT_END) if name not in tokenizer.special_tokens]
        if missing:
            raise ConfigError(
                f"the tokenizer has no {' and no '.join(missing)}, so it cannot tell the turns of a conversation apart; "
                "take one made by `nsa tokenizer train` or another with ChatML's tokens"
            )
        self.tokenizer = tokenizer
        self.start_id, self.end_id = tokenizer.special_tokens[CHAT_START], tokenizer.special_tokens[CHAT_END]
        self._header = {role: tokenizer.encode(f"{role}\n") for role in ROLES}
        self._newline = tokenizer.encode("\n")
        self.closing = [self.end_id, *self._newline]  # what follows the content of each message

    def encode(self, messages: Sequence[Message]) -> ChatTokens:
        """Token ids of a whole conversation, a list of {"role": …, "content": …}.

        Roles are system (first message only), user, assistant and tool. Raises `ValueError` naming the message, counted from 0, and what is
        wrong with it: an unknown role, content that is no text, tool calls or other text outside of `content`.
        """
        return self.encode_batch([messages])[0]

    def encode_batch(self, conversations: Sequence[Sequence[Message]]) -> list[ChatTokens]:
        """`encode` of each conversation, with all their contents in one `Tokenizer.encode_batch`."""
        for messages in conversations:
            check_conversation(messages)
        contents = iter(self.tokenizer.encode_batch([message["content"] for messages in conversations for message in messages]))
        return [self._join(messages, [next(contents) for _ in messages]) for messages in conversations]

    def _join(self, messages: Sequence[Message], contents: list[list[int]]) -> ChatTokens:
        ids: list[int] = []
        assistant: list[bool] = []
        for message, content in zip(messages, contents, strict=True):
            header = self._header[message["role"]]
            ids += [self.start_id, *header, *content, *self.closing]
            written = [message["role"] == "assistant"] * (len(content) + 1)
            assistant += [False] * (1 + len(header)) + written + [False] * len(self._newline)
        return ChatTokens(ids, assistant)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant's next answer begins.

        They are the ones that `encode` gives for the conversation with that answer, so a model meets what it was trained on.
        Raises `ValueError` as `encode` does, and where the last word is the assistant's already.
        """
        ids = self.encode(messages).ids
        if messages[-1]["role"] == "assistant":
            raise ValueError(f"messages[{len(messages) - 1}] is the assistant's: there is nothing to answer; end with a user's message")
        return [*ids, self.start_id, *self._header["assistant"]]

    def decode(self, ids: Sequence[int]) -> list[dict[str, str]]:
        """The messages of what `encode` made: exactly those, where the tokenizer loses nothing.

        Raises `ValueError` where the ids are no whole conversation.
        """
        messages: list[dict[str, str]] = []
        listed = [int(i) for i in ids]
        at = 0
        while at < len(listed):
            try:
                end = listed.index(self.end_id, at)
            except ValueError:
                end = at
            if listed[at] != self.start_id or end == at:
                raise ValueError(f"message {len(messages)} does not begin with {CHAT_START} or does not end with {CHAT_END}")
            role = next((role for role, header in self._header.items() if listed[at + 1 : at + 1 + len(header)] == header), None)
            following = end + 1 + len(self._newline)
            if role is None or listed[end + 1 : following] != self._newline:
                raise ValueError(f"message {len(messages)} does not begin with one of the roles {', '.join(ROLES)}, or no newline follows it")
            messages.append({"role": role, "content": self.tokenizer.decode(listed[at + 1 + len(self._header[role]) : end])})
            at = following
        return messages


def check_conversation(messages: object) -> None:
    """Raises `ValueError` where `messages` is no conversation as `ChatTemplate.encode` takes them."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise ValueError(f'a conversation is a list of {{"role": …, "content": …}}, not {_kind(messages)}')
    if not messages:
        raise ValueError("a conversation has no message; leave it out")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f'{where} is {_kind(message)}, not an object with "role" and "content"')
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"{where} has no {key!r}, only {', '.join(map(str, message)) or 'nothing'}")
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise ValueError(f"{where} has the role {role!r}; the roles are {', '.join(ROLES)}")
        if role == "system" and index:
            raise ValueError(f"{where} is a system message; only the first message can be one")
        if not isinstance(content, str):
            raise ValueError(f"{where}: 'content' is {_kind(content)}, not text")
        for key in _CARRIES_TEXT:
            if message.get(key):
                raise ValueError(f"{where} has {key!r}, which the template does not write; put it into 'content' as text, or leave it out")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: 'content' has a lone surrogate at character {error.start}, which is no character") from None


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__
