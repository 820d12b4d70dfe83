"""Threads of matrix products on a shared CPU."""

from __future__ import annotations

import os


def limit_spinning() -> None:
    """Let OpenMP threads sleep soon instead of spinning while they wait for each other. Call before torch is imported.

    The default suits an idle machine alone. With other work on both of two cores, a training step took 100 times as long
    (40 tokens/s instead of 4,500); with this limit it takes 6 times as long, and 7 % longer on an idle machine.
    A value that the environment has stays.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
