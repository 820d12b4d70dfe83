"""Where the tokens of a pack stand: computed once, shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels.compress import block_rows, position_in_group
from nsa_transformer.models.chunk import ChunkPlan, SparseChunkPlan
from nsa_transformer.models.rope import RotaryEmbedding, Rotation


@dataclass(frozen=True)
class PackLayout:
    """Positions, rotations and compressed blocks of T packed tokens. Nothing here waits for the device.

    cu_seqlens   int32 [num_docs + 1]
    document     int64 [T], which document each token belongs to
    rotation     of the tokens
    cmp_rows     int64 [N', l], tokens of each compressed block, N' = T // d; rows past the documents' blocks point anywhere
    cmp_rotation of the compressed keys, at the middle of their blocks
    """

    cu_seqlens: Tensor
    document: Tensor
    rotation: Rotation
    cmp_rows: Tensor
    cmp_rotation: Rotation

    @staticmethod
    def build(num_tokens: int, cu_seqlens: Tensor | None, config: NSAConfig, rope: RotaryEmbedding, device: torch.device) -> PackLayout:
        """Documents from their first token on.

        Raises `ValueError` naming cu_seqlens where it does not bound the documents; its values are checked on the CPU alone.
        """
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, num_tokens], dtype=torch.int32, device=device)
        _check_boundaries(cu_seqlens, num_tokens, device)
        owner, positions = position_in_group(cu_seqlens.long(), torch.arange(num_tokens, device=device))
        rows, index = block_rows(cu_seqlens, num_tokens, config)
        middles = index * config.compress_stride + config.compress_block // 2
        return PackLayout(cu_seqlens, owner, rope.rotation(positions), rows, rope.rotation(middles))

    @staticmethod
    def chunk(plan: ChunkPlan, rope: RotaryEmbedding, device: torch.device) -> PackLayout:
        """A chunk of one sequence, whose tokens before are in a cache; compressed blocks are those that it completes, in tokens of the plan's run."""
        position = torch.arange(plan.start, plan.end, device=device)
        ends = torch.arange(2, dtype=torch.int32, device=device) * len(position)
        rows, middles = (plan.block_rows, plan.middles) if isinstance(plan, SparseChunkPlan) else (position[:0, None], position[:0])
        return PackLayout(ends, torch.zeros_like(position), rope.rotation(position), rows, rope.rotation(middles))

    @staticmethod
    def step(lengths: Tensor, rope: RotaryEmbedding) -> PackLayout:
        """The newest token of each sequence, lengths int32 [B] with it; nothing is compressed from these tokens alone."""
        none = torch.zeros(0, 1, dtype=torch.int64, device=lengths.device)
        ends = torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
        return PackLayout(ends, ends[:-1].long(), rope.rotation((lengths - 1).clamp(min=0)), none, rope.rotation(none[:, 0]))


def _check_boundaries(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> None:
    """The values only on the CPU, where reading them does not wait for a device."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens is {type(cu_seqlens).__name__}; give a tensor, torch.int32 [num_docs + 1]")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.device != device:
        was = f"{cu_seqlens.dtype} {list(cu_seqlens.shape)} on {cu_seqlens.device}"
        raise ValueError(f"cu_seqlens is {was}; give torch.int32 [num_docs + 1] on {device}")
    if device.type != "cpu":
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != num_tokens or bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise ValueError(f"cu_seqlens is {first} … {last}; it must rise from 0 to {num_tokens}, the number of tokens, without decreasing")
