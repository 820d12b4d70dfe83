"""Which backend is chosen, and that it says why; what the kernels are for is pretended, so this runs anywhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels import available_backends, dispatch, nsa_attention

CONFIG = NSAConfig(8, 4, 16, 4, 1, 2, 32)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an H100 as its first GPU and a V100 as its second, as far as the choice goes, and without the CUDA extension."""
    monkeypatch.setattr(dispatch, "extension_missing", lambda: "the CUDA extension is not built")
    monkeypatch.setattr(dispatch, "_TRITON", True)
    monkeypatch.setattr(dispatch, "_INTERPRET", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 0))[torch.device("cuda", index).index if isinstance(index, int) else index.index]
    )


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "extension_missing", lambda: "torch sees no NVIDIA GPU")
    monkeypatch.setattr(dispatch, "_TRITON", True)
    monkeypatch.setattr(dispatch, "_INTERPRET", True)


def tensor(device: str, dtype: torch.dtype = torch.bfloat16, width: int = 128) -> Any:
    """What the choice looks at of a tensor."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(10, 4, width))


def inputs(tokens: int, width: int = 64) -> list[torch.Tensor]:
    rows = (tokens - CONFIG.compress_block) // CONFIG.compress_stride + 1
    shapes = [(tokens, 4, width)] + 2 * [(rows, 2, width)] + 4 * [(tokens, 2, width)]
    return [*(torch.randn(shape) for shape in shapes), torch.rand(tokens, 4, 3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("width", "width_v"), [(64, 64), (192, 128), (256, 256)])
def test_auto_takes_the_kernels_where_they_take_the_inputs(gpu: None, dtype: torch.dtype, width: int, width_v: int) -> None:
    q, v = tensor("cuda:0", dtype, width), tensor("cuda:0", dtype, width_v)
    assert [dispatch.choose_backend(name, q, v, NSAConfig()) for name in ("auto", "triton", "reference")] == ["triton", "triton", "reference"]


REFUSED = [
    pytest.param(tensor("cpu"), NSAConfig(), "on cpu, not on an NVIDIA GPU", id="cpu"),
    pytest.param(tensor("cuda:1"), NSAConfig(), "cuda:1, which is not an NVIDIA GPU of compute capability 8.0", id="old GPU"),
    pytest.param(tensor("cuda:0", torch.float64), NSAConfig(), "not one of bfloat16, float16, float32", id="float64"),
    pytest.param(tensor("cuda:0", width=96), NSAConfig(), "head widths 96 and 96 are not both among 64, 128, 192, 256", id="width"),
    pytest.param(tensor("cuda:0"), NSAConfig(24, 12, 48), "compress_block=24, compress_stride=12", id="no powers of two"),
    pytest.param(tensor("cuda:0"), NSAConfig(4, 2, 16), "compress_stride=2", id="stride"),
    pytest.param(tensor("cuda:0"), NSAConfig(select_block=256), "select_block=256", id="block"),
]


@pytest.mark.parametrize(("q", "config", "why"), REFUSED)
def test_what_the_kernels_do_not_take(gpu: None, q: Any, config: NSAConfig, why: str) -> None:
    assert dispatch.choose_backend("auto", q, q, config) == "reference"
    with pytest.raises(ValueError, match="backend='triton' does not take these inputs") as error:
        dispatch.choose_backend("triton", q, q, config)
    assert why in str(error.value)
    assert "backend='auto'" in str(error.value)


def test_the_interpreter_takes_cpu_tensors_and_only_by_name(interpreter: None) -> None:
    q = tensor("cpu", torch.float32)
    assert available_backends() == ["reference", "triton"]
    assert dispatch.choose_backend("auto", q, q, NSAConfig()) == "reference"
    assert dispatch.choose_backend("triton", q, q, NSAConfig()) == "triton"
    for other, why in ((tensor("cuda:0"), "CPU tensors alone"), (tensor("cpu"), "computes wrongly")):
        with pytest.raises(ValueError, match=why):
            dispatch.choose_backend("triton", other, other, NSAConfig())


def test_a_machine_says_what_auto_picks_and_why(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.describe_auto().startswith("triton on GPU tensors of bf16, fp16, fp32 with head widths 64, 128, 192, 256")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert dispatch.describe_auto() == "reference: no GPU here has compute capability 8.0 or higher"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert dispatch.describe_auto() == "reference: torch sees no NVIDIA GPU"
    monkeypatch.setattr(dispatch, "_TRITON", False)
    assert dispatch.describe_auto() == "reference: triton is not installed"
    with pytest.raises(ValueError, match="backend='triton' is not available here: triton is not installed; write one of auto, reference"):
        dispatch.check_backend_name("triton")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_choice_does_not_break_a_compiled_graph(backend: str) -> None:
    made = inputs(50)
    cu = torch.tensor([0, 20, 50], dtype=torch.int32)
    compiled = torch.compile(lambda *x: nsa_attention(*x, CONFIG, cu_seqlens=cu, backend=backend), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*made), nsa_attention(*made, CONFIG, cu_seqlens=cu, backend=backend))


def test_facts_about_the_machine_are_constants_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark that `_constant` sets is torch's own and private; should another torch not know it, this breaks the graph."""

    def capability(index: int) -> tuple[int, int]:
        torch._dynamo.graph_break()
        return (9, 0)

    @dispatch._constant
    def phrase() -> str | None:
        torch._dynamo.graph_break()
        return None

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    compiled = torch.compile(lambda x: x + dispatch._capable(1) + (phrase() is None), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 2


def test_e4m3_needs_a_newer_gpu_than_the_rest(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.fp8_refuses(tensor("cuda:0")) is None and dispatch.fp8_refuses(tensor("cpu")) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert dispatch.fp8_refuses(tensor("cuda:0")) == "it is on a GPU below compute capability 8.9, for which Triton has no e4m3"
