"""The Triton backend against the float64 brute force: error at most twice plain PyTorch's, blocks by the importance they reach.

Without a GPU the kernels run in Triton's interpreter, in float32 and float16: its bfloat16 arithmetic is wrong.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsa_transformer.kernels import nsa_attention
from nsa_transformer.kernels.dispatch import choose_backend, kernels_refuse

from . import judge
from .cases import (
    NAMES,
    Case,
    assert_blocks_follow_importance,
    assert_close,
    assert_error_beside_plain,
    assert_same_bits,
    config_of,
    int32,
    make_case,
    run,
    run_oracle,
)
from .judge import TIMES, check

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux alone"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, tests/kernels/test_triton_gpu.py"),
]

SMALL = {"compress_block": 8, "compress_stride": 4, "select_block": 8, "num_selected": 4, "num_initial": 1, "num_local": 2, "window": 20}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with judge.poisoned():
        yield


def case_of(lengths: list[int], dtype: torch.dtype = torch.float32, **keywords) -> Case:
    changes = {key: keywords.pop(key) for key in list(keywords) if key in SMALL}
    wide = {"dk": 64, "dv": 64, "hkv": 1} | keywords
    return make_case(lengths, config_of(**SMALL | changes), **wide).to(dtype)  # type: ignore[arg-type]


def test_against_the_brute_force():
    case = case_of([19, 30], group=2)
    result = run(case, "triton")
    answer, _ = run_oracle(case.to(torch.float64))
    assert_blocks_follow_importance(case, result.blocks, answer, 1e-5)
    assert_error_beside_plain(case, "triton", TIMES)


@pytest.mark.parametrize("group", [1, 2, 3, 16, pytest.param(33, marks=pytest.mark.slow)])
def test_groups(group):
    check(case_of([37, 20], group=group, seed=group))


@pytest.mark.parametrize(
    "lengths",
    [[90], [1], [7], [8], [0, 5, 0, 0, 66, 1], [1] * 9, [3, 64, 2]],
    ids=str,
)
def test_documents(lengths):
    check(case_of(lengths, group=4, padding=2, seed=len(lengths)))


@pytest.mark.parametrize(("dk", "dv"), [(128, 64), (192, 128), (64, 192)])
def test_widths(dk, dv):
    check(case_of([50], torch.float16, dk=dk, dv=dv, group=4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_two_key_heads_and_dtypes(dtype):
    check(case_of([61, 12], dtype, hkv=2, group=2))


@pytest.mark.parametrize(
    "changes",
    [
        {"compress_block": 4, "compress_stride": 4, "select_block": 8, "num_selected": 3, "num_initial": 0, "num_local": 1},
        {"compress_block": 8, "compress_stride": 8, "select_block": 8, "num_selected": 5, "num_initial": 2, "num_local": 2},
        {"compress_block": 32, "compress_stride": 16, "select_block": 64, "num_selected": 2, "num_initial": 1, "num_local": 1},
        {"compress_block": 16, "compress_stride": 4, "select_block": 128, "num_selected": 1, "num_initial": 0, "num_local": 1},
        {"num_selected": 3},
        {"num_initial": 0, "num_local": 0, "num_selected": 3},
        {"window": 1},
        pytest.param({"window": 500}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_geometries(changes):
    # With a window of one key, or one-key softmaxes, gradients are 0 exactly or noise of which twice is no measure: compare to the largest.
    case = case_of([100, 33], group=2, **changes)
    if changes.get("window") == 1:
        result = run(case, "triton")
        exact = run(case.to(torch.float64).using(blocks=result.blocks), "reference")
        assert_close("out", result.out, exact.out, 1e-5)
        for name, x, y in zip(NAMES, result.grads, exact.grads, strict=True):
            assert_close(name, x, y, 1e-5)
        return
    check(case)


def test_queries_that_are_the_tail_of_their_documents():
    check(case_of([70, 30, 9], lengths_q=[11, 30, 0], group=2))
    check(case_of([70, 30], lengths_q=[5, 6], q_start=[20, 3], group=2))


def test_given_blocks():
    case = case_of([66], group=2)
    generator = torch.Generator().manual_seed(3)
    picked = torch.stack([torch.randperm(9, generator=generator)[:5] for _ in range(66)])
    picked = picked.masked_fill(torch.rand(66, 5, generator=generator) < 0.4, -1).masked_fill((torch.arange(66) % 7 == 0)[:, None], -1)
    check(case.using(blocks=picked[:, None].int()))  # some in the future, some queries without any, no order, nothing forced


@pytest.mark.slow
@pytest.mark.parametrize("stored", [0, 1], ids=["computed once more", "one head at a time"])
def test_scores_are_stored_for_dq_or_computed_once_more(stored, monkeypatch):
    """Gradients of the selected scores are stored for as many heads as fit; where one head's do not, dq computes the scores itself."""
    from nsa_transformer.kernels.triton import attention

    case = case_of([70, 21], hkv=2, group=3)
    whole = run(case, "triton")
    entries = len(case.inputs.q) * SMALL["num_selected"] * 3 * SMALL["select_block"] * 4
    monkeypatch.setattr(attention, "STORED_SCORES", stored * entries)
    result = check(case)
    if stored:
        for name, x, y in zip(NAMES, whole.grads, result.grads, strict=True):
            assert_same_bits(name, x, y[: len(x)])


def test_views_at_odd_offsets():
    """Parts of a flat buffer need not begin at multiples of 16 bytes."""
    case = case_of([40], torch.float16, group=2)

    def moved(x: Tensor) -> Tensor:
        buffer = torch.empty(x.numel() + 1, dtype=x.dtype)
        buffer[1:] = x.flatten()
        return buffer[1:].view(x.shape)

    odd = case.changed(**{name: moved(getattr(case.inputs, name)) for name in NAMES})
    straight, result = run(case, "triton"), run(odd, "triton")
    for name, x, y in zip(NAMES, straight.grads, result.grads, strict=True):
        assert_same_bits(name, x, y)


def test_scale_and_signs_of_gates():
    case = case_of([40], group=2).using(scale=0.3)
    check(case.changed(gates=case.inputs.gates * 2 - 1))


def test_float32_gates_beside_float16():
    case = case_of([40], torch.float16, group=2)
    mixed = run(case.changed(gates=case.inputs.gates.float()), "triton")
    assert mixed.grads.gates.dtype == torch.float32 and mixed.out.dtype == torch.float16
    assert_same_bits("out", mixed.out, run(case, "triton").out)


def test_strided_inputs_give_the_same_bits():
    case = case_of([53], group=2, hkv=2)

    def strided(x: Tensor) -> Tensor:
        wide = torch.full((x.shape[0], 3, *x.shape[1:]), torch.nan, dtype=x.dtype)
        wide[:, 1] = x
        return wide[:, 1]

    plain, views = run(case, "triton"), [strided(x).requires_grad_() for x in case.inputs]
    out = nsa_attention(*views, case.config, **case.keywords, backend="triton")
    assert_same_bits("out", out.detach(), plain.out)
    for name, x, y in zip(NAMES, torch.autograd.grad(out, views, case.grad_out), plain.grads, strict=True):
        assert_same_bits(name, x, y)


@pytest.mark.parametrize("lengths", [pytest.param([130], marks=pytest.mark.slow), [60, 71]], ids=str)
def test_strips_chunks_segments_and_parts(lengths, monkeypatch):
    from nsa_transformer.kernels.triton import attention

    monkeypatch.setattr(attention, "SELECT_CHUNK", 16)
    monkeypatch.setattr(attention, "SCORE_TABLE", 1)
    monkeypatch.setattr(attention, "_segment", lambda *_: 8)
    monkeypatch.setattr(attention, "_parts", lambda *_: 4)
    check(case_of(lengths, compress_block=4, group=2, num_selected=5))


@pytest.mark.slow
@pytest.mark.parametrize("equal", [False, True])
def test_selection_of_the_few_that_can_be_best(equal):
    """128 blocks and more go through the filter; equal importances overflow it, and go to the lower index."""
    case = make_case(
        [1100], lengths_q=[24], config=config_of(**SMALL | {"compress_block": 4, "num_selected": 6}), hkv=1, group=1, dk=64, dv=64, dtype=torch.float32
    )
    if equal:
        case = case.changed(q=torch.zeros_like(case.inputs.q))
    with torch.no_grad():
        _, blocks = nsa_attention(*case.inputs, case.config, **case.keywords, backend="triton", return_blocks=True)
        _, exact = nsa_attention(*case.to(torch.float64).inputs, case.config, **case.keywords, backend="reference", return_blocks=True)
    assert (blocks == exact).all(-1).float().mean() > 0.995


def test_nothing_of_the_future_and_nothing_of_other_documents():
    case = case_of([40, 30], group=2)
    result = run(case, "triton")
    inputs = case.inputs._replace(**{name: getattr(case.inputs, name).clone() for name in NAMES})
    for name in ("q", "k_slc", "v_slc", "k_win", "v_win", "gates"):
        getattr(inputs, name)[25:40] += 1
    inputs.k_cmp[(26 - 8) // 4 + 1 : 9] += 1
    inputs.v_cmp[(26 - 8) // 4 + 1 : 9] += 1
    changed = run(replace(case, inputs=inputs), "triton")
    keep = torch.cat([torch.arange(25), torch.arange(40, 70)])
    assert_same_bits("out", changed.out[keep], result.out[keep])


def test_empty_pack():
    case = case_of([0, 0], group=2)
    result = run(case, "triton")
    assert result.out.shape == (0, 2, 64) and result.blocks.shape == (0, 1, 4)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(result.grads, case.inputs, strict=True))


def test_operators_follow_torch_rules(poisoned):
    torch.use_deterministic_algorithms(False)
    case = case_of([21, 5], group=2)
    inputs = [x.requires_grad_() for x in case.inputs]
    cu, start = case.keywords["cu_seqlens"], int32([0, 0])
    geometry = [8, 4, 8, 4, 1, 2, 20]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.nsa_transformer.attention_triton.default, (*inputs, cu, cu, start, None, geometry, 0.125, True), test_utils=tests)
    plain = [x.detach() for x in inputs]
    _, blocks, outs, lse = torch.ops.nsa_transformer.attention_triton(*plain, cu, cu, start, None, geometry, 0.125, True)
    arguments = (case.grad_out, *plain, cu, cu, start, blocks, outs, lse, geometry, 0.125)
    torch.library.opcheck(torch.ops.nsa_transformer.attention_triton_backward.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_one_graph_under_torch_compile():
    case = case_of([30], group=2)
    keywords = dict(case.keywords)

    def call(*inputs: Tensor) -> Tensor:
        return nsa_attention(*inputs, case.config, **keywords, backend="triton") * 2

    leaves = [x.requires_grad_() for x in case.inputs]
    out = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    result = run(case, "triton")
    assert_same_bits("out", out.detach(), result.out * 2)
    for name, x, y in zip(NAMES, torch.autograd.grad(out, leaves, case.grad_out), result.grads, strict=True):
        assert_close(name, x, 2 * y, 1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dk": 48}, "64, 128, 192, 256"),
        ({"select_block": 24}, "powers of two"),
        ({"compress_stride": 2}, "at least 4"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take_is_refused_by_name(change, words):
    case = case_of([20], **change) if "dtype" in change else case_of([20], group=1, **change)
    with pytest.raises(ValueError, match=words):
        run(case, "triton")
    assert kernels_refuse(case.inputs.q, case.inputs.v_slc, case.config)


def test_auto_takes_the_reference_on_a_cpu():
    case = case_of([20])
    assert choose_backend("auto", case.inputs.q, case.inputs.v_slc, case.config) == "reference"


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_random_packs(data):
    stride = data.draw(st.sampled_from([4, 8]))
    block = stride * data.draw(st.sampled_from([1, 2, 4]))
    select = max(block, data.draw(st.sampled_from([8, 16, 32])))
    initial, local = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    config = config_of(
        compress_block=block,
        compress_stride=stride,
        select_block=select,
        num_selected=max(1, initial + local + data.draw(st.integers(0, 3))),
        num_initial=initial,
        num_local=local,
        window=data.draw(st.integers(2, 60)),
    )
    lengths = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=4))
    lengths_q = [data.draw(st.integers(0, length)) for length in lengths] if data.draw(st.booleans()) else None
    group = data.draw(st.sampled_from([1, 2, 3, 5, 8]))
    case = make_case(lengths, config, lengths_q=lengths_q, hkv=data.draw(st.integers(1, 2)), group=group, dk=64, dv=64, seed=data.draw(st.integers(0, 999)))
    result = run(case.to(torch.float32), "triton")
    exact = run(case.using(blocks=result.blocks), "reference")
    assert_close("out", result.out, exact.out, 1e-5)
    for name, x, y in zip(NAMES, result.grads, exact.grads, strict=True):
        assert_close(name, x, y, 2e-5)
