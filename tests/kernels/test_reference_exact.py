"""What must hold exactly in the reference attention: degenerate shapes, packs, the future, tails, and however the tensors come in."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_transformer.kernels import nsa_attention

from .cases import (
    NAMES,
    Case,
    assert_close,
    assert_matches_oracle,
    assert_same_bits,
    bounds,
    config_of,
    int32,
    make_case,
    run,
)
from .oracle import Geometry, num_compressed
from .strategies import cases

# ------------------------------------------------------------------------------------------------ degenerate exactness


def dense_causal(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    ends = case.keywords["cu_seqlens"].tolist()
    outs = [
        torch.nn.functional.scaled_dot_product_attention(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        for a, b in pairwise(ends)
        if b > a
    ]
    return torch.cat(outs)


@pytest.mark.parametrize("branch", ["slc", "win"])
@pytest.mark.parametrize("length", [1, 7, 8, 31, 32])
def test_branch_that_holds_everything_is_dense_causal(branch, length):
    config = config_of(num_selected=4) if branch == "slc" else config_of(window=32)
    case = make_case([length, 5], config, group=2)
    only = torch.tensor([0.0, float(branch == "slc"), float(branch == "win")], dtype=torch.float64)
    case = case.changed(gates=only.expand_as(case.inputs.gates))
    result = run(case)
    q, k, v = (getattr(case.inputs, name).clone().requires_grad_() for name in ("q", f"k_{branch}", f"v_{branch}"))
    out = dense_causal(case, q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), case.grad_out)
    assert_close("out", result.out, out.detach(), 1e-13)
    for name, expected in zip(("q", f"k_{branch}", f"v_{branch}"), grads, strict=True):
        assert_close(name, getattr(result.grads, name), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_first_queries_get_exactly_zero_from_the_compressed_branch(dtype):
    config = config_of(compress_block=6, compress_stride=3, select_block=6)
    case = make_case([20, 4, 11], config, dtype=dtype)
    case = case.changed(gates=torch.tensor([1.0, 0.0, 0.0], dtype=dtype).expand_as(case.inputs.gates).contiguous())
    result = run(case)
    blind = torch.cat([torch.arange(length) < 5 for length in (20, 4, 11)])
    assert not result.out[blind].any() and result.out[~blind].any()
    assert not result.grads.q[blind].any() and not result.grads.gates[blind, :, 0].any()
    for tensor in (result.out, *result.grads):
        assert tensor.isfinite().all()


# ------------------------------------------------------------------------------------- documents, the future, the tail


def alone(case: Case, lengths: list[int], document: int) -> tuple[Case, slice, slice]:
    """The document by itself, its rows in the pack, and its compressed rows."""
    start = sum(lengths[:document])
    rows = slice(start, start + lengths[document])
    counts = [num_compressed(length, Geometry.of(case.config)) for length in lengths]
    compressed = slice(sum(counts[:document]), sum(counts[: document + 1]))
    parts = {name: getattr(case.inputs, name)[compressed if name in ("k_cmp", "v_cmp") else rows] for name in NAMES}
    single = Case(case.inputs._replace(**parts), case.grad_out[rows], case.config, {"cu_seqlens": bounds([lengths[document]])})
    return single, rows, compressed


def assert_packed_is_alone(case: Case) -> None:
    lengths = case.keywords["cu_seqlens"].diff().tolist()
    packed = run(case)
    for document in range(len(lengths)):
        single, rows, compressed = alone(case, lengths, document)
        result = run(single)
        assert_same_bits(f"out of document {document}", packed.out[rows], result.out)
        assert_same_bits(f"blocks of document {document}", packed.blocks[rows], result.blocks)
        for name, whole, part in zip(NAMES, packed.grads, result.grads, strict=True):
            assert_same_bits(f"gradient of {name} in document {document}", whole[compressed if name in ("k_cmp", "v_cmp") else rows], part)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[45, 1, 0, 30, 3, 17], [3, 64, 64], [1, 600, 5, 300]], ids=str)
def test_packed_is_alone_bit_for_bit(lengths, dtype):
    assert_packed_is_alone(make_case(lengths, dtype=dtype, group=4, dk=8, dv=8, padding=2, unread=1))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 3, 5), (3, 1, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_packed_is_alone_wherever_the_document_lies_in_memory(offset, dtype, shape):
    """Matrix products may round differently on data that is aligned differently."""
    hkv, group, dk, dv = shape
    assert_packed_is_alone(make_case([offset, 21, 40], dtype=dtype, hkv=hkv, group=group, dk=dk, dv=dv))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases(), st.sampled_from([torch.float64, torch.float32]))
def test_any_packed_is_alone_bit_for_bit(case, dtype):
    assert_packed_is_alone(case.to(dtype))


@pytest.mark.slow
@settings(max_examples=1500, deadline=None)
@given(cases(), st.sampled_from([torch.float64, torch.float32]))
def test_any_packed_is_alone_bit_for_bit_at_length(case, dtype):
    assert_packed_is_alone(case.to(dtype))


def test_document_of_nan_stays_among_itself():
    lengths = [21, 18, 30]
    case = make_case(lengths)
    clean = run(case)
    _, rows, compressed = alone(case, lengths, 1)
    bad = {}
    for name in NAMES:
        bad[name] = getattr(case.inputs, name).clone()
        bad[name][compressed if name in ("k_cmp", "v_cmp") else rows] = float("nan")
    dirty = run(case.changed(**bad))
    for document in (0, 2):
        _, rows, compressed = alone(case, lengths, document)
        assert_same_bits(f"out of document {document}", dirty.out[rows], clean.out[rows])
        for name, a, b in zip(NAMES, dirty.grads, clean.grads, strict=True):
            part = compressed if name in ("k_cmp", "v_cmp") else rows
            assert_same_bits(f"gradient of {name} in document {document}", a[part], b[part])


@pytest.mark.parametrize("change", ["noise", "huge"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [1, 3, 4, 16, 31, 44])
def test_future_changes_nothing_before_it(first, dtype, change):
    """Tokens from `first` on replaced, compressed tokens that hold any of them too: rows before keep every bit, and so do gradients of a loss there."""
    lengths = [5, 45]
    case = make_case(lengths, dtype=dtype)
    early = torch.arange(50) < 5 + first
    case = Case(case.inputs, case.grad_out * early[:, None, None], case.config, case.keywords)
    before = run(case)
    geo = Geometry.of(case.config)
    offset = num_compressed(5, geo)
    old = torch.tensor([True] * offset + [i * geo.d + geo.l <= first for i in range(num_compressed(45, geo))])
    generator = torch.Generator().manual_seed(9)

    changed = {}
    for name in NAMES:
        x = getattr(case.inputs, name)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        factor = {"noise": 1.0, "huge": 1e6}[change]
        keep = (old if name in ("k_cmp", "v_cmp") else early).reshape(-1, 1, 1)
        changed[name] = torch.where(keep, x, (noise * factor).to(dtype))
    after = run(case.changed(**changed))
    assert_same_bits("out", after.out[early], before.out[early])
    assert_same_bits("blocks", after.blocks[early], before.blocks[early])
    for name, a, b in zip(NAMES, after.grads, before.grads, strict=True):
        keep = old if name in ("k_cmp", "v_cmp") else early
        assert_same_bits(f"gradient of {name}", a[keep], b[keep])
        assert not b[~keep].any(), f"gradient of {name} reaches the future"


@pytest.mark.parametrize("starts", ["ends", "given", "middle"])
def test_tail_gives_the_rows_of_the_whole(starts):
    lengths = [41, 1, 30, 0, 6]
    case = make_case(lengths, group=3, unread=2)
    whole = run(case)
    first = [20, 0, 29, 0, 6]
    last = lengths if starts != "middle" else [33, 1, 30, 0, 6]
    offsets = [0, 41, 42, 72, 72]
    rows = torch.cat([torch.arange(o + a, o + b) for o, a, b in zip(offsets, first, last, strict=True)])
    tail = case.changed(q=case.inputs.q[rows], gates=case.inputs.gates[rows])
    lengths_q = [b - a for a, b in zip(first, last, strict=True)]
    tail = tail.using(cu_seqlens=bounds(lengths_q), cu_seqlens_k=bounds(lengths))
    if starts != "ends":
        tail = tail.using(q_start=int32(first))
    tail = Case(tail.inputs, case.grad_out[rows], case.config, tail.keywords)
    result = assert_matches_oracle(tail)
    assert_close("out", result.out, whole.out[rows], 1e-13)
    assert_same_bits("blocks", result.blocks, whole.blocks[rows])
    assert_close("gradient of q", result.grads.q, whole.grads.q[rows], 1e-13)


def test_gradients_of_two_halves_add_up():
    case = make_case([38])
    whole = run(case)
    total = [torch.zeros_like(x) for x in case.inputs]
    for a, b in ((0, 17), (17, 38)):
        half = case.changed(q=case.inputs.q[a:b], gates=case.inputs.gates[a:b]).using(cu_seqlens=bounds([b - a]), cu_seqlens_k=bounds([38]), q_start=int32([a]))
        grads = run(Case(half.inputs, case.grad_out[a:b], case.config, half.keywords)).grads
        for name, sum_, grad in zip(NAMES, total, grads, strict=True):
            (sum_[a:b] if name in ("q", "gates") else sum_).add_(grad)
    for name, sum_, grad in zip(NAMES, total, whole.grads, strict=True):
        assert_close(name, sum_, grad, 1e-12)


# ------------------------------------------------------------------------------------------------ how tensors come in


def test_rows_past_the_last_compressed_token_are_never_read():
    lengths = [21, 3, 18]
    case = make_case(lengths)
    clean = run(case)
    rows = len(case.inputs.k_cmp)
    bound = sum(lengths) // case.config.compress_stride
    assert bound > rows
    poison = {name: torch.cat([x, x.new_full((bound - rows, *x.shape[1:]), float("nan"))]) for name, x in zip(NAMES[1:3], case.inputs[1:3], strict=True)}
    result = run(case.changed(**poison))
    assert_same_bits("out", result.out, clean.out)
    assert_same_bits("blocks", result.blocks, clean.blocks)
    for name, a, b in zip(NAMES, result.grads, clean.grads, strict=True):
        assert_same_bits(f"gradient of {name}", a[: len(b)], b)
        assert not a[len(b) :].any(), f"gradient of {name} past N"


def test_same_bits_twice_and_without_autograd():
    case = make_case([60, 13], dtype=torch.float32)
    first, second = run(case), run(case)
    with torch.no_grad():
        out = nsa_attention(*case.inputs, case.config, **case.keywords)
    assert isinstance(out, torch.Tensor) and not out.requires_grad
    assert_same_bits("out", second.out, first.out)
    assert_same_bits("out without autograd", out, first.out)
    for name, a, b in zip(NAMES, second.grads, first.grads, strict=True):
        assert_same_bits(name, a, b)


def test_strided_inputs_and_gradient_that_is_expanded():
    case = make_case([33, 8])
    strided = case.inputs._replace(**{n: x.transpose(0, 1).contiguous().transpose(0, 1) for n, x in zip(NAMES, case.inputs, strict=True)})
    assert not strided.q.is_contiguous()
    ones = Case(case.inputs, torch.ones_like(case.grad_out), case.config, case.keywords)
    expected = run(ones)
    leaves = [x.detach().requires_grad_() for x in strided]
    out = nsa_attention(*leaves, case.config, **case.keywords)
    out.sum().backward()
    assert_close("out", out.detach(), expected.out, 1e-13)
    for name, leaf, grad in zip(NAMES, leaves, expected.grads, strict=True):
        assert_close(name, leaf.grad, grad, 1e-12)


def test_inputs_are_left_as_they_were():
    case = make_case([33, 8])
    kept = [x.clone() for x in case.inputs]
    run(case)
    for name, x, y in zip(NAMES, case.inputs, kept, strict=True):
        assert_same_bits(name, x, y)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_one_input_alone(name):
    case = make_case([33, 8])
    expected = getattr(run(case).grads, name)
    leaf = getattr(case.inputs, name).clone().requires_grad_()
    out = nsa_attention(*case.inputs._replace(**{name: leaf}), case.config, **case.keywords)
    (grad,) = torch.autograd.grad(out, leaf, case.grad_out)
    assert_close(name, grad, expected, 1e-12)


def test_shared_keys_and_values_get_the_sum_of_their_gradients():
    config = config_of(compress_block=1, compress_stride=1)
    case = make_case([30], config)
    k, v = case.inputs.k_slc, case.inputs.v_slc
    grads = run(case.changed(k_cmp=k, v_cmp=v, k_win=k, v_win=v)).grads
    k, v = k.clone().requires_grad_(), v.clone().requires_grad_()
    out = nsa_attention(case.inputs.q, k, v, k, v, k, v, case.inputs.gates, config, **case.keywords)
    for shared, parts in zip(torch.autograd.grad(out, (k, v), case.grad_out), (grads[1::2][:3], grads[2::2][:3]), strict=True):
        assert_close("shared", shared, sum(parts), 1e-12)


def test_bf16_under_autocast_is_no_worse():
    """A caller's autocast must not lower the float32 of softmax and sums."""
    case = make_case([64, 30], group=4, dk=16, dv=8, dtype=torch.bfloat16)
    plain = run(case)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits("out", run(case).out, plain.out)
