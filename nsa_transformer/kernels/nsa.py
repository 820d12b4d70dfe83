"""`nsa_attention`: the one door to Native Sparse Attention, whatever the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels.checks import check_boundaries, check_tensors
from nsa_transformer.kernels.dispatch import available_backends, check_backend_name, choose_backend
from nsa_transformer.kernels.operators import reference_op, triton_op

__all__ = ["available_backends", "nsa_attention"]


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    config: NSAConfig,
    *,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
    blocks: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_blocks: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Native Sparse Attention (arXiv 2502.11089) over packed documents: `g_cmp o_cmp + g_slc o_slc + g_win o_win`.

    Args:
        q: `[T, Hq, Dk]`, bf16, fp16, fp32 or fp64, already rotated.
        k_cmp, v_cmp: `[N', Hkv, Dk]`, `[N', Hkv, Dv]`: compressed keys and values, documents one after the other, `max(0, (len - l) // d + 1)`
            each; rows past their sum are never read.
        k_slc, v_slc, k_win, v_win: `[S, Hkv, Dk or Dv]`, keys and values of the selected and the window branch. S = T unless `cu_seqlens_k` says otherwise.
        gates: `[T, Hq, 3]` in q's dtype or float32, after the sigmoid, in the order compressed, selected, window.
        config: the geometry.
        cu_seqlens: int32 `[num_docs + 1]`, boundaries of the documents' queries, from 0 to T; None: one document.
        cu_seqlens_k: int32 `[num_docs + 1]`, boundaries of the documents' keys; None: `cu_seqlens`.
        q_start: int32 `[num_docs]`, position of each document's first query; None: queries end where keys end.
        blocks: int32 `[T, Hkv, n]`, -1 padded: attend exactly these selection blocks instead of choosing.
        scale: of the scores; None: `Dk ** -0.5`.
        backend: `auto` (the kernels where device, dtype and shape allow, see `choose_backend`) or one of `available_backends()`.
        return_blocks: also return the attended blocks.

    Returns:
        `[T, Hq, Dv]` in q's dtype; with `return_blocks` also int32 `[T, Hkv, n]`, ascending, -1 padded.

    Raises:
        ValueError: naming the argument, what it was and what would do. What only a GPU knows (values of `cu_seqlens`, `blocks`)
            is checked on CPU tensors, and everywhere under `NSA_CHECK=1`.
    """
    check_backend_name(backend)
    if not isinstance(config, NSAConfig):
        raise ValueError(f"config is {type(config).__name__}; give an NSAConfig")
    keys_values = (k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)
    check_tensors(q, keys_values, gates, blocks, scale)
    queries, keys = q.shape[0], k_slc.shape[0]
    if cu_seqlens is None:
        whole = torch.arange(2, dtype=torch.int32, device=q.device)  # made there: copied from here, it would wait for the device
        cu_seqlens = whole * queries
        if cu_seqlens_k is None and keys != queries:
            cu_seqlens_k = whole * keys
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens
    check_boundaries(q, cu_seqlens, cu_seqlens_k, q_start)
    if q_start is None:
        q_start = cu_seqlens_k.diff() - cu_seqlens.diff()
    geometry, scale = _geometry(config), q.shape[-1] ** -0.5 if scale is None else float(scale)
    inputs = (q, *keys_values, gates)
    if choose_backend(backend, q, v_cmp, config) == "reference":
        out, used = reference_op(*inputs, cu_seqlens, cu_seqlens_k, q_start, blocks, geometry, scale)
    else:
        save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        out, used, _, _ = triton_op(*inputs, cu_seqlens, cu_seqlens_k, q_start, blocks, geometry, scale, save)
    return (out, used) if return_blocks else out


def _geometry(config: NSAConfig) -> list[int]:
    return [
        config.compress_block,
        config.compress_stride,
        config.select_block,
        config.num_selected,
        config.num_initial,
        config.num_local,
        config.window,
    ]
