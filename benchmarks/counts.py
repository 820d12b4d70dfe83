"""What a call has to compute and to move, part by part, and which kernel belongs to which part.

Useful FLOPs, counted by definition for one causal document: 2 per multiplication and addition, only for (query, key) pairs that are attended.
What a kernel computes beside that (masked corners of tiles, other rows' blocks in a union, scores a second time in the backward) is no use and
is not counted. Bytes are compulsory ones: every tensor that a part needs once in, every tensor that it makes once out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.shapes import Shape
from nsa_transformer.config import NSAConfig

L2_BYTES_PER_SECOND = 7e12  # what an H100's L2 cache was seen to deliver

# Part of the pipeline: names of its kernels, or what they begin with before a further underscore.
PARTS: dict[str, tuple[str, ...]] = {
    "plan": ("nsa_plan", "nsa_clean"),
    "compressed forward": ("nsa_compressed_forward",),
    "score + top-n": ("nsa_score", "nsa_select"),
    "window forward": ("nsa_window_forward",),
    "lists": ("nsa_lists",),
    "selected forward": ("nsa_selected_forward",),
    "delta": ("nsa_delta",),
    "compressed dq": ("nsa_compressed_dq",),
    "compressed dk, dv": ("nsa_compressed_dkv", "nsa_compressed_dk", "nsa_compressed_dv"),
    "window dq": ("nsa_window_dq",),
    "window dk, dv": ("nsa_window_dkv", "nsa_window_dk", "nsa_window_dv"),
    "selected dq": ("nsa_selected_dq",),
    "selected dk, dv": ("nsa_selected_dkv", "nsa_selected_dk", "nsa_selected_dv"),
    "sums": ("nsa_sum", "nsa_reduce"),
}
OTHER = "other"
BACKWARD = ("delta", "compressed dq", "compressed dk, dv", "window dq", "window dk, dv", "selected dq", "selected dk, dv", "sums")


def part_of(kernel: str) -> str:
    """The part that a kernel belongs to; `other` for what is not the package's own."""
    for part, names in PARTS.items():
        if any(kernel == name or kernel.startswith(f"{name}_") for name in names):
            return part
    return OTHER


def by_part(kernels: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """Milliseconds per kernel as milliseconds per part, and the names of the others, slowest first."""
    parts: dict[str, float] = {}
    for name, ms in kernels.items():
        parts[part_of(name)] = parts.get(part_of(name), 0.0) + ms
    others = sorted((name for name in kernels if part_of(name) == OTHER), key=lambda name: -kernels[name])
    return parts, others


@dataclass(frozen=True)
class Pairs:
    """(query, key) pairs of one query head over one document."""

    compressed: int
    selected: int
    window: int
    dense: int


def count_pairs(length: int, config: NSAConfig) -> Pairs:
    """`selected` for queries that choose num_selected blocks, their own among them, or all visible ones."""
    t = np.arange(length, dtype=np.int64)
    compressed = np.maximum((t + 1 - config.compress_block) // config.compress_stride + 1, 0)
    own, inside = np.divmod(t, config.select_block)
    selected = (np.minimum(config.num_selected, own + 1) - 1) * config.select_block + inside + 1
    window = np.minimum(t + 1, config.window)
    return Pairs(int(compressed.sum()), int(selected.sum()), int(window.sum()), length * (length + 1) // 2)


def num_compressed(length: int, config: NSAConfig) -> int:
    return max(0, (length - config.compress_block) // config.compress_stride + 1)


def part_flops(shape: Shape, config: NSAConfig) -> dict[str, int]:
    """Useful FLOPs of each part that multiplies matrices. Of the backward's five products the scores, dP
    and dQ go to dq, dK and dV to dkv, which computes scores and dP again without their being counted."""
    heads, pairs = shape.heads, count_pairs(shape.length, config)
    flops = {"score + top-n": 2 * heads.dk * heads.hq * pairs.compressed}
    for branch, count in (("compressed", pairs.compressed), ("window", pairs.window), ("selected", pairs.selected)):
        flops[f"{branch} forward"] = 2 * (heads.dk + heads.dv) * heads.hq * count
        flops[f"{branch} dq"] = 2 * (2 * heads.dk + heads.dv) * heads.hq * count
        flops[f"{branch} dk, dv"] = 2 * (heads.dk + heads.dv) * heads.hq * count
    return flops


def dense_flops(shape: Shape, config: NSAConfig) -> tuple[int, int]:
    """Useful FLOPs of dense causal attention, forward and backward."""
    heads, pairs = shape.heads, count_pairs(shape.length, config).dense
    return 2 * (heads.dk + heads.dv) * heads.hq * pairs, 2 * (3 * heads.dk + 2 * heads.dv) * heads.hq * pairs


def part_bytes(shape: Shape, config: NSAConfig, element: int = 2) -> dict[str, int]:
    """Compulsory bytes of each part; `element` bytes per number of the inputs, sums and blocks are 4."""
    heads, length = shape.heads, shape.length
    q, out = (length * heads.hq * width * element for width in (heads.dk, heads.dv))
    keys = length * heads.hkv * (heads.dk + heads.dv) * element
    compressed = num_compressed(length, config) * heads.hkv * (heads.dk + heads.dv) * element
    compressed_k = num_compressed(length, config) * heads.hkv * heads.dk * element
    row, blocks, gates = length * heads.hq * 4, length * heads.hkv * config.num_selected * 4, length * heads.hq * 3 * element
    moved = {
        "compressed forward": q + compressed + out + row,
        "score + top-n": q + compressed_k + row + blocks,
        "window forward": q + keys + out + row,
        "lists": 2 * blocks,
        "selected forward": q + keys + blocks + gates + 2 * out + 2 * out + row,  # the other branches in, its own and the sum of all out
        "delta": 4 * out + 3 * row + gates,
    }
    for branch, both in (("compressed", compressed), ("window", keys), ("selected", keys + blocks)):
        given = q + both + out + 2 * row + gates // 3
        moved[f"{branch} dq"] = given + q
        moved[f"{branch} dk, dv"] = given + (compressed if branch == "compressed" else keys)
    return moved


def floor_ms(part: str, flops: Mapping[str, int], moved: Mapping[str, int], forward_rate: float | None, backward_rate: float | None) -> float | None:
    """The least time of a part: its FLOPs at the rates (FLOP/s) that dense attention reached beside it, or its bytes at L2 speed, whichever is
    longer. None for a part that has neither, or where no rate was measured."""
    if part not in moved:
        return None
    seconds = moved[part] / L2_BYTES_PER_SECOND
    if part in flops:
        rate = backward_rate if part in BACKWARD else forward_rate
        if rate is None:
            return None
        seconds = max(seconds, flops[part] / rate)
    return seconds * 1e3
