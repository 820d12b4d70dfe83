"""Packing: every token once, in order, in packs that are full."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_transformer.data.packing import PackPlan, plan_packs

LENGTHS = st.lists(st.integers(1, 50), max_size=60)


def check_accounting(plan: PackPlan, lengths: list[int], max_length: int, documents: list[int]) -> None:
    seen: dict[int, list[tuple[int, int]]] = {}
    for pack in range(len(plan)):
        fragments = plan.fragments(pack)
        assert fragments
        assert sum(length for _, _, length in fragments) <= max_length
        for document, start, length in fragments:
            assert length >= 1
            seen.setdefault(document, []).append((start, length))
    assert sorted(seen) == sorted(documents)
    for document, pieces in seen.items():
        at = 0
        for start, length in sorted(pieces):
            assert start == at
            at += length
        assert at == lengths[document]
        assert all(length == max_length for _, length in sorted(pieces)[:-1])


@given(LENGTHS, st.integers(1, 30), st.integers(1, 12), st.randoms())
def test_every_token_lies_in_one_pack(lengths: list[int], max_length: int, buffer: int, random) -> None:
    documents = [i for i in range(len(lengths)) if random.random() < 0.8]
    random.shuffle(documents)
    plan = plan_packs(np.array(lengths, dtype=np.int64), max_length, np.array(documents, dtype=np.int64), buffer)
    check_accounting(plan, lengths, max_length, documents)
    shuffled = list(range(len(plan)))
    random.shuffle(shuffled)
    again = plan.reordered(np.array(shuffled, dtype=np.int64))
    assert [again.fragments(i) for i in range(len(again))] == [plan.fragments(i) for i in shuffled]


def plan_by_hand(lengths: list[int], max_length: int, order: list[int], buffer: int) -> list[list[tuple[int, int, int]]]:
    """The rule of `plan_packs` on plain lists: packs that share, in order."""
    stream = [(document, lengths[document] // max_length * max_length, lengths[document] % max_length) for document in order]
    stream = [piece for piece in stream if piece[2]]
    ready, stream = stream[:buffer], stream[buffer:]
    packs = []
    while ready:
        pack, space = [], max_length
        piece = ready[0]
        while True:
            ready.remove(piece)
            ready += stream[:1]
            stream = stream[1:]
            pack.append(piece)
            space -= piece[2]
            fitting = [p for p in ready if p[2] <= space]
            if not fitting:
                break
            piece = max(fitting, key=lambda p: p[2])  # the first of the longest
        packs.append(pack)
    return packs


@given(LENGTHS, st.integers(1, 30), st.integers(1, 12), st.randoms())
def test_the_plan_is_best_fit_over_the_buffer(lengths: list[int], max_length: int, buffer: int, random) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)
    plan = plan_packs(np.array(lengths, dtype=np.int64), max_length, np.array(order, dtype=np.int64), buffer)
    packs = [plan.fragments(i) for i in range(len(plan))]
    assert [pack for pack in packs if pack[0][2] < max_length] == plan_by_hand(lengths, max_length, order, buffer)
    full = [pack[0] for pack in packs if pack[0][2] == max_length]
    assert full == [(d, k * max_length, max_length) for d in order for k in range(lengths[d] // max_length)]


def test_a_small_plan() -> None:
    plan = plan_packs(np.array([3, 25, 7, 10, 4]), 10, np.arange(5), 3)
    assert [plan.fragments(i) for i in range(len(plan))] == [
        [(1, 0, 10)],
        [(1, 10, 10)],
        [(3, 0, 10)],
        [(0, 0, 3), (2, 0, 7)],
        [(1, 20, 5), (4, 0, 4)],
    ]


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
    plan = plan_packs(lengths, 4096, rng.permutation(len(lengths)), 256)
    assert time.perf_counter() - began < 20  # 1.5 s on an idle core
    assert plan.length.sum() == lengths.sum()
    assert lengths.sum() / (len(plan) * 4096) > 0.99
