"""CUDA's streams and events on a CPU: such that everything has happened by the time it is asked about, enough to run the code around them; or such that
nothing happens before it must, which shows who does not wait."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_transformer.memory import cuda_link, host, optimizer_offload


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.enable_timing = enable_timing
        self.records = 0

    def record(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)
        self.records += 1

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        assert self.enable_timing and end.enable_timing and self.records == end.records == 1
        return 1.0


class Stream:
    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.waits = 0

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event) and event.records
        self.waits += 1

    def synchronize(self) -> None:
        pass


def stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    current = Stream()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)


# ------------------------------------------------------------------------------------------------------------ streams that lag


class Lagging:
    """Streams beside the current one, on which operations that write wait in a queue. They are done when an event behind them is waited for, by the host or
    by the current stream, whose own work is done at once; and now and then, by the seed (None: never before). Whoever reads without waiting finds old
    numbers. What is not seen: that a stream does not wait for the current one."""

    def __init__(self, seed: int | None) -> None:
        self._random = None if seed is None else random.Random(seed)
        self._lock = threading.RLock()
        self._streams: list[_Queue] = []
        self.current = _Queue(self)
        self._streams.clear()

    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing=False, blocking=False: _Mark(self))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None, priority=0: _Queue(self))
        monkeypatch.setattr(torch.cuda, "stream", self._beside)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)

    @contextmanager
    def _beside(self, stream: _Queue) -> Iterator[None]:
        with _Later(stream):
            yield

    def push(self, stream: _Queue, what: Callable[[], object]) -> None:
        with self._lock:
            if stream is self.current:
                what()
                return
            stream.waiting.append(what)
            if self._random is not None:
                other = self._random.choice(self._streams)
                self.pass_(other, other.done + self._random.randint(0, 3))

    def pass_(self, stream: _Queue, count: int) -> None:
        """Until a stream has done so many things, or all that it has."""
        with self._lock, torch.no_grad():
            while stream.done < count and stream.waiting:
                what = stream.waiting[0]
                what()  # which may wait for other streams, and these for no later part of this one
                stream.waiting.popleft()
                stream.done += 1


class _Queue:
    def __init__(self, lagging: Lagging) -> None:
        self.lagging, self.done = lagging, 0
        self.waiting: deque[Callable[[], object]] = deque()
        lagging._streams.append(self)

    def wait_event(self, event: _Mark) -> None:
        if event.place is not None:  # an event that was never recorded is not waited for
            self.lagging.push(self, lambda place=event.place: self.lagging.pass_(*place))

    def synchronize(self) -> None:
        self.lagging.pass_(self, self.done + len(self.waiting))


class _Mark:
    """An event; waiting for it means the last `record` before."""

    def __init__(self, lagging: Lagging) -> None:
        self.lagging = lagging
        self.place: tuple[_Queue, int] | None = None

    def record(self, stream: _Queue) -> None:
        self.place = stream, stream.done + len(stream.waiting)

    def synchronize(self) -> None:
        assert self.place is not None
        self.lagging.pass_(*self.place)

    def elapsed_time(self, end: _Mark) -> float:
        return 1.0


class _Later(TorchDispatchMode):
    """What writes into a tensor waits in a stream's queue; views are made at once."""

    def __init__(self, stream: _Queue) -> None:
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            self.stream.lagging.push(self.stream, lambda: func(*args, **kwargs))
            return kwargs.get("out", args[0]) if func._schema.returns else None
        assert all(each.alias_info for each in func._schema.returns), f"{func} makes memory of its own on a stream"
        return func(*args, **kwargs)


def small_parts(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Move so many elements at once, and compute half as many, such that small tensors have many parts."""
    monkeypatch.setattr(host, "PART", size)
    monkeypatch.setattr(cuda_link, "CHUNK", max(1, size // 2))
    monkeypatch.setattr(optimizer_offload, "CHUNK", max(1, size // 2))


def take_workspaces(device: torch.device) -> None:
    """Let the libraries of a GPU take the memory that they keep, so that it is not counted to what follows."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(64, 64, dtype=dtype, device=device, requires_grad=True)
        torch.nn.functional.linear(x, x).sum().backward()
    torch.cuda.synchronize(device)
