"""The way between host memory and a CUDA GPU: sums of gradients are added up on the GPU, and it takes a share of the update.

    add      sum up         + gradient, norm             sum down                     one room
    update   four tensors up    AdamW, targets rounded   master and moments down      four rooms
             `_up`          `_compute`                   `_down`

Each stream works in order, and all sums and updates take the same three: what comes down later was read by the time that it does. What the host has updated
goes up on a stream of its own, so that it need not queue behind parts that wait for rooms.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_transformer.memory.host import CHUNK, Link, Part, SameMemory, Tick, adamw, host_zeros, page_lock

IN_FLIGHT = 512 << 20  # bytes of gradients that may wait on the device to be added up; past that the backward waits
ROOMS = 12  # of three parts that are updated: one comes, one is computed, one goes
# Of the elements. A part of 4 Mi takes the 16 cores of an H200's host 1.76 ms, and the link 1.37: 56 % for the GPU, were neither in the other's way. It is a
# constant, since torch's AdamW differs in last bits between the two: each run, and each one that goes on, has to divide alike.
DEVICE_SHARE = 0.55


class CudaLink(Link):
    """Sums are added up on the GPU: one comes from host memory, `CHUNK` elements at a time, has the gradient added and its norm taken, and goes back, on
    three streams beside the backward. The host has nothing to do with it, and the two directions of the link carry 4 bytes a parameter each.

    Args:
        device: the GPU.
        room: elements of all that crosses.
        steps: how many step counts `update` is given.
        key: what to set to false where the system does not let so much memory be page-locked.
    """

    share = DEVICE_SHARE

    def __init__(self, device: torch.device, room: int, steps: int, key: str) -> None:
        super().__init__()
        self._key = key
        self._up, self._compute, self._down, self._send = (torch.cuda.Stream(device) for _ in range(4))
        room = min(CHUNK, room)
        self._rooms = [_Room(torch.empty(room, device=device)) for _ in range(ROOMS)]
        self.device = self._rooms[0].values.device  # with its number
        self._wide = torch.empty(room, device=device)  # what goes to the device, before it is rounded
        self._steps = torch.empty(steps, device=device)
        self._turn = 0
        self._left: dict[int, torch.cuda.Event] = {}  # of each sum: the event behind its way back to the host
        self._last: torch.cuda.Event | None = None  # of the sum that was added to last
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
        self._compute.wait_event(self.now())
        if again:
            self._up.wait_event(self._left[total.data_ptr()])
        for number, (part, into) in enumerate(zip(grad.split(CHUNK), total.split(CHUNK), strict=True)):
            room = self._next_room()
            values = room.values[: len(part)]
            if again:
                room.wait_until_left(self._up)
                with torch.cuda.stream(self._up):
                    values.copy_(into, non_blocking=True)
                room.came.record(self._up)
                self._compute.wait_event(room.came)
            else:
                room.wait_until_left(self._compute)
            with torch.cuda.stream(self._compute):
                if again:
                    values += part
                else:
                    values.copy_(part)
                torch.linalg.vector_norm(values, out=norms[number])
            room.done.record(self._compute)
            self._down.wait_event(room.done)
            with torch.cuda.stream(self._down):
                into.copy_(values, non_blocking=True)
            room.left.record(self._down)
        self._last = self._left.setdefault(total.data_ptr(), torch.cuda.Event())
        self._last.record(self._down)
        read = torch.cuda.Event()
        read.record(self._compute)
        self._held.append((grad, read))
        # Memory that another stream reads is free for use once the stream that it belongs to has waited for that; the host need not.
        if len(self._held) > 1 and sum(grad.nbytes for grad, _ in self._held) > IN_FLIGHT:
            with self.standing_still():
                while len(self._held) > 1 and sum(grad.nbytes for grad, _ in self._held) > IN_FLIGHT:
                    torch.cuda.current_stream(self.device).wait_event(self._held.popleft()[1])

    def settle(self) -> None:
        if self._last is not None:  # and not all of `_down`, on which an update may be coming back
            self._last.synchronize()
        self._held.clear()

    def begin(self, ready: torch.cuda.Event | None) -> None:
        assert ready is not None
        self._send.wait_event(ready)

    def to_device(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        for source, target in pairs:
            if target.device != self.device:  # what is streamed stays with the host
                target.copy_(source)
            else:
                with torch.cuda.stream(self._send):
                    if target.dtype == source.dtype:
                        target.copy_(source, non_blocking=True)
                    else:
                        target.copy_(self._wide[: len(source)].copy_(source, non_blocking=True))

    def sent(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._send)
        return event

    def update(
        self, parts: Sequence[Part], steps: Tensor, options: Sequence[dict[str, Any]], factor: float, ready: torch.cuda.Event | None
    ) -> torch.cuda.Event:
        assert ready is not None
        self._compute.wait_event(ready)
        with torch.cuda.stream(self._up):
            self._steps.copy_(steps, non_blocking=True)
        for part in parts:
            rooms = [self._next_room() for _ in part.tensors]
            master, grad, first, second = (room.values[: len(part.master)] for room in rooms)
            there = Part(part.group, part.pieces, master, grad, first, second)
            for room in rooms:
                room.wait_until_left(self._up)
            with torch.cuda.stream(self._up):
                for values, source in zip(there.tensors, part.tensors, strict=True):
                    values.copy_(source, non_blocking=True)
            rooms[0].came.record(self._up)
            self._compute.wait_event(rooms[0].came)
            with torch.cuda.stream(self._compute):
                adamw(there, self._steps, options[part.group], factor)
                for piece in part.pieces:
                    piece.target.copy_(master[piece.at])
            rooms[0].done.record(self._compute)
            self._down.wait_event(rooms[0].done)
            with torch.cuda.stream(self._down):
                for into, values in ((part.master, master), (part.first, first), (part.second, second)):
                    into.copy_(values, non_blocking=True)
            for room in rooms:
                room.left.record(self._down)
        event = torch.cuda.Event()
        event.record(self._compute)
        return event

    def finish(self) -> None:
        for stream in (self._send, self._down):
            stream.synchronize()

    def _next_room(self) -> _Room:
        self._turn += 1
        return self._rooms[self._turn % len(self._rooms)]


class _Room:
    """Device memory that a tensor of a part passes through, and how far it has come."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.came, self.done, self.left = torch.cuda.Event(), torch.cuda.Event(), torch.cuda.Event()
        self._used = False

    def wait_until_left(self, stream: torch.cuda.Stream) -> None:
        if self._used:
            stream.wait_event(self.left)
        self._used = True


def link_to(device: torch.device, room: int, steps: int, key: str) -> Link:
    """As `CudaLink` takes them."""
    return CudaLink(device, room, steps, key) if device.type == "cuda" else SameMemory()
