"""Byte-level BPE: lossless for any bytes, linear in their number. Stored as a tokenizer.json, of which any other can be loaded."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from nsa_transformer.config import ConfigError
from nsa_transformer.data.bpe import learn_merges
from nsa_transformer.data.pieces import BYTE_ALPHABET, PATTERN, PieceTable, cut_text, split_pieces
from nsa_transformer.data.tokenizer_spec import (
    CHAT_END,
    CHAT_START,
    END_OF_DOCUMENT,
    add_special,
    has_our_pieces,
    mark_end_of_document,
    mark_special,
    open_backend,
    our_pre_tokenizer,
    vocabulary,
)
from nsa_transformer.utils.files import expand_home, write_atomic

__all__ = ["CHAT_END", "CHAT_START", "END_OF_DOCUMENT", "PATTERN", "Tokenizer", "cut_text", "train_tokenizer"]

MIN_VOCAB_SIZE = 257  # the 256 bytes and end of document
_BATCH_SIZE = 1 << 22  # characters that the library encodes at once
_STREAM_SIZE = 1 << 18  # characters of a stream that are encoded at once


class Tokenizer:
    """Text to token ids and back. Make one with `train_tokenizer` or `Tokenizer.load`."""

    def __init__(self, content: str) -> None:
        """`content` is the text of a tokenizer.json. Raises `ConfigError` if it is none, or has no end-of-document token."""
        try:
            spec = json.loads(content)
            spec["truncation"] = spec["padding"] = None
            self.eod_token, self.eod_id = mark_end_of_document(spec)
            for name in (CHAT_START, CHAT_END):
                mark_special(spec, name)
            self._backend = open_backend(spec)
        except ConfigError:
            raise
        except Exception as error:  # the library raises bare Exception for whatever it cannot read
            raise ConfigError(f"not a valid tokenizer.json ({error})") from None
        self._spec = spec
        self._pieces = PieceTable(self._backend.model) if has_our_pieces(spec) else None

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[str]]:
        return Tokenizer, (self.to_json(),)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a tokenizer.json, or the one in a folder (a run, an export). Raises `ConfigError` naming the file."""
        file = expand_home(path)
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
        """`encode` of each text.

        With this project's pattern on one core, at four times the speed of the library's on one; with another by the library on all cores.
        """
        if self._pieces is None:
            return list(self._encode_by_library(texts))
        return [self._pieces.encode(split_pieces(_checked(text))).tolist() for text in texts]

    def encode_bytes(self, content: bytes) -> list[int]:
        """Token ids of any bytes: those of `encode` where they are UTF-8. `decode_bytes` gives them back.

        What is not UTF-8 is kept by a byte-level vocabulary alone; with another this raises `ValueError` naming the first such byte.
        """
        return [i for ids in self.encode_stream([content]) for i in ids.tolist()]

    def encode_stream(self, parts: Iterable[str | bytes]) -> Iterator[np.ndarray]:
        """Token ids of a text that comes in `parts`, uint32 arrays of any length: end to end those of the whole text, however it is divided.

        Parts are text, or bytes as in `encode_bytes`, which may be cut inside a character. With this project's pattern no more than a part and
        some megabytes are held at a time. The pieces of another pattern can depend on all text before them, so there the text is collected first.
        """
        if self._pieces is None:
            yield np.array(self._encode_escaped("".join(_escaped(parts))), dtype=np.uint32)
            return
        waiting, size, rest = [], 0, ""
        for part in _escaped(parts):
            waiting.append(part)
            size += len(part)
            if size >= _STREAM_SIZE:
                text = rest + "".join(waiting)
                done = 0
                for pieces in split_pieces(text, final=False):
                    done += sum(map(len, pieces))
                    yield self._pieces.encode([pieces])
                waiting, size, rest = [], 0, text[done:]
        for pieces in split_pieces(rest + "".join(waiting)):
            yield self._pieces.encode([pieces])

    def _encode_escaped(self, text: str) -> list[int]:
        """Token ids of text in which a lone surrogate stands for a byte that is not UTF-8, by the library and the vocabulary's tokens of single bytes."""
        stretches = re.split("([\udc80-\udcff]+)", text)
        if len(stretches) == 1:
            return self.encode(text)
        vocab = self._backend.get_vocab(with_added_tokens=False) if self.is_byte_level else {}
        token_of = {chr(0xDC00 + byte): vocab.get(BYTE_ALPHABET[byte]) for byte in range(0x80, 0x100)}
        encoded = iter(self.encode_batch(stretches[::2]))
        ids = next(encoded)
        for run in stretches[1::2]:
            for character in run:
                token = token_of[character]
                if token is None:
                    place = len(text[: text.index(character)].encode("utf-8", "surrogateescape"))
                    raise ValueError(
                        f"byte 0x{ord(character) - 0xDC00:02x} at offset {place} is not UTF-8, and this tokenizer has no token for it; "
                        "convert the text to UTF-8, or take a byte-level tokenizer as `nsa tokenizer train` makes"
                    )
                ids.append(token)
            ids += next(encoded)
        return ids

    def _encode_by_library(self, texts: Sequence[str]) -> Iterator[list[int]]:
        start = 0
        while start < len(texts):
            stop, size = start, 0
            while stop < len(texts) and (stop == start or size + len(texts[stop]) <= _BATCH_SIZE):
                size += len(texts[stop])
                stop += 1
            batch = [_checked(text) for text in texts[start:stop]]
            yield from (encoding.ids for encoding in self._backend.encode_batch_fast(batch, add_special_tokens=False))
            start = stop

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens stand for none. Bytes that form no character become U+FFFD."""
        return self._backend.decode(self._in_range(ids), skip_special_tokens=True)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of token ids, exact for byte-level BPE also where a character is cut in the middle; else those of `decode`."""
        listed = self._in_range(ids)
        if not self.is_byte_level:
            return self._backend.decode(listed, skip_special_tokens=True).encode()
        return b"".join(map(self._token_bytes.__getitem__, listed))

    def _in_range(self, ids: Iterable[int]) -> list[int]:
        listed = [int(i) for i in ids]
        if listed and not 0 <= min(listed) <= max(listed) < self.vocab_size:
            wrong = next(i for i in listed if not 0 <= i < self.vocab_size)
            raise ValueError(f"token id {wrong} is outside the vocabulary of {self.vocab_size}")
        return listed

    @property
    def can_be_cut(self) -> bool:
        """Whether `cut_text` cuts a text into parts that encode to the same tokens apart as together."""
        return self._pieces is not None

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token stands for bytes of its own, whatever stands beside it."""
        return '"ByteLevel"' in json.dumps(self._spec.get("decoder"))

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        """Bytes of each id of a byte-level vocabulary."""
        byte_of = {character: value for value, character in enumerate(BYTE_ALPHABET)}
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
            if mark_special(spec, name) is None:
                taken = [*vocabulary(spec).values(), *(added["id"] for added in spec["added_tokens"])]
                add_special(spec, name, max(taken) + 1)
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
            if self.is_byte_level:
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
    Memory grows with the distinct pieces of the texts, not with their length. `progress` is called with the characters read so far.
    Raises `ConfigError` for a vocabulary below 257, or 259 with `chat_tokens`.
    """
    least = MIN_VOCAB_SIZE + 2 * chat_tokens
    if vocab_size < least:
        raise ConfigError(
            f"vocab_size={vocab_size} is too small for a byte-level tokenizer: 256 bytes and {least - 256} special tokens need {least}; "
            f"write model.vocab_size={least} or more"
        )
    from tokenizers import AddedToken, decoders, models
    from tokenizers import Tokenizer as Backend

    pieces: Counter[str] = Counter()
    read = 0
    for text in texts:
        for part in split_pieces(_checked(text)):
            pieces.update(part)
        read += len(text)
        if progress is not None:
            progress(read)
    alphabet = sorted(BYTE_ALPHABET)
    tokens = [END_OF_DOCUMENT.encode(), *(bytes([BYTE_ALPHABET.index(character)]) for character in alphabet)]
    first_ids = [1 + alphabet.index(character) for character in BYTE_ALPHABET]
    merges = learn_merges({piece.encode(): count for piece, count in pieces.items()}, first_ids, tokens, vocab_size - 2 * chat_tokens)
    names = [END_OF_DOCUMENT, *(token.decode("latin-1").translate(BYTE_ALPHABET) for token in tokens[1:])]
    vocab = {name: i for i, name in enumerate(names)}
    backend = Backend(models.BPE(vocab=vocab, merges=[(names[left], names[right]) for left, right in merges]))
    backend.pre_tokenizer = our_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    tokenizer = Tokenizer(backend.to_str())
    return tokenizer.with_chat_tokens() if chat_tokens else tokenizer


def _checked(text: str) -> str:
    """`text`, if all of it is characters; `UnicodeEncodeError`, a ValueError, names the one that is none."""
    if not text.isascii():
        text.encode("utf-8")
    return text


def _escaped(parts: Iterable[str | bytes]) -> Iterator[str]:
    """Parts as text, bytes that are not UTF-8 as lone surrogates. Text is checked to have none of its own."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for part in parts:
        yield _checked(part) if isinstance(part, str) else decoder.decode(part)
    yield decoder.decode(b"", final=True)
