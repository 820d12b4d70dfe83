"""The reference attention against the brute-force oracle: forward, blocks and every gradient; and the choice of blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_transformer import NSAConfig

from .cases import (
    NAMES,
    assert_blocks_follow_importance,
    assert_error_beside_plain,
    assert_matches_oracle,
    assert_same_bits,
    config_of,
    int32,
    make_case,
    run,
    run_oracle,
)
from .oracle import Geometry, num_compressed, select
from .strategies import cases

GEOMETRIES = {
    "default of these tests": config_of(),
    "one token everywhere": config_of(compress_block=1, compress_stride=1, select_block=1, num_selected=3, num_local=1, window=1),
    "l = d = l'": config_of(compress_block=5, compress_stride=5, select_block=5, window=4),
    "overlap of three, no power of two": config_of(compress_block=9, compress_stride=3, select_block=15, num_selected=3, window=11),
    "l = l' = 3d": config_of(compress_block=6, compress_stride=2, select_block=6),
    "stride 1": config_of(compress_block=4, compress_stride=1, select_block=5, window=3),
    "nothing forced": config_of(num_initial=0, num_local=0, num_selected=1),
    "forced alone": config_of(num_initial=2, num_local=1, num_selected=3),
    "no local": config_of(num_initial=1, num_local=0, num_selected=2),
    "many initial": config_of(num_initial=3, num_local=3, num_selected=7, select_block=4),
    "everything selected": config_of(num_selected=50),
    "wide window": config_of(window=1000),
}
LENGTHS = {
    "one document": [45],
    "several": [17, 1, 30, 3],
    "length one": [1],
    "shorter than l": [3, 2],
    "empty documents": [0, 12, 0, 0, 21, 0],
    "exact multiples": [16, 32],
}


# ------------------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("config", GEOMETRIES.values(), ids=GEOMETRIES)
def test_matches_oracle(config, lengths):
    assert_matches_oracle(make_case(lengths, config))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("hkv", [1, 3])
def test_group_sizes(group, hkv):
    assert_matches_oracle(make_case([23, 9], hkv=hkv, group=group, dk=3, dv=2))


@pytest.mark.parametrize(("dk", "dv"), [(1, 1), (6, 4), (4, 6), (24, 16)])
def test_key_and_value_widths(dk, dv):
    assert_matches_oracle(make_case([26], dk=dk, dv=dv))


def test_paper_geometry():
    """Three steps past the length where 16 blocks of 64 hold everything, so that something is left out."""
    whole = make_case([1100], NSAConfig(), lengths_q=[6], hkv=1, group=2, dk=8, dv=4)
    result = assert_matches_oracle(whole)
    assert (result.blocks >= 0).all()
    assert_matches_oracle(make_case([70, 40], NSAConfig(window=33), hkv=1, group=1))


def test_long_documents():
    """Past the lengths where an implementation changes from one path to another: many chunks of queries, few of the keys selected."""
    config = config_of(num_selected=3)
    assert_matches_oracle(make_case([330, 140], config, hkv=1, group=2, dk=2, dv=3))
    assert_matches_oracle(make_case([900, 5, 1300], config, lengths_q=[6, 2, 270], q_start=[880, 0, 250], hkv=1, group=1, dk=3, dv=2))


@pytest.mark.slow
def test_paper_geometry_far_out():
    assert_matches_oracle(make_case([5000, 4200], NSAConfig(), lengths_q=[9, 3], q_start=[4500, 4197], hkv=2, group=2, dk=16, dv=8))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_any_pack_and_geometry(case):
    assert_matches_oracle(case)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases(tails=True))
def test_any_tail(case):
    assert_matches_oracle(case)


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(st.one_of(cases(), cases(tails=True)))
def test_any_pack_geometry_and_tail_at_length(case):
    assert_matches_oracle(case)


def test_scale():
    case = make_case([29])
    assert_matches_oracle(case.using(scale=0.125))
    assert_same_bits("scale Dk ** -0.5", run(case.using(scale=4**-0.5)).out, run(case).out)


def test_thousands_of_tiny_documents():
    lengths = [(7 * i * i + i) % 6 for i in range(2000)]
    assert_matches_oracle(make_case(lengths, hkv=1, group=2, dk=2, dv=3, padding=48))


@pytest.mark.parametrize("documents", [0, 1, 3])
def test_empty_pack(documents):
    case = make_case([0] * documents)
    result = run(case)
    assert result.out.shape == (0, 4, 6) and result.out.dtype == torch.float64
    assert result.blocks.shape == (0, 2, case.config.num_selected) and result.blocks.dtype == torch.int32
    assert all(g.shape == x.shape for g, x in zip(result.grads, case.inputs, strict=True))


def test_empty_pack_has_compressed_rows_that_are_not_read():
    result = run(make_case([0], unread=3))
    assert result.out.shape == (0, 4, 6) and not result.grads.k_cmp.any()


def test_without_cu_seqlens_there_is_one_document():
    case = make_case([37])
    assert_same_bits("out", run(case.using(cu_seqlens=None)).out, run(case).out)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
    ids=["fp32", "bf16", "bf16, gates fp32", "fp16, gates fp32"],
)
def test_error_within_twice_that_of_plain_pytorch(dtypes, seed):
    case = make_case([90, 7, 41], config_of(window=20), group=2, dk=16, dv=8, seed=seed).to(*dtypes)
    result = run(case)
    assert result.out.dtype == dtypes[0]
    assert result.grads.gates.dtype == (dtypes[1] or dtypes[0])
    answer, _ = run_oracle(case.to(torch.float64))
    assert_blocks_follow_importance(case, result.blocks, answer, 1e-5)  # p_cmp is float32 whatever the dtype
    assert_error_beside_plain(case)


# ------------------------------------------------------------------------------------------------------- selection


def test_ties_go_to_the_lower_index():
    """A query of zeros spreads its probability evenly over 32 compressed tokens: inner blocks tie exactly."""
    case = make_case([66], hkv=1, group=1, lengths_q=[1])
    assert num_compressed(66, Geometry.of(case.config)) == 32
    case = case.changed(q=torch.zeros_like(case.inputs.q))
    assert run(case).blocks.flatten().tolist() == [0, 1, 7, 8]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_importances_with_many_ties(dtype):
    """Keys that are either seen evenly or not at all (exp underflows to 0): importances are counts, and ties the rule."""
    config = config_of(compress_block=2, compress_stride=2, select_block=4, num_selected=5)
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        case = make_case([64], config, hkv=1, group=1, dk=1, lengths_q=[1]).using(scale=1.0).to(dtype)
        seen = torch.zeros(32).index_fill(0, torch.randperm(32, generator=generator)[:8], 1.0)
        case = case.changed(q=torch.ones_like(case.inputs.q), k_cmp=((seen - 1) * 4096).reshape(32, 1, 1).to(dtype))
        importance = [(seen[2 * j] + seen[2 * j + 1]).item() / 8 for j in range(16)]
        assert run(case).blocks.flatten().tolist() == select(importance, 63, Geometry.of(config))


def test_blocks_are_chosen_for_the_whole_group():
    """Importance is summed over the heads: each has its favourite, but the block that is second for both comes first."""
    config = config_of(compress_block=2, compress_stride=2, select_block=2, num_initial=0, num_local=0, num_selected=2, window=1)
    case = make_case([8], config, hkv=1, group=2, dk=2, lengths_q=[1]).using(scale=1.0)
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], dtype=torch.float64)
    keys = torch.tensor([[8.1, 0.0], [0.0, 8.0], [7.9, 7.9], [0.0, 0.0]], dtype=torch.float64)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        expected = sorted((order.index(0), order.index(2)))
        changed = case.changed(q=q, k_cmp=keys[order][:, None])
        assert run(changed).blocks.tolist() == run_oracle(changed)[0].blocks == [[expected]]


def test_blocks_go_back_in():
    case = make_case([50, 3, 27], group=3)
    first = run(case)
    again = run(case.using(blocks=first.blocks))
    assert_same_bits("blocks", again.blocks, first.blocks)
    assert_same_bits("out", again.out, first.out)
    for name, a, b in zip(NAMES, again.grads, first.grads, strict=True):
        assert_same_bits(name, a, b)


def test_given_blocks_are_attended_and_nothing_else():
    """Any blocks of the document, in any order, forced ones left out; none at all gives 0 from this branch, not NaN."""
    lengths = [50, 3, 27]
    case = make_case(lengths, group=3)
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        count = -(-length // case.config.select_block)
        for _ in range(2 * length):
            some = torch.randperm(count, generator=generator)[: int(torch.randint(0, 5, (1,), generator=generator))].tolist()
            rows.append((some + [-1] * 4)[:4])
    given = int32(rows).reshape(-1, 2, 4)
    result = assert_matches_oracle(case.using(blocks=given))
    used = result.blocks.where(result.blocks >= 0, 2**30)
    assert torch.equal(used, used.sort(-1).values)
    assert torch.equal(result.blocks.sort(-1).values, given.sort(-1).values)


def test_no_blocks_at_all():
    case = make_case([20])
    result = assert_matches_oracle(case.using(blocks=torch.full((20, 2, 4), -1, dtype=torch.int32)))
    assert not result.grads.k_slc.any() and not result.grads.v_slc.any() and not result.grads.gates[..., 1].any()


def test_selection_carries_no_gradient():
    """With the compressed branch gated off, nothing reaches the compressed keys, though they choose the blocks."""
    case = make_case([40])
    grads = run(case.changed(gates=case.inputs.gates * torch.tensor([0.0, 1.0, 1.0]))).grads
    assert not grads.k_cmp.any() and not grads.v_cmp.any()
