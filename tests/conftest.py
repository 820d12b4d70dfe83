"""What every test shares: who skips without a GPU, how Triton kernels run there, and how many threads a worker takes."""

from __future__ import annotations

import os

import pytest
import torch

# Triton decides when it is imported whether kernels are interpreted: without a GPU they are, so that CPU tensors go through them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    # The tests' tensors are small: more threads only wait for each other, and on busy cores a hundred times as long.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
