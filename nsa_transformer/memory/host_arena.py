"""One piece of host memory for all that is offloaded, page-locked as a whole.

Not torch's pinned allocator: it rounds every allocation up to a power of two, which for 57 GiB are 64, and for 93 GiB 128.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

from nsa_transformer.config import ConfigError
from nsa_transformer.utils.hardware import memory_bytes

GIB = 2**30


class HostArena:
    """`bytes`: uint8 [size], zeros, for as long as this object or a view of the tensor lives; page-locked for as long as this object does.

    Raises `ConfigError` where the machine has less memory, or where it cannot be page-locked for `device`.
    """

    def __init__(self, size: int, device: torch.device, pin: bool) -> None:
        there = memory_bytes()
        if there is not None and size > there:
            raise ConfigError(f"the experts take {size / GIB:.1f} GiB of host memory, and this machine has {there / GIB:.1f}; load them in --dtype bfloat16")
        try:
            mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise ConfigError(f"{size / GIB:.1f} GiB of host memory for the experts cannot be had ({error.strerror})") from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a hint, for fewer pages to lock and to translate; some kernels are built without
                mapping.madvise(mmap.MADV_HUGEPAGE)
        self.bytes: Tensor = torch.frombuffer(mapping, dtype=torch.uint8)
        self.pinned = pin
        if pin and device.type == "cuda":
            with torch.cuda.device(device):
                status = int(torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), size, 0))
            if status != 0:
                raise ConfigError(
                    f"{size / GIB:.1f} GiB of host memory cannot be page-locked (CUDA error {status}); "
                    "give the machine or its container more memory, or write memory.expert_offloading.pin_memory=false"
                )
            weakref.finalize(self, _release, self.bytes.data_ptr(), device)


def _release(address: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # what was launched may still read it
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(address)
