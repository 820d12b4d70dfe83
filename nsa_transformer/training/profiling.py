"""A trace of a few steps of a run, for a person to open and look at."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nsa_transformer.config import ProfilingConfig

__all__ = ["Profiler"]

MEMORY_EVENTS = 200_000  # allocations that the snapshot's history holds


class Profiler:
    """Traces `config.num_steps` steps after `config.start_step` steps of this process; a context manager around the loop.

    Call `step()` at the end of each optimizer step. Writes `run_dir/profiler/trace_rank<r>.json.gz` and, with `trace_memory`
    on CUDA, `memory_rank<r>.pickle`, once the last of the steps is done (or when the loop ends among them), and tells `log`
    how to open them. A run too short for a trace says so. When off, `step()` returns at once.
    """

    def __init__(self, run_dir: str | os.PathLike[str], config: ProfilingConfig, device: torch.device | str, log: Callable[[str], None]) -> None:
        self.config, self.device, self.log = config, torch.device(device), log
        self.folder = Path(run_dir) / "profiler"
        self.steps = 0  # ended so far
        self.traced: int | None = None  # steps in the trace that was written
        self._profile: torch.profiler.profile | None = None
        self._records_memory = False
        self._failed = False  # an error ended the loop: then even a part of a step is worth a look

    def __enter__(self) -> Profiler:
        if not self.config.enabled:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's tracer writes lines of its own to the screen
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        # The profiler's own start-up is slow; its warm-up step keeps that out of the trace.
        self._profile = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=self.config.start_step - 1, warmup=1, active=self.config.num_steps, repeat=1),
            on_trace_ready=self._write,
            profile_memory=self.config.trace_memory,
            record_shapes=True,
        )
        self._profile.start()
        return self

    def step(self) -> None:
        """One optimizer step has ended."""
        if self._profile is None:
            return
        self.steps += 1
        if self.steps == self.config.start_step and self.config.trace_memory and self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
            self._records_memory = True
        self._profile.step()
        if self.traced is not None:
            self._stop()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._profile is None:
            return
        self._failed = error is not None
        try:
            self._stop()
        except Exception as failure:
            if error is None:
                raise
            self.log(f"the profiler failed after the error that ended the run: {failure}")
        if self.traced is None:
            self.log(
                f"nothing was traced: {self.steps} steps ran, and tracing begins after logging.profiling.start_step={self.config.start_step}; "
                "write a smaller start_step or run longer"
            )

    def _stop(self) -> None:
        profile, self._profile = self._profile, None
        assert profile is not None
        profile.stop()  # writes through on_trace_ready where the loop ended among the traced steps
        if self._records_memory:
            torch.cuda.memory._record_memory_history(enabled=None)
            self._records_memory = False

    def _write(self, profile: torch.profiler.profile) -> None:
        traced = min(self.steps - self.config.start_step, self.config.num_steps)
        if traced == 0 and not self._failed:
            return  # the loop ended exactly where the trace would begin
        rank = _rank()
        if self._records_memory:
            # Before the trace: after an out-of-memory error this is the file that matters.
            snapshot = self.folder / f"memory_rank{rank}.pickle"
            self._place(snapshot, torch.cuda.memory._dump_snapshot)
            self.log(f"memory snapshot: {snapshot}; drop it on https://docs.pytorch.org/memory_viz")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        path = self.folder / f"trace_rank{rank}.json.gz"
        self._place(path, profile.export_chrome_trace)
        self.traced = traced
        first = self.config.start_step + 1
        steps = f"steps {first} to {first + traced - 1}" if traced > 1 else f"step {first}" + (" (unfinished)" if traced == 0 else "")
        memory = "; allocations are its [memory] events" if self.config.trace_memory else ""
        self.log(f"trace of {steps} of this process: {path}; open it at https://ui.perfetto.dev or chrome://tracing{memory}")
        if self.config.trace_memory and self.device.type != "cuda":
            self.log("a memory snapshot exists on CUDA alone; on this device the allocations are in the trace")

    @staticmethod
    def _place(path: Path, write: Callable[[str], Any]) -> None:
        """Under its name only when it is whole. The temporary name keeps the ending, from which torch takes the format."""
        temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
        try:
            write(str(temporary))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
