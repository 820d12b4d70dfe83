"""What may go wrong in a run, and how it is said."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from nsa_transformer.config import Config


class TrainingError(RuntimeError):
    """Training cannot go on; the message says what to do."""


class OutOfMemory(TrainingError):
    """The memory of the device, or of the machine, did not suffice."""


class Stopped(BaseException):
    """A signal came where nothing is worth saving. Like KeyboardInterrupt, no `except Exception` catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class StopSignal:
    """SIGTERM and Ctrl-C. Inside `deferred()` the first one only sets `received`, so that the loop can save; a second one, and
    any outside, raises `Stopped`."""

    def __init__(self) -> None:
        self.received = 0
        self._deferred = False

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._deferred and not self.received:
            self.received = number
            if os.environ.get("RANK", "0") == "0":
                # A long step can follow; os.write, since print is not safe where a signal may have interrupted a print.
                os.write(2, b"stopping after this step; a second signal stops at once, without saving\n")
        else:
            raise Stopped(number)


_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the device or of the machine did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in _MEMORY_WORDS)


def describe_out_of_memory(error: BaseException, doing: str, config: Config) -> str | None:
    """One message on what was being made and which keys would help; None where the error is not about memory."""
    if not is_out_of_memory(error):
        return None
    training, data, memory = config.training, config.data, config.memory
    helps = []
    if training.micro_batch_size > 1:
        helps.append("training.micro_batch_size=1")
    if memory.activation_checkpointing != "full":
        helps.append(f"memory.activation_checkpointing={'selective' if memory.activation_checkpointing == 'none' else 'full'}")
    helps.append(f"data.max_length={max(data.max_length // 2, 1)}")
    if training.loss_chunk_size > 256:
        helps.append(f"training.loss_chunk_size={training.loss_chunk_size // 4}")
    if isinstance(error, torch.OutOfMemoryError) and not memory.offloads_optimizer and "WORLD_SIZE" not in os.environ:
        helps.append("memory.optimizer_offloading.enabled=true (the optimizer in host memory)")
    helps.append("a smaller model (model=base, model=tiny), or more GPUs (torchrun --nproc_per_node=N), which share weights and moments")
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    packs = f"packs of {data.max_length} tokens × micro_batch_size {training.micro_batch_size}"
    return f"out of memory while {doing}, with {packs}. Try {', '.join(helps)}. ({first_line})"


_LOST_WORDS = ("Connection reset by peer", "Connection closed by peer", "Broken pipe")  # gloo's, of a rank whose process is gone


def describe_lost_rank(error: BaseException, doing: str) -> str | None:
    """One message where an error says that another rank of this run is gone; None where it does not."""
    if "WORLD_SIZE" not in os.environ or not any(word in str(error) for word in _LOST_WORDS):
        return None
    return f"another rank ended while {doing}; where it says nothing itself, the system may have killed it for want of memory"
