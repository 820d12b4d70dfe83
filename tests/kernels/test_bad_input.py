"""Bad input to `nsa_attention` is refused with a `ValueError` that names the argument."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from nsa_transformer import NSAConfig
from nsa_transformer.kernels import available_backends, nsa_attention

from .cases import NAMES, config_of, int32, make_case, run

LENGTHS = [20, 0, 13]
KEYS = ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")


def case(**kw):
    return make_case(LENGTHS, hkv=2, group=3, dk=4, dv=6, dtype=torch.float32, **kw)


def assert_refused(bad, *names: str) -> str:
    """Raises ValueError whose text has one of the names as a word."""
    with pytest.raises(ValueError) as caught:
        nsa_attention(*bad.inputs, bad.config, **bad.keywords)
    text = str(caught.value)
    assert any(re.search(rf"\b{re.escape(name)}\b", text) for name in names), f"none of {names} in: {text}"
    return text


def test_the_case_itself_is_good():
    assert run(case()).out.isfinite().all()


# ------------------------------------------------------------------------------------------------------------- tensors


@pytest.mark.parametrize("name", NAMES)
def test_not_three_dimensions(name):
    x = getattr(case().inputs, name)
    assert_refused(case().changed(**{name: x[0]}), name)
    assert_refused(case().changed(**{name: x[None]}), name)


@pytest.mark.parametrize("name", KEYS)
def test_heads_that_disagree(name):
    assert_refused(case().changed(**{name: getattr(case().inputs, name)[:, :1]}), name)


@pytest.mark.parametrize("name", KEYS)
def test_widths_that_disagree(name):
    assert_refused(case().changed(**{name: getattr(case().inputs, name)[..., :-1]}), name)


@pytest.mark.parametrize("name", ["k_slc", "v_slc", "k_win", "v_win", "gates"])
@pytest.mark.parametrize("change", [-1, 1])
def test_lengths_that_disagree(name, change):
    x = getattr(case().inputs, name)
    assert_refused(case().changed(**{name: x[:-1] if change < 0 else torch.cat([x, x[:1]])}), name)


def test_query_longer_than_keys():
    good = case()
    assert_refused(good.changed(q=torch.cat([good.inputs.q, good.inputs.q[:1]])), "q")


@pytest.mark.parametrize("shape", [(33, 6, 2), (33, 6, 4), (33, 2, 3), (33, 6, 1), (33, 1, 3)])
def test_gates_of_another_shape(shape):
    assert_refused(case().changed(gates=torch.rand(shape)), "gates")


def test_group_that_does_not_divide():
    good = case()
    text = assert_refused(good.changed(q=good.inputs.q[:, :5], gates=good.inputs.gates[:, :5]), "q")
    assert "5" in text and "2" in text


def test_fewer_query_heads_than_key_heads():
    good = case()
    assert_refused(good.changed(q=good.inputs.q[:, :1], gates=good.inputs.gates[:, :1]), "q")


@pytest.mark.parametrize("name", ["k_cmp", "v_cmp"])
def test_compressed_rows_that_disagree(name):
    assert_refused(case().changed(**{name: getattr(case().inputs, name)[:-1]}), "k_cmp", "v_cmp")


def test_both_compressed_too_short():
    good = case()
    assert_refused(good.changed(k_cmp=good.inputs.k_cmp[:-1], v_cmp=good.inputs.v_cmp[:-1]), "k_cmp", "v_cmp")
    assert_refused(good.changed(k_cmp=good.inputs.k_cmp[:0], v_cmp=good.inputs.v_cmp[:0]), "k_cmp", "v_cmp")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_dtype_unlike_the_others(name, dtype):
    assert_refused(case().changed(**{name: getattr(case().inputs, name).to(dtype)}), name, *(["k_cmp"] if name == "q" else []))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_dtype_that_is_no_floating_point(dtype):
    good = case()
    assert_refused(good.changed(**{name: getattr(good.inputs, name).to(dtype) for name in NAMES}), "q")


@pytest.mark.parametrize("name", NAMES)
def test_another_device(name):
    assert_refused(case().changed(**{name: getattr(case().inputs, name).to("meta")}), name, *(["k_cmp"] if name == "q" else []))


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seqlens_k", "q_start", "blocks"])
def test_another_device_for_the_rest(name):
    tensors = {"cu_seqlens_k": int32([0, 20, 20, 33]), "q_start": int32([0, 0, 0]), "blocks": torch.zeros(33, 2, 4, dtype=torch.int32)}
    bad = case().using(**tensors)
    assert_refused(bad.using(**{name: bad.keywords[name].to("meta")}), name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [None, [[1.0]]])
def test_not_a_tensor(name, value):
    assert_refused(case().changed(**{name: value}), name)


# ---------------------------------------------------------------------------------------------------------- boundaries


@pytest.mark.parametrize(
    "values",
    [[1, 20, 33], [0, 20, 10, 33], [0, 20, 32], [0, 20, 34], [0, 40, 33], [0], [], [-1, 33], [0, -5, 33], [0, 2**31 - 1, -2, 33]],
    ids=str,
)
def test_boundaries_that_cannot_be(values):
    bad = torch.tensor(values, dtype=torch.int32)
    assert_refused(case().using(cu_seqlens=bad), "cu_seqlens")
    assert_refused(case().using(cu_seqlens_k=bad), "cu_seqlens_k")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.int16])
def test_boundaries_of_another_dtype(dtype):
    good = int32([0, 20, 20, 33])
    text = assert_refused(case().using(cu_seqlens=good.to(dtype)), "cu_seqlens")
    assert "int32" in text
    assert_refused(case().using(cu_seqlens_k=good.to(dtype)), "cu_seqlens_k")


def test_boundaries_of_another_shape():
    good = int32([0, 20, 20, 33])
    assert_refused(case().using(cu_seqlens=good[None]), "cu_seqlens")
    assert_refused(case().using(cu_seqlens=good[0]), "cu_seqlens")
    assert_refused(case().using(cu_seqlens_k=good[None]), "cu_seqlens_k")
    assert_refused(case().using(cu_seqlens=[0, 20, 20, 33]), "cu_seqlens")


def test_as_many_documents_of_keys_as_of_queries():
    assert_refused(case().using(cu_seqlens_k=int32([0, 20, 33])), "cu_seqlens_k")


def test_more_queries_than_keys_in_a_document():
    assert_refused(case().using(cu_seqlens_k=int32([0, 13, 13, 33])), "cu_seqlens", "cu_seqlens_k", "q_start")


def test_first_position_of_queries():
    tail = make_case(LENGTHS, lengths_q=[4, 0, 13])
    assert run(tail.using(q_start=int32([3, 0, 0]))).out.isfinite().all()
    for bad in (
        int32([16, 0]),
        int32([[16, 0, 0]]),
        torch.tensor([16, 0, 0]),
        torch.tensor([16.0, 0.0, 0.0]),
        int32([-1, 0, 0]),
        int32([17, 0, 0]),
        int32([2**31 - 1, 0, 0]),
    ):
        assert_refused(tail.using(q_start=bad), "q_start")


# -------------------------------------------------------------------------------------------------------------- blocks


def first_block_of_each() -> torch.Tensor:
    return torch.tensor([0, -1, -1, -1], dtype=torch.int32).repeat(33, 2, 1)


@pytest.mark.parametrize("value", [-2, 3, 1000, 2**31 - 1, -(2**31)])
def test_block_that_is_not_in_the_document(value):
    """The first document has blocks 0 to 2, the last 0 and 1."""
    blocks = first_block_of_each()
    blocks[5, 1, 1] = value
    assert_refused(case().using(blocks=blocks), "blocks")


def test_block_of_another_document():
    blocks = first_block_of_each()
    blocks[5, 0, 1] = 2
    assert run(case().using(blocks=blocks)).out.isfinite().all()
    blocks[25, 0, 1] = 2
    assert_refused(case().using(blocks=blocks), "blocks")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_blocks_of_another_dtype(dtype):
    text = assert_refused(case().using(blocks=torch.zeros(33, 2, 4, dtype=dtype)), "blocks")
    assert "int32" in text


@pytest.mark.parametrize("shape", [(33, 2), (32, 2, 4), (33, 1, 4), (33, 6, 4), (1, 33, 2, 4)])
def test_blocks_of_another_shape(shape):
    assert_refused(case().using(blocks=torch.zeros(shape, dtype=torch.int32)), "blocks")


# ----------------------------------------------------------------------------------------------------- backend, geometry


def test_backends():
    found = available_backends()
    assert isinstance(found, list) and "reference" in found and set(found) <= {"reference", "triton", "cuda"} and len(set(found)) == len(found)
    good = case()
    expected = run(good).out
    assert torch.equal(nsa_attention(*good.inputs, good.config, **good.keywords, backend="reference"), expected)
    if found == ["reference"]:
        assert torch.equal(nsa_attention(*good.inputs, good.config, **good.keywords, backend="auto"), expected)


@pytest.mark.parametrize("name", ["triton", "cuda", "flash", "", "Reference", None])
def test_backend_that_is_not_there(name):
    if name == "triton" and name in available_backends():  # "cuda" computes nsa_decode alone, wherever it is
        pytest.skip(f"{name} is available here")
    text = assert_refused(case().using(backend=name), "backend")
    assert "reference" in text, f"says what would do: {text}"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"compress_block": 5}, ("compress_stride", "compress_block")),
        ({"select_block": 9}, ("compress_stride", "select_block")),
        ({"compress_block": 10}, ("compress_block", "select_block")),
        ({"num_selected": 2}, ("num_selected",)),
        ({"window": 0}, ("window",)),
        ({"window": -3}, ("window",)),
        ({"compress_stride": 0}, ("compress_stride",)),
        ({"num_selected": 0, "num_initial": 0, "num_local": 0}, ("num_selected",)),
        ({"num_initial": -1}, ("num_initial",)),
    ],
    ids=str,
)
def test_geometry_that_cannot_be(changes, names):
    with pytest.raises(ValueError, match="|".join(names)):
        config_of(**changes)


def test_config_of_another_kind():
    good = case()
    with pytest.raises(ValueError, match="config"):
        nsa_attention(*good.inputs, {"window": 4}, **good.keywords)
    assert isinstance(good.config, NSAConfig)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"compress_block": 32.0}, "compress_block=32.0 must be a whole number"),
        ({"window": "512"}, "window=512 must be a whole number"),
        ({"num_local": True}, "num_local=true must be a whole number"),
        ({"compression": "max"}, "compression=max is unknown"),
    ],
)
def test_a_geometry_of_another_type(given: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        NSAConfig(**given)
