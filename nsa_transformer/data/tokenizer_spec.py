"""The content of a tokenizer.json: its special tokens, and whether its pieces are this project's."""

from __future__ import annotations

import json
import re
from typing import Any

from nsa_transformer.config import ConfigError
from nsa_transformer.data.pieces import BYTE_ALPHABET, PATTERN

__all__ = [
    "CHAT_END",
    "CHAT_START",
    "END_OF_DOCUMENT",
    "add_special",
    "has_our_pieces",
    "mark_end_of_document",
    "mark_special",
    "open_backend",
    "our_pre_tokenizer",
    "vocabulary",
]

END_OF_DOCUMENT = "<|endoftext|>"
CHAT_START, CHAT_END = "<|im_start|>", "<|im_end|>"  # ChatML's markers of a message; see chat.py
_END_NAMES = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>")

Spec = dict[str, Any]


def mark_end_of_document(spec: Spec) -> tuple[str, int]:
    """Find the end-of-document token of a tokenizer.json and make sure that it is declared special."""
    for name in _END_NAMES:
        token = mark_special(spec, name)
        if token is not None:
            return name, token
    raise ConfigError(f"it has no end-of-document token; one of {', '.join(_END_NAMES)} must be in its vocabulary")


def mark_special(spec: Spec, name: str) -> int | None:
    """The id of the token `name`, which is declared special from then on; None where there is no such token."""
    for entry in spec["added_tokens"]:
        if entry["content"] == name:
            entry["special"] = True
            return entry["id"]
    token = vocabulary(spec).get(name)
    if token is not None:
        add_special(spec, name, token)
    return token


def vocabulary(spec: Spec) -> dict[str, int]:
    """Ids by token, without the added ones."""
    listed = spec["model"].get("vocab", {})
    return listed if isinstance(listed, dict) else {token: i for i, (token, _) in enumerate(listed)}  # Unigram: a list of [token, score]


def add_special(spec: Spec, name: str, token: int) -> None:
    """Declare `name` a special token with the id `token`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"].append({"id": token, "content": name, **flags})
    spec["added_tokens"].sort(key=lambda entry: entry["id"])


def our_pre_tokenizer() -> Any:
    """The library's way to the pieces of `PATTERN`, as bytes."""
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def open_backend(spec: Spec) -> Any:
    """The library's tokenizer, to which the name of a special token in a text is text."""
    import tokenizers

    def from_spec() -> Any:
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        backend.encode_special_tokens = True
        return backend

    backend = from_spec()
    # Some models have the names in their own vocabulary too (Unigram) and would find them there. They are shown no name whole.
    special = [(added["content"], added["id"]) for added in spec["added_tokens"] if added["special"] and len(added["content"]) > 1]
    found = [name for name, token in special if token in backend.encode(name, add_special_tokens=False).ids]
    if found:
        inside = "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in found)
        split = {"type": "Split", "pattern": {"Regex": inside}, "behavior": "Isolated", "invert": False}
        before = spec.get("pre_tokenizer")
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*([before] if before else []), split]}
        backend = from_spec()
    return backend


def has_our_pieces(spec: Spec) -> bool:
    """Whether the ids of a text are those of its `PATTERN` pieces, each encoded for itself as bytes: a tokenizer that `train_tokenizer` made."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    backend = Backend(models.BPE())
    backend.pre_tokenizer = our_pre_tokenizer()
    ours = json.loads(backend.to_str())
    model = spec["model"]
    return (
        spec.get("pre_tokenizer") == ours["pre_tokenizer"]
        and spec.get("normalizer") is None
        and all(added["special"] for added in spec["added_tokens"])  # others are looked for in the text before it is split
        and all(model.get(key, value) == value for key, value in ours["model"].items() if key not in ("vocab", "merges"))  # no dropout, no affixes
        and all(character in model["vocab"] for character in BYTE_ALPHABET)
    )
