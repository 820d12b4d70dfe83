"""Training with the routed experts in host memory: each pass brings them to the GPU layer by layer.

Two layers' worth of `w13` and `w2` lie on the GPU, layer n in slot n mod 2. While one layer is computed the next one of the pass comes, forwards and
then backwards, on a stream of its own. Autograd keeps views of the slots, not weights: before a layer's backward its weights are brought again, into
the slot that they had (`_Bring`, `_Again`). The parameters themselves have shape and gradients, and one element of memory.

    per pass and layer   2 copies of E · 3 · I · H elements, once for the forward and once for the backward; the last two layers stay in between

Masters and moments are the offloaded optimizer's, which rounds each update into the host's copy. On a CPU the host's copy is what is computed with,
and nothing moves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nsa_transformer.kernels import experts
from nsa_transformer.memory.host import host_zeros, page_lock
from nsa_transformer.models.moe import MixtureOfExperts
from nsa_transformer.models.transformer import Transformer

Weights = tuple[Tensor, Tensor]  # w13, w2


def stream_experts(model: Transformer, device: torch.device, pin_memory: bool) -> None:
    """Give a model on meta its memory on `device`, not yet initialised, with its experts' weights in host memory, page-locked with `pin_memory`.

    Raises `ConfigError` where so much memory cannot be page-locked.
    """
    blocks, layers = zip(*_layers(model), strict=True)
    like = [(mixture.w13, mixture.w2) for mixture in layers]
    for mixture in layers:
        del mixture.w13, mixture.w2  # or `to_empty` would give them memory
    model.to_empty(device=device)
    flat = host_zeros(sum(w.numel() for weights in like for w in weights), like[0][0].dtype)
    # `.data`: views would count each other's writes, and a layer would be copied again because the next one is still being updated.
    parts = (part.data for part in flat.split([w.numel() for weights in like for w in weights]))
    stream = _Stream([(next(parts).view(w13.shape), next(parts).view(w2.shape)) for w13, w2 in like], device)
    if pin_memory and device.type == "cuda":
        page_lock(flat, stream, device, "memory.expert_offloading.pin_memory")
    around = [None, *blocks, None]
    for number, (mixture, (w13, w2)) in enumerate(zip(layers, like, strict=True)):
        mixture.w13, mixture.w2 = (nn.Parameter(torch.zeros(1, dtype=w.dtype, device=device).expand(w.shape)) for w in (w13, w2))
        mixture.experts = StreamedExperts(stream, number, model, (around[number], around[number + 2]))


def host_weights(model: Transformer) -> dict[nn.Parameter, Tensor]:
    """Where passes read the parameters that are streamed: host tensors, flat."""
    found: dict[nn.Parameter, Tensor] = {}
    for _, mixture in _layers(model):
        if isinstance(mixture.experts, StreamedExperts):
            found |= dict(zip((mixture.w13, mixture.w2), (w.flatten() for w in mixture.experts.host), strict=True))
    return found


def _layers(model: Transformer) -> list[tuple[nn.Module, MixtureOfExperts]]:
    """Blocks with experts, and these."""
    return [(block, block.mlp) for block in model.layers if isinstance(block.mlp, MixtureOfExperts)]


class StreamedExperts:
    """`experts` of one layer, in `MixtureOfExperts.experts`: w13 and w2 have the gradients, the weights come from the host."""

    def __init__(self, stream: _Stream, layer: int, model: Transformer, neighbours: tuple[nn.Module | None, nn.Module | None]) -> None:
        self._stream, self._layer, self._model, self._neighbours = stream, layer, model, neighbours

    @property
    def host(self) -> Weights:
        return self._stream.host[self._layer]

    @torch.compiler.disable  # streams and events
    def __call__(self, x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor, backend: str = "auto") -> Tensor:
        if self._layer == 0:
            self._stream.forwards = True
        self._stream.bring(self._layer)
        before = self._stream.mark()
        up, down = _Bring.apply(w13, w2, self)
        y = _Again.apply(experts(x, indices, weights, up, down, backend), self)
        self.bring_next(before)
        return y

    def bring_next(self, before: torch.cuda.Event | None) -> None:
        """Start on the layer that the pass comes to next, whose slot nothing reads any more that was launched after `before`."""
        step = 1 if self._stream.forwards else -1
        block = self._neighbours[self._stream.forwards]
        if block is not None:
            self._model.ready(block)  # it may still be being updated
            self._stream.start(self._layer + step, before)

    def views(self) -> Weights:
        return self._stream.views(self._layer)

    def bring_again(self) -> None:
        self._stream.forwards = False
        self._stream.bring(self._layer)
        self.bring_next(self._stream.mark())


class _Bring(torch.autograd.Function):
    """The weights in their slot in the parameters' place; gradients go to the parameters."""

    @staticmethod
    def forward(ctx: Any, w13: Tensor, w2: Tensor, streamed: StreamedExperts) -> Weights:
        return streamed.views()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *grads, None


class _Again(torch.autograd.Function):
    """Behind a layer's experts: in the backward it comes before theirs, and brings the weights that they saved as views."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, streamed: StreamedExperts) -> Tensor:
        ctx.streamed = streamed
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.streamed.bring_again()
        return grad, None


class _Stream:
    """Two slots on the device and what they hold; on a CPU the host's weights themselves."""

    def __init__(self, host: list[Weights], device: torch.device) -> None:
        self.host, self._device = host, device
        self.forwards = True  # the direction of the pass
        self._slots: list[Weights] = []
        if _apart(device):
            self._slots = [(torch.empty_like(w13, device=device), torch.empty_like(w2, device=device)) for w13, w2 in host[:2]]
            self._holds: list[tuple[int, int] | None] = [None] * len(self._slots)  # layer, and how often its host weights had been written
            self._copied = [torch.cuda.Event() for _ in self._slots]
            self._copies = torch.cuda.Stream(device)

    def mark(self) -> torch.cuda.Event | None:
        """Behind all that the current stream was given."""
        if not self._slots:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def bring(self, layer: int) -> None:
        """Let the current stream have a layer's weights."""
        if self._slots:
            self.start(layer, self.mark())
            torch.cuda.current_stream(self._device).wait_event(self._copied[layer % 2])

    def start(self, layer: int, before: torch.cuda.Event | None) -> None:
        """Begin to copy a layer into its slot once the device has passed `before`, unless it is there as the host has it."""
        if before is None:
            return
        slot, known = layer % 2, (layer, sum(w._version for w in self.host[layer]))
        if self._holds[slot] == known:
            return
        self._copies.wait_event(before)
        with torch.no_grad(), torch.cuda.stream(self._copies):
            for target, source in zip(self._slots[slot], self.host[layer], strict=True):
                target.copy_(source, non_blocking=True)
            self._copied[slot].record(self._copies)
        self._holds[slot] = known

    def views(self, layer: int) -> Weights:
        """For autograd to save: `.data`, since it is right that their content changes before they are read again."""
        w13, w2 = self._slots[layer % 2] if self._slots else self.host[layer]
        return w13.data, w2.data


def _apart(device: torch.device) -> bool:
    """Whether host and device have memories of their own."""
    return device.type == "cuda"
