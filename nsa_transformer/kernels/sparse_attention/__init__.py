"""The CUDA C++ extension: a step of decoding in one launch, built by setup.py. Importing this loads nothing; `missing` says whether it can be used."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from nsa_transformer.kernels.sparse_attention import setup

CAPABILITY = (9, 0)  # compute capability that it is built for, and every later one with
SHARED = 227 << 10  # bytes of shared memory for a block, as csrc/decode.cu has it; GPUs for desktops have less
NEEDS = f"an NVIDIA GPU of compute capability {'.'.join(map(str, CAPABILITY))} (H100, H200) or higher with {SHARED >> 10} KB of shared memory for a block"

STORES = ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "k_scale", "v_scale", "k_recent", "v_recent")  # of a `PagedKeysValues`
_POINTERS = ("q", "gates", "out", "chosen", *STORES, "pages", "lengths", "notes")
_NUMBERS = (
    *("pairs", "cluster", "kv_heads", "group", "max_pages", "most_groups", "num_selected", "num_initial", "num_local", "window", "ring", "threshold", "recent"),
    *("width", "bfloat16", "float_gates", "fp8"),
)


class Arguments(ctypes.Structure):
    """`NsaDecode` of csrc/arguments.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in _NUMBERS),
    ]


def missing() -> str | None:
    """Why the extension cannot be used on this machine, as a phrase; None if it can."""
    return no_gpu() or library_missing()


def no_gpu() -> str | None:
    """Why no GPU here runs the extension, as a phrase; None if one does."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "torch sees no NVIDIA GPU"
    if not any(capable(index) for index in range(torch.cuda.device_count())):
        return f"no GPU here is {NEEDS}"
    return None


def capable(index: int) -> bool:
    """Whether a CUDA device runs the extension."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(index) < CAPABILITY:
        return False
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin >= SHARED  # type: ignore[attr-defined]


def library_missing() -> str | None:
    """Why the library cannot be used, whatever the GPU, as a phrase; None if it can."""
    found = _load()
    return found if isinstance(found, str) else None


def library() -> ctypes.CDLL:
    found = _load()
    assert not isinstance(found, str), found
    return found


@cache
def _load() -> ctypes.CDLL | str:
    """The library, or why not. Once a process: a library that was loaded cannot be loaded anew."""
    if not setup.LIBRARY.exists():
        return "the CUDA extension is not built"
    try:
        found = ctypes.CDLL(str(setup.LIBRARY))
        sources = found.nsa_sources
    except (OSError, AttributeError) as error:
        return f"the CUDA extension cannot be loaded ({error})"
    sources.restype = ctypes.c_ulonglong
    if sources() != setup.source_hash():
        return "the CUDA extension was built from other sources, and is to be built again"
    found.nsa_problem.restype = ctypes.c_char_p
    if torch.cuda.is_available() and (problem := found.nsa_problem()) is not None:
        return f"the CUDA extension as it is built cannot use the GPU ({problem.decode()})"
    arguments = ctypes.POINTER(Arguments)
    found.nsa_decode_notes.argtypes, found.nsa_decode_notes.restype = [arguments], ctypes.c_longlong
    found.nsa_decode_clusters.argtypes, found.nsa_decode_clusters.restype = [arguments], ctypes.c_int
    found.nsa_decode.argtypes, found.nsa_decode.restype = [arguments, ctypes.c_void_p], ctypes.c_char_p
    return found
