"""Slots of a pool against a plain model of each policy: who stays, who goes, what is copied, what is counted."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.slot_policies import HALVING, SlotPolicy
from nsa_transformer.kernels.dispatch import triton_missing

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux alone"),
    pytest.mark.skipif(triton_missing() is not None, reason=f"no Triton here: {triton_missing()}"),
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def step(slots, plain: SlotPolicy, chosen: list[int], policy: str, demand: bool = True) -> None:
    """One plan of both, compared."""
    from nsa_transformer.kernels.triton import expert_slots as kernels

    kernels.plan(torch.tensor(chosen, device=DEVICE), slots, policy, demand)
    marks = [(kernels.AT_HAND if e in plain.owners else kernels.COPIED) if e in chosen else 0 for e in range(len(slots.marks))]
    expected = plain.plan(chosen, demand)
    assert slots.marks.tolist() == marks
    assert slots.priority.tolist() == [plain.priority(e) for e in range(len(slots.priority))] and int(slots.clock) == plain.clock
    count, *rest = slots.moves.tolist()
    size = len(rest) // 2
    assert list(zip(rest[:count], rest[size : size + count], strict=True)) == expected
    assert slots.owner.tolist() == [-1 if owner is None else owner for owner in plain.owners]
    assert slots.table.tolist() == [plain.owners.index(e) if e in plain.owners else -1 for e in range(len(slots.table))]
    assert slots.counts.tolist() == plain.counts


@pytest.mark.parametrize("policy", ["lru", "frequency"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_policies_against_a_plain_model(policy: str, data: st.DataObject) -> None:
    from nsa_transformer.kernels.triton import expert_slots as kernels

    experts = data.draw(st.integers(2, 20), "experts")
    size = data.draw(st.integers(1, experts), "slots")
    all_layers = kernels.Slots.empty(3, experts, size, DEVICE)
    plain = SlotPolicy(size, policy)
    for _ in range(data.draw(st.integers(1, 12), "plans")):
        chosen = data.draw(st.lists(st.integers(0, experts - 1), min_size=1, max_size=size), "chosen")
        step(all_layers.layer(1), plain, chosen, policy, data.draw(st.booleans(), "demand"))
    for other in (0, 2):
        untouched = all_layers.layer(other)
        assert (untouched.table == -1).all() and not untouched.counts.any() and not untouched.clock.any()


@pytest.mark.parametrize("policy", ["lru", "frequency"])
@pytest.mark.parametrize(("experts", "size", "places"), [(8, 8, 8), (16, 9, 9), (64, 64, 64), (200, 70, 33), (512, 512, 17)])
def test_many_places(experts: int, size: int, places: int, policy: str) -> None:
    """As many as are looked through at once, one more, many more; some of them twice."""
    from nsa_transformer.kernels.triton import expert_slots as kernels

    slots, plain = kernels.Slots.empty(1, experts, size, DEVICE).layer(0), SlotPolicy(size, policy)
    generator = torch.Generator().manual_seed(0)
    for number in range(5):
        chosen = torch.randint(0, experts, (places,), generator=generator)
        chosen[-1] = number  # which often is in no place but the last
        step(slots, plain, chosen.tolist(), policy, number != 2)


def test_frequency_forgets() -> None:
    """Over several halvings: an expert that was used often long ago goes before one used now and then."""
    from nsa_transformer.kernels.triton import expert_slots as kernels

    slots, plain = kernels.Slots.empty(1, 6, 2, DEVICE).layer(0), SlotPolicy(2, "frequency")
    for number in range(150):
        step(slots, plain, [0] if number < 40 else [1 + number % 3 % 2], "frequency")
    assert 0 not in plain.owners and plain.clock > 2 * HALVING


def test_uses_are_compared_after_they_are_halved() -> None:
    """Three and two are both one then, and of equals the first slot goes."""
    from nsa_transformer.kernels.triton import expert_slots as kernels

    slots, plain = kernels.Slots.empty(1, 4, 2, DEVICE).layer(0), SlotPolicy(2, "frequency")
    step(slots, plain, [0, 1], "frequency")
    slots.priority[:2] = torch.tensor([3, 2])
    slots.clock.fill_(HALVING - 1)
    plain.uses, plain.clock = {0: 3, 1: 2}, HALVING - 1
    step(slots, plain, [2], "frequency")
    assert plain.owners == [2, 1]


def test_the_two_policies_differ() -> None:
    for policy, gone in (("lru", 0), ("frequency", 1)):
        from nsa_transformer.kernels.triton import expert_slots as kernels

        slots, plain = kernels.Slots.empty(1, 4, 2, DEVICE).layer(0), SlotPolicy(2, policy)
        for chosen in ([0], [0], [0], [1], [2]):
            step(slots, plain, chosen, policy)
        assert gone not in plain.owners


def pieces(experts: int, words: int) -> Tensor:
    return torch.arange(experts * words, dtype=torch.int32).view(experts, words)


def on_host(x: Tensor) -> Tensor:
    return x.pin_memory() if DEVICE.type == "cuda" else x


@pytest.mark.parametrize("words", [12, 4096, 4100, 9000, 40000])
def test_copies(words: int) -> None:
    """Fetched experts lie in their slots, part by part, nothing else was touched, and streaming takes them from there."""
    from nsa_transformer.kernels.triton import expert_slots as kernels

    host = on_host(pieces(6, words))
    slots = kernels.Slots.empty(1, 6, 4, DEVICE).layer(0)
    pool = torch.full((4, words), -7, dtype=torch.int32, device=DEVICE)
    kernels.plan(torch.tensor([5, 2, 5], device=DEVICE), slots, "lru")
    table, part = slots.table.tolist(), words // 12 * 8
    assert [e for e in range(6) if table[e] >= 0] == [2, 5]
    kernels.fetch(host, pool, slots, 0, part)
    assert (pool[:, part:] == -7).all()
    for expert in (2, 5):
        assert torch.equal(pool[table[expert], :part].cpu(), host[expert, :part])
    pool[:, :part] += 1
    kernels.fetch(host, pool, slots, part, words - part)
    assert torch.equal(pool[[table[2], table[5]], :part].cpu(), host[[2, 5], :part] + 1)
    kernels.fetch(host, pool, slots, 0, part)
    for expert in (2, 5):
        assert torch.equal(pool[table[expert]].cpu(), host[expert])
    assert (pool[[s for s in range(4) if s not in table]] + (torch.arange(words, device=DEVICE) >= part) == -6).all()
    kernels.fetch(host, pool, slots, 0, words)
    assert torch.equal(pool[[table[2], table[5]]].cpu(), host[[2, 5]])
    kernels.plan(torch.tensor([2], device=DEVICE), slots, "lru")
    pool += 1  # an empty list copies nothing
    for start, count in ((0, part), (part, words - part)):
        kernels.fetch(host, pool, slots, start, count)
    assert torch.equal(pool[table[2]].cpu(), host[2] + 1)
    out13, out2 = (torch.full((3, n), -9, dtype=torch.int32, device=DEVICE) for n in (part, words - part))
    kernels.stream(host, pool, slots, 2, out13, out2)
    expected = host[2:5].clone()
    expected[0] += 1  # expert 2, as its slot has it
    assert torch.equal(torch.cat([out13, out2], 1).cpu(), expected)


def test_more_places_than_slots_are_refused() -> None:
    from nsa_transformer.kernels.triton import expert_slots as kernels

    with pytest.raises(AssertionError, match="3 places for 2 slots"):
        kernels.plan(torch.tensor([0, 1, 2], device=DEVICE), kernels.Slots.empty(1, 4, 2, DEVICE).layer(0), "lru")


@pytest.mark.gpu
def test_a_captured_plan_and_copy_follow_their_indices() -> None:
    from nsa_transformer.kernels.triton import expert_slots as kernels

    host, policy = on_host(pieces(128, 3 * 4096)), "lru"
    slots, plain = kernels.Slots.empty(1, 128, 20, DEVICE).layer(0), SlotPolicy(20, policy)
    pool = torch.zeros(20, host.shape[1], dtype=torch.int32, device=DEVICE)
    indices = torch.arange(8, device=DEVICE)

    def step() -> None:
        kernels.plan(indices, slots, policy)
        kernels.fetch(host, pool, slots, 0, 2 * 4096)
        kernels.fetch(host, pool, slots, 2 * 4096, 4096)

    step()
    plain.plan(list(range(8)), True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for number in range(50):
        indices.copy_(torch.randperm(128, generator=torch.Generator().manual_seed(number))[:8])
        graph.replay()
        plain.plan(indices.tolist(), True)
        assert slots.owner.tolist() == [-1 if owner is None else owner for owner in plain.owners]
        assert all(torch.equal(pool[s].cpu(), host[owner]) for s, owner in enumerate(plain.owners) if owner is not None)
