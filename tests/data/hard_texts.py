"""Texts of one thing over and over, which tokenizers have been known to take hours for."""

from __future__ import annotations

import base64
from collections.abc import Callable

import numpy as np

_UNITS = {
    "one letter": "a",
    "spaces": " ",
    "newlines": "\n",
    "CRLF": "\r\n",
    "mixed line ends": "\r\n\n\r \r\n\t\n",
    "space and newline": " \n",
    "tabs": "\t",
    "digits": "7",
    "combining marks": "\u0301",
    "letter with marks": "e\u0301\u0323\u0302",
    "emoji": "\U0001f600",
    "joined emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "Gothic letters": "\U00010330",
    "punctuation": "!",
    "one Chinese character": "\u6c49",
    "no-break spaces": "\u00a0",
}


def _characters(size: int, first: int, last: int) -> str:
    return "".join(map(chr, np.random.default_rng(0).integers(first, last, size).tolist()))


_RANDOM: dict[str, Callable[[int], str]] = {
    "base64": lambda size: base64.b64encode(np.random.default_rng(0).bytes(size * 3 // 4)).decode(),
    "hexadecimal": lambda size: np.random.default_rng(0).bytes(size // 2).hex(),
    "random digits": lambda size: _characters(size, ord("0"), ord("9") + 1),
    "random letters": lambda size: _characters(size, ord("a"), ord("z") + 1),
    "random Chinese": lambda size: _characters(size // 3, 0x4E00, 0x9FFF),
    "Chinese sentences": lambda size: "\uff0c".join(_characters(30, 0x4E00 + i % 9000, 0x9FFF) for i in range(size // 93)),
}
NAMES = [*_UNITS, *_RANDOM]


def hard_text(name: str, size: int) -> str:
    """About `size` bytes of UTF-8."""
    unit = _UNITS.get(name)
    return _RANDOM[name](size) if unit is None else unit * (size // len(unit.encode()))
