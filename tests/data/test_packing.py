"""Packing: every token once, in order, in packs that are full."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_transformer.data.packing import CUTS, WASTE, PackPlan, most_fragments, plan_packs

LENGTHS = st.lists(st.integers(1, 50), max_size=60)
# Many documents of a little more than half a pack, which best fit alone cannot lay together: where cuts are needed.
LARGE = st.lists(st.integers(5, 9), min_size=20, max_size=120)


def array(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def check_accounting(plan: PackPlan, lengths: list[int], max_length: int, documents: list[int]) -> None:
    seen: dict[int, list[tuple[int, int]]] = {}
    most = most_fragments(array([lengths[d] for d in documents]), max_length)
    for pack in range(len(plan)):
        fragments = plan.fragments(pack)
        assert 1 <= len(fragments) <= most
        assert sum(length for _, _, length in fragments) <= max_length
        assert len({document for document, _, _ in fragments}) == len(fragments)
        for document, start, length in fragments:
            assert length >= 1
            seen.setdefault(document, []).append((start, length))
    assert sorted(seen) == sorted(documents)
    for document, pieces in seen.items():
        at = 0
        for start, length in pieces:  # in the order of their packs
            assert start == at
            at += length
        assert at == lengths[document]
    least = sum(-(-lengths[d] // max_length) for d in documents)
    assert len(plan.document) <= least + least // CUTS


@given(st.one_of(LENGTHS, LARGE), st.integers(1, 30), st.integers(1, 12), st.randoms())
def test_every_token_lies_in_one_pack(lengths: list[int], max_length: int, buffer: int, random) -> None:
    documents = [i for i in range(len(lengths)) if random.random() < 0.8]
    random.shuffle(documents)
    plan = plan_packs(array(lengths), max_length, array(documents), buffer)
    check_accounting(plan, lengths, max_length, documents)
    shuffled = list(range(len(plan)))
    random.shuffle(shuffled)
    again = plan.reordered(array(shuffled))
    assert [again.fragments(i) for i in range(len(again))] == [plan.fragments(i) for i in shuffled]
    assert again.mean_lengths().tolist() == [sum(n * n for _, _, n in p) / sum(n for _, _, n in p) for p in map(plan.fragments, shuffled)]


def plan_by_hand(lengths: list[int], max_length: int, order: list[int], buffer: int) -> list[list[tuple[int, int, int]]]:
    """The rule of `plan_packs` on plain lists: packs that share, in order."""
    least = sum(-(-lengths[document] // max_length) for document in order)
    most = most_fragments(array([lengths[document] for document in order]), max_length)
    stream, full = [], 0  # (arrival, document, start, length, full packs up to this document)
    for arrival, document in enumerate(order):
        full += lengths[document] // max_length
        rest = lengths[document] % max_length
        if rest:
            stream.append((arrival, document, lengths[document] - rest, rest, full))
    ready, stream = stream[:buffer], stream[buffer:]
    packs, waste, cuts = [], 0, 0
    full_arrived = ready[-1][4] if ready else 0
    while ready:
        pack, space = [], max_length
        while len(pack) < most:
            fitting = sorted((p for p in ready if p[3] <= space), key=lambda p: (-p[3], p[0]))  # the first of the longest
            if not fitting:
                break
            ready.remove(fitting[0])
            if stream:
                full_arrived = stream[0][4]
            ready += stream[:1]
            stream = stream[1:]
            pack.append(fitting[0][1:4])
            space -= fitting[0][3]
        too_much = (waste + space) * WASTE > (len(packs) + 1 + full_arrived) * max_length
        fits = any(p[3] <= space for p in ready)
        if space and ready and not fits and len(pack) < most and too_much and cuts < least // CUTS:
            arrival, document, start, length, of = max(ready, key=lambda p: (p[3], -p[0]))
            ready.remove((arrival, document, start, length, of))
            ready.append((arrival, document, start + space, length - space, of))
            pack.append((document, start, space))
            cuts, space = cuts + 1, 0
        waste += space
        packs.append(pack)
    return packs


@given(st.one_of(LENGTHS, LARGE), st.integers(1, 30), st.integers(1, 12), st.randoms())
def test_the_plan_is_best_fit_over_the_buffer(lengths: list[int], max_length: int, buffer: int, random) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)
    plan = plan_packs(array(lengths), max_length, array(order), buffer)
    packs = [plan.fragments(i) for i in range(len(plan))]
    assert [pack for pack in packs if pack[0][2] < max_length] == plan_by_hand(lengths, max_length, order, buffer)
    full = [pack[0] for pack in packs if pack[0][2] == max_length]
    assert full == [(d, k * max_length, max_length) for d in order for k in range(lengths[d] // max_length)]


def test_a_small_plan() -> None:
    plan = plan_packs(array([3, 25, 7, 10, 4]), 10, np.arange(5), 3)
    assert [plan.fragments(i) for i in range(len(plan))] == [
        [(1, 0, 10)],
        [(1, 10, 10)],
        [(3, 0, 10)],
        [(2, 0, 7), (0, 0, 3)],
        [(1, 20, 5), (4, 0, 4)],
    ]


def test_a_cut_fills_a_pack_and_its_rest_comes_later() -> None:
    """Forty documents of 6 tokens in packs of 10: two cuts are allowed, and each fills one pack."""
    plan = plan_packs(np.full(40, 6), 10, np.arange(40), 4)
    packs = [plan.fragments(i) for i in range(len(plan))]
    assert packs[:2] == [[(0, 0, 6), (1, 0, 4)], [(2, 0, 6), (1, 4, 2), (3, 0, 2)]]
    assert packs[2:] == [[(4, 0, 6), (3, 2, 4)], *([(i, 0, 6)] for i in range(5, 40))]


@pytest.mark.parametrize("spread", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("max_length", [2048, 8192, 65536])
def test_packs_are_full_and_documents_whole(max_length: int, spread: float) -> None:
    """Both bounds at once, for documents from much alike to anything between a few tokens and many packs."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(np.log(3000), spread, 20_000)).astype(np.int64)
    plan = plan_packs(lengths, max_length, rng.permutation(len(lengths)), 4096)
    assert plan.length.sum() == lengths.sum()
    assert lengths.sum() / (len(plan) * max_length) >= 0.995
    assert len(plan.document) <= 1.05 * (-(-lengths // max_length)).sum()


def test_where_both_bounds_cannot_hold_documents_stay_whole() -> None:
    """Two documents of 1,010 leave 28 of 2,048 tokens empty, and each such hole takes a cut of its own."""
    plan = plan_packs(np.full(2000, 1010), 2048, np.arange(2000), 256)
    assert len(plan.document) == 2100
    assert 0.985 < plan.length.sum() / (len(plan) * 2048) < 0.995


def test_most_fragments() -> None:
    assert most_fragments(array([2, 3, 4, 50]), 10) == 8 + 3
    assert most_fragments(array([10, 20]), 10) == 8
    assert most_fragments(array([1] * 100), 10) == 8 + 10
    assert most_fragments(array([]), 10) == 8


def test_nothing_to_pack() -> None:
    assert len(plan_packs(np.array([5, 5]), 4, np.array([], dtype=np.int64), 3)) == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="max_length=0"):
        plan_packs(np.array([1]), 0, np.arange(1), 1)
    with pytest.raises(ValueError, match="buffer=0"):
        plan_packs(np.array([1]), 1, np.arange(1), 0)
    with pytest.raises(ValueError, match="at least 1 token"):
        plan_packs(np.array([1, 0]), 1, np.arange(2), 1)


def test_a_million_documents_take_seconds_and_fill_their_packs() -> None:
    rng = np.random.default_rng(0)
    lengths = np.maximum(1, rng.lognormal(6, 1.5, 1_000_000)).astype(np.int64)
    began = time.perf_counter()
    plan = plan_packs(lengths, 4096, rng.permutation(len(lengths)), 4096)
    assert time.perf_counter() - began < 20  # 2.7 s on an idle core
    assert plan.length.sum() == lengths.sum()
    assert lengths.sum() / (len(plan) * 4096) > 0.995
