"""Every Triton kernel compiles for the chips we name and stays within the registers, spills and shared memory of its budget. No GPU is needed.

The kernels are compiled by `tests/kernels/aot.py` in a process of its own, because Triton decides at import whether they are interpreted,
and other tests of this process may have decided so.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels import aot, aot_budget

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton exists for Linux alone")


def compile_there(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The report of `python -m tests.kernels.aot`; it holds errors too, so only a process that died leaves none."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "tests.kernels.aot", "--json", str(report), *arguments]
    path = os.pathsep.join([str(aot.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, cwd=aot.ROOT, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert report.exists(), f"status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return json.loads(report.read_text())


def printed_there(script: str) -> Any:
    """What a script prints as JSON in its last line, in a process that compiles."""
    path = os.pathsep.join([str(aot.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    there = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=aot.ROOT, env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize(
    ("target", "tier"),
    [
        pytest.param(90, ["--fast"]),
        pytest.param(90, ["--slow"], marks=pytest.mark.slow),
        pytest.param(80, [], marks=pytest.mark.slow),
        pytest.param(100, [], marks=pytest.mark.slow),
    ],
    ids=["sm_90", "sm_90-others", "sm_80", "sm_100"],
)
def test_every_kernel_stays_within_its_budget(target: int, tier: list[str], tmp_path: Path) -> None:
    report = compile_there(tmp_path, f"--target={target}", *tier)
    assert any(report["kernels"].values()), "no kernel was launched"
    wrong = aot_budget.compare(report, aot_budget.read())
    assert not wrong, "\n".join(wrong)


TOY = """
import torch, triton, triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

@triton.jit
def scale(x, y, n, factor, flag, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, i < n) * factor
    if y is not None:
        value += tl.load(y + i, i < n)
    tl.store(x + i, value, i < n)

@triton.jit(do_not_specialize=["depth"])
def multiply(a, b, c, depth, M: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr):
    acc = tl.zeros([M, M], tl.float32)
    for k in tl.range(0, depth, K, num_stages=STAGES):
        acc = tl.dot(a.load([0, k]), b.load([k, 0]), acc)
    tl.store(c + tl.arange(0, M)[:, None] * M + tl.arange(0, M)[None, :], acc)

@triton.jit
def shift(x, by):
    tl.store(x + by, 0.0)

@triton.jit(do_not_specialize=["by"])
def count(x, by):
    tl.store(x + by, 0.0)

@triton.jit
def wrong(x):
    tl.store(x, tl.arange(0, 3))

def launch():
    x = torch.empty(4096, dtype=torch.bfloat16)
    scale[(4,)](x, None, 1000, 0.5, 1, BLOCK=1024)
    scale[lambda meta: (4096 // meta["BLOCK"],)](x, x, 1024, 0.5, 1, BLOCK=1024, num_warps=8)
    scale[(4,)](x, None, 1001, 2.5, 1, BLOCK=1024)
    shift[(1,)](x, 16)
    shift[(1,)](x, 17)
    shift[(1,)](x.float(), 1)
    count[(1,)](x, 16)
    count[(1,)](x, 1)
    a, b, c = torch.empty(64, 512, dtype=torch.bfloat16), torch.empty(512, 64, dtype=torch.bfloat16), torch.empty(64, 64)
    multiply[(1,)](TensorDescriptor.from_tensor(a, [64, 64]), TensorDescriptor.from_tensor(b, [64, 64]), c, 512, M=64, K=64, STAGES=3, maxnreg=128)
    wrong[(1,)](x)
"""


@needs_triton
def test_launches_are_specialised_as_they_would_be_at_run_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy_kernels.py").write_text(TOY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = compile_there(tmp_path, "--target=90", "--call=toy_kernels:launch")["kernels"]["launch"]
    scales = [name for name in found if name.startswith("scale")]
    # 1000 and 1001 make one kernel, 1024 is a multiple of 16 and makes another.
    assert scales == ["scale[num_warps=None]", "scale[num_warps=8]"]
    assert [found[name]["warps"] for name in scales] == [4, 8]
    shifts = [name for name in found if name.startswith("shift")]
    assert shifts == ["shift[x=*bf16,by%16=True]", "shift[x=*bf16,by%16=False]", "shift[x=*fp32,by%16=None]"]
    assert "count" in found  # once: its integer is not specialised
    product = found["multiply"]
    assert product["instructions"]["wgmma"] > 0 and product["instructions"]["tma"] > 0 and product["instructions"]["mma.sync"] == 0
    assert 0 < product["registers"] <= 128 and product["spills"] == 0
    assert product["shared"] >= 3 * 2 * 64 * 64 * 2  # three stages of both tiles in bf16
    assert "arange" in found["wrong"]["error"]


LAUNCHES = """
import json
from tests.kernels import aot
from tests.kernels.aot_cases import cases

found = {}
for case in cases():
    if case.name in ("experts decode bf16", "expert slots", "experts bf16, few rows each", "decoding bf16 128 G16, 64k"):
        for target in (80, 90, 100):
            with aot.record(target) as recording:
                case.call()
            for launch in recording.launches:
                found.setdefault(f"{target} {launch.name}", []).append([launch.options.get("launch_pdl", False), launch.args.get("PDL", False)])
print(json.dumps(found))
"""


@needs_triton
def test_who_is_launched_before_the_kernel_ahead_has_ended() -> None:
    """From compute capability 9.0 on. What is launched so must wait, and the kernel ahead may say when it can begin: both are compiled in by PDL."""
    found: dict[str, list[list[bool]]] = printed_there(LAUNCHES)
    assert all(choice == [False, False] for name, choices in found.items() if name.startswith("80 ") for choice in choices)
    for target in (90, 100):
        mine = {name.removeprefix(f"{target} "): choices for name, choices in found.items() if name.startswith(f"{target} ")}
        sums = mine.pop("experts_sum")
        assert sums.count([True, True]) == 4 and sums.count([False, False]) == 2, "decoding's; training's forward and backward"
        assert mine.pop("experts_decode_down") == [[True, True], [False, True], *[[True, True]] * 3], "the second one follows a copy as well"
        assert mine.pop("slots_fetch") == [[False, True], [True, True], [False, True]], "the part that begins beyond 0 follows the one before it"
        for name in ("decode_scan", "decode_rank", "decode_selected", "decode_combine"):
            assert set(map(tuple, mine.pop(name))) == {(True, True)}, name
        assert set(map(tuple, mine.pop("experts_decode_up"))) == {(False, True)}, "*down* reads what was written before *up*"
        assert all(choice == [False, False] for choices in mine.values() for choice in choices)


SMALL_CHIP = """
import json
from functools import partial

import torch
from tests.kernels import aot
from tests.kernels.aot_cases import decoding

aot.TARGETS[89] = (99 * 1024, 128)  # an L40S or an RTX 4090; later ones of 12.0 have as much
cases = [
    aot.Case(f"{dtype} {dk}/{dv}", partial(decoding, 1, 64, dk, dv, 16, dtype, 512), targets=(89,))
    for dk, dv, dtype in ((128, 128, torch.bfloat16), (256, 256, torch.bfloat16), (192, 128, torch.float32))
]
found = aot.compile_cases(cases, 89, "decode_s")
print(json.dumps({f"{case} {name}": kernel.get("shared") for case, kernels in found.items() for name, kernel in kernels.items()}))
"""


@pytest.mark.slow
@needs_triton
def test_decoding_with_e4m3_fits_chips_with_little_shared_memory() -> None:
    found = printed_there(SMALL_CHIP)
    assert len(found) == 6 and all(shared is not None and shared <= 99 * 1024 for shared in found.values()), found


KERNEL = {"registers": 100, "spills": 0, "shared": 1024}


def reported(**changes: Any) -> dict[str, Any]:
    return {"triton": "3.7.1", "target": 90, "limit": 227 * 1024, "cases": ["one", "slow one"], "kernels": {"one": {"sum": KERNEL | changes}}}


def test_a_kernel_within_its_budget_passes_and_one_beyond_does_not() -> None:
    budget = aot_budget.update(reported(), {})
    assert aot_budget.compare(reported(), budget) == []
    assert aot_budget.compare(reported(registers=90, shared=0), budget) == []
    assert aot_budget.compare(reported(registers=101), budget) == ["sm_90 one sum: registers 101, budget 100"]
    assert aot_budget.compare(reported(spills=8), budget) == ["sm_90 one sum: spills 8, budget 0"]
    assert len(aot_budget.compare(reported(shared=227 * 1024 + 1), budget)) == 2  # beyond its budget and beyond the chip
    assert "does not compile" in aot_budget.compare({**reported(), "kernels": {"one": {"sum": {"error": "no"}}}}, budget)[0]


def test_budget_and_kernels_are_the_same_set() -> None:
    budget = aot_budget.update(reported(), {})
    assert "has no budget" in aot_budget.compare(reported(), {})[0]
    stale = copy.deepcopy(budget)
    stale["targets"]["90"]["one"]["product"] = KERNEL
    assert "sm_90 one product has a budget and is launched no more" in aot_budget.compare(reported(), stale)[0]
    stale = copy.deepcopy(budget)
    stale["targets"]["90"] |= {"gone": {}, "slow one": {"sum": KERNEL}}  # a case of the other tier was not compiled now, and still is one
    assert [line.partition(":")[0] for line in aot_budget.compare(reported(), stale)] == ["sm_90 gone has a budget and is no case any more"]
    assert aot_budget.update(reported(), stale)["targets"]["90"] == {"one": {"sum": KERNEL}, "slow one": {"sum": KERNEL}}


def test_another_version_of_triton_has_other_numbers() -> None:
    budget = aot_budget.update(reported(), {})
    other = {**reported(registers=200), "triton": "3.6.0"}
    assert aot_budget.compare(other, budget) == []
    assert aot_budget.update(other, budget)["triton"] == "3.6.0"
    assert len(aot_budget.compare({**reported(shared=1 << 20), "triton": "3.6.0"}, budget)) == 1  # the chip's limit holds for every version
