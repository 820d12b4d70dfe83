"""The one batch there is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORE = -100  # target of a token that takes no part in the loss


@dataclass(frozen=True)
class Pack:
    """Documents laid end to end, with their boundaries.

    tokens      int64 [T]
    targets     int64 [T], the next token of the same document; `IGNORE` where there is no loss
    cu_seqlens  int32 [num_docs + 1], starts at 0, ends at T; may be padded to a fixed size by repeating T
    num_tokens  tokens that belong to documents; the rest, `tokens[num_tokens:]`, is one padding document
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    num_tokens: int

    @property
    def positions(self) -> torch.Tensor:
        """int64 [T], restarting at 0 in each document."""
        index = torch.arange(len(self.tokens), device=self.cu_seqlens.device)
        document = torch.searchsorted(self.cu_seqlens[1:].long(), index, right=True)
        return index - self.cu_seqlens.long()[document]

    def to(self, device: torch.device | str) -> Pack:
        tokens, targets, cu_seqlens = (t.to(device, non_blocking=True) for t in (self.tokens, self.targets, self.cu_seqlens))
        return Pack(tokens, targets, cu_seqlens, self.num_tokens)
