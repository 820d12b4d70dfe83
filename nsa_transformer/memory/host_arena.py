"""One piece of host memory for all that is offloaded, page-locked as a whole.

Not torch's pinned allocator: it rounds every allocation up to a power of two, which for 57 GiB are 64, and for 93 GiB 128.
"""

from __future__ import annotations

import torch

from nsa_transformer.config import ConfigError
from nsa_transformer.memory.host import host_zeros, page_lock
from nsa_transformer.utils.hardware import GIB, memory_bytes


class HostArena:
    """`bytes`: uint8 [size], zeros; page-locked for as long as this object lives.

    Raises `ConfigError` where the machine has less memory, or where it cannot be page-locked for `device`.
    """

    def __init__(self, size: int, device: torch.device, pin: bool) -> None:
        there = memory_bytes()
        if there is not None and size > there:
            raise ConfigError(f"the experts take {size / GIB:.1f} GiB of host memory, and this machine has {there / GIB:.1f}; load them in --dtype bfloat16")
        try:
            self.bytes = host_zeros(size, torch.uint8)
        except OSError as error:
            raise ConfigError(f"{size / GIB:.1f} GiB of host memory for the experts cannot be had ({error.strerror})") from None
        self.pinned = pin
        if pin and device.type == "cuda":
            page_lock(self.bytes, self, device, "memory.expert_offloading.pin_memory")
