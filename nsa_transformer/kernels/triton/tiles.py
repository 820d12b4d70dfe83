"""Tile sizes by head widths, element size and group: chosen by hand, since an autotuner would make timing part of the result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """rows: query rows (of the score kernel: tokens); keys; warps; stages of the pipeline; registers a thread may use at most, 0: all;
    heads: of the score kernel, how many of the group go side by side."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int = 0
    heads: int = 0


@dataclass(frozen=True)
class Tiles:
    band: Tile
    band_q: Tile  # same rows as `band`
    compressed_kv: Tile
    window_kv: Tile
    score: Tile
    selected: Tile
    selected_q: Tile  # same rows as `selected`
    selected_kv: Tile


def choose_tiles(width: int, width_v: int, itemsize: int, group: int, select: int) -> Tiles:
    widest = max(width, width_v)
    heads = min(1 << max(group - 1, 0).bit_length(), 32)
    block = max(select, 16)  # the least a product takes
    if itemsize == 4:
        tokens = min(32, max(1, 64 // heads))
        narrow = Tile(64, 32, 4, 1)
        return Tiles(
            band=narrow,
            band_q=narrow,
            compressed_kv=Tile(32, 32, 4, 1),
            window_kv=Tile(32, 32, 4, 1),
            score=Tile(tokens, 32, 4, 1, heads=heads),
            selected=Tile(64, block, 4, 1),
            selected_q=Tile(64, block, 4, 1),
            selected_kv=Tile(32, block, 4, 1),
        )
    tokens = min(16, max(1, 128 // heads))
    score = Tile(tokens, 64, 4, 3 if widest <= 128 else 2, heads=heads)
    wide_block = 8 if select > 64 else 4
    if widest <= 128:
        return Tiles(
            band=Tile(128, 64, 8, 3),
            band_q=Tile(128, 64, 8, 2),
            compressed_kv=Tile(64, 128, 8, 2),
            window_kv=Tile(64, 128, 8, 2),
            score=score,
            selected=Tile(64, block, wide_block, 3 if select <= 64 else 2),
            selected_q=Tile(64, block, wide_block, 2),
            selected_kv=Tile(64, block, wide_block, 2),
        )
    return Tiles(
        band=Tile(128, 64, 8, 2),
        band_q=Tile(128, 64, 8, 2),
        compressed_kv=Tile(64, 64, 8, 1),
        window_kv=Tile(64, 64, 8, 1),
        score=score,
        selected=Tile(64, block, 8, 2),
        selected_q=Tile(64, block, 8, 2),
        selected_kv=Tile(64, block, 8, 1),
    )
