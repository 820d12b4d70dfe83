"""Threads of matrix products on a shared CPU."""

from __future__ import annotations

import os


def limit_spinning() -> None:
    """Let OpenMP threads sleep soon instead of spinning while they wait for each other. Call before torch is imported.

    The default suits an idle machine alone. Beside two busy loops on two cores, forward and backward of a small model fell from 4,558
    to 40 tokens/s; with this limit from 4,247 to 708 (benchmarks/log.md).
    A value that the environment has stays.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
