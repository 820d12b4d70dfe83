"""The way between host memory and a CUDA GPU: sums of gradients are added up on the GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from nsa_transformer.memory.host import CHUNK, Link, SameMemory, Tick, host_zeros, page_lock

IN_FLIGHT = 512 << 20  # bytes of gradients that may wait on the device to be added up; past that the backward waits


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


def link_to(device: torch.device, room: int, key: str) -> Link:
    """As `CudaLink` takes them."""
    return CudaLink(device, room, key) if device.type == "cuda" else SameMemory()
