"""Tile sizes by head widths, element size and group: chosen by hand, since an autotuner would make timing part of the result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """rows: query rows (of the score kernel: tokens); keys; warps; stages of the pipeline; registers a thread may use at most, 0: all;
    heads: of the score kernel, how many of the group go side by side"""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int = 0
    heads: int = 0


@dataclass(frozen=True)
class Tiles:
    band: Tile
    band_q: Tile
    compressed_kv: Tile
    window_kv: Tile
    score: Tile
    selected: Tile
    selected_q: Tile  # same rows as `selected`
    selected_kv: Tile


def choose_tiles(width: int, width_v: int, itemsize: int, group: int, select: int, major: int) -> Tiles:
    """For a device of compute capability `major`; tuned on 9, made to fit on 8."""
    widest = max(width, width_v)
    heads = min(1 << max(group - 1, 0).bit_length(), 32)
    block = max(select, 16)  # the least a product takes
    if itemsize == 4:  # products run on the ordinary cores, unrolled: small tiles keep them short and in registers
        small = Tile(32, 16, 8, 1)
        return Tiles(
            band=small,
            band_q=small,
            compressed_kv=small,
            window_kv=small,
            score=Tile(min(32, max(1, 32 // heads)), 32, 8, 1, heads=heads),
            selected=Tile(32, block, 8, 1),
            selected_q=Tile(32, block, 8, 1),
            selected_kv=Tile(16, block, 8, 1),
        )
    large = select > 64
    if widest <= 128:
        return Tiles(
            band=Tile(128, 64, 4, 2) if major >= 9 else Tile(64, 64, 4, 2),
            band_q=Tile(128, 64, 8, 3),
            compressed_kv=Tile(32, 64, 4, 3),
            window_kv=Tile(32, 64, 4, 3),
            score=Tile(min(16, max(1, 128 // heads)), 64, 4, 3, heads=heads),
            selected=Tile(64, block, 8 if large else 4, 2 if large else 3),
            selected_q=Tile(64, block, 8 if large else 4, 2),
            selected_kv=Tile(32, block, 8 if large else 4, 2),
        )
    score = Tile(min(16, max(1, 64 // heads)), 64, 4, 3 if width <= 192 else 2, heads=heads)
    if width + width_v <= 320:
        return Tiles(
            band=Tile(64, 64, 4, 2),
            band_q=Tile(128, 64, 8, 2),
            compressed_kv=Tile(32, 64, 4, 2),
            window_kv=Tile(32, 64, 4, 2),
            score=score,
            selected=Tile(64, block, 8 if large else 4, 2),
            selected_q=Tile(64, block, 8 if large else 4, 1),
            selected_kv=Tile(32, block, 8 if large else 4, 2),
        )
    return Tiles(
        band=Tile(64, 64, 4, 2),
        band_q=Tile(64, 64, 4, 1),
        compressed_kv=Tile(64, 64, 8, 1),
        window_kv=Tile(64, 64, 8, 1),
        score=score,
        selected=Tile(64, block, 8 if large else 4, 1),
        selected_q=Tile(64, block, 8 if large else 4, 1),
        selected_kv=Tile(32 if large else 64, block, 8, 1),
    )
