"""φ: the reference against loops in float64, and the Triton kernels against the reference, error at most twice its own in the same dtype.

Without a GPU the kernels run in Triton's interpreter, in float32 and float16: its bfloat16 arithmetic is wrong.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsa_transformer import NSAConfig
from nsa_transformer.kernels import CompressionWeights, compress_blocks
from nsa_transformer.kernels.compress import block_rows

from .cases import assert_close, assert_same_bits, bounds

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux alone")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
NAMES = ("k_cmp", "v_cmp", "grad k", "grad v", *(f"grad {name} of {of}" for of in "kv" for name in CompressionWeights._fields))
KINDS = pytest.mark.parametrize("kind", ["mean", "mlp"])
GEOMETRIES = {"l = 2d": (8, 4), "l = d": (4, 4), "l = 4d": (16, 4), "the paper's": (32, 16)}
PACKS = [[41], [1], [3], [0, 9, 0, 0, 66, 7], [4] * 9, [3, 64, 2], [8, 8], [0, 0]]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that a kernel leaves unwritten holds NaN."""
    deterministic, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS asks for a setting of its own otherwise
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def config_of(geometry: tuple[int, int], kind: str) -> NSAConfig:
    block, stride = geometry
    return NSAConfig(block, stride, max(block, 8), 4, 1, 2, 16, kind)  # type: ignore[arg-type]


def num_blocks(lengths: list[int], config: NSAConfig) -> int:
    return sum(max(0, (length - config.compress_block) // config.compress_stride + 1) for length in lengths)


class Case:
    """Keys and values as a model gives them, a third of a projection's rows; weights of an MLP for `mlp`; gradients of what comes out."""

    def __init__(
        self, lengths: list[int], geometry: tuple[int, int] = (8, 4), kind: str = "mlp", *, heads: int = 2, dk: int = 64, dv: int = 64, padding: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(len(lengths) + dk)

        def rand(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.lengths, self.config, self.cu = lengths, config_of(geometry, kind), bounds(lengths, padding).to(DEVICE)
        tokens, block = sum(lengths), geometry[0]
        self.leaves = [rand(tokens, heads, width) for width in (dk, dv)]
        self.used = num_blocks(lengths, self.config)
        self.grads = [rand(self.used, heads, width) for width in (dk, dv)]
        if kind == "mlp":
            for width in (dk, dv):
                self.leaves += [rand(block, width), rand(width, block * width) * (block * width) ** -0.5, rand(width, width) * width**-0.5]

    def run(self, backend: str, dtype: torch.dtype, strided: bool = True, **keywords: Any) -> list[Tensor]:
        """Both outputs without the rows past the blocks, and all gradients."""
        leaves = [x.to(DEVICE, dtype) for x in self.leaves]
        if strided:
            leaves[:2] = (torch.stack([x + 1, x, x - 1], 1)[:, 1] for x in leaves[:2])
        leaves = [x.detach().requires_grad_() for x in leaves]
        weights = (CompressionWeights(*leaves[2:5]), CompressionWeights(*leaves[5:8])) if len(leaves) > 2 else None
        outs = compress_blocks(*leaves[:2], self.config, **{"weights": weights, "cu_seqlens": self.cu, **keywords}, backend=backend)
        for out, x in zip(outs, leaves, strict=False):
            assert out.shape == (len(x) // self.config.compress_stride, *x.shape[1:]) and out.dtype == dtype
            assert out.isfinite().all(), "rows past the documents' blocks, too"
        padded = [torch.zeros_like(out) for out in outs]
        for full, grad in zip(padded, self.grads, strict=True):
            full[: self.used] = grad.to(dtype)
        return [*(out[: self.used].detach() for out in outs), *torch.autograd.grad(outs, leaves, padded)]


def check(case: Case, dtype: torch.dtype = torch.float32) -> None:
    exact, plain, found = case.run("reference", torch.float64), case.run("reference", dtype), case.run("triton", dtype)
    # The reference is exact or nearly so where a sum has one term; then roundings of the largest number are allowed.
    rounding = 4 * torch.finfo(dtype).eps
    for name, x, y, wanted in zip(NAMES, found, plain, exact, strict=False):
        assert x.dtype == dtype and x.shape == wanted.shape, name
        if wanted.numel():
            error, other = (x.double() - wanted).abs(), (y.double() - wanted).abs()
            floor = rounding * wanted.abs().max()
            assert error.max() <= 2 * other.max() + floor, f"{name}: largest error {error.max():.3g}, plain PyTorch {other.max():.3g}"
            assert error.square().mean().sqrt() <= 2 * other.square().mean().sqrt() + floor / 4, name


# ----------------------------------------------------------------------------------------------------------- the reference


@KINDS
@pytest.mark.parametrize("geometry", [*GEOMETRIES.values(), (9, 3), (3, 1)], ids=str)
def test_reference_is_its_definition(kind: str, geometry: tuple[int, int]) -> None:
    case = Case([19, 0, 3, 40, geometry[0]], geometry, kind, dk=6, dv=4)
    found = case.run("reference", torch.float64)
    block, stride = geometry
    for out, x, weights in zip(found[:2], case.leaves[:2], (case.leaves[2:5], case.leaves[5:8]), strict=True):
        wanted, start = [], 0
        for length in case.lengths:
            for first in range(start, start + length - block + 1, stride):
                for head in range(x.shape[1]):
                    tokens = x[first : first + block, head]
                    if kind == "mean":
                        wanted.append(tokens.sum(0) / block)
                    else:
                        position, up, down = weights
                        hidden = up @ (tokens + position).reshape(-1)
                        wanted.append(down @ (hidden * hidden.sigmoid()))
            start += length
        assert_close("blocks", out.cpu(), torch.stack(wanted).view(-1, *x.shape[1:]), 1e-12)


@KINDS
def test_rows_given_are_rows_found(kind: str) -> None:
    case = Case([19, 0, 30], kind=kind)
    rows, _ = block_rows(case.cu, 49, case.config)
    for x, y in zip(case.run("reference", torch.float32), case.run("reference", torch.float32, rows=rows), strict=True):
        assert_same_bits("rows", x, y)


def test_without_boundaries_there_is_one_document() -> None:
    case = Case([33], kind="mean")
    for x, y in zip(case.run("reference", torch.float32), case.run("reference", torch.float32, cu_seqlens=None), strict=True):
        assert_same_bits("one document", x, y)


# ------------------------------------------------------------------------------------------------------------- the kernels


@needs_triton
@KINDS
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(kind: str, geometry: tuple[int, int]) -> None:
    check(Case([37, 90, 15], geometry, kind))


@needs_triton
@KINDS
@pytest.mark.parametrize("lengths", PACKS, ids=str)
def test_documents(kind: str, lengths: list[int]) -> None:
    check(Case(lengths, kind=kind, heads=1, padding=2))


@needs_triton
@KINDS
@pytest.mark.parametrize(("heads", "dk", "dv"), [(1, 128, 64), (3, 192, 128), (5, 64, 256)], ids=str)
def test_heads_and_widths(kind: str, heads: int, dk: int, dv: int) -> None:
    check(Case([29, 12], kind=kind, heads=heads, dk=dk, dv=dv))


@needs_triton
@KINDS
def test_half_precision(kind: str) -> None:
    check(Case([150, 33], (16, 8), kind), HALF)


@needs_triton
@KINDS
def test_tiles_of_a_few_lines_give_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_transformer.kernels.triton import compress, compress_mlp

    case = Case([29, 12], kind=kind, heads=3)
    whole = case.run("triton", torch.float32)
    monkeypatch.setattr(compress, "TILE", 256)
    monkeypatch.setattr(compress_mlp, "TILE", 256)
    for name, x, y in zip(NAMES, case.run("triton", torch.float32), whole, strict=False):
        assert_close(name, x, y, 1e-5)


@needs_triton
@KINDS
def test_memory_layout_does_not_matter(kind: str) -> None:
    case = Case([29, 12], kind=kind)
    for name, x, y in zip(NAMES, case.run("triton", torch.float32), case.run("triton", torch.float32, strided=False), strict=False):
        assert_same_bits(name, x, y)


@needs_triton
@KINDS
def test_a_loss_that_knows_one_of_the_two_alone(kind: str) -> None:
    case = Case([29, 12], kind=kind)
    both = case.run("triton", torch.float32)[2:]
    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in case.leaves]
    weights = (CompressionWeights(*leaves[2:5]), CompressionWeights(*leaves[5:8])) if kind == "mlp" else None
    outs = compress_blocks(*leaves[:2], case.config, weights=weights, cu_seqlens=case.cu, backend="triton")
    for i in range(2):
        grads = torch.autograd.grad(outs[i][: case.used], leaves, case.grads[i].to(DEVICE, torch.float32), retain_graph=True, materialize_grads=True)
        own = (i, *range(2 + 3 * i, 5 + 3 * i)) if kind == "mlp" else (i,)
        for at, (name, x, y) in enumerate(zip(NAMES[2:], grads, both, strict=False)):
            if at in own:
                assert_same_bits(name, x, y)
            else:
                assert not x.any(), name


@needs_triton
@KINDS
@pytest.mark.parametrize("token", [0, 7, 13, 20, 21, 35])
def test_a_token_changes_the_blocks_that_hold_it(kind: str, token: int) -> None:
    case = Case([21, 15], kind=kind)
    before = case.run("triton", torch.float32)[:2]
    for x in case.leaves[:2]:
        x[token] += 1
    after = case.run("triton", torch.float32)[:2]
    first, place = (0, token) if token < 21 else (4, token - 21)  # the first document has four blocks, the second two
    holding = [first + i for i in range(4 if first == 0 else 2) if 4 * i <= place < 4 * i + 8]
    for x, y in zip(before, after, strict=True):
        assert (x != y).flatten(1).any(1).nonzero().flatten().tolist() == holding


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="opcheck's tensors are on the CPU")
def test_operators_follow_torch_rules(poisoned: None) -> None:
    torch.use_deterministic_algorithms(False)
    ops = torch.ops.nsa_transformer
    both = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    forward = ("test_schema", "test_faketensor")
    case = Case([21, 6])
    k, v, position_k, _, _, position_v, _, _ = (x.float() for x in case.leaves)
    leaves = [x.requires_grad_() for x in (k, v, position_k, position_v)]
    torch.library.opcheck(ops.compress_mean.default, (*leaves[:2], case.cu, 8, 4), test_utils=both)
    torch.library.opcheck(ops.compress_split.default, (*leaves, case.cu, 8, 4), test_utils=both)
    mean_k, mean_v, plan = ops.compress_mean(k.detach(), v.detach(), case.cu, 8, 4)
    torch.library.opcheck(ops.compress_mean_backward.default, (mean_k, mean_v, plan, 27, 8, 4), test_utils=forward)
    chunks = ops.compress_split(*(x.detach() for x in leaves), case.cu, 8, 4)[:2]
    torch.library.opcheck(ops.compress_split_backward.default, (*chunks, plan, 27, 2, 8, 4, torch.float32, torch.float32), test_utils=forward)
    shares = [torch.randn(len(x), 2 * 64, requires_grad=True) for x in chunks]
    torch.library.opcheck(ops.compress_combine.default, (*shares, plan, 6, 2, 2), test_utils=both)
    outs = ops.compress_combine(*(x.detach() for x in shares), plan, 6, 2, 2)
    torch.library.opcheck(ops.compress_combine_backward.default, (*outs, plan, 2), test_utils=forward)


@needs_triton
@KINDS
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_one_graph_under_torch_compile(kind: str, backend: str) -> None:
    case = Case([29, 12], kind=kind)
    plain = case.run(backend, torch.float32)
    leaves = [x.to(DEVICE, torch.float32).requires_grad_() for x in case.leaves]

    def call(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        weights = (CompressionWeights(*leaves[2:5]), CompressionWeights(*leaves[5:8])) if len(leaves) > 2 else None
        return compress_blocks(*leaves[:2], case.config, weights=weights, cu_seqlens=case.cu, backend=backend)

    outs = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    grads = torch.autograd.grad([x[: case.used] for x in outs], leaves, [g.to(DEVICE, torch.float32) for g in case.grads])
    for name, x, y in zip(NAMES, (*(x[: case.used].detach() for x in outs), *grads), plain, strict=False):
        assert_close(name, x, y, 1e-5)


@needs_triton
@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_random_packs(data: st.DataObject) -> None:
    stride = data.draw(st.sampled_from([4, 8]))
    geometry = (stride * data.draw(st.sampled_from([1, 2, 4])), stride)
    lengths = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=5))
    check(Case(lengths, geometry, data.draw(st.sampled_from(["mean", "mlp"])), heads=data.draw(st.integers(1, 3)), padding=data.draw(st.integers(0, 2))))


# --------------------------------------------------------------------------------------------------------------- bad input


def arguments(**changes: Any) -> dict[str, Any]:
    x = torch.zeros(20, 2, 8)
    return {"k": x, "v": x, "config": config_of((8, 4), "mean"), **changes}


MLP = CompressionWeights(torch.zeros(8, 8), torch.zeros(8, 64), torch.zeros(8, 8))
BAD = [
    ({"k": torch.zeros(20, 16)}, r"k has shape \[20, 16\]"),
    ({"v": torch.zeros(19, 2, 8)}, r"v is torch.float32 \[19, 2, 8\]"),
    ({"v": torch.zeros(20, 2, 8).double()}, "v is torch.float64"),
    ({"config": 3}, "config is int"),
    ({"weights": (MLP, MLP)}, "compression='mean' takes None"),
    ({"config": config_of((8, 4), "mlp")}, "compression='mlp' takes CompressionWeights"),
    ({"config": config_of((8, 4), "mlp"), "weights": (MLP, MLP._replace(down=torch.zeros(8, 9)))}, "weights for v have shapes"),
    ({"cu_seqlens": torch.tensor([0, 20])}, "cu_seqlens is torch.int64"),
    ({"cu_seqlens": bounds([19])}, "cu_seqlens is 0 … 19; it must rise from 0 to 20"),
    ({"cu_seqlens": bounds([25, -5])}, "without decreasing"),
    ({"backend": "cuda"}, "backend='cuda'"),
    ({"backend": "triton", "k": torch.zeros(20, 2, 48), "v": torch.zeros(20, 2, 48)}, "64, 128, 192, 256"),
    ({"backend": "triton", "k": torch.zeros(20, 2, 64).double(), "v": torch.zeros(20, 2, 64).double()}, "k has dtype torch.float64"),
    ({"backend": "triton", "k": torch.zeros(20, 2, 64), "v": torch.zeros(20, 2, 64), "cu_seqlens": bounds([19])}, "it must rise from 0 to 20"),
]


@pytest.mark.skipif(DEVICE == "cuda", reason="these tensors are on the CPU")
@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input(changes: dict[str, Any], words: str) -> None:
    if changes.get("backend") == "triton" and importlib.util.find_spec("triton") is None:
        words = "triton is not installed"
    given = arguments(**changes)
    with pytest.raises(ValueError, match=words):
        compress_blocks(given.pop("k"), given.pop("v"), given.pop("config"), **given)
