"""The way between host memory and a CUDA GPU: sums of gradients are added up on the GPU, and it takes a share of the update.

    add      sum up         + gradients, norm            sum down                     one room
    update   four tensors up    AdamW, targets rounded   master and moments down      four rooms
             `_up`          `_compute`                   `_down`

Each stream works in order, and all sums and updates take the same three: what comes down later was read by the time that it does. What the host has updated
goes up on a stream of its own, so that it need not queue behind parts that wait for rooms.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_transformer.memory.host import CHUNK, Behind, Coming, Link, Part, SameMemory, Tick, adamw, host_zeros, page_lock

IN_FLIGHT = 512 << 20  # bytes of gradients that may wait on the device to be added up; past that the backward waits
ROOMS = 12  # of three parts that are updated: one comes, one is computed, one goes. Half a byte a parameter, or less (`part_size`)
# Of the elements. An update of `large` alone, on an H200 with 16 cores: 0.41 s with 0.4 and 0.5, 0.45 with 0.6, 0.48 with 0.7, 0.60 by the GPU alone, 0.66 by
# the host; beside a forward 0.5 was the best too. It is a constant, since torch's AdamW differs in last bits between the two: each run, and each one that goes
# on, has to divide alike.
DEVICE_SHARE = 0.5


class CudaLink(Link):
    """Sums are added up on the GPU: one comes from host memory, a part at a time, has the gradients added and its norm taken, and goes back, on three
    streams beside the backward. The host only launches that, and the two directions of the link carry 4 bytes a parameter each.

    Args:
        device: the GPU.
        room: elements of the largest part that crosses.
        steps: how many step counts `update` is given.
        key: what to set to false where the system does not let so much memory be page-locked.
    """

    share = DEVICE_SHARE
    beside = True

    def __init__(self, device: torch.device, room: int, steps: int, key: str) -> None:
        super().__init__()
        self._key = key
        self._up, self._down = (torch.cuda.Stream(device) for _ in range(2))
        # Their kernels are short, and what waits for them is not: they come before those of the passes.
        self._compute, self._send = (torch.cuda.Stream(device, priority=-1) for _ in range(2))
        self._rooms = [_Room(torch.empty(room, device=device)) for _ in range(ROOMS)]
        self.device = self._rooms[0].values.device  # with its number
        self._wide = torch.empty(min(CHUNK, room), device=device)  # what goes to the device, before it is rounded
        self._steps = torch.empty(steps, device=device)
        self._turn = 0
        self._left: dict[int, torch.cuda.Event] = {}  # of each sum: the event behind its way back to the host
        self._last: torch.cuda.Event | None = None  # of the sum that was added to last
        self._held: deque[tuple[list[Tensor], torch.cuda.Event]] = deque()  # gradients, and the event behind their last reading

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

    def behind(self) -> Behind:
        return torch.cuda.current_stream(self.device), self.now()

    def add(self, coming: Sequence[Coming], norms: Tensor, received: Container[int], behind: Behind | None) -> None:
        assert behind is not None
        passes, ready = behind
        self._compute.wait_event(ready)
        grads = []
        for part, pieces in coming:
            key, total = part.grad.data_ptr(), part.grad
            again = any(piece.parameter in received for piece in part.pieces)
            room = self._next_rooms(1)[0]
            values = room.values[: len(total)]
            if again:  # the first time of a step has left zeros where it had no gradient
                self._up.wait_event(self._left[key])
                room.wait_until_left(self._up)
                with torch.cuda.stream(self._up):
                    values.copy_(total, non_blocking=True)
                room.came.record(self._up)
                self._compute.wait_event(room.came)
            else:
                room.wait_until_left(self._compute)
            with torch.cuda.stream(self._compute):
                if not again and sum(len(grad) for _, grad in pieces) < len(total):
                    values.zero_()
                for piece, grad in pieces:
                    if piece.parameter in received:
                        values[piece.at].add_(grad)
                    else:
                        values[piece.at].copy_(grad)
                # One norm for the part, since each would be one more kernel to launch in the backward.
                norms[part.pieces[0].norm : part.pieces[-1].norm + 1].zero_()
                torch.linalg.vector_norm(values, out=norms[pieces[0][0].norm])
            room.done.record(self._compute)
            self._down.wait_event(room.done)
            with torch.cuda.stream(self._down):
                total.copy_(values, non_blocking=True)
            room.leave(self._down)
            self._last = self._left.setdefault(key, torch.cuda.Event())
            self._last.record(self._down)
            grads += [grad for _, grad in pieces]
        read = torch.cuda.Event()
        read.record(self._compute)
        self._held.append((grads, read))
        # Memory that another stream reads is free for use once the stream that it belongs to has waited for that; the host need not.
        if len(self._held) > 1 and self._bytes_held() > IN_FLIGHT:
            with torch.cuda.stream(passes), self.standing_still():
                while len(self._held) > 1 and self._bytes_held() > IN_FLIGHT:
                    passes.wait_event(self._held.popleft()[1])

    def _bytes_held(self) -> int:
        return sum(grad.nbytes for grads, _ in self._held for grad in grads)

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

    def begin_update(self, steps: Tensor, ready: torch.cuda.Event | None) -> None:
        assert ready is not None
        self._compute.wait_event(ready)
        with torch.cuda.stream(self._up):
            self._steps.copy_(steps, non_blocking=True)

    def update(self, part: Part, options: dict[str, Any], factor: float) -> None:
        rooms = self._next_rooms(len(part.tensors))
        # The host waits, not the stream: what waits there takes a place in its queue, and a full queue holds up all other launches of the process.
        for room in rooms:
            room.wait_until_empty()
        master, grad, first, second = (room.values[: len(part.master)] for room in rooms)
        there = Part(part.group, part.pieces, master, grad, first, second)
        with torch.cuda.stream(self._up):
            for values, source in zip(there.tensors, part.tensors, strict=True):
                values.copy_(source, non_blocking=True)
        rooms[0].came.record(self._up)
        self._compute.wait_event(rooms[0].came)
        with torch.cuda.stream(self._compute):
            adamw(there, self._steps, options, factor)
            for piece in part.pieces:
                piece.target.copy_(master[piece.at])
        rooms[0].done.record(self._compute)
        self._down.wait_event(rooms[0].done)
        with torch.cuda.stream(self._down):
            for into, values in ((part.master, master), (part.first, first), (part.second, second)):
                into.copy_(values, non_blocking=True)
        for room in rooms:
            room.leave(self._down)

    def updated(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._compute)
        return event

    def finish(self) -> None:
        for stream in (self._send, self._down):
            stream.synchronize()

    def _next_rooms(self, count: int) -> list[_Room]:
        self._turn += count
        return [self._rooms[(self._turn + number) % len(self._rooms)] for number in range(count)]


class _Room:
    """Device memory that a tensor of a part passes through, and how far it has come."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.came, self.done = torch.cuda.Event(), torch.cuda.Event()
        self._left = torch.cuda.Event(blocking=True)  # a core that waits for it is free for others
        self._used = False

    def leave(self, stream: torch.cuda.Stream) -> None:
        """What is in here leaves by what `stream` has been given."""
        self._left.record(stream)
        self._used = True

    def wait_until_left(self, stream: torch.cuda.Stream) -> None:
        if self._used:
            stream.wait_event(self._left)

    def wait_until_empty(self) -> None:
        if self._used:
            self._left.synchronize()


def link_to(device: torch.device, room: int, steps: int, key: str) -> Link:
    """As `CudaLink` takes them."""
    return CudaLink(device, room, steps, key) if device.type == "cuda" else SameMemory()
