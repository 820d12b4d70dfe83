"""CUDA's streams and events on a CPU, where everything has happened by the time it is asked about: enough to run the code around them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
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
    def __init__(self, device: Any = None) -> None:
        self.waits = 0

    def wait_event(self, event: Event) -> None:
        assert isinstance(event, Event) and event.records
        self.waits += 1


def stand_in_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    current = Stream()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
