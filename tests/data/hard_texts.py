"""Texts of one thing over and over, which tokenizers have been known to take hours for."""

from __future__ import annotations

import base64

import numpy as np


def hard_texts(size: int) -> dict[str, str]:
    """By name, each of about `size` bytes of UTF-8."""
    rng = np.random.default_rng(0)
    chinese = "".join(map(chr, rng.integers(0x4E00, 0x9FFF, size // 3).tolist()))
    units = {
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
    repeated = {name: unit * (size // len(unit.encode())) for name, unit in units.items()}
    return {
        **repeated,
        "base64": base64.b64encode(rng.bytes(size * 3 // 4)).decode(),
        "hexadecimal": rng.bytes(size // 2).hex(),
        "random digits": "".join(map(str, rng.integers(0, 10, size).tolist())),
        "random Chinese": chinese,
        "Chinese sentences": "".join(f"{chinese[i : i + 30]}，" for i in range(0, len(chinese) * 9 // 10, 30)),
        "random letters": "".join(map(chr, rng.integers(97, 123, size).tolist())),
    }
