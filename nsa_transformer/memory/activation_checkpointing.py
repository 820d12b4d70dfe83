"""Recomputing activations in the backward instead of keeping them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nsa_transformer.models.transformer import Block, Transformer

_aten = torch.ops.aten
# A recomputed top-k may fall differently where scores tie, so the chosen experts are kept whatever the mode.
ROUTING = (_aten.topk.default,)
# Outputs that are dear to recompute: attention's, ours or torch's, and the experts'.
DEAR = (
    torch.ops.nsa_transformer.attention_reference.default,
    torch.ops.nsa_transformer.attention_triton.default,
    torch.ops.nsa_transformer.experts_grouped.default,
    torch.ops.nsa_transformer.experts_triton.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def apply_activation_checkpointing(model: Transformer, mode: str, always: Iterable[Any] = ()) -> None:
    """`none`: keep everything. `selective`: keep attention and expert outputs, recompute the cheap rest of each block.
    `full`: keep each block's input alone. Gradients are the same bits in all three on a deterministic device.

    `always`: further operators whose outputs, like the chosen experts, are kept whatever the mode."""
    if mode == "none":
        return
    kept = frozenset((*ROUTING, *always, *(DEAR if mode == "selective" else ())))

    def policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)

    def run(forward: Any, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    for block in model.layers:
        assert isinstance(block, Block)
        block.run = run
