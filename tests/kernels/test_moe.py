"""`experts` against loops: its own reference backend, and one in float64 written here without either."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from nsa_transformer.kernels import experts

NAMES = ("x", "weights", "w13", "w2")
EXPERT_BACKENDS = ("reference", "torch")  # those that take float64 on any machine; the kernels have test_triton_moe.py
T, H, I, E, K = 33, 12, 5, 6, 3  # noqa: E741


def make(
    routing: str = "random",
    dtype: torch.dtype = torch.float64,
    *,
    tokens: int = T,
    hidden: int = H,
    width: int = I,
    num: int = E,
    top_k: int = K,
    seed: int = 0,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scores = rand(tokens, num)
    if routing == "empty":  # experts 0, 3 and the last are visited by nobody
        scores[:, [0, 3, num - 1]] = -1e9
    if routing == "one":  # expert 2 by everybody
        scores[:, 2] = 1e9
    return {
        "x": rand(tokens, hidden).to(dtype),
        "indices": scores.topk(top_k, dim=-1).indices,
        "weights": rand(tokens, top_k).sigmoid().to(dtype),
        "w13": (rand(num, 2 * width, hidden) / hidden**0.5).to(dtype),
        "w2": (rand(num, hidden, width) / width**0.5).to(dtype),
        "grad": rand(tokens, hidden).to(dtype),
    }


def loop(x: Tensor, indices: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """The definition, a token and an expert at a time."""
    width = w2.shape[2]
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for k in range(indices.shape[1]):
            e = int(indices[t, k])
            gate, up = w13[e, :width] @ x[t], w13[e, width:] @ x[t]
            row = row + weights[t, k] * (w2[e] @ (gate * torch.sigmoid(gate) * up))
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def answer(case: dict[str, Tensor], function, **keywords) -> dict[str, Tensor]:
    """The output and all gradients of one call."""
    leaves = {name: case[name].detach().clone().requires_grad_() for name in NAMES}
    out = function(leaves["x"], case["indices"], leaves["weights"], leaves["w13"], leaves["w2"], **keywords)
    if not out.requires_grad:  # a loop over no token
        return {"out": out} | {f"grad of {name}": torch.zeros_like(leaves[name]) for name in NAMES}
    grads = torch.autograd.grad(out, list(leaves.values()), case["grad"])
    return {"out": out.detach()} | {f"grad of {name}": grad for name, grad in zip(NAMES, grads, strict=True)}


def to(case: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in case.items()}


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@contextmanager
def poisoned_memory():
    """Memory that an operation allocates without filling holds NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS would ask for an environment variable
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


ROUTINGS = ["random", "empty", "one"]


@pytest.mark.parametrize("backend", EXPERT_BACKENDS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_definition_in_float64(backend: str, routing: str):
    case = make(routing)
    exact = answer(case, loop)
    with poisoned_memory():
        found = answer(case, experts, backend=backend)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")
    if routing == "empty":
        assert (found["grad of w13"][[0, 3, E - 1]] == 0).all() and (found["grad of w2"][[0, 3, E - 1]] == 0).all()


@pytest.mark.parametrize(
    "shape",
    [{"top_k": 1}, {"top_k": 1, "routing": "one"}, {"tokens": 0}, {"tokens": 1}, {"num": 1, "top_k": 1}, {"top_k": E}, {"width": 1}, {"hidden": 1}],
    ids=str,
)
@pytest.mark.parametrize("backend", EXPERT_BACKENDS)
def test_edge_shapes(backend: str, shape: dict):
    case = make(**shape)
    exact = answer(case, loop)
    with poisoned_memory():
        found = answer(case, experts, backend=backend)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("weights", ["same", "float32"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype: torch.dtype, routing: str, weights: str):
    """Both against the float64 definition on the same rounded inputs; the plain one is autograd through the loop over experts."""
    for seed in range(3):
        case = make(routing, dtype, tokens=96, hidden=24, width=16, seed=seed)
        if weights == "float32":
            case["weights"] = make(routing, torch.float32, tokens=96, hidden=24, width=16, seed=seed)["weights"]
        exact = answer(to(case, torch.float64), experts, backend="reference")
        plain = answer(case, experts, backend="reference")
        with poisoned_memory():
            found = answer(case, experts, backend="torch")
        for name, value in exact.items():
            assert found[name].dtype == plain[name].dtype
            assert error(found[name], value) <= 2 * error(plain[name], value) + 1e-9, f"{name}, seed {seed}"


def test_int32_indices_are_the_same_bits():
    case = make(dtype=torch.float32)
    narrow = case | {"indices": case["indices"].int()}
    for backend in EXPERT_BACKENDS:
        for (name, a), b in zip(answer(case, experts, backend=backend).items(), answer(narrow, experts, backend=backend).values(), strict=True):
            assert torch.equal(a, b), (backend, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_the_same_bits(dtype: torch.dtype):
    case = make(dtype=dtype, tokens=257, hidden=32, width=16)
    for (name, a), b in zip(answer(case, experts).items(), answer(case, experts).values(), strict=True):
        assert torch.equal(a, b), name


def test_auto_on_a_cpu_is_torch():
    case = make(dtype=torch.float32)
    assert torch.equal(answer(case, experts)["out"], answer(case, experts, backend="torch")["out"])


def test_strided_inputs():
    """Transposed weights, a slice of x and an expanded gradient give what contiguous ones do."""
    case = make()
    wide = torch.cat([case["x"], case["x"]], dim=1)
    strided = case | {"x": wide[:, :H], "w13": case["w13"].mT.contiguous().mT, "w2": case["w2"].mT.contiguous().mT}
    strided["grad"] = torch.ones(1, 1, dtype=torch.float64).expand(T, H)
    plain = case | {"grad": torch.ones(T, H, dtype=torch.float64)}
    for name, value in answer(plain, experts).items():
        torch.testing.assert_close(answer(strided, experts)[name], value)


def test_under_autocast_float32_stays_float32():
    """The caller chooses the dtype by casting; an enclosing autocast does not round behind its back."""
    case = make(dtype=torch.float32)
    outside = answer(case, experts, backend="torch")
    with torch.autocast("cpu", torch.bfloat16):
        inside = answer(case, experts, backend="torch")
    for name, value in outside.items():
        assert torch.equal(inside[name], value), name


def test_the_operator_is_well_formed():
    """torch's own checks: schema, fake kernel, autograd registration."""
    case = make(dtype=torch.float32)
    inputs = tuple(case[name].requires_grad_() if name != "indices" else case[name] for name in ("x", "indices", "weights", "w13", "w2"))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert set(torch.library.opcheck(torch.ops.nsa_transformer.experts_grouped, inputs, test_utils=checks).values()) == {"SUCCESS"}


BAD = {
    "x axes": ("x", {"x": torch.zeros(T, 1, H)}),
    "x is no tensor": ("x", {"x": [[0.0] * H] * T}),
    "x dtype": ("x", {"x": torch.zeros(T, H, dtype=torch.int64)}),
    "x width": ("w13", {"x": torch.zeros(T, H + 1)}),
    "indices axes": ("indices", {"indices": torch.zeros(T, dtype=torch.int64)}),
    "indices dtype": ("indices", {"indices": torch.zeros(T, K)}),
    "indices tokens": ("indices", {"indices": torch.zeros(T - 1, K, dtype=torch.int64)}),
    "indices without experts": ("indices", {"indices": torch.zeros(T, 0, dtype=torch.int64), "weights": torch.zeros(T, 0)}),
    "indices too large": ("indices", {"indices": torch.full((T, K), E)}),
    "indices negative": ("indices", {"indices": torch.full((T, K), -1)}),
    "weights shape": ("weights", {"weights": torch.zeros(T, K + 1)}),
    "weights dtype": ("weights", {"weights": torch.zeros(T, K, dtype=torch.float64)}),
    "weights device": ("weights", {"weights": torch.zeros(T, K, device="meta")}),
    "w13 odd": ("w13", {"w13": torch.zeros(E, 2 * I + 1, H)}),
    "w13 dtype": ("w13", {"w13": torch.zeros(E, 2 * I, H, dtype=torch.bfloat16)}),
    "w13 axes": ("w13", {"w13": torch.zeros(2 * I, H)}),
    "w2 transposed": ("w2", {"w2": torch.zeros(E, I, H)}),
    "w2 experts": ("w2", {"w2": torch.zeros(E + 1, H, I)}),
    "w2 device": ("w2", {"w2": torch.zeros(E, H, I, device="meta")}),
    "backend": ("backend", {"backend": "cutlass"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_the_argument(name: str):
    argument, changes = BAD[name]
    case = make(dtype=torch.float32)
    del case["grad"]
    with pytest.raises(ValueError, match=rf"^{argument}\b"):
        experts(**{**case, **changes})


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [{}, {"hidden": 20, "width": 12}, {"tokens": 0}, {"top_k": 1}], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_on_a_gpu(routing: str, shape: dict[str, int]):
    """bf16 through torch's grouped kernel, float32 through one product per expert; widths that are no multiple of 8 too."""
    for dtype in (torch.bfloat16, torch.float32):
        case = {name: x.cuda() for name, x in make(routing, dtype, **{"tokens": 200, "hidden": 64, "width": 32, **shape}).items()}
        exact = answer(to(case, torch.float64), experts, backend="reference")
        plain = answer(case, experts, backend="reference")
        with poisoned_memory():
            found = answer(case, experts, backend="torch")
        again = answer(case, experts, backend="torch")
        for name, value in exact.items():
            assert error(found[name], value) <= 2 * error(plain[name], value) + 1e-6, f"{dtype} {name}"
            assert torch.equal(found[name], again[name]), name
