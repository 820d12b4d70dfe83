"""Ways to round keys and values to e4m3, their bytes and errors, and a cache that rounds in any of them while it keeps 16 bits.

Sizes: T tokens (whole blocks of `size`), H key/value heads, D width. Every way is a function of x [T, H, D] and `size` to what is read back, in x's dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_transformer.config import KVCacheConfig, NSAConfig
from nsa_transformer.kernels import nsa_attention
from nsa_transformer.kernels.paged import LARGEST, SCALE, quantize_rows, recent_tokens, ring_tokens
from nsa_transformer.models.attention import NativeSparseAttention
from nsa_transformer.models.cache import KVCache, SparseLayerCache
from nsa_transformer.models.chunk import Places, SparseChunkPlan
from nsa_transformer.models.transformer import Transformer

Way = Callable[[Tensor, int], Tensor]


def _by(x: Tensor, scale: Tensor) -> Tensor:
    """Through e4m3 with a scale that broadcasts to x."""
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(x.dtype) * scale.to(x.dtype)


def by_row(x: Tensor, size: int) -> Tensor:
    """A scale in bf16 for each token and head: what the cache does, to the bit."""
    stored, scale = quantize_rows(x)
    return stored.to(x.dtype) * scale.to(x.dtype)[..., None]


def by_row_32(x: Tensor, size: int) -> Tensor:
    """The same with scales in float32."""
    return _by(x, (x.float().abs().amax(-1, keepdim=True) / LARGEST).clamp(min=1e-12))


def by_channel(x: Tensor, size: int) -> Tensor:
    """A scale for each block, head and channel."""
    blocks = x.unflatten(0, (-1, size))
    return _by(blocks, (blocks.float().abs().amax(1, keepdim=True) / LARGEST).clamp(min=1e-12)).flatten(0, 1)


def by_block(x: Tensor, size: int) -> Tensor:
    """A scale for each block and head."""
    blocks = x.unflatten(0, (-1, size))
    return _by(blocks, (blocks.float().abs().amax((1, 3), keepdim=True) / LARGEST).clamp(min=1e-12)).flatten(0, 1)


def unscaled(x: Tensor, size: int) -> Tensor:
    """No scale: clamped to ± 448."""
    return _by(x, torch.ones((), device=x.device))


def forgotten(x: Tensor, size: int) -> Tensor:
    """Zeros, to see what old blocks are good for."""
    return torch.zeros_like(x)


# Bytes of scales for a token and head, of keys or of values: (width, block) -> bytes.
SCALE_BYTES: dict[Way, Callable[[int, int], float]] = {
    by_row: lambda width, size: SCALE.itemsize,
    by_row_32: lambda width, size: 4,
    by_channel: lambda width, size: 4 * width / size,
    by_block: lambda width, size: 4 / size,
    unscaled: lambda width, size: 0,
}


@dataclass(frozen=True)
class Variant:
    """How old blocks are kept: keys and values in some way, both None: in 16 bits; and all compressed keys and values. `shipped`: by the package's own FP8
    cache."""

    name: str
    keys: Way | None = None
    values: Way | None = None
    threshold: int = 0
    shipped: bool = False
    compressed: Way | None = None

    def cache(self, model: Transformer) -> KVCache:
        if self.shipped:
            return model.new_cache(settings=KVCacheConfig("fp8", self.threshold))
        cache = model.new_cache()
        if self.keys is not None and self.values is not None:
            cache.layers = [RoundedLayer(cache, {"k": self.keys, "v": self.values}, self.threshold, self.compressed) for _ in cache.layers]
        return cache

    def row_bytes(self, width: int, config: NSAConfig) -> float:
        """Of a token and key/value head, without rings: the selected branch, its scales, and compressed keys and values in 16 bits."""
        compressed = (4 * width if self.compressed is None else 2 * width + 2 * SCALE_BYTES[self.compressed](width, 1)) / config.compress_stride
        if self.keys is None or self.values is None:
            return 4 * width + compressed
        scales = sum(SCALE_BYTES[way](width, config.select_block) for way in (self.keys, self.values))
        return 2 * width + scales + compressed

    def sequence_bytes(self, tokens: int, width: int, config: NSAConfig) -> float:
        """Of a sequence and head with its rings; what a last page has left is not counted."""
        rings = ring_tokens(config) + config.compress_block
        if self.keys is not None:
            rings += recent_tokens(config, self.threshold)
        return tokens * self.row_bytes(width, config) + 4 * width * rings


def tokens_ratio(variant: Variant, tokens: int | None, width: int, config: NSAConfig) -> float:
    """How many times the tokens of a 16-bit cache of sequences of so many tokens (None: without end) go into the same memory."""
    plain = Variant("16 bit")
    if tokens is None:
        return plain.row_bytes(width, config) / variant.row_bytes(width, config)
    return plain.sequence_bytes(tokens, width, config) / variant.sequence_bytes(tokens, width, config)


class RoundedLayer(SparseLayerCache):
    """The 16-bit cache, whose blocks are rounded in place when the FP8 cache would round them: after the chunk that makes them older than `threshold`."""

    def __init__(self, owner: KVCache, ways: dict[str, Way], threshold: int, compressed: Way | None) -> None:
        super().__init__(owner)
        self.ways, self.threshold, self.compressed = ways, threshold, compressed

    def _compress(self, *arguments: Any) -> dict[str, Tensor]:
        rows = super()._compress(*arguments)
        return rows if self.compressed is None else {name: self.compressed(x, 1) for name, x in rows.items()}

    def _extend_selected(self, plan: SparseChunkPlan, new: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = super()._extend_selected(plan, new)
        size = self.owner.config.nsa.select_block
        before, after = (max(0, length - self.threshold) // size * size for length in (plan.start, plan.end))
        if after > before:
            assert self.owner.table is not None
            places = Places.of(self.owner.table[plan.sequence].long(), after, self.owner.span).between(before, after)
            for name in ("k", "v"):
                places.write(self._stores[f"{name}_slc"], self.ways[name](rows[f"{name}_slc"][before:after], size))
        return rows


def with_outliers(model: Transformer, factor: float = 16.0, pairs: Sequence[int] = (1, 9, 17, 25)) -> Transformer:
    """A copy whose keys are `factor` times as large in some pairs of channels, and its queries as much smaller: with a power of two the same model exactly.

    Both channels that the rotation turns into each other are scaled alike, so that it does not matter. Trained models have such channels.
    """
    model = copy.deepcopy(model)
    for layer in (block.attention for block in model.layers):
        assert isinstance(layer, NativeSparseAttention)
        half = layer.head_dim // 2
        scale = torch.ones(2, half, device=layer.q_proj.weight.device)
        scale[:, [pair % half for pair in pairs]] = factor
        each = scale.flatten()[:, None].to(layer.q_proj.weight.dtype)
        with torch.no_grad():
            layer.q_proj.weight.view(layer.num_heads, layer.head_dim, -1).div_(each)
            keys = layer.k_proj.weight.view(3, layer.num_kv_heads, layer.head_dim, -1)
            # Compressed keys are scaled behind their MLP, which is not linear.
            mlp = layer.k_compress.weights is not None
            keys[1 if mlp else 0 :].mul_(each)
            if mlp:
                layer.k_compress.down.weight.mul_(each)
    return model


# ------------------------------------------------------------------------------------------------------------ errors of keys


@torch.no_grad()
def queries_and_keys(model: Transformer, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """q [T, Hq, D] and selected keys [T, H, D] of each layer on one sequence."""
    found: list[tuple[Tensor, Tensor]] = []

    def attend(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, *rest: Any, **keywords: Any) -> Any:
        found.append((q, k_slc))
        return nsa_attention(q, k_cmp, v_cmp, k_slc, *rest, **keywords)

    layers = [block.attention for block in model.layers if isinstance(block.attention, NativeSparseAttention)]
    try:
        for layer in layers:
            layer.attend = attend
        model(tokens, last_only=True)
    finally:
        for layer in layers:
            layer.attend = nsa_attention  # type: ignore[assignment]
    return found


def key_error(q: Tensor, k: Tensor, way: Way, size: int, newest: int = 256) -> dict[str, float]:
    """Of whole blocks of keys k [T, H, D]: relative RMS error of the keys, and of their scores with the `newest` queries of q [T, Hq, D], in nats (RMS, and
    relative to the spread of a query's scores)."""
    whole = len(k) // size * size
    exact, rounded = k[:whole].double(), way(k[:whole], size).double()
    last = q[-newest:].double().unflatten(1, (k.shape[1], -1))

    def scores(keys: Tensor) -> Tensor:
        return torch.einsum("thgd,shd->hgts", last, keys) * q.shape[-1] ** -0.5

    right = scores(exact)
    wrong = (scores(rounded) - right).square().mean().sqrt()
    spread = (right - right.mean(-1, keepdim=True)).square().mean().sqrt()
    relative = (rounded - exact).norm() / exact.norm()
    return {"keys": float(relative), "nats": float(wrong), "scores": float(wrong / spread)}


def synthetic(kind: str, tokens: int = 2048, heads: int = 2, width: int = 128) -> tuple[Tensor, Tensor]:
    """Normal queries and keys in bf16, with what trained models' keys are said to have: `scaled`: a twentieth of the channels 16 times as large, and q there
    as much smaller; `shifted`: these channels with a mean of 16, q there as it was; `uneven`: tokens whose sizes differ by e^(2 n), n normal."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(tokens, heads * group, width, generator=generator) for group in (2, 1))
    few = slice(0, None, 20)
    if kind == "scaled":
        k[..., few] *= 16
        q[..., few] /= 16
    elif kind == "shifted":
        k[..., few] += 16
    elif kind == "uneven":
        k *= (2 * torch.randn(tokens, heads, 1, generator=generator)).exp()
    elif kind != "normal":
        raise ValueError(f"kind={kind!r} is unknown; write normal, scaled, shifted or uneven")
    return q.bfloat16(), k.bfloat16()
