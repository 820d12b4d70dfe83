"""What a person reads while a run goes: a live panel on a terminal, plain lines anywhere else."""

from __future__ import annotations

import statistics
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

__all__ = ["Console", "format_count", "format_duration"]

MEDIAN_STEPS = 50  # step times that the time left is judged by; a median does not mind a validation or a slow first step


def format_duration(seconds: float) -> str:
    """`42 s`, `7 min 03 s`, `2 h 05 min`, `3 d 04 h`."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def format_count(value: float) -> str:
    """Three digits and a unit: `950`, `12.3k`, `1.20M`, `4.56G`."""
    units = ["", "k", "M", "G", "T"]
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    if units[0] == "":
        return f"{value:.0f}"
    return f"{value:.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}{units[0]}"


# Key of a metrics row, its name on the screen, how its value is written. The order is the order on the screen.
_FIELDS = (
    ("loss", "loss", "{:.4f}".format),
    ("val_loss", "val loss", "{:.4f}".format),
    ("val_bpb", "val bpb", "{:.4f}".format),
    ("lr", "lr", "{:.2e}".format),
    ("grad_norm", "grad norm", "{:.2f}".format),
    ("tokens_per_second", "tokens/s", format_count),
    ("mfu", "MFU", "{:.1%}".format),
    ("max_memory_gib", "memory", "{:.2f} GiB".format),
    ("data_wait_fraction", "data wait", "{:.1%}".format),
    ("update_wait_fraction", "update wait", "{:.1%}".format),
    ("expert_load_max_over_mean", "expert load max/mean", "{:.2f}".format),
)


def cells(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what a metrics row holds; null is left out, MFU where the peak is unknown."""
    return [(name, write(row[key])) for key, name, write in _FIELDS if row.get(key) is not None]


class Console:
    """Messages and progress of one rank; with `enabled=False` (every rank but 0) silent, warnings included.

    `info` and `warning` work at any time; `live` brackets the steps:

        with console.live(total_steps, first_step):
            console.advance(step, seconds)   # each optimizer step
            console.update(row)              # each row that goes to metrics.jsonl

    `stdout` and `stderr` default to the process's own.
    """

    def __init__(self, enabled: bool = True, stdout: TextIO | None = None, stderr: TextIO | None = None) -> None:
        self.enabled = enabled
        self._stdout, self._stderr = stdout, stderr
        self._live: Any = None
        self._total = self._step = 0
        self._latest: dict[str, Any] = {}
        self._seconds: deque[float] = deque(maxlen=MEDIAN_STEPS)

    # Looked up at each use: a test or a notebook may have put another stream in place since.
    @property
    def stdout(self) -> TextIO:
        return self._stdout or sys.stdout

    @property
    def stderr(self) -> TextIO:
        return self._stderr or sys.stderr

    def info(self, message: str) -> None:
        """One message on stdout, above the panel where there is one."""
        if not self.enabled:
            return
        if self._live is not None:
            self._live.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, file=self.stdout, flush=True)

    def warning(self, message: str) -> None:
        """One message on stderr, beginning with `warning:`. Where stderr is the terminal of the panel, above the panel."""
        if not self.enabled:
            return
        if self._live is not None and self.stderr.isatty():
            self._live.console.print(f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        else:
            print(f"warning: {message}", file=self.stderr, flush=True)

    @contextmanager
    def live(self, total_steps: int, first_step: int = 0) -> Iterator[None]:
        """The panel for steps `first_step` + 1 … `total_steps`. However the block ends, the terminal is itself again afterwards."""
        self._total, self._step = total_steps, first_step
        self._latest = {}
        self._seconds.clear()
        self._live = self._start_panel() if self.enabled and self.stdout.isatty() else None
        try:
            yield
        finally:
            if self._live is not None:
                live, self._live = self._live, None
                live.stop()

    def advance(self, step: int, seconds: float) -> None:
        """An optimizer step has ended and took so long."""
        self._step = step
        self._seconds.append(seconds)

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a training or validation row. The panel keeps the last value of each; lines show the row."""
        self._step = max(self._step, int(row["step"]))
        self._latest |= {key: value for key, value in row.items() if value is not None}
        if self.enabled and self._live is None:
            self.info(self._line(row))

    def seconds_left(self) -> float | None:
        """Steps that remain times the median of the latest step times; None before the first step."""
        return statistics.median(self._seconds) * (self._total - self._step) if self._seconds else None

    def _line(self, row: Mapping[str, Any]) -> str:
        width = len(str(self._total))
        parts = [f"step {row['step']:>{width}}/{self._total}"] + [f"{name} {value}" for name, value in cells(row)]
        left = self.seconds_left()
        if left is not None and "val_loss" not in row:
            parts.append(f"{format_duration(left)} left")
        return " | ".join(parts)

    def _start_panel(self) -> Any:
        import rich.console
        import rich.live

        screen = rich.console.Console(file=self.stdout)
        if screen.is_dumb_terminal:
            return None
        # Rich would send redirected stderr to the panel's stdout, so only where both are the terminal.
        live = rich.live.Live(console=screen, get_renderable=self._panel, refresh_per_second=4, redirect_stderr=self.stderr.isatty())
        live.start(refresh=True)
        return live

    def _panel(self) -> Any:
        return _Panel(self._step, self._total, cells(self._latest), self.seconds_left())


class _Panel:
    """A bar and the latest numbers, laid out for whatever width the terminal has at the moment."""

    def __init__(self, step: int, total: int, numbers: list[tuple[str, str]], left: float | None) -> None:
        self.step, self.total, self.numbers, self.left = step, total, numbers, left

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        width = options.max_width
        head = f"step {self.step}/{self.total}"
        tail = "" if self.left is None else f"{format_duration(self.left)} left"
        bar = width - len(head) - len(tail) - 4
        if bar >= 10:
            line = Text(head + "  ", style="bold", end="", no_wrap=True)
            yield line
            yield from console.render(ProgressBar(total=max(self.total, 1), completed=self.step, width=bar), options)
            yield Text("  " + tail, no_wrap=True, overflow="crop")
        else:
            yield Text("  ".join(part for part in (head, tail) if part), style="bold", no_wrap=True, overflow="ellipsis")
        text, used = Text(no_wrap=True, overflow="ellipsis"), 0
        for name, value in self.numbers:
            size = len(name) + 1 + len(value)
            if used and used + 3 + size > width:
                yield text
                text, used = Text(no_wrap=True, overflow="ellipsis"), 0
            if used:
                text.append("   ")
            text.append(name + " ", style="dim").append(value, style="cyan" if name.startswith("val") else "")
            used += size + (3 if used else 0)
        if used:
            yield text
