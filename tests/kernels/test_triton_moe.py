"""The Triton experts against loops in float64, as `test_moe.py` has them: in the interpreter without a GPU, in bf16 too on one."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from nsa_transformer.kernels import experts
from nsa_transformer.kernels.dispatch import triton_missing

from .test_moe import NAMES, ROUTINGS, answer, error, loop, make, poisoned_memory, to

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux alone"),
    pytest.mark.skipif(triton_missing() is not None, reason=f"no Triton here: {triton_missing()}"),
]
ON_GPU = torch.cuda.is_available()
SMALL = {"tokens": 45, "hidden": 32, "width": 16}


def check(case: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Error of output and every gradient at most twice that of plain autograd through the loop, both against float64."""
    if ON_GPU:
        case = {name: x.cuda() for name, x in case.items()}
    exact = answer(to(case, torch.float64), experts, backend="reference")
    plain = answer(case, experts, backend="reference")
    with poisoned_memory():
        found = answer(case, experts, backend="triton")
    for name, value in exact.items():
        assert found[name].dtype == plain[name].dtype and found[name].shape == value.shape
        assert error(found[name], value) <= 2 * error(plain[name], value) + 1e-6, name
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_error_is_at_most_twice_that_of_plain_pytorch(routing: str, dtype: torch.dtype) -> None:
    found = check(make(routing, dtype, **SMALL))
    if routing == "empty":
        assert not found["grad of w13"][[0, 3, -1]].any() and not found["grad of w2"][[0, 3, -1]].any()


@pytest.mark.parametrize(
    "shape",
    [{"tokens": 0}, {"tokens": 1}, {"top_k": 1}, {"num": 1, "top_k": 1}, {"top_k": 6}, {"hidden": 40, "width": 24}, {"hidden": 8, "width": 8}],
    ids=str,
)
def test_shapes(shape: dict[str, int]) -> None:
    check(make(dtype=torch.float16, **SMALL | shape))


def test_the_definition() -> None:
    case = make(dtype=torch.float32, **SMALL)
    exact = answer(to(case, torch.float64), loop)
    found = answer({name: x.cuda() for name, x in case.items()} if ON_GPU else case, experts, backend="triton")
    for name, value in exact.items():
        torch.testing.assert_close(found[name].cpu().double(), value, rtol=2e-5, atol=2e-5)


def test_weights_in_float32_and_strided_inputs() -> None:
    case = make(dtype=torch.float16, **SMALL)
    case["weights"] = make(dtype=torch.float32, **SMALL)["weights"]
    case["w13"] = case["w13"].mT.contiguous().mT
    case["x"] = torch.cat([case["x"], case["x"]], dim=1)[:, : SMALL["hidden"]]
    case["indices"] = case["indices"].int()
    assert check(case)["grad of weights"].dtype == torch.float32


def test_views_at_odd_offsets() -> None:
    """Parts of a flat buffer need not begin at multiples of 16 bytes."""
    case = make(dtype=torch.float16, **SMALL)
    for name in ("x", "w13", "w2", "grad"):
        buffer = torch.empty(case[name].numel() + 1, dtype=torch.float16)
        buffer[1:] = case[name].flatten()
        case[name] = buffer[1:].view(case[name].shape)
    check(case)


def test_what_is_not_finite_stays_with_its_expert() -> None:
    """Tiles reach into the next expert's rows and, where a width is no multiple of theirs, into its matrix."""
    case = make(dtype=torch.float32, **SMALL | {"hidden": 40, "width": 24, "top_k": 1, "num": 4})
    case["indices"] = torch.tensor([0, 2, 3]).repeat(15)[:, None].sort(0).values
    case["w13"][1], case["w2"][1] = torch.nan, torch.nan  # nobody visits it
    case["grad"][20] = torch.inf  # of expert 2
    found = answer({name: x.cuda() for name, x in case.items()} if ON_GPU else case, experts, backend="triton")
    for expert in (0, 1, 3):
        assert found["grad of w13"][expert].isfinite().all() and found["grad of w2"][expert].isfinite().all(), expert
    others = torch.arange(45) != 20
    assert found["out"].isfinite().all() and found["grad of x"][others].isfinite().all() and found["grad of weights"][others].isfinite().all()
    assert not found["grad of w13"][2].isfinite().all()


def test_two_runs_are_the_same_bits() -> None:
    case = make(dtype=torch.float16, **SMALL)
    case = {name: x.cuda() for name, x in case.items()} if ON_GPU else case
    for (name, a), b in zip(answer(case, experts, backend="triton").items(), answer(case, experts, backend="triton").values(), strict=True):
        assert torch.equal(a, b), name


def test_nothing_is_kept_without_gradients() -> None:
    case = make(dtype=torch.float32, **SMALL)
    x, indices, weights, w13, w2 = (case[name].cuda() if ON_GPU else case[name] for name in ("x", "indices", "weights", "w13", "w2"))
    y, hidden, *_ = torch.ops.nsa_transformer.experts_triton(x, indices, weights, w13, w2, False)
    _, kept, *_ = torch.ops.nsa_transformer.experts_triton(x, indices, weights, w13, w2, True)
    assert hidden.numel() == 0 and kept.shape == (indices.numel(), w13.shape[1])
    assert torch.equal(y, experts(x, indices, weights, w13, w2, backend="triton"))


@pytest.mark.parametrize("cut", [1, 4, 6])
def test_experts_in_parts_are_the_same_bits(cut: int) -> None:
    """Each part is overwritten as soon as the next one is asked for, as a buffer for streaming is."""
    from nsa_transformer.kernels.triton import experts as kernels

    case = make("empty", torch.float16, **SMALL)
    x, indices, weights, w13, w2 = (case[name].cuda() if ON_GPU else case[name] for name in ("x", "indices", "weights", "w13", "w2"))

    def parts():
        for first in range(0, 6, cut):
            part = w13[first : first + cut].clone(), w2[first : first + cut].clone()
            yield first, *part
            for tensor in part:
                tensor.fill_(torch.nan)

    whole, *_ = kernels.forward(x, indices, weights, w13, w2, False)
    with poisoned_memory():
        found, *_ = kernels.forward_in_parts(x, indices, weights, 6, SMALL["width"], parts())
    assert torch.equal(found, whole)


def test_the_operator_is_well_formed() -> None:
    case = make(dtype=torch.float32, **SMALL | {"tokens": 9})
    inputs = tuple(case[name].requires_grad_(name in NAMES) for name in ("x", "indices", "weights", "w13", "w2"))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    found = torch.library.opcheck(torch.ops.nsa_transformer.experts_triton, (*(x.cuda() if ON_GPU else x for x in inputs), True), test_utils=checks)
    assert set(found.values()) == {"SUCCESS"}


def test_what_the_kernels_do_not_take() -> None:
    case = make(dtype=torch.float32, **SMALL | {"width": 6})
    arguments = [case[name].cuda() if ON_GPU else case[name] for name in ("x", "indices", "weights", "w13", "w2")]
    with pytest.raises(ValueError, match="expert width 6 are not both multiples of 4"):
        experts(*arguments, backend="triton")
    wide = [x.double() if x.is_floating_point() else x for x in arguments]
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64"):
        experts(*wide, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", [{}, {"tokens": 5000}, {"tokens": 3, "num": 64, "top_k": 6}], ids=str)
def test_bf16(routing: str, shape: dict[str, int]) -> None:
    check(make(routing, torch.bfloat16, **{"tokens": 700, "hidden": 192, "width": 136} | shape))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "width", "chosen"),
    [(torch.bfloat16, 16, "triton"), (torch.float16, 16, "triton"), (torch.bfloat16, 12, "torch"), (torch.float32, 16, "torch")],
    ids=str,
)
def test_what_auto_picks(dtype: torch.dtype, width: int, chosen: str) -> None:
    case = {name: x.cuda() for name, x in make(dtype=dtype, **SMALL | {"width": width}).items()}
    for name, value in answer(case, experts).items():
        assert torch.equal(value, answer(case, experts, backend=chosen)[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("rows_per_expert", [2, 40, 200, 1100])
def test_every_choice_of_tiles(rows_per_expert: int) -> None:
    check(make("random", torch.bfloat16, tokens=rows_per_expert * 2, hidden=264, width=200, num=4, top_k=2))
