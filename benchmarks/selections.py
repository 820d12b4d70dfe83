"""Selections to measure with: what trained models choose is not known, so two ends of the scale.

`iid` lets no query agree with its neighbour; under `drift` neighbours share most of their blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig

CHUNK = 512  # tokens drawn one after the other; the chunks of a document are drawn side by side, each starting afresh
KEEP = {"iid": 0.0, "drift": 0.9}  # probability that the next token keeps a free block


def make_blocks(kind: str, length: int, hkv: int, config: NSAConfig, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Blocks of one document's queries, int32 [length, hkv, num_selected], ascending, -1 padded, as `nsa_attention(blocks=...)` takes them.

    Each query has its forced blocks, and free ones drawn uniformly among its other visible blocks: `iid` draws anew for every query, under
    `drift` the next query keeps each free block with probability 0.9 and draws the others. While no more than num_selected blocks are
    visible, all are taken.
    """
    keep, size, n = KEEP[kind], config.select_block, config.num_selected
    generator = torch.Generator(device=device).manual_seed(seed)
    chunks, most = -(-length // CHUNK), -(-length // size)
    block = torch.arange(most, device=device)
    blocks = torch.empty(chunks, CHUNK, hkv, n, dtype=torch.int32, device=device)
    before = torch.full((chunks, hkv, n), -1, dtype=torch.int64, device=device)
    for step in range(min(CHUNK, length)):
        own = ((torch.arange(chunks, device=device) * CHUNK + step) // size)[:, None, None]
        # The n largest keys win: forced blocks before kept ones before random ones; future blocks are last.
        keys = torch.rand(chunks, hkv, most, generator=generator, device=device)
        kept = (torch.rand(before.shape, generator=generator, device=device) < keep) & (before >= 0)
        keys = torch.cat([keys, keys[..., :1]], dim=-1).scatter_(-1, torch.where(kept, before, most), 2.0)[..., :most]
        keys = keys.masked_fill((block < config.num_initial) | (block > own - config.num_local), 3.0).masked_fill(block > own, -1.0)
        key, index = torch.nn.functional.pad(keys, (0, max(0, n - most)), value=-1.0).topk(n, dim=-1)
        free = (index >= config.num_initial) & (index <= own - config.num_local) & (key > 0)
        before = torch.where(free, index, -1)
        ordered = torch.where(key >= 0, index, most).sort(dim=-1).values
        blocks[:, step] = torch.where(ordered == most, -1, ordered).to(torch.int32)
    return blocks.flatten(0, 1)[:length].contiguous()


def mean_union(blocks: Tensor, tokens: int = 4) -> float:
    """How many different blocks `tokens` neighbouring queries of one document choose together, on average."""
    usable = blocks[: len(blocks) // tokens * tokens]
    together = usable.unflatten(0, (-1, tokens)).transpose(1, 2).flatten(2).sort(dim=-1).values
    different = (together[..., 1:] != together[..., :-1]) & (together[..., 1:] >= 0)
    return float(different.sum(-1).add(together[..., 0] >= 0).float().mean())
