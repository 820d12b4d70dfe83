"""Host memory for what the GPU has no room for, and the way between the two."""

from __future__ import annotations

import math
import mmap
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from nsa_transformer.config import ConfigError
from nsa_transformer.utils.hardware import memory_bytes

# Elements that are moved and computed at once: 16 MiB in float32. What one operation wrote, the next one finds in the caches of the cores, and a few hundred
# such parts of a large model cost little to start.
CHUNK = 1 << 22
ALIGN = 16  # elements: a cache line of float32
GIB = 2**30


def host_zeros(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[count]`, zeros, in memory that is taken page by page as it is written, in huge pages where the system has them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=dtype)
    # Private: the system has huge pages for shared memory, mmap's default, only where it was set up for that. Taking 1 GiB is a seventh of the work with them.
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a hint, which kernels built without huge pages refuse
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=count)


def page_lock(flat: Tensor, owner: object, device: torch.device, key: str) -> None:
    """Page-lock a host tensor as it is, without the rounding up of torch's own page-locked memory, for `device` and as long as `owner` lives.

    Raises `ConfigError` naming `key` where the system refuses.
    """
    with torch.cuda.device(device):
        status = int(torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.nbytes, 0))
    if status:
        raise ConfigError(
            f"{flat.nbytes / GIB:.1f} GiB of host memory cannot be page-locked (CUDA error {status}); "
            f"give the machine or its container more memory, or write {key}=false"
        )
    weakref.finalize(owner, _unlock, flat, device)


def _unlock(flat: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # what was launched may still read it
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())


def check_host_memory(wanted: int, what: str) -> None:
    """Raises `ConfigError` where the machine has less than `wanted` bytes: memory is promised freely and the process killed without a word once it is used."""
    total = memory_bytes()
    if total is not None and wanted > total:
        raise ConfigError(f"{what} takes {wanted / GIB:.1f} GiB of host memory and this machine has {total / GIB:.1f}; write a smaller model, or leave it off")


Tick = torch.cuda.Event | float


class Link(Protocol):
    """The way between host and device. Of the methods that move something, each is called by one thread at a time."""

    def now(self) -> torch.cuda.Event | None:
        """A mark behind all work that the calling thread has given to the device."""

    def tick(self) -> Tick:
        """The time when the device has done all work that the calling thread has given to it."""

    def between(self, start: Tick, end: Tick) -> float:
        """Seconds from one tick to another; the device must have passed both."""

    def to_host(self, values: Tensor, ready: torch.cuda.Event | None) -> Iterator[Tensor]:
        """The parts of a flat device tensor, `CHUNK` elements each, once the device has passed `ready`. A part counts until the next one is asked for."""

    def to_device(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Of each pair, host values and a device tensor of as many elements: rounds the first to the second's dtype and copies it there. Each count
        rounded up to `ALIGN`, they are `CHUNK` at most."""

    def begin(self, ready: torch.cuda.Event | None) -> None:
        """What `to_device` copies from now on waits for `ready`."""

    def sent(self) -> torch.cuda.Event | None:
        """A mark behind all copies of `to_device`."""


class SameMemory:
    """Host and device are the same."""

    def now(self) -> None:
        return None

    def tick(self) -> float:
        return time.perf_counter()

    def between(self, start: Tick, end: Tick) -> float:
        assert isinstance(start, float) and isinstance(end, float)
        return end - start

    def to_host(self, values: Tensor, ready: torch.cuda.Event | None) -> Iterator[Tensor]:
        assert ready is None
        return iter(values.split(CHUNK))

    def to_device(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        for source, target in pairs:
            target.copy_(source)

    def begin(self, ready: torch.cuda.Event | None) -> None:
        assert ready is None

    def sent(self) -> None:
        return None


class CudaLink:
    """A stream for each direction, each with a few page-locked buffers.

    Nothing else needs to be page-locked: every byte that crosses is rounded or added by the cores anyway, and a buffer of a chunk's size stays in
    their caches between that and the copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._up, self._down = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._going = [_Slot() for _ in range(3)]
        self._coming = [_Slot() for _ in range(2)]
        self._turn = 0

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def tick(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, start: Tick, end: Tick) -> float:
        assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1e3

    def to_host(self, values: Tensor, ready: torch.cuda.Event | None) -> Iterator[Tensor]:
        assert ready is not None
        self._down.wait_event(ready)
        parts = values.split(CHUNK)
        under_way: list[tuple[_Slot, Tensor]] = []
        for number in range(len(parts) + 1):
            if number < len(parts):  # the next copy starts before the last one is waited for
                slot = self._coming[number % 2]
                part = slot.view(parts[number])
                with torch.cuda.stream(self._down):
                    part.copy_(parts[number], non_blocking=True)
                    slot.copied.record(self._down)
                under_way.append((slot, part))
            if number:
                slot, part = under_way.pop(0)
                slot.copied.synchronize()
                yield part

    def to_device(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        slot = self._going[self._turn % len(self._going)]
        self._turn += 1
        slot.copied.synchronize()  # what it last held has left
        start = 0
        for source, target in pairs:
            if target.device != self.device:  # what is streamed stays with the host
                target.copy_(source)
                continue
            part = slot.view(target, start)
            part.copy_(source)
            with torch.cuda.stream(self._up):
                target.copy_(part, non_blocking=True)
            start += math.ceil(part.nbytes / (4 * ALIGN)) * 4 * ALIGN  # whatever the next dtype
        slot.copied.record(self._up)

    def begin(self, ready: torch.cuda.Event | None) -> None:
        assert ready is not None
        self._up.wait_event(ready)

    def sent(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._up)
        return event


class _Slot:
    """Page-locked memory for a chunk of float32, and what was last copied from or to it."""

    def __init__(self) -> None:
        self._bytes = _page_locked(4 * CHUNK)
        self.copied = torch.cuda.Event()

    def view(self, like: Tensor, start: int = 0) -> Tensor:
        """Room for as many elements of that dtype as `like` has, from byte `start` on."""
        return self._bytes[start : start + like.nbytes].view(like.dtype)


def _page_locked(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)


def link_to(device: torch.device) -> Link:
    return CudaLink(device) if device.type == "cuda" else SameMemory()
