"""Byte-level BPE on the `tokenizers` library: lossless for any text, linear in its length."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nsa_transformer.config import ConfigError
from nsa_transformer.utils.files import write_atomic

__all__ = ["CHAT_END", "CHAT_START", "END_OF_DOCUMENT", "PATTERN", "Tokenizer", "cut_text", "train_tokenizer"]

END_OF_DOCUMENT = "<|endoftext|>"
CHAT_START, CHAT_END = "<|im_start|>", "<|im_end|>"  # ChatML's markers of a message; see chat.py
MIN_VOCAB_SIZE = 257  # the 256 bytes and end of document
_END_NAMES = (END_OF_DOCUMENT, "</s>", "<|end_of_text|>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>")

# Pieces that merges never cross. The bounds keep the work per character constant: without them a long run of one
# class of characters is a single piece, and both the regex and the merging inside it grow faster than its length.
PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]{1,64}",  # a word with the space or sign before it
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]{1,64}[\r\n]{0,16}",  # punctuation with the newlines after it
        r"\s{0,64}[\r\n]{1,16}",  # blank space up to the last newline
        r"\s{1,64}(?!\S)",  # indentation, less the last space, which goes to the word
        r"\s{1,64}",
    )
)
# Places where PATTERN always ends a piece: no alternative holds a letter or digit followed by blank space, or a newline
# followed by one. Text on both sides therefore encodes to the same tokens apart as together.
_CUT = re.compile(r"[A-Za-z0-9](?=[ \n])|\n(?=[A-Za-z0-9])")
_CUT_SIZE = 1 << 18  # characters; the library needs some 100 bytes of memory per character it encodes at once
_BATCH_SIZE = 1 << 22


def cut_text(text: str, size: int = _CUT_SIZE) -> list[str]:
    """`text` in parts of at least `size` characters (the last may be shorter), cut only where `PATTERN` always ends a piece."""
    parts, start = [], 0
    while len(text) - start > size:
        match = _CUT.search(text, start + size - 1)
        if match is None:
            break
        parts.append(text[start : match.end()])
        start = match.end()
    parts.append(text[start:])
    return parts


class Tokenizer:
    """Text to token ids and back. Make one with `train_tokenizer` or `Tokenizer.load`."""

    def __init__(self, content: str) -> None:
        """`content` is the text of a tokenizer.json. Raises `ConfigError` if it is none, or has no end-of-document token."""
        import tokenizers

        try:
            spec = json.loads(content)
            spec["truncation"] = spec["padding"] = None
            self.eod_token, self.eod_id = _mark_end_of_document(spec)
            for name in (CHAT_START, CHAT_END):
                _mark_special(spec, name)
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except ConfigError:
            raise
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise ConfigError(f"not a valid tokenizer.json ({error})") from None
        self._backend.encode_special_tokens = True  # the name of a special token in a text is text
        self._spec = spec
        self._cuttable = spec.get("pre_tokenizer") == _pre_tokenizer_spec() and spec.get("normalizer") is None
        if self.eod_id in self.encode(self.eod_token):
            raise ConfigError(f"reads the text {self.eod_token!r} as its end-of-document token, so documents could not be told apart")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a tokenizer.json, or the one in a folder (a run, an export). Raises `ConfigError` naming the file."""
        file = Path(path).expanduser()
        if file.is_dir():
            file = file / "tokenizer.json"
        try:
            content = file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"there is no tokenizer at {file}; name a tokenizer.json, or a folder or run that has one") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the tokenizer at {file} cannot be read: {error}") from None
        try:
            return cls(content)
        except ConfigError as error:
            raise ConfigError(f"the tokenizer at {file}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizer.json at `path` (or into the folder `path`), whole or not at all."""
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, self.to_json())
        except OSError as error:
            raise ConfigError(f"the tokenizer cannot be written to {file}: {error.strerror or error}") from None

    def to_json(self) -> str:
        """The text of a tokenizer.json."""
        return self._backend.to_str(pretty=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with nothing added. Raises `ValueError` on a lone surrogate, which is no character."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        parts: list[str] = []
        counts = []
        for text in texts:
            cut = cut_text(text) if self._cuttable else [text]
            parts += cut
            counts.append(len(cut))
        encoded = self._encode_parts(parts)
        return [_joined([next(encoded) for _ in range(count)]) for count in counts]

    def _encode_parts(self, parts: list[str]) -> Iterator[list[int]]:
        start = 0
        while start < len(parts):
            stop, size = start, 0
            while stop < len(parts) and (stop == start or size + len(parts[stop]) <= _BATCH_SIZE):
                size += len(parts[stop])
                stop += 1
            batch = parts[start:stop]
            try:
                encodings = self._backend.encode_batch_fast(batch, add_special_tokens=False)
            except (TypeError, UnicodeEncodeError):
                for part in batch:
                    part.encode("utf-8")  # names the character; UnicodeEncodeError is a ValueError
                raise
            yield from (encoding.ids for encoding in encodings)
            start = stop

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens stand for none. Bytes that form no character become U+FFFD."""
        listed = [int(i) for i in ids]
        for i in listed:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return self._backend.decode(listed, skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of token ids, exact for byte-level BPE also where a character is cut in the middle; else those of `decode`."""
        if not self._is_byte_level:
            return self.decode(ids).encode()
        return b"".join(self._token_bytes[int(i)] for i in ids)

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(self._spec.get("decoder"))

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        """Bytes of each id of a byte-level vocabulary, which writes byte b as one printable character: as chr(b) where that is one,
        and as chr(256), chr(257), … for the others in order (GPT-2's alphabet)."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in printable]
        byte_of = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
        table = [b""] * self.vocab_size
        for token, i in self._backend.get_vocab(with_added_tokens=False).items():
            if self.byte_lengths[i]:
                table[i] = bytes(byte_of[c] for c in token)
        for added in self._spec["added_tokens"]:
            table[added["id"]] = b"" if added["special"] else added["content"].encode()
        return table

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens by name. No text encodes to one, and `decode` passes over them."""
        return {added["content"]: added["id"] for added in self._spec["added_tokens"] if added["special"]}

    def with_chat_tokens(self) -> Tokenizer:
        """This tokenizer with <|im_start|> and <|im_end|> behind its last token, so that no other id moves; itself where it has both."""
        spec = json.loads(self.to_json())
        for name in (CHAT_START, CHAT_END):
            if _mark_special(spec, name) is None:
                taken = [*_vocabulary(spec).values(), *(added["id"] for added in spec["added_tokens"])]
                _add_special(spec, name, max(taken) + 1)
        return Tokenizer(json.dumps(spec))

    @cached_property
    def vocab_size(self) -> int:
        """Highest token id + 1: the rows that an embedding needs."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """int64 [vocab_size], UTF-8 bytes that each token stands for, special tokens 0.

        Exact for byte-level BPE. For SentencePiece-like vocabularies, where a token can lose a leading space, the bytes of its own text.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in self._backend.get_vocab(with_added_tokens=False).items():
            if self._is_byte_level:
                lengths[i] = len(token)  # one character of the byte alphabet per byte
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                lengths[i] = 1
            else:
                lengths[i] = len(token.replace("\u2581", " ").encode())
        for added in self._spec["added_tokens"]:
            lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
        return lengths

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content: equal tokenizers have equal ones, whatever file they came from."""
        canonical = json.dumps(json.loads(self._backend.to_str()), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def train_tokenizer(texts: Iterable[str], vocab_size: int, progress: Callable[[int], None] | None = None, *, chat_tokens: bool = False) -> Tokenizer:
    """Byte-level BPE of at most `vocab_size` tokens, fewer where the texts hold too little to merge. Deterministic.

    Ids: end of document, the 256 bytes, merges in the order they were made, and with `chat_tokens` <|im_start|> and <|im_end|> last.
    These two therefore move no other id; they take the place of the last two merges.
    `progress` is called with the characters read so far. Raises `ConfigError` for a vocabulary below 257, or 259 with `chat_tokens`.
    """
    least = MIN_VOCAB_SIZE + 2 * chat_tokens
    if vocab_size < least:
        raise ConfigError(
            f"vocab_size={vocab_size} is too small for a byte-level tokenizer: 256 bytes and {least - 256} special tokens need {least}; "
            f"write model.vocab_size={least} or more"
        )
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2 * chat_tokens,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def parts() -> Iterator[str]:
        read = 0
        for text in texts:
            for part in cut_text(text):
                yield part
                read += len(part)
                if progress is not None:
                    progress(read)

    backend.train_from_iterator(parts(), trainer)
    tokenizer = Tokenizer(backend.to_str())
    return tokenizer.with_chat_tokens() if chat_tokens else tokenizer


def _pre_tokenizer() -> Any:
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pre_tokenizer_spec() -> Any:
    """How `_pre_tokenizer` reads in a tokenizer.json: texts may only be cut for a tokenizer whose pattern is `PATTERN`."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    backend = Backend(models.BPE())
    backend.pre_tokenizer = _pre_tokenizer()
    return json.loads(backend.to_str())["pre_tokenizer"]


def _mark_end_of_document(spec: dict[str, Any]) -> tuple[str, int]:
    """Find the end-of-document token of a tokenizer.json and make sure that it is declared special."""
    for name in _END_NAMES:
        token = _mark_special(spec, name)
        if token is not None:
            return name, token
    raise ConfigError(f"it has no end-of-document token; one of {', '.join(_END_NAMES)} must be in its vocabulary")


def _mark_special(spec: dict[str, Any], name: str) -> int | None:
    """The id of the token `name`, which is declared special from then on; None where there is no such token."""
    for entry in spec["added_tokens"]:
        if entry["content"] == name:
            entry["special"] = True
            return entry["id"]
    token = _vocabulary(spec).get(name)
    if token is not None:
        _add_special(spec, name, token)
    return token


def _vocabulary(spec: dict[str, Any]) -> dict[str, int]:
    """Ids by token, without the added ones."""
    vocab = spec["model"].get("vocab", {})
    return vocab if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}  # Unigram: a list of [token, score]


def _add_special(spec: dict[str, Any], name: str, token: int) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"].append({"id": token, "content": name, **flags})
    spec["added_tokens"].sort(key=lambda entry: entry["id"])


def _joined(parts: list[list[int]]) -> list[int]:
    return parts[0] if len(parts) == 1 else [i for part in parts for i in part]
