"""A stream for copies beside the one that computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class CopyLane:
    """A stream beside the current one, whose work the device takes up first. On a CPU all happens in order, and there is none: marks are None."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def beside(self) -> AbstractContextManager[Any]:
        """Makes it the current stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event | None:
        """What the current stream has been given so far."""
        return None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()

    def wait(self, mark: torch.cuda.Event | None) -> None:
        """Let the current stream go on once all that was marked is done."""
        if mark is not None and self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(mark)
