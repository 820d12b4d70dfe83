"""Attention layers: Native Sparse Attention, and its dense and sliding-window controls on torch's own attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsa_transformer.config import ModelConfig, NSAConfig
from nsa_transformer.kernels import CompressionWeights, compress_blocks, few_rows, nsa_attention
from nsa_transformer.kernels.decode import nsa_decode
from nsa_transformer.kernels.paged import NewRows
from nsa_transformer.models.cache import DenseLayerCache, LayerView, SparseLayerCache
from nsa_transformer.models.chunk import SparseChunkPlan
from nsa_transformer.models.layout import PackLayout
from nsa_transformer.models.rope import RotaryEmbedding

MASKED_QUERIES = 4096  # at once in dense attention that goes on from a cache: where torch has no kernel for a mask, all their scores are in memory


class BlockCompressor(nn.Module):
    """Parameters of φ, equation 7: the l keys (or values) of a block become one. `kernels/compress.py` computes it, of both at once.

    `mlp`: the block, each row with a learned position embedding, flattened, through a two-layer MLP shared by the heads. `mean`: the average.
    """

    def __init__(self, dim: int, config: NSAConfig) -> None:
        super().__init__()
        self.kind = config.compression
        if self.kind == "mlp":
            self.position = nn.Parameter(torch.empty(config.compress_block, dim))
            self.up = nn.Linear(config.compress_block * dim, dim, bias=False)
            self.down = nn.Linear(dim, dim, bias=False)

    @property
    def weights(self) -> CompressionWeights | None:
        return CompressionWeights(self.position, self.up.weight, self.down.weight) if self.kind == "mlp" else None


class NativeSparseAttention(nn.Module):
    """Native Sparse Attention (arXiv 2502.11089) as a layer: projections, rotation, compression, gates, three branches, output.

    Args:
        hidden_size: width of x.
        num_heads, num_kv_heads: query heads and key/value heads; the latter divide the former.
        head_dim: width of queries and keys, even.
        config: geometry.
        head_dim_v: width of values; None: `head_dim`.
        rope: rotary embedding of width `head_dim`; None: the default one.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        config: NSAConfig | None = None,
        head_dim_v: int | None = None,
        *,
        rope: RotaryEmbedding | None = None,
    ) -> None:
        super().__init__()
        config = NSAConfig() if config is None else config
        if min(hidden_size, num_heads, num_kv_heads, head_dim) < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}, and every size must be at least 1")
        if head_dim_v is not None and head_dim_v < 1:
            raise ValueError(f"head_dim_v={head_dim_v} must be at least 1, or None for head_dim")
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} must be even for the rotary embedding; write {head_dim + 1}")
        self.config = config
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.head_dim_v = head_dim, head_dim if head_dim_v is None else head_dim_v
        self.rope = RotaryEmbedding(head_dim) if rope is None else rope
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        # Three independent keys and values (section 3.3.3), in the order compressed, selected, window.
        self.k_proj = nn.Linear(hidden_size, 3 * num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, 3 * num_kv_heads * self.head_dim_v, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim_v, hidden_size, bias=False)
        self.k_compress = BlockCompressor(head_dim, config)
        self.v_compress = BlockCompressor(self.head_dim_v, config)
        self.gate = GateMLP(hidden_size, num_heads)
        self.attend: Callable[..., Tensor] = nsa_attention  # type: ignore[assignment]
        self.decode: Callable[..., Tensor] = nsa_decode  # type: ignore[assignment]
        self.backend = "auto"  # of the compression and the attention, as `nsa_attention` takes it
        # As a part of `Transformer` these are drawn again, from its seed.
        for parameter in (p for c in (self.k_compress, self.v_compress) for n, p in c.named_parameters() if n == "position"):
            nn.init.normal_(parameter, std=0.02)

    def join_projections(self) -> None:
        """Make one product of the layers that x goes through first, wherever a cache is given."""
        join_weights((self.q_proj, self.k_proj, self.v_proj, self.gate.up))

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, *, layout: PackLayout | None = None, cache: LayerView | None = None) -> Tensor:
        """x `[T, hidden]` packed by `cu_seqlens` (int32 `[num_docs + 1]`; None: one document): `[T, hidden]`.

        `layout` saves building the positions again in each layer. With a `cache`, x continues one sequence, or has a token of each, and `layout` says where.
        """
        if x.dim() != 2 or x.shape[1] != self.q_proj.in_features:
            raise ValueError(f"x has shape {list(x.shape)}; give [T, {self.q_proj.in_features}], packed tokens without a batch axis")
        if layout is None:
            layout = PackLayout.build(x.shape[0], cu_seqlens, self.config, self.rope, x.device)
        joined = None if cache is None else joined_product(x, (self.q_proj, self.k_proj, self.v_proj, self.gate.up))
        if joined is None:
            q, k, v, gates = self.q_proj(x), self.k_proj(x), self.v_proj(x), self.gate(x)
        else:
            q, k, v, hidden = joined
            gates = self.gate.of(hidden)
        q = layout.rotation(q.unflatten(-1, (self.num_heads, self.head_dim)))
        k_cmp, k_turning = k.unflatten(-1, (3 * self.num_kv_heads, self.head_dim)).split((self.num_kv_heads, 2 * self.num_kv_heads), dim=1)
        k_slc, k_win = layout.rotation(k_turning).chunk(2, dim=1)
        v_cmp, v_slc, v_win = v.unflatten(-1, (3, self.num_kv_heads, self.head_dim_v)).unbind(1)
        if cache is None:
            k_cmp, v_cmp = self._compress(k_cmp, v_cmp, layout.cmp_rows, layout.cu_seqlens)
            keys_values = (layout.cmp_rotation(k_cmp), v_cmp, k_slc, v_slc, k_win, v_win)
            out = self.attend(q, *keys_values, gates, self.config, cu_seqlens=layout.cu_seqlens, backend=self.backend)
        else:
            assert isinstance(cache.layer, SparseLayerCache)
            new = NewRows(k_cmp, v_cmp, k_slc, v_slc, k_win, v_win)
            if cache.plan is None:
                out = self.decode(q, gates, cache.layer.step(new, self._compress_blocks, self.backend), self.config, backend=self.backend)
            else:
                assert isinstance(cache.plan, SparseChunkPlan)
                rows = cache.layer.extend(cache.plan, new, partial(self._compress_run, layout))
                out = self.attend(q=q, **rows, gates=gates, config=self.config, backend=self.backend)
        return self.o_proj(out.flatten(1))

    def _compress(self, k: Tensor, v: Tensor, rows: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """k, v `[T, heads, …]`, blocks int64 `[N, l]` of their tokens: `[N, heads, …]` or more rows."""
        k_weights, v_weights = self.k_compress.weights, self.v_compress.weights
        weights = None if k_weights is None or v_weights is None else (k_weights, v_weights)
        return compress_blocks(k, v, self.config, weights=weights, cu_seqlens=cu_seqlens, rows=rows, backend=self.backend)

    def _compress_run(self, layout: PackLayout, k: Tensor, v: Tensor, plan: SparseChunkPlan) -> tuple[Tensor, Tensor]:
        """The run of tokens k, v `[T, heads, …]` that a plan's new blocks lie in: compressed and rotated, `[new blocks, heads, …]`."""
        k_new, v_new = (x[: len(plan.block_rows)] for x in self._compress(k, v, plan.block_rows, plan.run))
        return layout.cmp_rotation(k_new), v_new

    def _compress_blocks(self, k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Whole blocks k, v `[N, l, heads, …]`, blocks `index` int64 `[N]` of their sequences: compressed and rotated, `[N, heads, …]`."""
        ends = torch.arange(len(k) + 1, dtype=torch.int32, device=k.device) * k.shape[1]
        rows = torch.arange(k.shape[0] * k.shape[1], device=k.device).view(k.shape[:2])
        k_new, v_new = (x[: len(index)] for x in self._compress(k.flatten(0, 1), v.flatten(0, 1), rows, ends))
        middles = index * self.config.compress_stride + self.config.compress_block // 2
        return self.rope.rotation(middles)(k_new), v_new


class GateMLP(nn.Module):
    """Equation 5's gates from the layer's input: an MLP and a sigmoid, `[T, heads, 3]` in float32."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        width = max(hidden_size // 4, 1)
        self.num_heads = num_heads
        self.up = nn.Linear(hidden_size, width, bias=False)
        self.down = nn.Linear(width, 3 * num_heads)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(self.up(x))

    def of(self, hidden: Tensor) -> Tensor:
        """Behind the first product."""
        if few_rows.few_rows(hidden, self.down.weight):
            return few_rows.gates(hidden, self.down.weight, self.down.bias).unflatten(-1, (self.num_heads, 3))
        score = self.down(F.silu(hidden))
        return score.to(torch.promote_types(score.dtype, torch.float32)).sigmoid().unflatten(-1, (self.num_heads, 3))


def join_weights(layers: Sequence[nn.Linear]) -> None:
    """Let the weights of layers without bias lie one behind the other in memory, where nobody may want gradients of them. Those that do stay where they are: a
    recorded step of decoding reads them there."""
    assert not any(layer.weight.requires_grad or layer.bias is not None for layer in layers)
    if _joined_weight(layers) is None:
        parts = torch.cat([layer.weight.detach() for layer in layers]).split([len(layer.weight) for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            layer.weight.data = part


def joined_product(x: Tensor, layers: Sequence[nn.Module]) -> Sequence[Tensor] | None:
    """x `[T, hidden]` to `[T, width]` of each layer by one product, for the few rows of decoding, where each costs a launch. None where their weights do not
    lie one behind the other (`join_weights`), or somebody wants to know of each: its gradient, or by a hook."""
    for layer in layers:
        if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks or (layer.weight.requires_grad and torch.is_grad_enabled()):
            return None
    weight = _joined_weight(layers)
    return None if weight is None else F.linear(x, weight).split([len(layer.weight) for layer in layers], dim=-1)  # type: ignore[arg-type]


def _joined_weight(layers: Sequence[nn.Module]) -> Tensor | None:
    """The weights of linear layers of one input as `[sum of widths, hidden]` where they lie so in memory, else None."""
    first = layers[0].weight
    assert isinstance(first, Tensor)
    width, rows, start = first.shape[1], 0, first.storage_offset()
    for layer in layers:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        same = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() and weight.dtype == first.dtype
        if not (same and weight.is_contiguous() and weight.storage_offset() == start + rows * width):
            return None
        rows += len(weight)
    return first.detach().as_strided((rows, width), (width, 1), start)


class DenseAttention(nn.Module):
    """Causal attention of one key and value per token; with a `window`, only the last `window` keys."""

    def __init__(self, config: ModelConfig, rope: RotaryEmbedding, window: int | None) -> None:
        super().__init__()
        self.config, self.rope, self.window = config.nsa, rope, window
        self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim_v = config.num_heads, config.num_kv_heads, config.head_dim, config.value_dim
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim_v, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim_v, config.hidden_size, bias=False)

    def join_projections(self) -> None:
        """As `NativeSparseAttention.join_projections`."""
        join_weights((self.q_proj, self.k_proj, self.v_proj))

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, *, layout: PackLayout | None = None, cache: LayerView | None = None) -> Tensor:
        """As `NativeSparseAttention.forward`."""
        if layout is None:
            layout = PackLayout.build(x.shape[0], cu_seqlens, self.config, self.rope, x.device)
        joined = None if cache is None else joined_product(x, (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = joined or (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q = layout.rotation(q.unflatten(-1, (self.num_heads, self.head_dim)))
        k = layout.rotation(k.unflatten(-1, (self.num_kv_heads, self.head_dim)))
        v = v.unflatten(-1, (self.num_kv_heads, self.head_dim_v))
        if cache is None:
            out = packed_attention(q, k, v, layout.cu_seqlens, self.window)
        else:
            assert isinstance(cache.layer, DenseLayerCache)
            if cache.plan is None:
                out = _attend_newest(q, *cache.layer.step(k, v), self.window)
            else:
                out = _attend_document(q, *cache.layer.extend(cache.plan, k, v), self.window)
        return self.o_proj(out.flatten(1))


@torch.compiler.disable  # the boundaries are read on the host
def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None) -> Tensor:
    """torch's attention on each document: q `[T, Hq, Dk]`, k, v `[T, Hkv, …]` to `[T, Hq, Dv]`."""
    lengths = cu_seqlens.diff().tolist()
    pieces = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    out = [_attend_document(*piece, window) for piece in pieces if len(piece[0])]
    return torch.cat(out) if out else q.new_empty(0, q.shape[1], v.shape[2])


def _attend_document(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Queries that end where the keys end. What needs a mask goes by pieces: of the window's length, so that it is not quadratic, or of MASKED_QUERIES."""
    queries, keys = q.shape[0], k.shape[0]
    if window is None or window >= keys:
        if queries == keys:
            return _sdpa(q, k, v, is_causal=True)
        window, size = keys, MASKED_QUERIES
    else:
        size = max(window, 64)
    out = []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        t = torch.arange(keys - queries + start, keys - queries + end, device=q.device)[:, None]
        first = max(0, keys - queries + start - window + 1)
        last = keys - queries + end
        key = torch.arange(first, last, device=q.device)
        out.append(_sdpa(q[start:end], k[first:last], v[first:last], attn_mask=(key <= t) & (key > t - window)))
    return torch.cat(out) if out else q.new_empty(0, q.shape[1], v.shape[2])


def _attend_newest(q: Tensor, k: Tensor, v: Tensor, t: Tensor, window: int | None) -> Tensor:
    """A query of each sequence, q `[B, Hq, Dk]` at position t `[B]`, against k, v `[B, Hkv, S, …]`: `[B, Hq, Dv]`."""
    key = torch.arange(k.shape[2], device=t.device)
    mask = key <= t[:, None]
    if window is not None:
        mask = mask & (key > t[:, None] - window)
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask[:, None, None], enable_gqa=True).squeeze(2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **kwargs).squeeze(0).transpose(0, 1)
