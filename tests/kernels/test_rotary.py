"""The rotary embedding: the reference against its definition in float64, and the Triton kernel against the reference.

Without a GPU the kernel runs in Triton's interpreter, in float32 and float16: its bfloat16 arithmetic is wrong.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsa_transformer.kernels.dispatch import interpreted
from nsa_transformer.kernels.rotary import rotate

from .cases import assert_close, assert_same_bits
from .judge import poisoned
from .test_triton_gpu import waiting_is_an_error

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux alone")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
EVERY_BACKEND = pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=needs_triton)])
LAYOUTS = ("contiguous", "heads of a projection", "heads before tokens", "every second number", "one row for all heads", "at an odd offset")
SHAPES = [(7, 3, 8), (33, 1, 2), (1, 5, 6), (20, 6, 96), (5, 70, 64), (3, 2, 128), (9, 4, 192), (2, 1, 4100)]


class Case:
    """Heads x, gradients of the result, and cosines and sines that are scaled, as YaRN's are; x and gradients float64, but numbers of the dtype."""

    def __init__(self, tokens: int, heads: int, width: int, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def rand(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.dtype = dtype
        self.x, self.grad = (rand(tokens, heads, width).to(dtype).double() for _ in range(2))
        angle = 100 * rand(tokens, width // 2)
        self.cos, self.sin = ((1.2 * wave).float().to(DEVICE) for wave in (angle.cos(), angle.sin()))

    def definition(self) -> tuple[Tensor, Tensor]:
        """The result and the gradient, each head times a matrix of its own."""
        half = self.cos.shape[1]
        c, s = (wave.cpu().double() for wave in (self.cos, self.sin))
        matrix = torch.zeros(len(c), 2 * half, 2 * half, dtype=torch.float64)
        for pair in range(half):
            matrix[:, pair, pair], matrix[:, half + pair, half + pair] = c[:, pair], c[:, pair]
            matrix[:, pair, half + pair], matrix[:, half + pair, pair] = -s[:, pair], s[:, pair]
        return torch.einsum("tij,thj->thi", matrix, self.x), torch.einsum("tji,thj->thi", matrix, self.grad)

    def run(self, backend: str, dtype: torch.dtype | None = None, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
        dtype = dtype or self.dtype
        x = laid_out(self.x.to(DEVICE, dtype), layout).requires_grad_()
        with poisoned():
            y = rotate(x, self.cos, self.sin, backend=backend)
            assert y.dtype == dtype and y.shape == x.shape and y.is_contiguous()
            (grad,) = torch.autograd.grad(y, x, laid_out(self.grad.to(DEVICE, dtype), layout))
        assert grad.dtype == dtype and grad.shape == x.shape
        return y.detach(), grad


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x in other memory, between numbers that are not finite."""

    def room(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)

    tokens, heads, width = x.shape
    views = {
        "contiguous": lambda: room(*x.shape),
        "heads of a projection": lambda: room(tokens, 3 * heads, width)[:, heads : 2 * heads],
        "heads before tokens": lambda: room(heads, tokens, width).transpose(0, 1),
        "every second number": lambda: room(tokens, heads, 2 * width)[..., ::2],
        "at an odd offset": lambda: room(x.numel() + 1)[1:].view(x.shape),
    }
    return views[layout]().copy_(x)


def check(case: Case, layout: str = "contiguous") -> None:
    """Output and gradient of the kernel: error at most twice the reference's in the same dtype, or a rounding of float32 of the largest number."""
    exact = case.run("reference", torch.float64)
    plain = case.run("reference", layout=layout)
    found = case.run("triton", layout=layout)
    for name, x, y, wanted in zip(("out", "grad"), found, plain, exact, strict=True):
        if wanted.numel():
            error, other = (x.double() - wanted).abs(), (y.double() - wanted).abs()
            floor = torch.finfo(torch.float32).eps * wanted.abs().max()
            assert error.max() <= 2 * other.max() + floor, f"{name}: largest error {error.max():.3g}, plain PyTorch {other.max():.3g}"
            assert error.square().mean().sqrt() <= 2 * other.square().mean().sqrt() + floor, name


# ----------------------------------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("shape", [(7, 3, 8), (1, 1, 2), (4, 2, 18)], ids=str)
def test_reference_is_its_definition(shape: tuple[int, int, int]) -> None:
    case = Case(*shape, torch.float64)
    for name, found, wanted in zip(("out", "grad"), case.run("reference"), case.definition(), strict=True):
        assert_close(name, found.cpu(), wanted, 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_reference_rounds_once(dtype: torch.dtype) -> None:
    case = Case(50, 3, 16, dtype)
    for name, found, wanted in zip(("out", "grad"), case.run("reference"), case.definition(), strict=True):
        error = (found.cpu().double() - wanted).abs()
        # Half a unit of the last place of the result, and float32's roundings before it, whose size is that of the terms.
        allowed = torch.finfo(dtype).eps / 2 * wanted.abs() + 2 * torch.finfo(torch.float32).eps * wanted.abs().max()
        assert (error <= allowed).all(), name


@EVERY_BACKEND
@pytest.mark.parametrize("shape", [(0, 3, 8), (4, 0, 8), (4, 2, 0)], ids=str)
def test_nothing_gives_nothing(shape: tuple[int, int, int], backend: str) -> None:
    y, grad = Case(*shape, torch.float32).run(backend)
    assert y.shape == grad.shape == shape


@EVERY_BACKEND
def test_gradients_of_gradients(backend: str) -> None:
    """The gradient is linear in the gradient that came in, and so is its gradient the result."""
    case = Case(5, 2, 8, torch.float32)
    x, grad = (given.to(DEVICE, torch.float32).requires_grad_() for given in (case.x, case.grad))
    (first,) = torch.autograd.grad(rotate(x, case.cos, case.sin, backend=backend), x, grad, create_graph=True)
    (second,) = torch.autograd.grad(first, grad, case.x.to(DEVICE, torch.float32))
    assert_close("second", second, case.run("reference", torch.float64)[0], 1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="these tensors are on the CPU")
def test_auto_on_the_cpu_is_the_reference() -> None:
    case = Case(30, 3, 64, torch.float32)
    for name, x, y in zip(("out", "grad"), case.run("auto"), case.run("reference"), strict=True):
        assert_same_bits(name, x, y)
    assert "rotate" not in rotate(case.x.float().requires_grad_(), case.cos, case.sin).grad_fn.name()


# -------------------------------------------------------------------------------------------------------------- the kernel


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(Case(*shape, dtype))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    case = Case(11, 6, 64, dtype)
    if layout == "one row for all heads":
        x, grad = (given[:, :1].to(DEVICE, dtype).expand(-1, 6, -1) for given in (case.x, case.grad))
        leaf = x.detach().requires_grad_()
        y = rotate(leaf, case.cos, case.sin, backend="triton")
        found = y.detach(), *torch.autograd.grad(y, leaf, grad)
        case.x, case.grad = x.cpu().double(), grad.cpu().double()
    else:
        check(case, layout)
        found = case.run("triton", layout=layout)
    for name, x, y in zip(("out", "grad"), found, case.run("triton"), strict=True):
        assert_same_bits(name, x, y)


@needs_triton
def test_cosines_that_are_a_view() -> None:
    case = Case(9, 3, 64, torch.float32)
    plain = case.run("triton")
    both = torch.stack([case.cos, case.sin], -1)
    case.cos, case.sin = both.unbind(-1)
    for name, x, y in zip(("out", "grad"), case.run("triton"), plain, strict=True):
        assert_same_bits(name, x, y)


@needs_triton
@pytest.mark.parametrize("tile", [64, 256, 1 << 16])
def test_tiles_of_any_size_give_the_same(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of which no tile holds a token's heads evenly."""
    from nsa_transformer.kernels.triton import rotary

    case = Case(23, 5, 96, torch.float32)
    plain = case.run("triton")
    monkeypatch.setattr(rotary, "TILE", tile)
    for name, x, y in zip(("out", "grad"), case.run("triton"), plain, strict=True):
        assert_same_bits(name, x, y)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="the file is memory of the CPU")
@pytest.mark.parametrize("far", ["tokens", "heads"])
def test_offsets_past_32_bits(far: str, tmp_path: Path) -> None:
    """Rows 2 GiB apart, in a file that is almost all hole: the stride fits 32 bits, the third row's offset does not."""
    apart = (1 << 30) + 8
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=2 * apart + 8, dtype=torch.float16)
    view = memory.as_strided((3, 1, 8) if far == "tokens" else (1, 3, 8), (apart, apart, 1))
    case = Case(*view.shape, torch.float16)
    view.copy_(case.x)
    assert_same_bits("out", rotate(view, case.cos, case.sin, backend="triton"), case.run("triton")[0])


@needs_triton
def test_the_backward_keeps_no_more_than_cosines_and_sines() -> None:
    case, kept = Case(9, 3, 64, torch.float32), []
    x = case.x.to(DEVICE, torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.data_ptr()) or saved, lambda saved: saved):
        rotate(x, case.cos, case.sin, backend="triton")
    assert kept == [case.cos.data_ptr(), case.sin.data_ptr()]


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="opcheck's tensors are on the CPU")
@pytest.mark.parametrize("layout", ["contiguous", "heads before tokens", "every second number"])
def test_the_operator_follows_torch_rules(layout: str) -> None:
    case = Case(9, 3, 8, torch.float32)
    for transposed in (False, True):
        x = laid_out(case.x.float(), layout).requires_grad_()
        found = torch.library.opcheck(torch.ops.nsa_transformer.rotate.default, (x, case.cos, case.sin, transposed))
        assert set(found.values()) == {"SUCCESS"}


@EVERY_BACKEND
def test_one_graph_under_torch_compile(backend: str) -> None:
    case = Case(13, 3, 64, torch.float32)
    x, grad = case.x.to(DEVICE, torch.float32).requires_grad_(), case.grad.to(DEVICE, torch.float32)
    y = torch.compile(rotate, fullgraph=True, backend="aot_eager")(x, case.cos, case.sin, backend=backend)
    for name, found, plain in zip(("out", "grad"), (y.detach(), *torch.autograd.grad(y, x, grad)), case.run(backend), strict=True):
        assert_same_bits(name, found, plain)


@needs_triton
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_shapes(data: st.DataObject) -> None:
    tokens, heads, half = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70))
    layout = data.draw(st.sampled_from([name for name in LAYOUTS if name != "one row for all heads"]))
    check(Case(tokens, heads, 2 * half, data.draw(st.sampled_from([torch.float32, HALF])), data.draw(st.integers(0, 1000))), layout)


# --------------------------------------------------------------------------------------------------------------- bad input


def arguments(**changes: Any) -> dict[str, Any]:
    angle = torch.zeros(20, 4)
    return {"x": torch.zeros(20, 2, 8), "cos": angle, "sin": angle, **changes}


BAD = [
    ({"x": torch.zeros(20, 16)}, r"x is of shape \[20, 16\]; give \[T, heads, D\]"),
    ({"x": torch.zeros(20, 2, 7)}, r"x is of shape \[20, 2, 7\]; give \[T, heads, D\] with an even D"),
    ({"x": [1.0]}, "x is list"),
    ({"x": torch.zeros(20, 2, 8, dtype=torch.int32)}, "x has dtype torch.int32"),
    ({"cos": torch.zeros(19, 4)}, r"cos is torch.float32 \[19, 4\] on cpu; x asks for torch.float32 \[20, 4\] on cpu"),
    ({"cos": torch.zeros(20, 8)}, r"cos is torch.float32 \[20, 8\]"),
    ({"cos": torch.zeros(1, 4)}, r"cos is torch.float32 \[1, 4\]"),
    ({"sin": torch.zeros(20, 1, 4)}, r"sin is torch.float32 \[20, 1, 4\]"),
    ({"sin": torch.zeros(20, 4).double()}, "sin is torch.float64"),
    ({"sin": torch.zeros(20, 4, device="meta")}, "sin is torch.float32 .* on meta"),
    ({"sin": None}, "sin is NoneType"),
    ({"cos": torch.zeros(20, 4, requires_grad=True)}, r"cos requires a gradient, and gets none here; give cos.detach\(\)"),
    ({"sin": torch.zeros(20, 4, requires_grad=True)}, r"sin requires a gradient, and gets none here; give sin.detach\(\)"),
    ({"backend": "cuda"}, "backend='cuda'"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rotate(**arguments(**changes))


@needs_triton
def test_what_the_kernel_does_not_take() -> None:
    wide = Case(5, 2, 8, torch.float64)
    with pytest.raises(ValueError, match=r"x has dtype torch.float64, .*; write backend='auto' or 'reference'"):
        wide.run("triton")
    for name, x, y in zip(("out", "grad"), wide.run("auto"), wide.run("reference"), strict=True):
        assert_same_bits(name, x, y)
    if interpreted():
        with pytest.raises(ValueError, match=r"x has dtype torch.bfloat16, which Triton's interpreter"):
            Case(5, 2, 8, torch.bfloat16).run("triton")


# ---------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(4096, 16, 128), (1000, 3, 192), (70000, 1, 64)], ids=str)
def test_shapes_of_models(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    check(Case(*shape, dtype), "heads of a projection")


@pytest.mark.gpu
def test_auto_on_a_gpu_is_the_kernel_and_the_reference_where_torch_compiles() -> None:
    case = Case(300, 4, 128, torch.bfloat16)
    x = case.x.to(DEVICE, torch.bfloat16).requires_grad_()
    assert "rotate" in rotate(x, case.cos, case.sin).grad_fn.name()
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    y = torch.compile(rotate, fullgraph=True, backend=keep)(x, case.cos, case.sin)
    assert seen and not any("nsa_transformer" in name for name in seen)
    assert_same_bits("compiled", y.detach(), case.run("reference")[0])


@pytest.mark.gpu
def test_two_runs_are_the_same_bits_and_nothing_waits() -> None:
    case = Case(3000, 5, 128, torch.bfloat16)
    x, grad = (given.to(DEVICE, torch.bfloat16).requires_grad_() for given in (case.x, case.grad))
    expected = case.run("triton")
    with waiting_is_an_error():
        y = rotate(x, case.cos, case.sin)
        (found,) = torch.autograd.grad(y, x, grad)
    assert_same_bits("out", y.detach(), expected[0])
    assert_same_bits("grad", found, expected[1])


@pytest.mark.gpu
def test_a_captured_call_follows_its_inputs() -> None:
    first, second = (Case(300, 4, 128, torch.bfloat16, seed) for seed in (0, 1))
    x, cos, sin = first.x.to(DEVICE, torch.bfloat16), first.cos.clone(), first.sin.clone()
    rotate(x, cos, sin)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rotate(x, cos, sin)
    for case in (first, second):
        for held, new in ((x, case.x), (cos, case.cos), (sin, case.sin)):
            held.copy_(new)
        y.fill_(torch.nan)
        graph.replay()
        assert_same_bits("out", y, case.run("triton")[0])


@pytest.mark.gpu
def test_more_than_32_bits_count() -> None:
    """A result of 4 GiB and more; x is a few rows, read again and again."""
    tokens, heads, width = (1 << 21) + 3, 8, 128
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free GPU memory")
    case = Case(1, heads, width, torch.bfloat16)
    x = case.x.to(DEVICE, torch.bfloat16).expand(tokens, -1, -1)
    cos, sin = torch.empty(2, tokens, width // 2, device=DEVICE)
    angle = torch.arange(tokens, device=DEVICE)[:, None] * torch.linspace(0.01, 1.0, width // 2, device=DEVICE)
    torch.cos(angle, out=cos)
    torch.sin(angle, out=sin)
    y = rotate(x, cos, sin, backend="triton")
    assert y.numel() > 1 << 31
    for part in (slice(0, 3), slice(tokens // 2, tokens // 2 + 3), slice(tokens - 3, tokens)):
        assert_close("part", y[part], rotate(x[part], cos[part], sin[part], backend="reference"), 1e-2)
