"""Steps of decoding, on a GPU replayed from CUDA graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_transformer.models.attention import NativeSparseAttention
from nsa_transformer.models.cache import KVCache
from nsa_transformer.models.transformer import Transformer


class Decoder:
    """`decoder(tokens)` is `model.decode(tokens, cache)`. On a GPU, where the attention waits for nothing, a step is recorded the second time one of its kind
    comes, and replayed from then on: that is dense attention, and sparse attention with `backend="triton"` in its layers.

    Kinds differ in what the host decides: whether some block is to be compressed or quantized, and where pages lie. The logits of a replayed step are
    overwritten by the next of its kind.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        layers = (block.attention for block in model.layers)
        self._recorded = all(not isinstance(layer, NativeSparseAttention) or layer.backend == "triton" for layer in layers)
        self._tokens: Tensor | None = None
        self._seen: set[tuple[object, ...]] = set()
        self._graphs: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens int64 `[B]` to logits `[B, vocab]`."""
        if not self._recorded or tokens.device.type != "cuda":
            return self.model.decode(tokens, self.cache)
        self.cache.reserve_step(tokens.device)
        kind = self.cache.step_shape()
        if self._tokens is None:
            self._tokens = tokens.clone()
        self._tokens.copy_(tokens)
        if kind in self._graphs:
            graph, logits = self._graphs[kind]
            graph.replay()
            return logits
        if kind not in self._seen:  # kernels are compiled and memory is found outside a recording
            self._seen.add(kind)
            return self.model.decode_reserved(self._tokens, self.cache)
        if len(self._graphs) >= 8:  # pages have moved: the old ones do not come again
            self._graphs.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.model.decode_reserved(self._tokens, self.cache)
        self._graphs[kind] = graph, logits
        graph.replay()
        return logits
