"""Host memory for what the GPU has no room for, and the way between the two."""

from __future__ import annotations

import mmap
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_transformer.config import ConfigError
from nsa_transformer.utils.hardware import GIB, memory_bytes

# Elements that the host computes at once, 16 MiB in float32: what one operation wrote, the next one finds in the caches of the cores.
CHUNK = 1 << 22
# Elements that cross the link at once, 64 MiB. Each part costs the thread that launches the backward a dozen calls, 0.1 to 0.4 ms: with parts of 4 Mi the
# backward of a large model took half as long again on an H200.
PART = 1 << 24
SMALL_PART = 1 << 20  # for models so small that no more is worth while
ALIGN = 16  # elements: a cache line of float32
RUN = 1 << 15  # elements whose norm one core takes


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


def part_size(total: int) -> int:
    """Elements that cross the link at once, for a model of so many: a 96th of it, such that a dozen rooms of float32 on the device take half a byte of each."""
    return min(PART, max(SMALL_PART, total // 96 // ALIGN * ALIGN))


@dataclass(frozen=True)
class Piece:
    """What a part has of one parameter."""

    parameter: int
    at: slice  # in each tensor of the part
    of: slice  # in the parameter, flat
    target: Tensor  # what passes read
    norm: int  # where the norm of its gradient goes


@dataclass(frozen=True)
class Part:
    """Up to `PART` elements of one parameter group, moved and updated at once. Its tensors are flat and float32; between pieces they are zero."""

    group: int
    pieces: Sequence[Piece]
    master: Tensor
    grad: Tensor  # a sum, of no use once it has been updated with
    first: Tensor
    second: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.master, self.grad, self.first, self.second

    def cut(self, size: int) -> Iterator[Part]:
        """The same in parts of up to `size` elements."""
        for begin in range(0, len(self.master), size):
            end = min(begin + size, len(self.master))
            pieces = []
            for piece in self.pieces:
                start, stop = max(piece.at.start, begin), min(piece.at.stop, end)
                if start < stop:
                    inside, first = slice(start - piece.at.start, stop - piece.at.start), piece.of.start
                    of = slice(first + inside.start, first + inside.stop)
                    pieces.append(Piece(piece.parameter, slice(start - begin, stop - begin), of, piece.target[inside], piece.norm))
            yield Part(self.group, pieces, *(tensor[begin:end] for tensor in self.tensors))


Behind = tuple[torch.cuda.Stream, torch.cuda.Event]  # a stream of the device, and a mark behind what it had been given
Coming = tuple[Part, Sequence[tuple[Piece, Tensor]]]  # pieces of a part, and their flat gradients on the device


def adamw(part: Part, steps: Tensor, options: dict[str, Any], factor: float) -> None:
    """torch's fused AdamW on the pieces of a part, wherever its tensors are, with gradients scaled by `factor` where that is below 1.

    Args:
        steps: float32, of each parameter the number of updates with this one, beside the part's tensors.
        options: lr, betas, eps and weight_decay.
    """
    if factor < 1:  # the sums themselves: `grad_scale` would divide, which rounds otherwise than torch's clipping
        part.grad.mul_(factor)
    masters, grads, first, second = ([tensor[piece.at] for piece in part.pieces] for tensor in part.tensors)
    torch._fused_adamw_(
        masters,
        grads,
        first,
        second,
        [],
        [steps[piece.parameter] for piece in part.pieces],
        lr=options["lr"],
        beta1=options["betas"][0],
        beta2=options["betas"][1],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        amsgrad=False,
        maximize=False,
    )


Tick = torch.cuda.Event | float


class Link(ABC):
    """The way between host and device. Three threads may use it: one for `settle` and, where it is not `beside`, `add`; one for `begin`, `to_device` and
    `sent`; one for `update` and `updated`, and for `add` where that is `beside`. `begin_update`, `add` and `finish` are called while nothing is being updated,
    and `settle` and `finish` while nothing is being added."""

    share = 0.0  # of the elements that `update` takes, where host and device update side by side
    beside = False  # whether `add` is for a thread of its own, so that its calls do not hold up the backward's launches

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
    def add(self, coming: Sequence[Coming], norms: Tensor, received: Container[int], behind: Behind | None) -> None:
        """Gradients on the device into their sums, of arenas: added where the parameter is in `received`, else put in their place. norms, float32 on the
        device: those of a part's pieces are written anew, such that all of them together have the norm of the sums of all that has been received. `behind`:
        as the thread of the backward gave it, once it had the gradients."""

    @abstractmethod
    def behind(self) -> Behind | None:
        """Where the work of the calling thread goes on the device, and a mark behind all of it."""

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

    @abstractmethod
    def begin_update(self, steps: Tensor, ready: torch.cuda.Event | None) -> None:
        """What `update` does from now on waits for `ready`, and reads `steps`, of an arena."""

    @abstractmethod
    def update(self, part: Part, options: dict[str, Any], factor: float) -> None:
        """`adamw` on the device for a part in arenas, and its targets written, which are the device's. Waits until there is room for the part, not for its
        update; part and steps are left alone until `finish`, or a `settle` after a later `add`."""

    @abstractmethod
    def updated(self) -> torch.cuda.Event | None:
        """A mark behind all targets of `update`."""

    @abstractmethod
    def finish(self) -> None:
        """Until nothing in an arena is still being read or written for `to_device`, `update` or `add`."""

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

    def behind(self) -> None:
        return None

    def add(self, coming: Sequence[Coming], norms: Tensor, received: Container[int], behind: Behind | None) -> None:
        for part, pieces in coming:
            for piece, grad in pieces:
                into = part.grad[piece.at]
                if piece.parameter in received:
                    into += grad
                else:
                    into.copy_(grad)
                norms[piece.norm] = _norm(into)

    def settle(self) -> None:
        pass

    def begin(self, ready: torch.cuda.Event | None) -> None:
        assert ready is None

    def to_device(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        for source, target in pairs:
            target.copy_(source)

    def sent(self) -> None:
        return None

    def begin_update(self, steps: Tensor, ready: torch.cuda.Event | None) -> None:
        assert ready is None

    def update(self, part: Part, options: dict[str, Any], factor: float) -> None:
        raise AssertionError("without a device all parts are the host's")

    def updated(self) -> None:
        return None

    def finish(self) -> None:
        pass


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
