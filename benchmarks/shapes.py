"""The shapes that are measured, by the names of the command line: `64/4/192/128@64k` is Hq/Hkv/Dk/Dv at 65,536 tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass

LONG = 524288  # tokens from which only the operator itself is measured, once, forward and backward


@dataclass(frozen=True)
class Heads:
    hq: int
    hkv: int
    dk: int
    dv: int

    @property
    def name(self) -> str:
        return f"{self.hq}/{self.hkv}/{self.dk}" if self.dk == self.dv else f"{self.hq}/{self.hkv}/{self.dk}/{self.dv}"


@dataclass(frozen=True)
class Shape:
    heads: Heads
    length: int
    backward: bool = True

    @property
    def name(self) -> str:
        return f"{self.heads.name}@{length_name(self.length)}"


def length_name(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def parse_length(text: str) -> int:
    """`64k` or `65536` as tokens."""
    match = re.fullmatch(r"([1-9]\d*)(k?)", text)
    if match is None:
        raise ValueError(f"{text!r} is no number of tokens; write one such as 64k or 65536")
    return int(match[1]) * (1024 if match[2] else 1)


def parse_shape(text: str) -> Shape:
    """`Hq/Hkv/D@LENGTH` or `Hq/Hkv/Dk/Dv@LENGTH`; without the backward at 128k tokens, where dense attention takes seconds."""
    match = re.fullmatch(r"(\d+)/(\d+)/(\d+)(?:/(\d+))?@(\w+)", text)
    if match is None:
        raise ValueError(f"shape {text!r} is not Hq/Hkv/Dk/Dv@LENGTH; write one such as 64/4/128@32k or 64/4/192/128@64k")
    hq, hkv, dk = (int(match[i]) for i in (1, 2, 3))
    dv = int(match[4]) if match[4] else dk
    if not (hq and hkv and dk and dv) or hq % hkv:
        raise ValueError(f"shape {text!r}: the {hkv} key/value heads must divide the {hq} query heads, and no number may be 0")
    length = parse_length(match[5])
    return Shape(Heads(hq, hkv, dk, dv), length, backward=length < 131072 or length >= LONG)


DEFAULT = tuple(
    parse_shape(name)
    for name in (
        "64/4/128@8k",
        "64/4/128@16k",
        "64/4/128@32k",
        "64/4/128@64k",
        "64/4/128@128k",
        "32/8/128@32k",
        "32/8/128@64k",
        "64/4/192/128@64k",
        "64/4/128@512k",
    )
)
QUICK = tuple(shape for shape in DEFAULT if shape.name in ("64/4/128@8k", "64/4/128@32k", "64/4/128@64k"))
