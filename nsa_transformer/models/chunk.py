"""Where a chunk of one sequence goes in a cache: the same for all layers, for keys and for values, so it is computed once a chunk.

A layer's work on a chunk is many small kernels, and it is the host that launching them keeps busy: nothing that depends on positions alone is left to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels.paged import page_rows, page_tokens


def num_compressed(length: int, config: NSAConfig) -> int:
    return max(0, (length - config.compress_block) // config.compress_stride + 1)


class Places(NamedTuple):
    """Rows of a sequence in a pool [pages, Hkv, size, …]: int64 [n], the page of each, and its row in the page."""

    page: Tensor
    row: Tensor

    @staticmethod
    def of(pages: Tensor, count: int, size: int) -> Places:
        """The first `count` rows of a sequence with int64 `pages` of `size` rows."""
        position = torch.arange(count, device=pages.device)
        return Places(pages[position // size], position % size)

    def between(self, first: int, last: int) -> Places:
        return Places(self.page[first:last], self.row[first:last])

    def read(self, pool: Tensor) -> Tensor:
        """[n, Hkv, …]."""
        if pool.dtype == torch.float8_e4m3fn:  # which is not indexed everywhere
            return self.read(pool.view(torch.uint8)).view(pool.dtype)
        return pool[self.page, :, self.row]

    def write(self, pool: Tensor, rows: Tensor) -> None:
        """rows [n, Hkv, …]."""
        if pool.dtype == torch.float8_e4m3fn:
            pool, rows = pool.view(torch.uint8), rows.view(torch.uint8)
        pool[self.page, :, self.row] = rows


@dataclass(frozen=True)
class ChunkPlan:
    """Tokens `start` … `end - 1` of a sequence."""

    sequence: int
    start: int
    end: int


@dataclass(frozen=True)
class SparseChunkPlan(ChunkPlan):
    """What layers of sparse attention need beside that.

    In pages: of tokens, `stored_before` are stored before the chunk and `stored` behind it (all of them, or, in FP8, the older ones); of compressed blocks,
    `blocks_before` and `blocks`.

    tokens, new_tokens   places of the tokens that a layer reads from pages, and of those that it writes: first all of them, then those that it did not have
    all_blocks, new_blocks   of compressed blocks, likewise
    run_start            the first token of the first new block; without one, `start`
    run                  int32 [2], 0 and the tokens from `run_start` to `end`: boundaries for φ
    block_rows           int64 [new blocks, l], tokens of each new block, counted from `run_start`
    middles              int64 [new blocks], positions that compressed keys are rotated by
    """

    stored_before: int
    stored: int
    tokens: Places
    new_tokens: Places
    blocks_before: int
    blocks: int
    all_blocks: Places
    new_blocks: Places
    run_start: int
    run: Tensor
    block_rows: Tensor
    middles: Tensor

    @staticmethod
    def build(sequence: int, start: int, end: int, pages: Tensor, config: NSAConfig, threshold: int | None) -> SparseChunkPlan:
        """pages int [max_pages] of the sequence, room for `end` tokens among them; `threshold`: that of a cache in FP8, None: another. Nothing waits for the
        device."""
        device, pages = pages.device, pages.long()
        if threshold is None:
            stored_before, stored, read = start, end, end
        else:
            stored_before, stored = (max(0, length - threshold) // config.select_block * config.select_block for length in (start, end))
            read = stored_before  # those that are stored now are still at hand as they were
        places = Places.of(pages, stored, page_tokens(config))
        before, blocks = num_compressed(start, config), num_compressed(end, config)
        block_places = Places.of(pages, blocks, page_rows(config))
        index = torch.arange(before, blocks, device=device) * config.compress_stride
        run_start = before * config.compress_stride if blocks > before else start
        return SparseChunkPlan(
            sequence, start, end, stored_before, stored, places.between(0, read), places.between(stored_before, stored),
            before, blocks, block_places, block_places.between(before, blocks),
            run_start,
            torch.arange(2, dtype=torch.int32, device=device) * (end - run_start),
            (index - run_start)[:, None] + torch.arange(config.compress_block, device=device),
            index + config.compress_block // 2,
        )  # fmt: skip


def ring_pieces(ring: Tensor, first: int, last: int) -> list[Tensor]:
    """Positions first … last - 1, at most `size` of them, of a sequence's ring [size, Hkv, …]: views [n, Hkv, …], two where its end lies between."""
    return [ring[piece] for piece in _pieces(len(ring), first, last)]


def write_ring(ring: Tensor, end: int, rows: Tensor) -> None:
    """The newest of rows [T, Hkv, …], the last of which is at position `end - 1`, into a sequence's ring [size, Hkv, …]."""
    place = max(0, len(rows) - len(ring))
    for piece in _pieces(len(ring), end - len(rows) + place, end):
        count = piece.stop - piece.start
        ring[piece] = rows[place : place + count]  # viewed only now: with gradients, torch refuses views older than the write before
        place += count


def _pieces(size: int, first: int, last: int) -> list[slice]:
    at, count = first % size, last - first
    beyond = at + count - size
    return [slice(at, size), slice(0, beyond)] if beyond > 0 else [slice(at, at + count)]
