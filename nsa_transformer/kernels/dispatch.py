"""Which backend computes a call, and why."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from nsa_transformer.config import NSAConfig

NAMES = ("reference", "triton")
WIDTHS = (64, 128, 192, 256)  # head widths that the Triton kernels are built for
_TRITON = find_spec("triton") is not None
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # read when Triton is imported, so it cannot change later


def available_backends() -> list[str]:
    """Backends that work on this machine, the plain PyTorch `reference` first; `triton` on an NVIDIA GPU from sm_80 on, or on CPU
    tensors where Triton's interpreter was asked for (TRITON_INTERPRET=1)."""
    return [name for name in NAMES if name == "reference" or triton_missing() is None]


def triton_missing() -> str | None:
    """Why the Triton kernels cannot run on this machine, as a phrase; None if they can."""
    if not _TRITON:
        return "triton is not installed"
    if _INTERPRET:
        return None
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "there is no NVIDIA GPU"
    if not any(_capable(index) for index in range(torch.cuda.device_count())):
        return "the GPU is older than compute capability 8.0"
    return None


@torch.compiler.assume_constant_result
def _capable(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 0)


def kernels_refuse(q: Tensor, v: Tensor, config: NSAConfig) -> str | None:
    """Why the Triton kernels do not take these inputs, as a phrase; None if they do."""
    if not _TRITON:
        return "triton is not installed"
    if q.device.type != ("cpu" if _INTERPRET else "cuda"):
        return f"q is on {q.device}" + ("" if _INTERPRET else ", not on an NVIDIA GPU")
    if not _INTERPRET and not _capable(q.device.index or 0):
        return f"{q.device} is older than compute capability 8.0"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"q has dtype {q.dtype}, not bfloat16, float16 or float32"
    if _INTERPRET and q.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    if q.shape[2] not in WIDTHS or v.shape[2] not in WIDTHS:
        return f"the head widths {q.shape[2]} and {v.shape[2]} are not both among {', '.join(map(str, WIDTHS))}"
    sizes = (config.compress_block, config.compress_stride, config.select_block)
    if any(size & (size - 1) for size in sizes) or config.compress_stride < 4 or not 8 <= config.select_block <= 128:
        block, stride, select = sizes
        return f"the geometry {block}/{stride}/{select} is not of powers of two with a stride from 4 and selection blocks from 8 to 128"
    return None


def check_backend_name(backend: str) -> None:
    if backend not in ("auto", *available_backends()):
        because = f": {triton_missing()}" if backend == "triton" else ""
        raise ValueError(f"backend={backend!r} is not available here{because}; write one of auto, {', '.join(available_backends())}")


def choose_backend(backend: str, q: Tensor, v: Tensor, config: NSAConfig) -> str:
    """`auto` is `triton` on a GPU wherever its kernels take the inputs, else `reference`; a name is itself, or a `ValueError` saying why not."""
    if backend == "reference" or (backend == "auto" and q.device.type != "cuda"):
        return "reference"
    refusal = kernels_refuse(q, v, config)
    if refusal is None:
        return "triton"
    if backend == "auto":
        return "reference"
    raise ValueError(f"backend='triton' does not take these inputs: {refusal}; write backend='auto' or 'reference'")
