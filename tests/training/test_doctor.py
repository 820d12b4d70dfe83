from __future__ import annotations

from typing import Any

import pytest

from nsa_transformer import kernels
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
V100 = {"name": "Tesla V100-SXM2-16GB", "memory_bytes": 16 * 1024**3, "capability": "7.0", "bf16": False, "peak_bf16_flops": None}


def report(monkeypatch: pytest.MonkeyPatch, machine: dict[str, Any], backends: list[str]) -> dict[str, list[str]]:
    """Lines of the report by the name of what they are about."""
    monkeypatch.setattr(doctor, "describe_machine", lambda: machine)
    monkeypatch.setattr(kernels, "available_backends", lambda: backends, raising=False)
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    monkeypatch.setattr(doctor.os.path, "exists", lambda path: False)
    text = doctor.doctor_report()
    assert text.endswith("\n")
    return {" ".join(line[11:].split("  ")[0].split()): line.split() for line in text.splitlines() if line.startswith("  ")}


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = report(monkeypatch, CPU, ["reference"])
    assert lines["reference"][0] == "ok"
    assert "model=tiny" in lines["gpu"]
    assert lines["triton"][0] == "missing"
    assert "TRITON_INTERPRET=1" in " ".join(lines["triton"])
    assert lines["nccl"][0] == "missing"
    assert lines["gloo"][0] == "ok"


def test_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = report(monkeypatch, CPU | {"gpus": [H100, V100], "cuda": "13.0", "nccl": True}, ["reference", "triton"])
    assert "NVIDIA H100 PCIe, 80.0 GiB" in " ".join(lines["gpu 0"])
    assert "MFU is not shown" in " ".join(lines["gpu 1"])
    assert lines["triton"][:2] == ["ok", "triton"]
    assert "setup.py build_ext --inplace" in " ".join(lines["cuda"])


def test_what_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda package: None)
    lines = report(monkeypatch, CPU | {"gpus": [V100], "cuda": "13.0", "bf16": False, "triton": None}, ["reference"])
    assert "training.precision=fp32" in " ".join(lines["bf16"])
    assert "pip install triton" in " ".join(lines["triton"])
    assert "pip install wandb" in " ".join(lines["wandb"])
    assert report(monkeypatch, CPU | {"cuda": "13.0"}, ["reference"])["gpu"][0] == "missing"


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available_backends", lambda: ["reference"], raising=False)
    text = doctor.doctor_report()
    assert "Attention backends" in text
    assert max(len(line) for line in text.splitlines()) < 200
