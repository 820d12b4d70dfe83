"""The cache of decoding: pages of keys and values that belong to many sequences, and what each sequence has for itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig

TILE = 64
LARGEST = 448.0  # of e4m3
SCALE = torch.bfloat16  # of a row in e4m3: half the bytes of float32, the same errors (benchmarks/log.md)


def page_rows(config: NSAConfig) -> int:
    """Compressed keys of a page: 64, or as many more as make its tokens whole selection blocks (never for what the kernels take)."""
    runs = config.select_block // config.compress_stride
    return -(-TILE // runs) * runs


def page_tokens(config: NSAConfig) -> int:
    """Tokens of a page: those that its compressed keys begin at."""
    return page_rows(config) * config.compress_stride


def ring_tokens(config: NSAConfig) -> int:
    """Tokens of a sequence's ring for the window: whole tiles."""
    return -(-config.window // TILE) * TILE


@dataclass(frozen=True)
class PagedKeysValues:
    """One layer's keys and values of B sequences. Position t of sequence b lies in page `pages[b, t // tokens]`, `tokens = page_tokens(config)`, and in a
    ring at `t %` its size.

    pages              int32 [B, max_pages], entries beyond a sequence's length count for nothing, whatever they are
    lengths            int32 [B], tokens of each sequence, the newest included; 0: there is no such sequence
    k_cmp, v_cmp       [pages, Hkv, rows, Dk or Dv], rows = page_rows(config), compressed key i at i % rows
    k_slc, v_slc       [pages, Hkv, tokens, Dk or Dv], in the compute dtype or e4m3
    k_win, v_win       [B, Hkv, ring, Dk or Dv], the newest tokens, ring = the window rounded up to 64
    k_scale, v_scale   with e4m3: SCALE [pages, Hkv, tokens], what a row is to be multiplied by
    k_recent, v_recent with e4m3: [B, Hkv, recent, Dk or Dv], rings in the compute dtype for the selection blocks that reach into the newest `threshold` tokens
    k_raw, v_raw       [B, Hkv, l, Dk or Dv], rings of the tokens that compressed keys are still to be made of; `nsa_decode` does not read them
    """

    pages: Tensor
    lengths: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    k_recent: Tensor | None = None
    v_recent: Tensor | None = None
    threshold: int = 0
    k_raw: Tensor | None = None
    v_raw: Tensor | None = None


class NewRows(NamedTuple):
    """Keys and values of a new token of each sequence, `[B, Hkv, Dk or Dv]`: for the compression (not rotated), the selected branch and the window."""

    k_raw: Tensor
    v_raw: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor


def recent_tokens(config: NSAConfig, threshold: int) -> int:
    """Tokens of a ring that holds every block reaching into the newest `threshold` tokens, the unfinished one included."""
    return (-(-threshold // config.select_block) + 1) * config.select_block


def gather_pages(pool: Tensor, pages: Tensor, count: int) -> Tensor:
    """The first `count` rows of a sequence with int64 `pages`, from a pool [pages, Hkv, size, …]: [count, Hkv, …]."""
    used = pages[: -(-count // pool.shape[2])]
    if pool.dtype == torch.float8_e4m3fn:  # which is not indexed everywhere
        return gather_pages(pool.view(torch.uint8), used, count).view(pool.dtype)
    return pool[used].transpose(1, 2).flatten(0, 1)[:count]


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] to e4m3 and a scale [...] of dtype SCALE for each row, its largest number over e4m3's: x is about the one times the other.

    A scale is rounded to the nearest before anything is divided by it. So no number of the row loses by it but the largest, which becomes 448 (1 ± 2^-8) and is
    stored as 448: an error of up to 0.4 %, where others have half a step of e4m3, up to 6 %. A row of zeros stays one.
    """
    # A product, not a quotient by a constant, which a GPU rounds otherwise than a CPU: scales are the same bits everywhere.
    x = x.float()
    scale = (x.abs().amax(-1) * (1 / LARGEST)).clamp(min=1e-12).to(SCALE)
    return (x / scale[..., None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def write_rows(rows: NewRows, cache: PagedKeysValues, config: NSAConfig) -> None:
    """`append_rows` in plain PyTorch."""
    lengths, table = cache.lengths.long(), cache.pages.long()
    each, t = torch.arange(len(lengths), device=lengths.device), (lengths - 1).clamp(min=0)
    span, size = page_tokens(config), config.select_block
    quantized = cache.k_scale is not None
    page = torch.where(lengths > 0, table[each, t // span], 0)
    old = lengths - cache.threshold
    first = (old - size).clamp(min=0)
    to = torch.where((old > 0) & (old % size == 0), table[each, first // span], 0)[:, None]
    token = first[:, None] + torch.arange(size, device=t.device)
    for raw, selected, window, raw_ring, pool, ring, scale, recent in (
        (rows.k_raw, rows.k_slc, rows.k_win, cache.k_raw, cache.k_slc, cache.k_win, cache.k_scale, cache.k_recent),
        (rows.v_raw, rows.v_slc, rows.v_win, cache.v_raw, cache.v_slc, cache.v_win, cache.v_scale, cache.v_recent),
    ):
        assert raw_ring is not None
        raw_ring[each, :, t % raw_ring.shape[2]] = raw
        ring[each, :, t % ring.shape[2]] = window
        if quantized:
            assert scale is not None and recent is not None
            recent[each, :, t % recent.shape[2]] = selected
            stored, factor = quantize_rows(recent[each[:, None], :, token % recent.shape[2]])
            pool.view(torch.uint8)[to, :, token % span] = stored.view(torch.uint8)  # e4m3 has no indexed writes
            scale[to, :, token % span] = factor
        else:
            pool[page, :, t % span] = selected
