"""Host memory that is taken page by page, and locking it; the CUDA runtime is pretended."""

from __future__ import annotations

import errno
import mmap
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from nsa_transformer.config import ConfigError
from nsa_transformer.memory import host


def test_a_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(mmap.mmap):
        def madvise(self, *_arguments: Any) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refused)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    zeros = host.host_zeros(5000)
    assert zeros.shape == (5000,) and not zeros.any()
    assert host.host_zeros(3, torch.bfloat16).fill_(1).sum() == 3


def test_page_locking_says_what_to_write_and_is_undone_with_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    class Runtime:
        status = 0

        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            calls.append(("lock", address))
            return self.status

        def cudaHostUnregister(self, address: int) -> int:
            calls.append(("unlock", address))
            return 0

    class Owner:
        pass

    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append(("wait", 0)))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    flat, owner, device = host.host_zeros(100), Owner(), torch.device("cuda")
    host.page_lock(flat, owner, device, "memory.expert_offloading.pin_memory")
    del owner
    assert calls == [("lock", flat.data_ptr()), ("wait", 0), ("unlock", flat.data_ptr())]
    runtime.status = 2
    with pytest.raises(ConfigError, match=r"CUDA error 2\); give .* or write memory\.expert_offloading\.pin_memory=false"):
        host.page_lock(flat, Owner(), device, "memory.expert_offloading.pin_memory")
