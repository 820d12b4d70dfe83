"""Times, kernels and memory of calls on a CUDA device."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]


class Timer(Protocol):
    def __call__(self, call: Call, repeats: int) -> list[float]:
        """Milliseconds of each of `repeats` calls, one after the other."""


class CudaTimer:
    """CUDA events around each call; before each, the L2 cache is filled with something else: by reading it, as weights are read between two layers. Lines that
    were written instead would have to go to memory first, and their way there count as the call's: up to 11 microseconds on an H200."""

    def __init__(self, device: torch.device) -> None:
        size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 1 << 26)
        self._other = torch.zeros(max(size, 1 << 25), dtype=torch.int32, device=device)

    def __call__(self, call: Call, repeats: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        torch.cuda.synchronize()
        for start, end in events:
            self._other.max()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


@dataclass(frozen=True)
class Timing:
    """Median of each round in ms, and how many calls a round timed; or why there is none."""

    rounds: tuple[float, ...] = ()
    repeats: int = 0
    problem: str = ""

    @property
    def ms(self) -> float | None:
        return min(self.rounds) if self.rounds else None


def measure(calls: Mapping[str, Call], timer: Timer, seconds: float = 0.5, rounds: int = 3) -> dict[str, Timing]:
    """Each call in turn, `rounds` times over, so that a clock that drifts meets all alike; about `seconds` for a call in all.

    A call that fails has its error as its problem and takes no further part.
    """
    repeats: dict[str, int] = {}
    medians: dict[str, list[float]] = {name: [] for name in calls}
    problems: dict[str, str] = {}
    for name, call in calls.items():  # warm-up: compiles, and says how long a call takes
        try:
            timer(call, 1)
            once = timer(call, 1)[0]
            repeats[name] = max(2, min(30, round(seconds * 1e3 / rounds / max(once, 1e-3))))
        except Exception as error:  # whatever a kernel or a library may raise: the others are measured all the same
            problems[name] = describe(error)
    for _ in range(rounds):
        for name, call in calls.items():
            if name in problems:
                continue
            try:
                medians[name].append(statistics.median(timer(call, repeats[name])))
            except Exception as error:
                problems[name] = describe(error)
    return {name: Timing(problem=problems[name]) if name in problems else Timing(tuple(medians[name]), repeats[name]) for name in calls}


def describe(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def kernels_of(call: Call, repeats: int = 3) -> dict[str, float]:
    """Milliseconds per call that each kernel took on the GPU, by its name, copies and fills included."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profiler.events() or []:
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            found[event.name] = found.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e3 / repeats
    return found


def peak_bytes(call: Call) -> int:
    """Most bytes allocated at once during a call, above what was allocated before it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
