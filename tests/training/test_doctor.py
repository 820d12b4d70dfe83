from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_transformer.kernels import dispatch, sparse_attention
from nsa_transformer.training import doctor

CPU: dict[str, Any] = {
    "system": "Linux",
    "python": "3.11.2",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "cuda": None,
    "gpus": [],
    "cpu": "A CPU",
    "cores": 2,
    "memory_bytes": 8 * 1024**3,
    "gloo": True,
    "nccl": False,
    "bf16": True,
}
H100 = {"name": "NVIDIA H100 PCIe", "memory_bytes": 80 * 1024**3, "capability": "9.0", "bf16": True, "peak_bf16_flops": 756.5e12}
RTX = {"name": "NVIDIA GeForce RTX 5090", "memory_bytes": 32 * 1024**3, "capability": "12.0", "bf16": True, "peak_bf16_flops": None}
V100 = {"name": "Tesla V100-SXM2-16GB", "memory_bytes": 16 * 1024**3, "capability": "7.0", "bf16": False, "peak_bf16_flops": None}

NOT_BUILT = "the CUDA extension is not built"


def report(
    monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any], interpret: bool = False, files: str = "Python.h", library: object = NOT_BUILT
) -> dict[str, list[str]]:
    """Lines of the report by the name of what they are about; the last of several. Only files ending in `files` exist. `library`: the CUDA extension's, or
    what is wrong with it."""
    capabilities = [tuple(map(int, gpu["capability"].split("."))) for gpu in machine["gpus"]]
    monkeypatch.setattr(doctor, "describe_machine", lambda: machine)
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    monkeypatch.setattr(doctor.os.path, "exists", lambda path: path.endswith(files))
    monkeypatch.setattr(dispatch, "_TRITON", machine["triton"] is not None)
    monkeypatch.setattr(dispatch, "_INTERPRET", interpret)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    shared = {(7, 0): 96, (9, 0): 227, (12, 0): 99}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(shared_memory_per_block_optin=shared[capabilities[index]] << 10))
    monkeypatch.setattr(sparse_attention, "_load", lambda: library)
    text = doctor.doctor_report()
    assert text.endswith("\n")
    return {" ".join(line[11:].split("  ")[0].split()): line.split() for line in text.splitlines() if line.startswith("  ")}


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = report(monkeypatch, CPU)
    assert lines["reference"][0] == "ok"
    assert "model=tiny" in lines["gpu"]
    assert lines["triton"][0] == "missing"
    assert "torch sees no NVIDIA GPU" in " ".join(lines["triton"])
    assert "TRITON_INTERPRET=1" in " ".join(lines["triton"])
    assert " ".join(lines["auto"]) == "auto reference: torch sees no NVIDIA GPU"
    assert lines["nccl"][0] == "missing"
    assert lines["gloo"][0] == "ok"


def test_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc")
    machine = CPU | {"gpus": [H100, H100], "cuda": "13.0", "nccl": True}
    lines = report(monkeypatch, machine)
    assert "NVIDIA H100 PCIe, 80.0 GiB" in " ".join(lines["gpu 0"])
    assert lines["triton"] == ["ok", "triton", "triton", "3.7.1"]
    assert " ".join(lines["auto"]).startswith("auto triton on GPU tensors of bf16, fp16, fp32 with head widths 64, 128, 192, 256")
    lines = report(monkeypatch, machine | {"gpus": [H100, V100]})
    assert "MFU is not shown" in " ".join(lines["gpu 1"])
    assert " ".join(lines["triton"]).startswith("missing triton not on gpu 1")
    assert "triton on GPU tensors" in " ".join(lines["auto"])


def test_the_extension_is_there_or_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc")
    hopper = CPU | {"gpus": [V100, H100], "cuda": "13.0"}
    command = f"cd {sparse_attention.setup.FOLDER} && python setup.py build_ext --inplace"
    for why in (NOT_BUILT, "the CUDA extension was built from other sources, and is to be built again"):
        assert " ".join(report(monkeypatch, hopper, library=why)["cuda"]) == f"missing cuda {why}: {command}"
    lines = report(monkeypatch, hopper, library=SimpleNamespace())
    assert " ".join(lines["cuda"]) == "ok cuda the CUDA C++ extension, for nsa_decode"
    assert " ".join(lines["auto"]).endswith("else reference; nsa_decode: cuda where it takes the step and there are many sequences")
    for gpus in ([], [V100], [RTX]):
        line = " ".join(report(monkeypatch, CPU | {"gpus": gpus, "cuda": "13.0"})["cuda"])
        assert line.startswith("missing cuda the CUDA C++ extension needs an NVIDIA GPU of compute capability 9.0 (H100, H200) or higher with 227 KB of shared")


def test_what_triton_needs_to_build_its_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = CPU | {"gpus": [H100], "cuda": "13.0"}
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert "set CC" in " ".join(report(monkeypatch, machine)["c compiler"])
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "python3-dev" in " ".join(report(monkeypatch, machine, files="no file")["Python.h"])
    lines = report(monkeypatch, machine)
    assert not {"Python.h", "c compiler"} & set(lines)


def test_the_interpreter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = report(monkeypatch, CPU, interpret=True)
    assert lines["triton"][0] == "ok"
    assert "for tests" in " ".join(lines["triton"])
    assert "backend='triton'" in " ".join(lines["auto"])


def test_what_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda package: None)
    lines = report(monkeypatch, CPU | {"gpus": [V100], "cuda": "13.0", "bf16": False, "triton": None})
    assert "training.precision=fp32" in " ".join(lines["bf16"])
    assert "triton is not installed: pip install 'triton>=" in " ".join(lines["triton"])
    assert " ".join(lines["auto"]) == "auto reference: triton is not installed"
    assert "pip install wandb" in " ".join(lines["wandb"])
    lines = report(monkeypatch, CPU | {"gpus": [V100], "cuda": "13.0", "bf16": False})
    assert "compute capability 8.0 (A100) or higher" in " ".join(lines["triton"])
    assert report(monkeypatch, CPU | {"cuda": "13.0"})["gpu"][0] == "missing"


def test_the_range_of_triton_is_that_of_the_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (asked,) = [line.split(";")[0] for line in project["dependencies"] if line.startswith("triton")]
    assert f"pip install '{asked}'" in " ".join(report(monkeypatch, CPU | {"triton": None})["triton"])


def test_this_machine() -> None:
    text = doctor.doctor_report()
    assert "Attention backends" in text
    assert max(len(line) for line in text.splitlines()) < 200
