"""The cache that decoding reads: pages of keys and values that belong to many sequences, and what each sequence has for itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig

PAGE_ROWS = 64  # compressed keys of a page


def page_tokens(config: NSAConfig) -> int:
    """Tokens of a page: those that its compressed keys begin at. Whole selection blocks."""
    return PAGE_ROWS * config.compress_stride


def ring_tokens(config: NSAConfig) -> int:
    """Tokens of a sequence's ring for the window: whole tiles."""
    return -(-config.window // PAGE_ROWS) * PAGE_ROWS


@dataclass(frozen=True)
class PagedKeysValues:
    """One layer's keys and values of B sequences. Position t of sequence b lies in page `pages[b, t // tokens]`, `tokens = 64 * d`, and of a ring at `t % its length`.

    pages              int32 [B, max_pages], entries beyond a sequence's length are never read
    lengths            int32 [B], tokens of each sequence, the newest included; 0: there is no such sequence
    k_cmp, v_cmp       [pages, Hkv, 64, Dk or Dv], compressed keys i of a page at i % 64
    k_slc, v_slc       [pages, Hkv, tokens, Dk or Dv], in the compute dtype or e4m3
    k_win, v_win       [B, Hkv, ring, Dk or Dv], the newest tokens, ring = the window rounded up to 64
    k_scale, v_scale   with e4m3: float32 [pages, Hkv, tokens], what a row is to be multiplied by
    k_recent, v_recent with e4m3: [B, Hkv, recent, Dk or Dv], rings in the compute dtype for the selection blocks that reach into the newest `threshold` tokens
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


def recent_tokens(config: NSAConfig, threshold: int) -> int:
    """Tokens of a ring that holds every block reaching into the newest `threshold` tokens, the unfinished one included."""
    return (-(-threshold // config.select_block) + 1) * config.select_block
