"""Host memory for what the GPU has no room for, and the way between the two."""

from __future__ import annotations

import mmap
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from nsa_transformer.config import ConfigError
from nsa_transformer.utils.hardware import GIB, memory_bytes

# Elements that are moved and computed at once: 16 MiB in float32. What one operation wrote, the next one finds in the caches of the cores, and a few hundred
# such parts of a large model cost little to start.
CHUNK = 1 << 22
ALIGN = 16  # elements: a cache line of float32
RUN = 1 << 15  # elements whose norm one core takes
IN_FLIGHT = 512 << 20  # bytes of gradients that may wait on the device to be added up; past that the backward waits


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


class Link(ABC):
    """The way between host and device. `add` and `settle` are called by one thread at a time, and so are `begin`, `to_device` and `sent`."""

    def __init__(self) -> None:
        self._waits: list[tuple[Tick, Tick]] = []

    @abstractmethod
    def arena(self, count: int) -> Tensor:
        """float32 [count], zeros, in host memory that this link reads and writes directly."""

    @abstractmethod
    def now(self) -> torch.cuda.Event | None:
        """A mark behind all work that the calling thread has given to the device."""

    @abstractmethod
    def tick(self) -> Tick:
        """The time when the device has done all work that the calling thread has given to it."""

    @abstractmethod
    def between(self, start: Tick, end: Tick) -> float:
        """Seconds from one tick to another; the device must have passed both."""

    @abstractmethod
    def add(self, grad: Tensor, total: Tensor, norms: Tensor, again: bool) -> None:
        """A flat gradient on the device into its sum, of an arena: added to it with `again`, else put in its place. norms, float32 on the device, one for
        each `CHUNK` elements: of the sum, afterwards."""

    @abstractmethod
    def settle(self) -> None:
        """Until every sum is in host memory."""

    @abstractmethod
    def begin(self, ready: torch.cuda.Event | None) -> None:
        """What `to_device` copies from now on waits for `ready`."""

    @abstractmethod
    def to_device(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Of each pair, values in an arena and a tensor of as many elements, `CHUNK` at most: rounds the first to the second's dtype and brings it there. The
        values stay as they are until the device has passed the next `sent`."""

    @abstractmethod
    def sent(self) -> torch.cuda.Event | None:
        """A mark behind all copies of `to_device`."""

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """What is waited for inside counts for `waited`."""
        begun = self.tick()
        yield
        self._waits.append((begun, self.tick()))

    def waited(self) -> float:
        """Seconds that the device has stood still, since this was last asked; it must have passed all of that."""
        waits, self._waits = self._waits, []
        return sum(self.between(*wait) for wait in waits)


class SameMemory(Link):
    """Host and device are the same."""

    def arena(self, count: int) -> Tensor:
        return host_zeros(count)

    def now(self) -> None:
        return None

    def tick(self) -> float:
        return time.perf_counter()

    def between(self, start: Tick, end: Tick) -> float:
        assert isinstance(start, float) and isinstance(end, float)
        return end - start

    def add(self, grad: Tensor, total: Tensor, norms: Tensor, again: bool) -> None:
        for number, (part, into) in enumerate(zip(grad.split(CHUNK), total.split(CHUNK), strict=True)):
            if again:
                into += part
            else:
                into.copy_(part)
            norms[number] = _norm(into)

    def settle(self) -> None:
        pass

    def begin(self, ready: torch.cuda.Event | None) -> None:
        assert ready is None

    def to_device(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        for source, target in pairs:
            target.copy_(source)

    def sent(self) -> None:
        return None


class CudaLink(Link):
    """Sums are added up on the GPU: one comes from host memory, `CHUNK` elements at a time, has the gradient added and its norm taken, and goes back, on
    three streams beside the backward. The host has nothing to do with it, and the two directions of the link carry 4 bytes a parameter each.

    Args:
        device: the GPU.
        room: elements of the largest tensor that crosses.
        key: what to set to false where the system does not let so much memory be page-locked.
    """

    def __init__(self, device: torch.device, room: int, key: str) -> None:
        super().__init__()
        self._key = key
        self._up, self._sum, self._down = (torch.cuda.Stream(device) for _ in range(3))
        room = min(CHUNK, room)
        self._rooms = [_Room(torch.empty(room, device=device)) for _ in range(4)]
        self.device = self._rooms[0].values.device  # with its number
        self._wide = torch.empty(room, device=device)  # what goes to the device, before it is rounded
        self._turn = 0
        self._left: dict[int, torch.cuda.Event] = {}  # of each sum: the event behind its way back to the host
        self._held: deque[tuple[Tensor, torch.cuda.Event]] = deque()  # gradients, and the event behind their last reading

    def arena(self, count: int) -> Tensor:
        flat = host_zeros(count)
        page_lock(flat, self, self.device, self._key)
        return flat

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

    def add(self, grad: Tensor, total: Tensor, norms: Tensor, again: bool) -> None:
        self._sum.wait_event(self.now())
        if again:
            self._up.wait_event(self._left[total.data_ptr()])
        for number, (part, into) in enumerate(zip(grad.split(CHUNK), total.split(CHUNK), strict=True)):
            room = self._rooms[self._turn % len(self._rooms)]
            self._turn += 1
            values = room.values[: len(part)]
            if again:
                room.wait_until_left(self._up)
                with torch.cuda.stream(self._up):
                    values.copy_(into, non_blocking=True)
                room.came.record(self._up)
                self._sum.wait_event(room.came)
            else:
                room.wait_until_left(self._sum)
            with torch.cuda.stream(self._sum):
                if again:
                    values += part
                else:
                    values.copy_(part)
                torch.linalg.vector_norm(values, out=norms[number])
            room.added.record(self._sum)
            self._down.wait_event(room.added)
            with torch.cuda.stream(self._down):
                into.copy_(values, non_blocking=True)
            room.left.record(self._down)
        self._left.setdefault(total.data_ptr(), torch.cuda.Event()).record(self._down)
        read = torch.cuda.Event()
        read.record(self._sum)
        self._held.append((grad, read))
        # Memory that another stream reads is free for use once the stream that it belongs to has waited for that; the host need not.
        if len(self._held) > 1 and sum(grad.nbytes for grad, _ in self._held) > IN_FLIGHT:
            with self.standing_still():
                while len(self._held) > 1 and sum(grad.nbytes for grad, _ in self._held) > IN_FLIGHT:
                    torch.cuda.current_stream(self.device).wait_event(self._held.popleft()[1])

    def settle(self) -> None:
        last = torch.cuda.Event()
        last.record(self._down)
        last.synchronize()
        self._held.clear()

    def begin(self, ready: torch.cuda.Event | None) -> None:
        assert ready is not None
        self._up.wait_event(ready)

    def to_device(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        for source, target in pairs:
            if target.device != self.device:  # what is streamed stays with the host
                target.copy_(source)
            else:
                with torch.cuda.stream(self._up):
                    if target.dtype == source.dtype:
                        target.copy_(source, non_blocking=True)
                    else:
                        target.copy_(self._wide[: len(source)].copy_(source, non_blocking=True))

    def sent(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._up)
        return event


class _Room:
    """Device memory that a part of a sum passes through, and how far it has come."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.came, self.added, self.left = torch.cuda.Event(), torch.cuda.Event(), torch.cuda.Event()
        self._used = False

    def wait_until_left(self, stream: torch.cuda.Stream) -> None:
        if self._used:
            stream.wait_event(self.left)
        self._used = True


def norm_of_parts(norms: Tensor) -> Tensor:
    """float32, from the norms of its parts."""
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(norms.double()).float()


def _norm(x: Tensor) -> Tensor:
    """On a CPU. torch takes the norm of one vector on one core, one number after the other, and is 0.5 % too low for 64 Mi of them; those of rows on all."""
    whole = len(x) // RUN * RUN
    if whole == 0:
        return torch.linalg.vector_norm(x)
    rows = torch.linalg.vector_norm(x[:whole].view(-1, RUN), dim=1)
    return norm_of_parts(rows if whole == len(x) else torch.cat([rows, torch.linalg.vector_norm(x[whole:]).view(1)]))


def link_to(device: torch.device, room: int, key: str) -> Link:
    """As `CudaLink` takes them."""
    return CudaLink(device, room, key) if device.type == "cuda" else SameMemory()
