"""The one batch there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["IGNORE", "Pack", "merge_packs"]

IGNORE = -100  # target of a token that takes no part in the loss


@dataclass(frozen=True)
class Pack:
    """Documents laid end to end, with their boundaries.

    tokens      int64 [T]
    targets     int64 [T], the next token of the same document; `IGNORE` where there is no loss
    cu_seqlens  int32 [num_docs + 1], starts at 0, ends at T; a stream pads it to one size for all packs by repeating T
    valid       bool [T], True for tokens of documents, False in the padding documents that fill a pack up
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    valid: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that belong to documents. Waits for the device where the pack lies on one."""
        return int(self.valid.sum())

    @property
    def positions(self) -> torch.Tensor:
        """int64 [T], restarting at 0 in each document."""
        index = torch.arange(len(self.tokens), device=self.cu_seqlens.device)
        document = torch.searchsorted(self.cu_seqlens[1:].long(), index, right=True)
        return index - self.cu_seqlens.long()[document]

    @property
    def document_lengths(self) -> list[int]:
        """Tokens of each document that is no padding. Waits for the device where the pack lies on one."""
        ends = torch.cat([self.valid.new_zeros(1, dtype=torch.int64), self.valid.cumsum(0)])[self.cu_seqlens.long()]
        return [length for length in ends.diff().tolist() if length]

    def to(self, device: torch.device | str) -> Pack:
        tokens, targets, cu_seqlens, valid = (t.to(device, non_blocking=True) for t in (self.tokens, self.targets, self.cu_seqlens, self.valid))
        return Pack(tokens, targets, cu_seqlens, valid)


def merge_packs(packs: Sequence[Pack]) -> Pack:
    """Several packs laid end to end as one, for a micro-batch. Padding documents stay where they are, so in the middle too."""
    if not packs:
        raise ValueError("merge_packs needs at least one pack")
    if len(packs) == 1:
        return packs[0]
    boundaries, start = [packs[0].cu_seqlens[:1]], 0
    for pack in packs:
        boundaries.append(pack.cu_seqlens[1:] + start)
        start += len(pack.tokens)
    return Pack(
        tokens=torch.cat([pack.tokens for pack in packs]),
        targets=torch.cat([pack.targets for pack in packs]),
        cu_seqlens=torch.cat(boundaries),
        valid=torch.cat([pack.valid for pack in packs]),
    )
