"""The judge judged: the brute-force oracle against numbers worked out by hand and against dense masks."""

from __future__ import annotations

import pytest
import torch

from nsa_transformer import NSAConfig

from .cases import NAMES, assert_close, backward, config_of, fresh, int32, make_case, plain_attention, run_oracle
from .oracle import Geometry, Inputs, forced_blocks, num_compressed, oracle_attention, select, shared_tokens

PAPER = Geometry.of(NSAConfig())


def test_overlap_weights_of_the_paper():
    """For 32/16/64: 1, 2, 2, 2, 1 on i = 4j-1 .. 4j+3."""
    for j in (1, 2, 7):
        weights = {i: shared_tokens(i, j, PAPER) / PAPER.d for i in range(60)}
        assert {i: w for i, w in weights.items() if w} == dict(zip(range(4 * j - 1, 4 * j + 4), (1, 2, 2, 2, 1), strict=True))
    assert [shared_tokens(i, 0, PAPER) / PAPER.d for i in range(6)] == [2, 2, 2, 1, 0, 0]


@pytest.mark.parametrize(("length", "count"), [(0, 0), (1, 0), (31, 0), (32, 1), (47, 1), (48, 2), (64, 3), (65, 3)])
def test_number_of_compressed_tokens(length, count):
    assert num_compressed(length, PAPER) == count == max(0, (length - 32) // 16 + 1)


def test_forced_blocks():
    assert forced_blocks(0, PAPER) == {0}
    assert forced_blocks(64, PAPER) == {0, 1}
    assert forced_blocks(1000, PAPER) == {0, 14, 15}


def test_selection_fills_up_by_importance_and_breaks_ties_downwards():
    geometry = Geometry.of(config_of(num_selected=5))  # forced: block 0 and the last two
    assert select([9.0, 1.0, 3.0, 1.0, 2.0, 0.0, 0.0], 55, geometry) == [0, 2, 4, 5, 6]
    assert select([0.0, 1.0, 1.0, 1.0, 1.0, 5.0, 5.0], 55, geometry) == [0, 1, 2, 5, 6]
    assert select([0.0, 1.0, 2.0], 20, geometry) == [0, 1, 2]


def test_one_token_and_two_worked_by_hand():
    """Every block one token long: the second query sees both compressed tokens, both blocks, and a window of itself."""
    config = NSAConfig(compress_block=1, compress_stride=1, select_block=1, num_selected=2, num_initial=1, num_local=1, window=1)
    one = torch.ones(2, 1, 1, dtype=torch.float64)
    values = torch.tensor([2.0, 4.0], dtype=torch.float64).reshape(2, 1, 1)
    gates = torch.tensor([[[1.0, 10.0, 100.0]], [[1.0, 10.0, 100.0]]], dtype=torch.float64)
    answer = oracle_attention(Inputs(one, one, values, one, 10 * values, one, 100 * values, gates), config)
    assert answer.out.flatten().tolist() == [2 + 200 + 20000, 3 + 300 + 40000]
    assert answer.blocks == [[[0]], [[0, 1]]]
    assert answer.importance == [[[1.0]], [[0.5, 0.5]]]


@pytest.mark.parametrize("tail", [False, True])
def test_oracle_equals_dense_masks(tail):
    case = make_case([19, 0, 1, 33, 3], lengths_q=[4, 0, 1, 20, 0] if tail else None, group=3, unread=2)
    if tail:
        case = case.using(q_start=int32([15, 0, 0, 7, 3]))
    answer, grads = run_oracle(case)
    n = case.config.num_selected
    blocks = torch.tensor([[chosen + [-1] * (n - len(chosen)) for chosen in heads] for heads in answer.blocks])
    inputs = fresh(case.inputs)
    out = plain_attention(inputs, case, blocks)
    assert_close("out", out, answer.out)
    for name, plain, oracle in zip(NAMES, backward(out, inputs, case.grad_out), grads, strict=True):
        assert_close(name, plain, oracle)
