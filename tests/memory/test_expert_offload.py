"""Offloaded experts against the same model with its experts on the device: the same bits, whatever was cached, copied, guessed or streamed."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nsa_transformer import Transformer
from nsa_transformer.config import Config, ConfigError, DataConfig, ExpertOffloadingConfig, ModelConfig
from nsa_transformer.inference.generate import SamplingConfig, generate
from nsa_transformer.inference.load import _offloaded
from nsa_transformer.kernels import experts
from nsa_transformer.kernels.dispatch import triton_missing
from nsa_transformer.memory import expert_offload, host_arena
from nsa_transformer.memory.expert_offload import ExpertStore, offload_experts, store_of
from nsa_transformer.memory.host_arena import HostArena
from nsa_transformer.models.moe import MixtureOfExperts
from nsa_transformer.utils.hardware import GIB

from ..models.small import random_tokens, small_config, small_model

if TYPE_CHECKING:
    from nsa_transformer.kernels.triton.expert_slots import Slots

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux alone"),
    pytest.mark.skipif(triton_missing() is not None, reason=f"no Triton here: {triton_missing()}"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # of whole models
GREEDY = SamplingConfig(temperature=0)
CONFIG = small_config(num_layers=3, moe={"num_experts": 7, "top_k": 2, "expert_size": 8})
LAYERS, EXPERT = 2, 3 * 8 * 24  # with experts, and elements of one
VARIANTS = {
    "lru": {},
    "frequency": {"policy": "frequency"},
    "prefetch": {"prefetch": 1},
    "prefetch all": {"prefetch": 2, "policy": "frequency"},
    "pageable": {"pin_memory": False},
}


def gib(experts_: int, dtype: torch.dtype, config: ModelConfig = CONFIG, layers: int = LAYERS) -> float:
    """A budget of so many experts and the tables."""
    expert = 3 * config.moe.expert_size * config.hidden_size * dtype.itemsize
    return (experts_ * expert + layers * (6 * config.moe.num_experts + 32) * 4) / GIB


def pair(config: ModelConfig = CONFIG, slots: int = 3, chunk: int = 2, **offloading: object) -> tuple[Transformer, Transformer]:
    """A model with its experts on the device, and the same one offloaded; unused slots and buffers hold NaN."""
    model = small_model(config).to(DEVICE).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if not name.endswith("router.weight"):
            parameter.data = parameter.data.to(DTYPE)
    moved = copy.deepcopy(model)
    for mixture in (m for m in model.modules() if isinstance(m, MixtureOfExperts)):
        mixture.experts = partial(experts, backend="triton")
    for mixture in (m for m in moved.modules() if isinstance(m, MixtureOfExperts)):
        mixture.w13 = torch.nn.Parameter(mixture.w13.to("meta"), requires_grad=False)
        mixture.w2 = torch.nn.Parameter(mixture.w2.to("meta"), requires_grad=False)
    settings = ExpertOffloadingConfig(enabled=True, gpu_budget_gib=gib(LAYERS * slots + 2 * chunk, DTYPE, config), **offloading)  # type: ignore[arg-type]
    store = offload_experts(moved, DEVICE, settings)
    assert store is store_of(moved) and store_of(model) is None
    own = dict(model.named_parameters())
    for name, fill in store.destinations(moved).items():
        fill(own[name])
    for tensor in (store._pool, *(t for buffer in store._buffers for t in (buffer.w13, buffer.w2))):
        tensor.view(DTYPE).fill_(torch.nan)
    return model, moved


@pytest.fixture(autouse=True)
def same_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for few rows round otherwise than those for many: with small models on either side both are to change at the same number of places."""
    from nsa_transformer.kernels.triton import expert_slots, experts_decode

    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(experts_decode, "MAX_ROWS", CONFIG.moe.num_experts)
        monkeypatch.setattr(expert_slots, "PROGRAMS", 3)


def set_stream_bytes(monkeypatch: pytest.MonkeyPatch, chunk: int, config: ModelConfig = CONFIG) -> None:
    monkeypatch.setattr(expert_offload, "STREAM_BYTES", chunk * 3 * config.moe.expert_size * config.hidden_size * DTYPE.itemsize)
    monkeypatch.setattr(expert_offload, "STREAM_SHARE", 1.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_generation_is_the_same_to_the_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is streamed, one that goes in groups, then tokens one by one, with slots for 3 of 7 experts."""
    set_stream_bytes(monkeypatch, 2)
    model, moved = pair(**VARIANTS[name])
    store = store_of(moved)
    assert store is not None and (store.slots, store.chunk) == (3, 2)
    for prompt in (random_tokens(30).tolist(), random_tokens(3, seed=1).tolist()):
        assert list(generate(moved, prompt, 6, GREEDY)) == list(generate(model, prompt, 6, GREEDY))
        with torch.no_grad():
            tokens = torch.tensor(prompt, device=DEVICE)
            assert torch.equal(moved(tokens), model(tokens))
    found = store.statistics()
    assert found.hits > 0 and found.misses > 0 and found.streamed > 0
    assert (found.prefetched > 0) == ("prefetch" in name)
    assert found.copied_bytes == (found.misses + found.prefetched + found.streamed) * EXPERT * DTYPE.itemsize
    assert found.hit_rate == found.hits / (found.hits + found.misses)


class LateLane:
    """In the place of a store's copy lane: what *fetch* is to copy comes when it is waited for, and until then NaN lies there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from nsa_transformer.kernels.triton import expert_slots

        self.fetch, self.copies, self.done, self.inside = expert_slots.fetch, [], 0, False
        self.at_once: list[int] = []  # copies that came with each waiting
        monkeypatch.setattr(expert_slots, "fetch", self.put_off)

    def put_off(self, host: Tensor, pool: Tensor, slots: Slots, start: int, part: int) -> None:
        assert self.inside
        count, *places = slots.moves.tolist()
        for slot in places[len(places) // 2 :][:count]:
            pool[slot, start : start + part].view(DTYPE).fill_(torch.nan)
        self.copies.append(partial(self.fetch, host, pool, slots, start, part))

    @contextmanager
    def beside(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def mark(self) -> int:
        return len(self.copies) if self.inside else 0

    def wait(self, mark: int) -> None:
        self.at_once.append(max(0, mark - self.done))
        for copy_ in self.copies[self.done : mark]:
            copy_()
        self.done = max(self.done, mark)


@pytest.mark.parametrize("name", ["lru", "prefetch all"])
def test_copies_are_waited_for_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """w13 before *up*, w2 before *down*, guesses before their layer, and none of them earlier."""
    model, moved = pair(**VARIANTS[name])
    store = store_of(moved)
    assert store is not None
    lane = LateLane(monkeypatch)
    monkeypatch.setattr(store, "_lane", lane)
    prompt = random_tokens(3).tolist()
    assert list(generate(moved, prompt, 6, GREEDY)) == list(generate(model, prompt, 6, GREEDY))
    with torch.no_grad():
        for tokens in random_tokens(8, seed=1).to(DEVICE).split(1):
            assert torch.equal(moved(tokens), model(tokens))
    assert len(lane.copies) > 40 and lane.done == len(lane.copies) and set(lane.at_once) == {0, 1}


def test_all_experts_at_hand_are_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    set_stream_bytes(monkeypatch, 2)
    model, moved = pair(slots=7)
    store = store_of(moved)
    assert store is not None and store.slots == 7
    prompt = random_tokens(2).tolist()
    assert list(generate(moved, prompt, 12, GREEDY)) == list(generate(model, prompt, 12, GREEDY))
    assert store.statistics().misses <= LAYERS * 7
    misses = store.statistics().misses
    assert list(generate(moved, prompt, 12, GREEDY)) == list(generate(model, prompt, 12, GREEDY))
    assert store.statistics().misses == misses


def test_what_lies_in_slots_is_not_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    set_stream_bytes(monkeypatch, 2)
    _, moved = pair()
    store = store_of(moved)
    assert store is not None
    long = random_tokens(30).to(DEVICE)
    with torch.no_grad():
        moved(long)
        assert store.statistics().streamed == LAYERS * 7
        moved(long[:1])
        at_hand = int((store._state.table >= 0).sum())
        assert at_hand >= LAYERS * 2
        moved(long)
    assert store.statistics().streamed == LAYERS * 7 + LAYERS * 7 - at_hand


def test_each_layer_is_streamed_once_and_the_next_begins_early(monkeypatch: pytest.MonkeyPatch) -> None:
    set_stream_bytes(monkeypatch, 3)
    _, moved = pair(chunk=3)
    store = store_of(moved)
    assert store is not None and store.chunk == 3
    staged: list[tuple[int, int]] = []
    right, run = store._stage, store.run
    monkeypatch.setattr(store, "_stage", lambda layer, first: (staged.append((layer, first)), right(layer, first))[1])
    called: list[int] = []
    monkeypatch.setattr(ExpertStore, "run", lambda self, layer, *inputs: (called.append(len(staged)), run(layer, *inputs))[1])
    with torch.no_grad():
        moved(random_tokens(30).to(DEVICE))
    assert staged == [(layer, first) for layer in range(LAYERS) for first in (0, 3, 6)]
    assert called == [0, 4]


def test_an_interrupted_pass_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was staged or guessed for a layer that was not called then is not taken for another's."""
    set_stream_bytes(monkeypatch, 2)
    model, moved = pair(prefetch=1)
    store = store_of(moved)
    assert store is not None
    long, short = random_tokens(30).to(DEVICE), random_tokens(1).to(DEVICE)
    with torch.no_grad():
        for tokens in (long, short, long):
            with monkeypatch.context() as patch:
                patch.setattr(moved.layers[2].mlp_norm, "forward", lambda x: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    moved(tokens)
            for again in (short, long):
                assert torch.equal(moved(again), model(again))


def test_a_trace_gives_the_hits_that_it_must() -> None:
    """Experts 0 … 3 in turn, two a token, in 3 slots: least recently used misses each time but the first use's neighbour."""
    store = ExpertStore(1, 6, 24, 8, 2, DTYPE, DEVICE, ExpertOffloadingConfig(True, gpu_budget_gib=gib(3 + 2, DTYPE, layers=1), policy="lru"))
    store._host.zero_()
    x, weights = torch.ones(1, 24, dtype=DTYPE, device=DEVICE), torch.ones(1, 2, device=DEVICE)
    held: list[int] = []
    hits = misses = 0
    for token in range(12):
        chosen = [token % 4, (token + 1) % 4]
        for expert in chosen:
            hits, misses = hits + (expert in held), misses + (expert not in held)
        held = [expert for expert in held if expert not in chosen] + chosen
        held = held[-3:]
        store.run(0, x, torch.tensor([chosen], device=DEVICE), weights)
    found = store.statistics()
    assert (found.hits, found.misses) == (hits, misses)


# ---------------------------------------------------------------------------------------------------------- loading, refusals


def test_the_experts_come_from_the_file_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair()
    save_file({**dict(model.named_parameters()), **dict(model.named_buffers())}, tmp_path / "model.safetensors")
    largest: list[int] = []
    right = ExpertStore.weights
    monkeypatch.setattr(ExpertStore, "weights", lambda self, *place: (largest.append(sum(w.numel() for w in right(self, *place))), right(self, *place))[1])
    offloading = ExpertOffloadingConfig(enabled=True, gpu_budget_gib=gib(LAYERS * 3 + 2, DTYPE))
    loaded = _offloaded(tmp_path, Config(model=CONFIG, data=DataConfig(max_length=128)), DEVICE, DTYPE, offloading).eval()
    assert set(largest) == {EXPERT} and len(largest) == LAYERS * 7 * 2
    assert all(p.is_meta == name.endswith(("mlp.w13", "mlp.w2")) for name, p in loaded.named_parameters())
    tokens = random_tokens(20).to(DEVICE)
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))


def test_budgets() -> None:
    make = partial(ExpertStore, LAYERS, 7, 24, 8, 2, DTYPE, DEVICE)
    enabled = ExpertOffloadingConfig(enabled=True)
    least = make(dataclasses.replace(enabled, gpu_budget_gib=gib(LAYERS * 2 + 2, DTYPE)))
    assert (least.slots, least.chunk) == (2, 1)
    assert least.gpu_bytes == (LAYERS * 2 + 2) * EXPERT * DTYPE.itemsize and least.host_bytes == LAYERS * 7 * EXPERT * DTYPE.itemsize
    with pytest.raises(ConfigError, match=r"gpu_budget_gib: 0\.000 GiB do not hold the 2 experts .* write 0\.001 or more"):
        make(dataclasses.replace(enabled, gpu_budget_gib=gib(LAYERS * 2 + 2, DTYPE) - 1 / GIB))
    roomy = make(dataclasses.replace(enabled, gpu_budget_gib=1.0))
    assert (roomy.slots, roomy.chunk) == (7, 7)
    assert "2 x 7 experts" in roomy.describe() and "page-locked" in roomy.describe()
    assert "pageable (pin_memory=false" in make(ExpertOffloadingConfig(True, False, 1.0)).describe()
    if DEVICE.type == "cpu":
        with pytest.raises(ConfigError, match="gpu_budget_gib=null means what is free on the GPU"):
            make(enabled)
    else:
        with pytest.raises(ConfigError, match=r"gpu_budget_gib=9999\.0 is more than"):
            make(dataclasses.replace(enabled, gpu_budget_gib=9999.0))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = ExpertOffloadingConfig(enabled=True, gpu_budget_gib=0.001)
    with pytest.raises(ConfigError, match=r"this model has no experts"):
        offload_experts(small_model(moe={"num_experts": 0}), DEVICE, budget)
    with pytest.raises(ConfigError, match=r"model\.moe\.expert_size=6 must be multiples of 4"):
        ExpertStore(1, 4, 24, 6, 2, torch.float32, DEVICE, budget)
    with pytest.raises(ConfigError, match=r"needs the Triton kernels: the model has dtype torch\.float64"):
        ExpertStore(1, 4, 24, 8, 2, torch.float64, DEVICE, budget)
    store = ExpertStore(1, 4, 24, 8, 2, DTYPE, DEVICE, budget)
    x, indices, weights = torch.ones(1, 24, dtype=DTYPE, device=DEVICE), torch.zeros(1, 2, dtype=torch.int64, device=DEVICE), torch.ones(1, 2, device=DEVICE)
    with pytest.raises(ValueError, match="no gradients"):
        store.run(0, x.clone().requires_grad_(), indices, weights)
    with pytest.raises(ValueError, match=r"x is torch\.float16"):
        store.run(0, x.half(), indices, weights)
    assert store.run(0, x[:0], indices[:0], weights[:0]).shape == (0, 24)
    monkeypatch.setattr(host_arena, "memory_bytes", lambda: 2**20)
    with pytest.raises(ConfigError, match=r"experts take 0\.0 GiB of host memory, and this machine has 0\.0"):
        HostArena(2**20 + 1, DEVICE, True)


def test_settings() -> None:
    for wrong, message in (
        ({"gpu_budget_gib": 0.0}, r"gpu_budget_gib=0\.0 must be greater than 0 and finite, or null"),
        ({"gpu_budget_gib": float("inf")}, "gpu_budget_gib=inf must be"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"prefetch": 1, "pin_memory": False}, "prefetch=1 needs page-locked memory"),
    ):
        with pytest.raises(ConfigError, match=message):
            ExpertOffloadingConfig(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------------- on a GPU


def stack(layers: int = 4, num: int = 64, hidden: int = 512, width: int = 256, top_k: int = 6, **offloading: object) -> tuple[ExpertStore, list[Tensor]]:
    """A store of bf16 experts, and the whole of their weights on the GPU."""
    expert = 3 * hidden * width * 2
    settings = ExpertOffloadingConfig(enabled=True, gpu_budget_gib=(layers * 16 + 8) * expert / GIB, **offloading)  # type: ignore[arg-type]
    store = ExpertStore(layers, num, hidden, width, top_k, torch.bfloat16, DEVICE, settings)
    generator = torch.Generator().manual_seed(0)
    whole = []
    for layer in range(layers):
        w13 = torch.randn(num, 2 * width, hidden, generator=generator).mul(hidden**-0.5).bfloat16()
        w2 = torch.randn(num, hidden, width, generator=generator).mul(width**-0.5).bfloat16()
        for expert in range(num):
            for target, source in zip(store.weights(layer, expert), (w13[expert], w2[expert]), strict=True):
                target.copy_(source)
        whole += [w13.to(DEVICE), w2.to(DEVICE)]
    return store, whole


def route(tokens: int, num: int, top_k: int, seed: int) -> tuple[Tensor, Tensor]:
    scores = torch.rand(tokens, num, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return scores.topk(top_k).indices, scores.topk(top_k).values


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 9, 700])
@pytest.mark.parametrize("name", ["lru", "frequency", "pageable"])
def test_every_path_on_a_gpu(name: str, tokens: int) -> None:
    store, whole = stack(**VARIANTS[name])
    for seed in range(10):
        for layer in range(4):
            x = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(seed)).bfloat16().to(DEVICE)
            indices, weights = route(tokens, 64, 6, 10 * seed + layer)
            own = partial(experts, backend="triton")(x, indices, weights, *whole[2 * layer : 2 * layer + 2])
            assert torch.equal(store.run(layer, x, indices, weights), own)


@pytest.mark.gpu
def test_a_captured_decode_step_follows_its_inputs() -> None:
    """All layers in one graph, with copies of what is missing and of guesses on another stream."""
    from nsa_transformer.config import MoEConfig
    from nsa_transformer.models.moe import Router

    store, whole = stack(prefetch=2)
    routers = [Router(512, MoEConfig(num_experts=64, top_k=6)).to(DEVICE) for _ in range(4)]
    layers = [store.layer(index, routers[index + 1] if index < 3 else None) for index in range(4)]

    @torch.no_grad()
    def step(x: Tensor, own: bool) -> Tensor:
        for index, router in enumerate(routers):
            indices, weights, _ = router(x)
            w13, w2 = whole[2 * index : 2 * index + 2]
            x = x + (experts(x, indices, weights, w13, w2, backend="triton") if own else layers[index](x, indices, weights, w13, w2))
        return x

    held = torch.randn(1, 512, device=DEVICE).bfloat16()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(held, False)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(held, False)
    for seed in range(50):
        held.copy_(torch.randn(1, 512, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(y, step(held, True))
    assert store.statistics().misses > 0 and store.statistics().prefetched > 0


@pytest.mark.gpu
def test_the_budget_holds() -> None:
    """Slots, buffers and tables within the budget; a call adds its rows alone."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    settings = ExpertOffloadingConfig(enabled=True, gpu_budget_gib=0.25)
    store = ExpertStore(8, 64, 512, 256, 6, torch.bfloat16, DEVICE, settings)
    assert torch.cuda.max_memory_allocated() - before <= 0.25 * GIB and store.gpu_bytes > 0.2 * GIB
    store._host.zero_()
    for tokens in (1, 2000):
        torch.cuda.reset_peak_memory_stats()
        for layer in range(8):
            x = torch.ones(tokens, 512, dtype=torch.bfloat16, device=DEVICE)
            store.run(layer, x, *route(tokens, 64, 6, layer))
        rows = tokens * 6 * (512 + 256) * 2
        assert torch.cuda.max_memory_allocated() - before <= 0.25 * GIB + 3 * rows + (8 << 20)
