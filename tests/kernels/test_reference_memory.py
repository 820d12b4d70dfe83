"""Memory of the reference attention: linear in T, forward and backward, and no T x T tensor on the way."""

from __future__ import annotations

import json
import tempfile
from itertools import accumulate
from pathlib import Path

import pytest
import torch

from nsa_transformer import NSAConfig
from nsa_transformer.kernels import nsa_attention

from .cases import fresh, make_case

CONFIG = NSAConfig(compress_block=32, compress_stride=16, select_block=32, num_selected=4, window=64)
T_BY_T = 8192 * 8192


class Ledger:
    """Peak of the bytes that torch allocates within the block, and the largest single allocation.

    From the profiler, which sees the allocator itself: a dispatch mode would not look inside an operator.
    """

    def __init__(self) -> None:
        self.peak = self.largest = 0
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> Ledger:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "trace.json")
            self._profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
        live = list(accumulate(size for _, size in sorted(changes, key=lambda change: change[0])))
        self.peak = max(live, default=0)
        self.largest = max((size for _, size in changes), default=0)


def measure(length: int, documents: int = 1) -> tuple[Ledger, int]:
    """Forward and backward of one pack; also the bytes kept between the two."""
    case = make_case([length // documents] * documents, CONFIG, hkv=1, group=2, dk=8, dv=8, dtype=torch.float32)
    inputs = fresh(case.inputs)
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.untyped_storage().nbytes()
        return tensor

    with Ledger() as ledger:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            out = nsa_attention(*inputs, case.config, **case.keywords, backend="reference")
        grads = torch.autograd.grad(out, inputs, case.grad_out)
    assert all(g.isfinite().all() for g in grads)
    return ledger, kept


def test_the_ledger_counts():
    with Ledger() as ledger:
        x = torch.zeros(100_000)
        del x
        y = torch.zeros(70_000)
        z = y + 1
    assert y.nbytes + z.nbytes == 560_000 <= ledger.peak < 561_000  # and the few bytes of the scalar
    assert ledger.largest == 400_000


@pytest.mark.parametrize("documents", [1, 16])
def test_memory_is_linear(documents):
    """Twice the tokens need at most a little over twice the bytes: while it runs, and kept for backward."""
    half, half_kept = measure(4096, documents)
    whole, whole_kept = measure(8192, documents)
    assert half_kept > 0 and half.peak > half_kept
    assert whole.largest < 4 * T_BY_T // 2, f"a tensor of {whole.largest // 4} elements at T = 8192"
    assert whole.peak <= 2.3 * half.peak, f"peak of {half.peak / 2**20:.0f} MiB at T = 4096, {whole.peak / 2**20:.0f} MiB at 8192"
    assert whole_kept <= 2.1 * half_kept, f"{half_kept / 2**20:.1f} MiB kept for backward at T = 4096, {whole_kept / 2**20:.1f} MiB at 8192"


def test_no_large_tensor_with_many_key_heads():
    """The paper's geometry without grouping: what a chunk of queries gathers must count the heads and their width."""
    case = make_case([8192], NSAConfig(), lengths_q=[256], hkv=8, group=1, dk=64, dv=64, dtype=torch.float32)
    with Ledger() as ledger, torch.no_grad():
        nsa_attention(*case.inputs, case.config, **case.keywords, backend="reference")
    assert ledger.largest < 4 * T_BY_T // 2, f"a tensor of {ledger.largest // 4} elements at T = 8192"


@pytest.mark.slow
def test_memory_is_linear_far_out():
    (half, _), (whole, _) = measure(16384), measure(32768)
    assert whole.peak <= 2.2 * half.peak, f"peak of {half.peak / 2**20:.0f} MiB at T = 16384, {whole.peak / 2**20:.0f} MiB at 32768"
