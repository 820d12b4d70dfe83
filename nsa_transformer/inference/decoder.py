"""Steps of decoding, on a GPU replayed from CUDA graphs."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from nsa_transformer.kernels.decode import decoding_backend
from nsa_transformer.kernels.moe import experts, wait_for_device
from nsa_transformer.memory.expert_offload import LayerExperts
from nsa_transformer.models.attention import NativeSparseAttention
from nsa_transformer.models.cache import KVCache
from nsa_transformer.models.moe import MixtureOfExperts
from nsa_transformer.models.transformer import Block, Transformer


class Decoder:
    """`decoder(tokens)` is `model.decode(tokens, cache)`. On a GPU a step is recorded the second time one of its kind comes, and replayed from then on, where
    nothing in it waits for the device (`why_not_recorded` says what does).

    Kinds differ in what the host decides: whether some block is to be compressed. Where the cache's memory has moved, all are recorded anew. The logits of a
    replayed step are overwritten by the next one.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._recorded = why_not_recorded(model, cache) is None
        if self._recorded:  # so nobody wants gradients
            for block in model.layers:
                assert isinstance(block, Block)
                block.attention.join_projections()
        self._tokens: Tensor | None = None
        self._moves = 0
        self._seen: set[bool] = set()
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens int64 `[B]` to logits `[B, vocab]`."""
        # Autocast keeps the weights it has cast, which would be those of a recording's own memory.
        if not self._recorded or torch.is_autocast_enabled(tokens.device.type):
            return self.model.decode(tokens, self.cache)
        self.cache.reserve_step(tokens.device)
        kind, moves = self.cache.step_kind()
        if moves != self._moves:
            self._graphs.clear()
            self._seen.clear()
            self._moves = moves
        if self._tokens is None:
            self._tokens = tokens.clone()
        self._tokens.copy_(tokens)
        if kind not in self._graphs:
            if kind not in self._seen:  # kernels are compiled and memory is found outside a recording
                self._seen.add(kind)
                return self.model.decode_reserved(self._tokens, self.cache)
            self._graphs[kind] = self._record(self._tokens)
        graph, logits = self._graphs[kind]
        graph.replay()
        return logits

    def _record(self, tokens: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # One pool for all: no two run at once.
        pool = next((other.pool() for other, _ in self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            logits = self.model.decode_reserved(tokens, self.cache)
        return graph, logits


def why_not_recorded(model: Transformer, cache: KVCache) -> str | None:
    """What in a step of decoding waits for the device, or may, as a phrase; None where nothing does, and a CUDA graph can be made of it."""
    weight = model.embedding.weight
    if weight.device.type != "cuda":
        return f"the model is on {weight.device}"
    if any(parameter.requires_grad for parameter in model.parameters()):
        return "the model is in training, where shards, streamed experts or weights on their way may lie around its layers; requires_grad_(False) ends that"
    for block in model.layers:
        assert isinstance(block, Block)
        refusal = _attention_waits(block.attention, cache, weight) or _experts_wait(block.mlp, weight)
        if refusal is not None:
            return refusal
    return None


def _attention_waits(layer: torch.nn.Module, cache: KVCache, weight: Tensor) -> str | None:
    if not isinstance(layer, NativeSparseAttention):
        return None
    if os.environ.get("NSA_CHECK") == "1":
        return "NSA_CHECK=1 reads boundaries on the host"
    q, v = weight.new_empty(0, layer.num_heads, layer.head_dim), weight.new_empty(0, layer.num_kv_heads, layer.head_dim_v)
    if decoding_backend(layer.backend, q, v, layer.config, cache.quantized) != "triton":
        return "plain PyTorch computes the attention, and gathers each sequence by its length"
    return None


def _experts_wait(mlp: torch.nn.Module, weight: Tensor) -> str | None:
    if not isinstance(mlp, MixtureOfExperts):
        return None
    if isinstance(mlp.experts, LayerExperts):
        return None if mlp.experts.store.arena.pinned else "experts in pageable host memory are copied by the host"
    if mlp.experts is not experts:
        return f"{mlp.experts} computes the experts"
    return "the experts' tokens are counted on the host" if wait_for_device(weight.new_empty(0, mlp.w2.shape[1]), mlp.w2) else None
