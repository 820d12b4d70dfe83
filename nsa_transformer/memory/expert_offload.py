"""Experts that live in host memory and come to the GPU as they are needed, for inference.

Each layer has slots on the GPU. Few tokens, as in decoding: a kernel looks up which experts they need and makes room for the missing ones by the policy,
another copies these, w13 of all before w2 of all, and the experts' kernels read through the table of slots. The host decides nothing and waits for nothing, so
a decode step can be captured in a graph. Many tokens, which need nearly all experts: the layer is streamed through two buffers, and while the experts in one
are computed the next are on their way to the other; the next layer's first ones come during its attention.

Models know nothing of it: their mixture-of-experts layers call what is handed in as `experts`, and keep their weights on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nsa_transformer.config import ConfigError, ExpertOffloadingConfig
from nsa_transformer.kernels import dispatch
from nsa_transformer.memory.copy_lane import CopyLane
from nsa_transformer.memory.host_arena import HostArena
from nsa_transformer.models.moe import MixtureOfExperts, Router
from nsa_transformer.utils.hardware import GIB

STREAM_BYTES = 64 << 20  # of a buffer of streaming: over 1 ms of the link, beside which launches and the first bytes' latency are nothing
STREAM_SHARE = 1 / 8  # of the budget, at most, for both buffers
FREE_SHARE = 0.75  # of the free memory, where no budget is given; the rest is for the cache and for activations

NO_EXPERTS = (
    "memory.expert_offloading.enabled=true, and this model has no experts; write memory.expert_offloading.enabled=false, or leave --expert-offloading out"
)


def most_bytes(layers: int, experts: int, expert_bytes: int) -> int:
    """GPU memory of slots and buffers whatever the budget: then no expert is ever missing."""
    return (layers * experts + 2 * min(experts, max(1, STREAM_BYTES // expert_bytes))) * expert_bytes


def least_bytes(layers: int, experts: int, expert_bytes: int, top_k: int) -> int:
    """GPU memory below which no token can be computed: its experts in each layer, two to stream, and the tables."""
    return (layers * top_k + 2) * expert_bytes + _state_bytes(layers, experts)


def check_budget(budget: int, layers: int, experts: int, expert_bytes: int, top_k: int) -> None:
    """Raises `ConfigError` where `budget` bytes are fewer than `least_bytes`."""
    least = least_bytes(layers, experts, expert_bytes, top_k)
    if budget < least:
        raise ConfigError(
            f"memory.expert_offloading.gpu_budget_gib: {budget / GIB:.3f} GiB do not hold the {top_k} experts that a token needs in each of {layers} "
            f"layers, and two to stream; write {least / GIB + 5e-4:.3f} or more"
        )


def _state_bytes(layers: int, experts: int) -> int:
    """Tables, lists and counts, at their largest."""
    return layers * (6 * experts + 32) * 4


@dataclass(frozen=True)
class OffloadStatistics:
    """Experts, each counted once for a layer and pass: found in a slot, missing and copied, copied ahead on a guess, streamed for many tokens."""

    hits: int
    misses: int
    prefetched: int
    streamed: int
    expert_bytes: int

    @property
    def hit_rate(self) -> float | None:
        """None where no slot was asked for."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None

    @property
    def copied_bytes(self) -> int:
        """From the host's memory to the GPU."""
        return (self.misses + self.prefetched + self.streamed) * self.expert_bytes


@dataclass
class _Buffer:
    """Room for some experts of a layer that is streamed, as int32 words and as matrices."""

    w13: Tensor
    w2: Tensor
    ready: torch.cuda.Event | None = None


class ExpertStore:
    """The experts of all mixture-of-experts layers of a model: `[layers, E]` in host memory, slots and buffers on `device`.

    Args:
        layers, experts, hidden_size, width, top_k: E experts a layer, with `w13` `[2 * width, hidden_size]` and `w2` `[hidden_size, width]` each.
        dtype: of the weights and of what they multiply.
        device: of the slots; a CPU under Triton's interpreter alone, for tests.

    Raises:
        ConfigError: a budget that holds less than top_k experts a layer and two for streaming, or that the GPU has not; shapes the kernels do not take.
    """

    def __init__(
        self, layers: int, experts: int, hidden_size: int, width: int, top_k: int, dtype: torch.dtype, device: torch.device, config: ExpertOffloadingConfig
    ) -> None:
        from nsa_transformer.kernels.triton.expert_slots import Slots

        refusal = dispatch.device_refuses(torch.empty(0, dtype=dtype, device=device), "the model")
        if refusal is not None:
            raise ConfigError(f"memory.expert_offloading needs the Triton kernels: {refusal}; write memory.expert_offloading.enabled=false")
        least = 16 // dtype.itemsize
        if hidden_size % least or width % least:
            raise ConfigError(
                f"model.hidden_size={hidden_size} and model.moe.expert_size={width} must be multiples of {least} in {dtype}; "
                "write memory.expert_offloading.enabled=false"
            )
        self.layers, self.experts, self.hidden_size, self.width = layers, experts, hidden_size, width
        self.dtype, self.device, self.config = dtype, device, config
        self.expert_bytes = 3 * hidden_size * width * dtype.itemsize
        words = self.expert_bytes // 4
        cut = words // 3 * 2
        self._matrix_words = ((0, cut), (cut, words - cut))  # first word and words of w13, of w2
        self.slots, self.chunk = self._divide(_budget(config, device), top_k)
        self.arena = HostArena(layers * experts * self.expert_bytes, device, config.pin_memory)
        self._host = self.arena.bytes.view(torch.int32).view(layers, experts, words)
        self._pool = torch.empty(layers, self.slots, words, dtype=torch.int32, device=device)
        self._state = Slots.empty(layers, experts, self.slots, device)
        self._states = [self._state.layer(index) for index in range(layers)]
        buffers = torch.empty(2, self.chunk * words, dtype=torch.int32, device=device)
        cut *= self.chunk
        self._buffers = [_Buffer(flat[:cut].view(self.chunk, -1), flat[cut:].view(self.chunk, -1)) for flat in buffers]
        self._turn = 0
        self._staged: tuple[int, int, _Buffer] | None = None
        self._ahead: tuple[torch.cuda.Event | None, tuple[Tensor, ...]] | None = None
        self._lane = CopyLane(device)

    def _divide(self, budget: int, top_k: int) -> tuple[int, int]:
        """Slots of each layer, and experts of each of the two buffers for streaming."""
        check_budget(budget, self.layers, self.experts, self.expert_bytes, top_k)
        room = (budget - _state_bytes(self.layers, self.experts)) // self.expert_bytes
        wanted = min(STREAM_BYTES // self.expert_bytes, int(room * STREAM_SHARE / 2))
        chunk = min(self.experts, max(1, wanted), (room - self.layers * top_k) // 2)
        return min(self.experts, (room - 2 * chunk) // self.layers), chunk

    # ------------------------------------------------------------------------------------------------------------ weights

    def weights(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """`w13` `[2 * width, hidden]` and `w2` `[hidden, width]` of an expert in host memory, to be written before the first call."""
        w13, w2 = self._matrices(self._host[layer, expert : expert + 1])
        return w13[0], w2[0]

    def _matrices(self, pieces: Tensor) -> tuple[Tensor, Tensor]:
        """Experts int32 [n, words] as w13 [n, 2 * width, hidden] and w2 [n, hidden, width]."""
        flat = pieces.view(self.dtype)
        cut = 2 * self.width * self.hidden_size
        return flat[:, :cut].unflatten(1, (2 * self.width, self.hidden_size)), flat[:, cut:].unflatten(1, (self.hidden_size, self.width))

    def destinations(self, model: nn.Module) -> dict[str, Callable[[Any], None]]:
        """By the names of the model's expert weights: what copies one of them, sliced by expert, into host memory, an expert at a time."""

        def fill(layer: int, part: int, source: Any) -> None:
            for expert in range(self.experts):
                self.weights(layer, expert)[part].copy_(source[expert : expert + 1][0])

        names = [name for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)]
        return {f"{name}.{weight}": partial(fill, layer, part) for layer, name in enumerate(names) for part, weight in enumerate(("w13", "w2"))}

    # ------------------------------------------------------------------------------------------------------------- calls

    def layer(self, index: int, next_router: Router | None = None) -> LayerExperts:
        """What a model's layer calls as `experts`; `next_router`, of the layer after it, makes the guesses of prefetching."""
        return LayerExperts(self, index, next_router)

    def run(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor, next_router: Router | None = None) -> Tensor:
        """As `kernels.experts`, with this layer's weights. Calls of one store follow each other on one stream."""
        from nsa_transformer.kernels.triton.experts_decode import MAX_ROWS

        if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
            raise ValueError("offloaded experts have no gradients; call the model under torch.no_grad()")
        if x.dtype != self.dtype or x.device.type != self.device.type:
            raise ValueError(f"x is {x.dtype} on {x.device}; these experts are {self.dtype} and serve {self.device}")
        top_k = indices.shape[1]
        with torch.cuda.device_of(x):
            self._join()
            if indices.numel() > max(self.experts, min(self.slots, MAX_ROWS)):
                return self._stream(layer, x, indices, weights)
            # While they name no more experts than there are, tokens go in groups that fit the slots: that copies no more than streaming, and fills the slots.
            self._staged = None
            group = min(self.slots, MAX_ROWS) // top_k
            parts = list(zip(x.split(group), indices.split(group), weights.split(group), strict=True))
            guesses = next_router if len(parts) == 1 else None
            found = [self._decode(layer, *part, guesses) for part in parts]
            return found[0] if len(found) == 1 else torch.cat(found)

    def _decode(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor, next_router: Router | None) -> Tensor:
        from nsa_transformer.kernels.triton import expert_slots, experts_decode

        if len(x) == 0:
            return torch.zeros_like(x)
        state = self._states[layer]
        expert_slots.plan(indices, state, self.config.policy)
        before = self._lane.mark()
        with self._lane.beside():
            self._lane.wait(before)  # whoever computed from a slot is done before it changes
            fetched13, fetched2 = self._fetch(layer)
        if self.config.prefetch and next_router is not None:
            self._prefetch(layer + 1, next_router, x)
        joins = (lambda: self._lane.wait(fetched13), lambda: self._lane.wait(fetched2))
        return experts_decode.forward(x, indices, weights, *self._matrices(self._pool[layer]), state, joins)

    def _fetch(self, layer: int) -> list[torch.cuda.Event | None]:
        """Begin to copy what the plan lists: w13 of all these experts, then w2, which is on its way while x is multiplied with w13. A mark after each.
        From pageable memory the host reads the list, and passes each matrix through a staging buffer of the driver's."""
        from nsa_transformer.kernels.triton import expert_slots

        host, pool, state, marks = self._host[layer], self._pool[layer], self._states[layer], []
        listed: list[tuple[int, int]] = []
        if not self.arena.pinned:
            count, *places = state.moves.tolist()
            listed = list(zip(places[:count], places[self.slots : self.slots + count], strict=True))
        for start, part in self._matrix_words:
            if self.arena.pinned:
                expert_slots.fetch(host, pool, state, start, part)
            for expert, slot in listed:
                pool[slot, start : start + part].copy_(host[expert, start : start + part], non_blocking=True)
            marks.append(self._lane.mark())
        return marks

    def _prefetch(self, layer: int, router: Router, x: Tensor) -> None:
        """Copy what the next layer's router would choose for this layer's input, while this one computes and after its own copies, which have waited for x.
        Only the next layer's slots change."""
        from nsa_transformer.kernels.triton import expert_slots

        with self._lane.beside():
            guess = router(x)[0][:, : self.config.prefetch].contiguous()
            state = self._states[layer]
            expert_slots.plan(guess, state, self.config.policy, demand=False)
            expert_slots.fetch(self._host[layer], self._pool[layer], state, 0, self._pool.shape[2])
            # Held until the next layer has waited: x is the current stream's, which else might use its memory again too early.
            self._ahead = (self._lane.mark(), (x, guess))

    def _join(self) -> None:
        if self._ahead is not None:
            self._lane.wait(self._ahead[0])
            self._ahead = None

    def _stream(self, layer: int, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        from nsa_transformer.kernels.triton import expert_slots
        from nsa_transformer.kernels.triton.experts import forward_in_parts

        state = self._states[layer]
        absent = (state.table < 0).sum() if self.arena.pinned else self.experts
        state.counts[expert_slots.STREAMED] += absent
        y, *_ = forward_in_parts(x, indices, weights, self.experts, self.width, self._parts(layer))
        return y

    def _parts(self, layer: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The layer's experts, a buffer at a time, as whoever computes them asks; the next buffer is on its way meanwhile."""
        for first in range(0, self.experts, self.chunk):
            staged, self._staged = self._staged, None
            buffer = staged[2] if staged is not None and staged[:2] == (layer, first) else self._stage(layer, first)
            after = (layer, first + self.chunk) if first + self.chunk < self.experts else (layer + 1, 0)
            if after[0] < self.layers:
                self._staged = (*after, self._stage(*after))
            self._lane.wait(buffer.ready)
            count = min(self.chunk, self.experts - first)
            w13 = buffer.w13[:count].view(self.dtype).view(count, 2 * self.width, self.hidden_size)
            yield first, w13, buffer.w2[:count].view(self.dtype).view(count, self.hidden_size, self.width)

    def _stage(self, layer: int, first: int) -> _Buffer:
        """Begin to copy experts into the buffer whose turn it is. It waits for all that was launched so far, the last reader of this buffer included; the
        other buffer's is launched later. From pageable memory the host copies, and nothing goes on beside it."""
        from nsa_transformer.kernels.triton import expert_slots

        buffer = self._buffers[self._turn]
        self._turn = 1 - self._turn
        count = min(self.chunk, self.experts - first)
        before = self._lane.mark()
        with self._lane.beside():
            self._lane.wait(before)
            if self.arena.pinned:
                expert_slots.stream(self._host[layer], self._pool[layer], self._states[layer], first, buffer.w13[:count], buffer.w2[:count])
            else:
                cut = buffer.w13.shape[1]
                for number in range(count):
                    buffer.w13[number].copy_(self._host[layer, first + number, :cut], non_blocking=True)
                    buffer.w2[number].copy_(self._host[layer, first + number, cut:], non_blocking=True)
            buffer.ready = self._lane.mark()
        return buffer

    # ------------------------------------------------------------------------------------------------------------ numbers

    def statistics(self) -> OffloadStatistics:
        """Of all calls so far, over all layers. Waits for the device."""
        hits, misses, prefetched, streamed = self._state.counts.sum(0).tolist()
        return OffloadStatistics(hits, misses, prefetched, streamed, self.expert_bytes)

    @property
    def host_bytes(self) -> int:
        return self.arena.bytes.numel()

    @property
    def gpu_bytes(self) -> int:
        """Slots and buffers."""
        return self._pool.nbytes + sum(buffer.w13.nbytes + buffer.w2.nbytes for buffer in self._buffers)

    def describe(self) -> str:
        memory = "page-locked" if self.arena.pinned else "pageable (pin_memory=false: copies go through the host)"
        return (
            f"{self.layers} x {self.experts} experts in {self.host_bytes / GIB:.2f} GiB of {memory} host memory; "
            f"{self.slots} slots a layer and buffers of {self.chunk} experts in {self.gpu_bytes / GIB:.2f} GiB on the GPU; policy {self.config.policy}"
        )


@dataclass(frozen=True)
class LayerExperts:
    """One layer's experts of a store, called as `kernels.experts`; the weights it is given, on the meta device, are ignored."""

    store: ExpertStore
    index: int
    next_router: Router | None

    def __call__(self, x: Tensor, indices: Tensor, weights: Tensor, _w13: Tensor, _w2: Tensor) -> Tensor:
        return self.store.run(self.index, x, indices, weights, self.next_router)


def _budget(config: ExpertOffloadingConfig, device: torch.device) -> int:
    """Bytes of GPU memory."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    if config.gpu_budget_gib is None:
        if free is None:
            raise ConfigError("memory.expert_offloading.gpu_budget_gib=null means what is free on the GPU, and there is none; write a number")
        return int(FREE_SHARE * free)
    budget = int(config.gpu_budget_gib * GIB)
    if free is not None and budget > free:
        raise ConfigError(
            f"memory.expert_offloading.gpu_budget_gib={config.gpu_budget_gib} is more than the {free / GIB:.1f} GiB that are free; write less, or null"
        )
    return budget


def offload_experts(model: nn.Module, device: torch.device, config: ExpertOffloadingConfig) -> ExpertStore:
    """Put a store in the place of the experts of a model whose expert weights are on the meta device, in the dtype they shall have; all else is on `device`.
    The store is empty: `destinations` fills it.

    Raises `ConfigError` for a model without experts, and as `ExpertStore` does.
    """
    mixtures = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    if not mixtures:
        raise ConfigError(NO_EXPERTS)
    assert all(mixture.w13.is_meta and mixture.w2.is_meta for mixture in mixtures)
    experts, hidden_size, width = mixtures[0].w2.shape
    store = ExpertStore(len(mixtures), experts, hidden_size, width, mixtures[0].router.config.top_k, mixtures[0].w13.dtype, device, config)
    for index, mixture in enumerate(mixtures):
        mixture.experts = store.layer(index, mixtures[index + 1].router if index + 1 < len(mixtures) else None)
    return store


def store_of(model: nn.Module) -> ExpertStore | None:
    """The store that a model's experts come from; None where they are its own."""
    found = (module.experts.store for module in model.modules() if isinstance(module, MixtureOfExperts) and isinstance(module.experts, LayerExperts))
    return next(found, None)
