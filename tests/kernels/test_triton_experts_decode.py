"""The experts' kernels for a few rows against the float64 loop: memory they do not fill and slots they should not read hold NaN."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from nsa_transformer.kernels import experts
from nsa_transformer.kernels.dispatch import triton_missing

from .test_moe import ROUTINGS, error, loop, make, poisoned_memory, to

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux alone"),
    pytest.mark.skipif(triton_missing() is not None, reason=f"no Triton here: {triton_missing()}"),
]
ON_GPU = torch.cuda.is_available()
SMALL = {"tokens": 7, "hidden": 32, "width": 16}
ORDER = ("x", "indices", "weights", "w13", "w2")


def in_slots(case: dict[str, Tensor], spare: int = 2) -> Tensor:
    """The output with the chosen experts' weights in slots as offloading has it, w13 before w2 in each, in no order, among NaN. Every other one comes
    only when it is waited for, w13 and w2 apart, and its w13 is gone again when w2 is waited for."""
    from nsa_transformer.kernels.triton import experts_decode
    from nsa_transformer.kernels.triton.expert_slots import AT_HAND, COPIED, Slots

    num, lines, hidden = case["w13"].shape
    used = case["indices"].unique().tolist()
    pool = torch.full((len(used) + spare, lines * hidden + hidden * lines // 2), torch.nan, dtype=case["x"].dtype, device=case["x"].device)
    slots = Slots.empty(1, num, len(pool), pool.device).layer(0)
    places = torch.randperm(len(pool), generator=torch.Generator().manual_seed(1))[: len(used)].tolist()
    w13 = pool[:, : lines * hidden].view(-1, lines, hidden)
    w2 = pool[:, lines * hidden :].view(-1, hidden, lines // 2)

    for number, (expert, place) in enumerate(zip(used, places, strict=True)):
        slots.table[expert] = place
        slots.marks[expert] = COPIED if number % 2 else AT_HAND
    w13[places[::2]], w2[places[::2]] = case["w13"][used[::2]], case["w2"][used[::2]]

    def join_up() -> None:
        w13[places[1::2]] = case["w13"][used[1::2]]

    def join_down() -> None:
        w13[places[1::2]], w2[places[1::2]] = torch.nan, case["w2"][used[1::2]]

    return experts_decode.forward(case["x"], case["indices"], case["weights"], w13, w2, slots, (join_up, join_down))


def check(case: dict[str, Tensor]) -> Tensor:
    """Both ways of finding an expert, bit for bit the same, with at most twice the error of the plain loop."""
    from nsa_transformer.kernels.triton import experts_decode

    if ON_GPU:
        case = {name: x.cuda() for name, x in case.items()}
    exact = experts(*(to(case, torch.float64)[name] for name in ORDER), backend="reference")
    plain = experts(*(case[name] for name in ORDER), backend="reference")
    x, indices, weights, w13, w2 = (case[name] for name in ORDER)
    with poisoned_memory():
        found = experts_decode.forward(x, indices, weights, w13, w2)
        moved = in_slots(case) if len(x) else found
    assert found.dtype == plain.dtype and found.shape == exact.shape
    assert error(found, exact) <= 2 * error(plain, exact) + 1e-6
    assert torch.equal(found, moved)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_error_is_at_most_twice_that_of_plain_pytorch(routing: str, dtype: torch.dtype) -> None:
    check(make(routing, dtype, **SMALL))


@pytest.mark.parametrize(
    "shape",
    [{"tokens": 0}, {"tokens": 1}, {"top_k": 1}, {"num": 1, "top_k": 1}, {"top_k": 6}, {"hidden": 40, "width": 24}, {"hidden": 8, "width": 8}, {"tokens": 33}],
    ids=str,
)
def test_shapes(shape: dict[str, int]) -> None:
    check(make(dtype=torch.float16, **SMALL | shape))


def test_more_rows_of_an_expert_than_a_tile() -> None:
    """All tokens visit one expert: 70 rows are a tile of 64 and six."""
    check(make(dtype=torch.float16, **SMALL | {"tokens": 70, "num": 1, "top_k": 1}))


def test_the_definition() -> None:
    from nsa_transformer.kernels.triton import experts_decode

    case = make(dtype=torch.float32, **SMALL)
    exact = loop(*(to(case, torch.float64)[name] for name in ORDER))
    found = experts_decode.forward(*(case[name].cuda() if ON_GPU else case[name] for name in ORDER))
    torch.testing.assert_close(found.cpu().double(), exact, rtol=2e-5, atol=2e-5)


def test_a_token_has_the_same_bits_whoever_is_with_it() -> None:
    from nsa_transformer.kernels.triton import experts_decode

    case = make("one", dtype=torch.float16, **SMALL | {"tokens": 5})
    x, indices, weights, w13, w2 = (case[name].cuda() if ON_GPU else case[name] for name in ORDER)
    together = experts_decode.forward(x, indices, weights, w13, w2)
    alone = torch.cat([experts_decode.forward(x[t : t + 1], indices[t : t + 1], weights[t : t + 1], w13, w2) for t in range(5)])
    assert torch.equal(together, alone)


def test_weights_in_float32_int32_indices_and_odd_views() -> None:
    case = make(dtype=torch.float16, **SMALL)
    case["weights"] = make(dtype=torch.float32, **SMALL)["weights"]
    case["indices"] = case["indices"].int().T.contiguous().T
    case["x"] = torch.cat([case["x"], case["x"]], dim=1)[:, : SMALL["hidden"]]
    case["w13"] = case["w13"].mT.contiguous().mT
    buffer = torch.empty(case["w2"].numel() + 1, dtype=torch.float16)
    buffer[1:] = case["w2"].flatten()
    case["w2"] = buffer[1:].view(case["w2"].shape)
    check(case)


def test_what_is_not_finite_stays_with_its_expert_and_token() -> None:
    from nsa_transformer.kernels.triton import experts_decode

    case = make(dtype=torch.float32, **SMALL | {"hidden": 40, "width": 24, "top_k": 1, "num": 4})
    case["indices"] = torch.tensor([0, 2, 3, 0, 2, 3, 0])[:, None]
    case["w13"][1], case["w2"][1] = torch.nan, torch.nan  # nobody visits it
    case["w2"][2] = torch.inf
    case["x"][3] = torch.nan
    found = experts_decode.forward(*(case[name].cuda() if ON_GPU else case[name] for name in ORDER))
    assert found[[0, 2, 5, 6]].isfinite().all() and not found[[1, 3, 4]].isfinite().any()


def test_the_door_takes_them_without_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa_transformer.kernels.triton import experts_decode

    calls: list[int] = []
    right = experts_decode.forward

    def counted(*inputs: Tensor) -> Tensor:
        calls.append(inputs[1].numel())
        return right(*inputs)

    monkeypatch.setattr(experts_decode, "forward", counted)
    case = make(dtype=torch.float32, **SMALL)
    arguments = [case[name].cuda() if ON_GPU else case[name] for name in ORDER]
    y = experts(*arguments, backend="triton")
    assert calls == [21]
    arguments[3].requires_grad_()
    assert experts(*arguments, backend="triton").requires_grad and calls == [21]
    with torch.no_grad():
        assert torch.equal(experts(*arguments, backend="triton"), y) and calls == [21, 21]
        monkeypatch.setattr(experts_decode, "MAX_ROWS", 20)
        torch.testing.assert_close(experts(*arguments, backend="triton"), y)
    assert calls == [21, 21]


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    "shape",
    [{"tokens": 1}, {"tokens": 9}, {"tokens": 64}, {"tokens": 3, "num": 128, "top_k": 8, "hidden": 2048, "width": 768}, {"tokens": 500, "top_k": 1}],
    ids=str,
)
def test_bf16(routing: str, shape: dict[str, int]) -> None:
    check(make(routing, torch.bfloat16, **{"hidden": 192, "width": 136} | shape))


@pytest.mark.gpu
def test_a_captured_call_follows_its_inputs() -> None:
    from nsa_transformer.kernels.triton import experts_decode

    first, second = (make(dtype=torch.bfloat16, tokens=4, hidden=192, width=136, seed=seed) for seed in (0, 1))
    held = {name: x.cuda() for name, x in first.items()}
    arguments = [held[name] for name in ORDER]
    experts_decode.forward(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = experts_decode.forward(*arguments)
    for name in ORDER:
        held[name].copy_(second[name])
    graph.replay()
    assert torch.equal(y, experts_decode.forward(*(second[name].cuda() for name in ORDER)))
