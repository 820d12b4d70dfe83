"""Which backend computes a call, and why."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels import sparse_attention

NAMES = ("reference", "triton", "cuda")
CAPABILITY = (8, 0)  # compute capability that the Triton kernels are built for, and every later one
FP8_CAPABILITY = (8, 9)  # for e4m3
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # and the dtypes,
WIDTHS = (64, 128, 192, 256)  # and the head widths
CUDA_COMPUTES = "the CUDA extension computes nsa_decode alone"
_TRITON = find_spec("triton") is not None
# The words that Triton takes for true. It decides when it is imported, so asking once is enough.
_INTERPRET = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile takes the result while it traces, and does not look inside: what the machine has does not change.

    This is `torch.compiler.assume_constant_result`, which sets the same mark but imports the whole compiler, and Triton, at once.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def available_backends() -> list[str]:
    """Backends that work on this machine, the plain PyTorch `reference` first; `triton` on an NVIDIA GPU from sm_80 on, or on CPU
    tensors where Triton's interpreter was asked for (TRITON_INTERPRET=1); `cuda`, for `nsa_decode` alone, on one from sm_90 on once the extension is built."""
    return [name for name in NAMES if _missing(name) is None]


def _missing(name: str) -> str | None:
    """Why a backend cannot run on this machine, as a phrase; None if it can."""
    return None if name == "reference" else triton_missing() if name == "triton" else extension_missing()


@_constant
def triton_missing() -> str | None:
    """Why the Triton kernels cannot run on this machine, as a phrase; None if they can."""
    if not _TRITON:
        return "triton is not installed"
    if _INTERPRET:
        return None
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch sees no NVIDIA GPU"
    if not any(_capable(index) for index in range(torch.cuda.device_count())):
        return f"no GPU here has compute capability {_version(CAPABILITY)} or higher"
    return None


@_constant
def extension_missing() -> str | None:
    """Why the CUDA extension cannot run on this machine, as a phrase; None if it can."""
    return sparse_attention.missing()


@_constant
def _capable(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= CAPABILITY


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def device_refuses(x: Tensor, name: str) -> str | None:
    """Why no Triton kernel takes x, called `name`, by its device and dtype, as a phrase; None if some may."""
    if not _TRITON:
        return "triton is not installed"
    if _INTERPRET and x.device.type != "cpu":
        return f"{name} is on {x.device}, and Triton's interpreter (TRITON_INTERPRET) takes CPU tensors alone"
    if not _INTERPRET and x.device.type != "cuda":
        return f"{name} is on {x.device}, not on an NVIDIA GPU"
    if not _INTERPRET and not _capable(x.device.index or 0):
        return f"{name} is on {x.device}, which is not an NVIDIA GPU of compute capability {_version(CAPABILITY)} or higher"
    if x.dtype not in DTYPES:
        return f"{name} has dtype {x.dtype}, not one of {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}"
    if _INTERPRET and x.dtype == torch.bfloat16:
        return f"{name} has dtype torch.bfloat16, which Triton's interpreter (TRITON_INTERPRET) computes wrongly"
    return None


def kernels_refuse(q: Tensor, v: Tensor, config: NSAConfig, name: str = "q") -> str | None:
    """Why the Triton kernels do not take these inputs, as a phrase; None if they do. `name`: what q is called in it."""
    refusal = device_refuses(q, name)
    if refusal is not None:
        return refusal
    if q.shape[2] not in WIDTHS or v.shape[2] not in WIDTHS:
        return f"the head widths {q.shape[2]} and {v.shape[2]} are not both among {', '.join(map(str, WIDTHS))}"
    block, stride, select = config.compress_block, config.compress_stride, config.select_block
    if any(size & (size - 1) for size in (block, stride, select)) or stride < 4 or not 8 <= select <= 128:
        return (
            f"compress_block={block}, compress_stride={stride}, select_block={select} "
            "are not powers of two with a compress_stride of at least 4 and a select_block of 8 to 128"
        )
    return None


def fp8_refuses(x: Tensor) -> str | None:
    """Why no Triton kernel reads or writes e4m3 on x's device, as a phrase; None if it does."""
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= FP8_CAPABILITY:
        return None
    return f"it is on a GPU below compute capability {_version(FP8_CAPABILITY)}, for which Triton has no e4m3"


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return _TRITON and _INTERPRET


def describe_auto() -> str:
    """What `backend="auto"` picks on this machine, and why, in words."""
    steps = "" if extension_missing() is not None else "; nsa_decode: cuda where it takes the step and there are many sequences"
    return _describe_kernels() + steps


def _describe_kernels() -> str:
    missing = triton_missing()
    if missing is not None:
        return f"reference: {missing}"
    if interpreted():
        return "reference; under TRITON_INTERPRET ask for backend='triton' by name"
    dtypes = ", ".join({torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype] for dtype in DTYPES)
    return f"triton on GPU tensors of {dtypes} with head widths {', '.join(map(str, WIDTHS))} and blocks of powers of two; else reference"


def check_backend_name(backend: str, step: bool = False) -> None:
    """Raises a `ValueError` for what is no backend on this machine. `step`: of `nsa_decode`, which alone has `cuda`."""
    if backend in ("auto", "reference"):
        return
    because = None
    if backend in NAMES:
        because = CUDA_COMPUTES if backend == "cuda" and not step else _missing(backend)
        if because is None:
            return
    names = [name for name in available_backends() if step or name != "cuda"]
    raise ValueError(f"backend={backend!r} is not available here{'' if because is None else f': {because}'}; write one of auto, {', '.join(names)}")


def choose_backend(backend: str, q: Tensor, v: Tensor, config: NSAConfig, name: str = "q") -> str:
    """The backend for these inputs, v any of the values. `auto` is `triton` on a GPU wherever its kernels take the inputs, else `reference`; a
    name is itself, or a `ValueError` saying why not."""
    if backend == "reference" or (backend == "auto" and q.device.type != "cuda"):
        return "reference"
    refusal = kernels_refuse(q, v, config, name)
    if refusal is None:
        return "triton"
    if backend == "auto":
        return "reference"
    raise ValueError(f"backend='triton' does not take these inputs: {refusal}; write backend='auto' or 'reference'")
