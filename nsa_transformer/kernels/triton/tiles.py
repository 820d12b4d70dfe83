"""Tile sizes by head widths, element size and group: chosen by hand, since an autotuner would make timing part of the result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """rows: query rows (of the score kernel: tokens); keys; warps; stages of the pipeline; registers a thread may use at most, 0: all;
    heads: of the score kernel, how many of the group go side by side; gluon: of the kernels in `hopper`, which choose their own rows"""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int = 0
    heads: int = 0
    gluon: bool = False


@dataclass(frozen=True)
class Tiles:
    band: Tile
    band_q: Tile
    compressed_kv: Tile
    window_kv: Tile
    score: Tile
    selected: Tile
    selected_q: Tile
    stored_q: Tile
    selected_kv: Tile


def choose_tiles(width: int, width_v: int, itemsize: int, group: int, select: int, capability: tuple[int, int]) -> Tiles:
    """Tuned on compute capability 9.0, which has forward kernels of its own for 16-bit heads of one width; made to fit on 8.0."""
    widest = max(width, width_v)
    heads = min(1 << max(group - 1, 0).bit_length(), 32)
    block = min(max(select, 16), 64)  # 16 is the least a product takes; larger blocks go in pieces
    piece = min(block, 32)
    if itemsize == 4:  # products run on the ordinary cores, unrolled: small tiles keep them short and in registers
        small = Tile(32, 16, 8, 1)
        return Tiles(
            band=small,
            band_q=small,
            compressed_kv=small,
            window_kv=small,
            score=Tile(min(32, max(1, 32 // heads)), 32, 8, 1, heads=heads),
            selected=Tile(32, piece, 8, 1),
            selected_q=Tile(32, piece, 8, 1),
            stored_q=Tile(32, piece, 8, 1),
            selected_kv=Tile(16, piece, 8, 1),
        )
    if widest <= 128:
        gluon = Tile(192, 64, 4, 5, gluon=True) if capability == (9, 0) and width == width_v else None
        gluon_q = Tile(128, 64, 4, 5, gluon=True) if gluon else None
        band_kv = Tile(64, 128, 4, 4, gluon=True) if gluon and group in (4, 16) else Tile(32, 64, 4, 3)  # others have not run on a GPU
        boxes = gluon is not None and group == 16  # a token's rows are a box; 32 have not run on a GPU
        tokens = -(-192 // group)  # lists of a tile's blocks hold at most 64
        return Tiles(
            band=gluon or (Tile(128, 64, 4, 2) if capability >= (9, 0) else Tile(64, 64, 4, 2)),
            band_q=gluon_q or Tile(128, 64, 8, 3),
            compressed_kv=band_kv,
            window_kv=band_kv,
            score=Tile(min(16, max(1, 128 // heads)), 64, 4, 3, heads=heads),
            selected=gluon if gluon and tokens <= 64 and select % 64 == 0 else Tile(64, block, 4, 3),
            selected_q=gluon_q if gluon_q and tokens <= 64 and select % 64 == 0 else Tile(64, block, 4, 2),
            stored_q=Tile(64, block, 4, 3),
            selected_kv=Tile(32, 64, 4, 6, gluon=True) if boxes and select % 64 == 0 else Tile(32, block, 4, 2),
        )
    score = Tile(min(16, max(1, 64 // heads)), 64, 4, 3 if width <= 192 else 2, heads=heads)
    if width + width_v <= 320:
        return Tiles(
            band=Tile(64, 64, 4, 2),
            band_q=Tile(128, 64, 8, 2),
            compressed_kv=Tile(32, 64, 4, 2),
            window_kv=Tile(32, 64, 4, 2),
            score=score,
            selected=Tile(64, block, 4, 2),
            selected_q=Tile(64, block, 4, 1),
            stored_q=Tile(64, block, 4, 3),
            selected_kv=Tile(32, block, 4, 2),
        )
    return Tiles(
        band=Tile(64, 64, 4, 2),
        band_q=Tile(64, 64, 4, 1),
        compressed_kv=Tile(64, 64, 8, 1),
        window_kv=Tile(64, 64, 8, 1),
        score=score,
        selected=Tile(64, block, 4, 1),
        selected_q=Tile(64, block, 4, 1),
        stored_q=Tile(64, block, 4, 2),
        selected_kv=Tile(64, block, 8, 1),
    )
