"""Speed of a run between two rows of metrics."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nsa_transformer.config import Config
from nsa_transformer.data.pack import Pack
from nsa_transformer.distributed.world import World
from nsa_transformer.memory.host import Tick
from nsa_transformer.models.flops import TrainingFlops
from nsa_transformer.utils.hardware import peak_flops


class Meter:
    """Speed between two rows of metrics, without validation and checkpoints. `update_waited` tells the seconds for which the device has waited for an
    offloaded optimizer since it was last called."""

    def __init__(self, config: Config, world: World, update_waited: Callable[[], float] | None = None) -> None:
        self._flops = TrainingFlops(config.model)
        self._peak = peak_flops(world.device, torch.bfloat16 if config.training.precision == "bf16" else torch.float32)
        self._world, self._device = world, world.device
        self._update_waited = update_waited
        self._clock = time.perf_counter
        self._loads: list[tuple[Tick, Tick]] = []
        self._reset()
        self.restart()

    def _reset(self) -> None:
        self._tokens, self._operations, self._seconds, self._waited, self._for_update = 0, 0, 0.0, 0.0, 0.0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def restart(self) -> None:
        """A step begins now."""
        if self._update_waited is not None:
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            self._update_waited()  # what a validation waited for
        self._began = self._clock()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """What is done inside is waiting for data, but for what a GPU has been given before and computes meanwhile."""
        begun = self._tick()
        yield
        self._loads.append((begun, self._tick()))

    def _tick(self) -> Tick:
        """The time when the device has done all that it was given."""
        if self._device.type != "cuda":
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def count(self, pack: Pack) -> None:
        self._tokens += pack.num_tokens
        self._operations += self._flops.of_documents(pack.document_lengths)

    def step_done(self) -> None:
        if self._device.type == "cuda":  # the stream and not the device: an offloaded optimizer's update goes on beside the next forward
            torch.cuda.current_stream(self._device).synchronize()
        self.last_step_seconds = self._clock() - self._began
        self._seconds += self.last_step_seconds
        for begun, ended in self._loads:
            if isinstance(begun, float) and isinstance(ended, float):
                self._waited += ended - begun
            elif isinstance(begun, torch.cuda.Event) and isinstance(ended, torch.cuda.Event):
                self._waited += begun.elapsed_time(ended) / 1e3
        self._loads.clear()
        if self._update_waited is not None:
            self._for_update += self._update_waited()

    def read(self) -> dict[str, Any]:
        """tokens/s of all ranks, MFU, peak memory and the shares of time spent waiting since the last reading."""
        totals = self._world.sum(torch.tensor([self._tokens, self._operations], dtype=torch.float64)).tolist()
        mfu = None if self._peak is None else totals[1] / self._seconds / (self._peak * self._world.size)
        row = {"tokens_per_second": totals[0] / self._seconds, "mfu": mfu, "max_memory_gib": peak_memory_gib(self._device)}
        row["data_wait_fraction"] = self._waited / self._seconds
        if self._update_waited is not None:
            row["update_wait_fraction"] = self._for_update / self._seconds
        self._reset()
        return row


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory since the last reading on a GPU; of the process so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # absent on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
