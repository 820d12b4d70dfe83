"""Memory of the reference attention: linear in T, forward and backward, and no T x T tensor on the way."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa_transformer import NSAConfig
from nsa_transformer.kernels import nsa_attention

from .cases import make_case

CONFIG = NSAConfig(compress_block=32, compress_stride=16, select_block=32, num_selected=4, window=64)


class Ledger(TorchDispatchMode):
    """Live and peak bytes of the tensors made under it, and the largest of them by elements."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self.known: dict[int, weakref.finalize] = {}

    def _free(self, key: int, size: int) -> None:
        del self.known[key]
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        existing = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in existing or key in self.known:
                continue
            size = storage.nbytes()
            self.largest = max(self.largest, size // tensor.element_size())
            self.live += size
            self.peak = max(self.peak, self.live)
            self.known[key] = weakref.finalize(storage, self._free, key, size)
        return result


def measure(length: int, documents: int = 1) -> tuple[Ledger, int]:
    case = make_case([length // documents] * documents, CONFIG, hkv=1, group=2, dk=8, dv=8, dtype=torch.float32)
    case = replace(case, inputs=case.inputs._replace(**{n: x.requires_grad_() for n, x in case.inputs._asdict().items()}))
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.untyped_storage().nbytes()
        return tensor

    with Ledger() as ledger:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            out = nsa_attention(*case.inputs, case.config, **case.keywords, backend="reference")
        grads = torch.autograd.grad(out, case.inputs, case.grad_out)
    assert all(g.isfinite().all() for g in grads)
    return ledger, kept


def test_the_ledger_counts():
    with Ledger() as ledger:
        x = torch.zeros(1000, dtype=torch.float64)
        y = x[:10].view(2, 5)
        z = (x + 1).sum()
    assert ledger.peak == 16008 and ledger.live == 8008 and ledger.largest == 1000, (ledger.peak, ledger.live)
    del x, y
    assert ledger.live == 8 and z == 1000


@pytest.mark.parametrize("documents", [1, 16])
def test_memory_is_linear(documents):
    """Twice the tokens need at most a little over twice the bytes: while it runs, and kept for backward."""
    half, half_kept = measure(4096, documents)
    whole, whole_kept = measure(8192, documents)
    assert whole.largest < 8192 * 8192 // 2, f"a tensor of {whole.largest} elements at T = 8192"
    assert whole.peak <= 2.3 * half.peak, f"peak of {half.peak / 2**20:.0f} MiB at T = 4096, {whole.peak / 2**20:.0f} MiB at 8192"
    assert whole_kept <= 2.1 * half_kept, f"{half_kept / 2**20:.1f} MiB kept for backward at T = 4096, {whole_kept / 2**20:.1f} MiB at 8192"


def test_no_large_tensor_with_many_key_heads():
    """The paper's geometry without grouping: what a chunk of queries gathers must count the heads and their width."""
    case = make_case([8192], NSAConfig(), lengths_q=[256], hkv=8, group=1, dk=64, dv=64, dtype=torch.float32)
    with Ledger() as ledger, torch.no_grad():
        nsa_attention(*case.inputs, case.config, **case.keywords, backend="reference")
    assert ledger.largest < 8192 * 8192 // 2, f"a tensor of {ledger.largest} elements at T = 8192"


@pytest.mark.slow
def test_memory_is_linear_far_out():
    (half, _), (whole, _) = measure(16384), measure(32768)
    assert whole.peak <= 2.2 * half.peak, f"peak of {half.peak / 2**20:.0f} MiB at T = 16384, {whole.peak / 2**20:.0f} MiB at 32768"
