"""Text in pieces that merges never cross, and places where a long text may be cut.

`PATTERN` is written for the `tokenizers` library. The same pattern in Python's `re` is several times as fast, since nothing is kept
of a piece but its text; which characters are letters, numbers and blank space is asked of the library, so that both always agree.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from typing import Any

import numpy as np

__all__ = ["BYTE_ALPHABET", "PATTERN", "PieceTable", "cut_text", "split_pieces"]

# The bounds keep the work per character constant: without them a long run of one class of characters is a single piece, and both the
# regex and the merging inside it grow faster than its length.
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
_LOOK = 96  # the characters from a piece's start on that decide where it ends are fewer: 1 + 64 + 16 and one to look ahead
# Places where PATTERN always ends a piece: no alternative holds a letter or digit followed by blank space, or a newline
# followed by one. Text on both sides therefore encodes to the same tokens apart as together.
_CUT = re.compile(r"[A-Za-z0-9](?=[ \n])|\n(?=[A-Za-z0-9])")
_CUT_SIZE = 1 << 18  # characters; a list of pieces needs some 25 bytes of memory per character
_PIECES_KEPT = 1 << 18  # of a table, some 50 MB
_ASTRAL = re.compile("[\U00010000-\U0010ffff]")


def cut_text(text: str, size: int = _CUT_SIZE) -> list[str]:
    """`text` in parts cut only where a piece ends: each of `size` to about twice `size` characters, the last one of any length up to that."""
    parts, start = [], 0
    while len(text) - start > size:
        match = _CUT.search(text, start + size - 1, start + 2 * size)
        end = match.end() if match else start + _whole_pieces(text, start, 2 * size + 2 * _LOOK)
        parts.append(text[start:end])
        start = end
    if start < len(text) or not parts:
        parts.append(text[start:])
    return parts


def _whole_pieces(text: str, start: int, size: int) -> int:
    """For text with no other place to cut (Chinese, base64): the length of the pieces within `size` characters from `start`, where a piece begins."""
    part = text[start : start + size]
    if start + size >= len(text):
        return len(part)
    pieces = _split(part)
    length = len(part) - len(_take_undecided(pieces, len(part)))
    # A lone blank before a word is a piece because of that word; at the end of a part it would join the blanks before it.
    while len(pieces[-1]) == 1 and pieces[-1].isspace() and pieces[-1] not in "\r\n":
        length -= len(pieces.pop())
    return length


def split_pieces(text: str, final: bool = True, size: int = _CUT_SIZE) -> Iterator[list[str]]:
    """The pieces of `text`, exactly those of `PATTERN`, in lists that stand for about `size` characters each.

    `final=False`: more text follows, so the last hundred characters or so, whose pieces it could change, are left out. Lone surrogates
    count as punctuation.
    """
    start = 0
    while start < len(text):
        part = text[start : start + size + 2 * _LOOK]
        start += len(part)
        pieces = _split(part)
        last = start == len(text)
        if not (last and final):
            start -= len(_take_undecided(pieces, len(part)))
        yield pieces
        if last:
            return


def _take_undecided(pieces: list[str], length: int) -> str:
    """Remove from the pieces of a text of `length` characters those that following text could change, and return their text."""
    end, taken = length, []
    while pieces and end > length - _LOOK:
        taken.append(pieces.pop())
        end -= len(taken[-1])
    return "".join(reversed(taken))


def _split(text: str) -> list[str]:
    if text.isascii():
        return _compiled(0x7F).findall(text)
    pattern = _compiled(0xFFFF)
    if not _ASTRAL.search(text):
        return pattern.findall(text)
    # A class of characters above U+FFFF makes `re` slow. It takes those for punctuation, as emoji are; letters and numbers among them
    # are replaced by others of their kind while the places are found.
    letters, numbers = _astral_kinds("".join(sorted(set(_ASTRAL.findall(text)))))
    if not letters and not numbers:
        return pattern.findall(text)
    ends = list(itertools.accumulate(map(len, pattern.findall(text.translate(dict.fromkeys(letters, "a") | dict.fromkeys(numbers, "0"))))))
    return [text[i:j] for i, j in zip([0, *ends], ends, strict=False)]


@lru_cache(maxsize=4096)
def _astral_kinds(characters: str) -> tuple[list[int], list[int]]:
    """Code points of the letters (and marks) and of the numbers among `characters`."""
    return [ord(c) for c in _members(r"\p{L}\p{M}", characters)], [ord(c) for c in _members(r"\p{N}", characters)]


@cache
def _compiled(last: int) -> re.Pattern[str]:
    """`PATTERN` for texts of characters up to `last`, in Python's `re`, which knows no \\p{…} and has another \\s."""
    characters = "".join(map(chr, (*range(min(last + 1, 0xD800)), *range(0xE000, last + 1))))
    kinds = {name: _as_ranges(_members(name, characters)) for name in (r"\p{L}\p{M}", r"\p{N}", r"\s")}

    def translate(match: re.Match[str]) -> str:
        part = match[0]
        if part == r"\S":
            return "[^" + kinds[r"\s"] + "]"
        for name, ranges in kinds.items():
            part = part.replace(name, ranges)
        return part if match[0].startswith("[") else f"[{part}]"

    return re.compile(re.sub(r"\[[^]]+\]|\\p\{N\}|\\[sS]", translate, PATTERN))


def _members(kind: str, characters: str) -> str:
    """Those of `characters` that the library counts among `kind`."""
    from tokenizers import Regex, normalizers

    return normalizers.Replace(Regex(f"[^{kind}]+"), "").normalize_str(characters)


def _as_ranges(characters: str) -> str:
    """The inside of a class in brackets."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\u{first:04x}-\\u{last:04x}" for first, last in ranges)


def _byte_alphabet() -> str:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (chr(n) for n in range(256, 512))
    return "".join(chr(b) if b in printable else next(others) for b in range(256))


# How byte-level vocabularies write a byte: as the character of that number where it is a printable one, and as those from 256 on for the
# others in order (GPT-2's alphabet).
BYTE_ALPHABET = _byte_alphabet()


class PieceTable(dict[str, bytes]):
    """Token ids of pieces, uint32 in bytes. A piece is encoded once and then looked up; in text most come again and again."""

    def __init__(self, model: Any) -> None:
        """`model` is the `tokenizers` library's BPE with a byte-level vocabulary."""
        super().__init__()
        self._model = model

    def __missing__(self, piece: str) -> bytes:
        content = piece.encode("utf-8", "surrogateescape")
        tokens = self._model.tokenize(content.decode("latin-1").translate(BYTE_ALPHABET))
        ids = array("I", [token.id for token in tokens]).tobytes()
        if len(self) >= _PIECES_KEPT:
            self.clear()
        self[piece] = ids
        return ids

    def encode(self, lists: Iterable[list[str]]) -> np.ndarray:
        """uint32 ids of all the pieces, one after the other."""
        return np.frombuffer(b"".join([b"".join(map(self.__getitem__, pieces)) for pieces in lists]), dtype=np.uint32)
