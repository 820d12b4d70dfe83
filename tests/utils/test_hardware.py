from __future__ import annotations

import json
import platform

import pytest
import torch

from nsa_transformer.utils import hardware
from nsa_transformer.utils.hardware import describe_machine, device_name, installed_version, peak_flops, peak_flops_by_name


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA GeForce RTX 3090", 71.2),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        # Other chips, or parts of one, behind a name that begins the same.
        ("NVIDIA A10G", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-16GB", None),
        ("Tesla T4", None),
        ("NVIDIA H1000", None),
        ("Some GPU", None),
    ],
)
def test_bf16_peak_by_name(name: str, tera: float | None) -> None:
    assert peak_flops_by_name(name, torch.bfloat16) == (None if tera is None else pytest.approx(tera * 1e12))


def test_fp16_and_fp32() -> None:
    assert peak_flops_by_name("Tesla V100-SXM2-32GB", torch.float16) == pytest.approx(125e12)
    assert peak_flops_by_name("NVIDIA H200", torch.float16) == pytest.approx(989.4e12)
    assert peak_flops_by_name("NVIDIA H200", torch.float32) is None


def test_no_name_matches_two_rows() -> None:
    names = ["A100-SXM4-80GB", "H100 80GB HBM3", "H200", "H200 NVL", "GH200 480GB", "B200", "GB200", "L4", "L40", "L40S", "RTX 4070 Ti", "RTX 4070 Ti SUPER"]
    for name in names:
        assert sum(hardware.re.fullmatch(pattern, name) is not None for pattern, _ in hardware._BF16_DENSE) == 1, name


def test_the_cpu_has_a_name_and_no_known_peak() -> None:
    assert device_name("cpu")
    assert peak_flops("cpu", torch.bfloat16) is None


def test_description_is_plain_json() -> None:
    facts = describe_machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["python"] == platform.python_version()
    assert facts["cores"] >= 1
    assert facts["memory_bytes"] is None or facts["memory_bytes"] > 2**28
    assert len(facts["gpus"]) == torch.cuda.device_count()


def test_versions() -> None:
    assert installed_version("pytest") == pytest.__version__
    assert installed_version("no-such-package-anywhere") is None
