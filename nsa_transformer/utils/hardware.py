"""What this machine is, and how fast its GPU can be at best."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from functools import cache
from typing import Any

import torch

GIB = 2**30

__all__ = ["GIB", "describe_machine", "device_name", "peak_flops", "peak_flops_by_name"]

# Dense tensor-core peak in TFLOP/s for bf16 inputs with fp32 accumulation, by the name that the driver reports, without the maker's words.
# Data sheets that print only the figure "with sparsity" are halved. H100 SXM, PCIe and NVL are three different chips' worth of clock and units.
_BF16_DENSE: tuple[tuple[str, float], ...] = (
    # NVIDIA A100 data sheet (312 | 624 sparse); A800 differs in NVLink alone.
    (r"A[18]00[- ](SXM4-)?(PCIE-)?\d+GB( PCIe)?", 312.0),
    # NVIDIA A30, A40 and A10 data sheets.
    (r"A30", 165.0),
    (r"A40", 149.7),
    (r"A10", 125.0),
    # NVIDIA H100 data sheet: SXM 1979 sparse, PCIe 1513 sparse, NVL 1671 sparse per GPU. H800 SXM differs in NVLink alone.
    (r"H[18]00 (SXM5 )?\d+GB( HBM\d\w?)?|H[18]00 SXM\d?", 989.4),
    (r"H100 PCIe", 756.5),
    (r"H100 NVL", 835.5),
    # NVIDIA H200 data sheet: SXM 1979 sparse, NVL 1671 sparse. GH200 data sheet: 990 dense (1979 sparse).
    (r"H200( \d+GB.*)?", 989.4),
    (r"H200 NVL", 835.5),
    (r"GH200 .*", 989.4),
    # NVIDIA HGX B200 data sheet: 36 PFLOP/s sparse for 8 GPUs. GB200 NVL72: 360 PFLOP/s sparse for 72 GPUs.
    (r"B200( \d+GB.*)?", 2250.0),
    (r"GB200( .*)?", 2500.0),
    # NVIDIA L4, L40 and L40S data sheets (242, 362 and 733 sparse; L40 and L40S print their dense figures).
    (r"L4", 121.0),
    (r"L40", 181.0),
    (r"L40S", 362.0),
    # NVIDIA RTX A6000 (309.7 sparse) and RTX 6000 Ada (728.5 sparse) data sheets.
    (r"RTX A6000", 154.8),
    (r"RTX 6000 Ada Generation", 364.2),
    # NVIDIA Ampere GA102 white paper v2, tables 3 to 5, and for the later models twice the FP32 rate, as those tables have it.
    (r"RTX 3060", 25.5),
    (r"RTX 3060 Ti", 32.4),
    (r"RTX 3070", 40.6),
    (r"RTX 3070 Ti", 43.5),
    (r"RTX 3080", 59.5),
    (r"RTX 3080 Ti", 68.2),
    (r"RTX 3090", 71.2),
    (r"RTX 3090 Ti", 80.0),
    # NVIDIA Ada GPU architecture white paper, appendix A; the others again twice their FP32 rate.
    (r"RTX 4060", 30.2),
    (r"RTX 4060 Ti", 44.1),
    (r"RTX 4070", 58.3),
    (r"RTX 4070 SUPER", 70.9),
    (r"RTX 4070 Ti", 80.2),
    (r"RTX 4070 Ti SUPER", 88.2),
    (r"RTX 4080", 97.5),
    (r"RTX 4080 SUPER", 104.4),
    (r"RTX 4090", 165.2),
    # NVIDIA RTX Blackwell GPU architecture white paper, appendix A.
    (r"RTX 5070", 61.7),
    (r"RTX 5070 Ti", 87.9),
    (r"RTX 5080", 112.6),
    (r"RTX 5090", 209.5),
)

# Tensor cores without bf16. NVIDIA V100 and T4 data sheets.
_FP16_DENSE: tuple[tuple[str, float], ...] = (
    (r"V100-SXM\d-\d+GB(-LS)?", 125.0),
    (r"V100-PCIE-\d+GB", 112.0),
    (r"V100S-PCIE-\d+GB", 130.0),
    (r"T4", 65.0),
)


def peak_flops_by_name(name: str, dtype: torch.dtype) -> float | None:
    """Dense tensor-core peak in FLOP/s of the GPU that the driver calls `name`; None where no data sheet figure is known.

    bf16 and fp16 (with fp32 accumulation) alone. Laptop chips share a desktop name but not its speed, and a MIG slice is a
    part of a GPU: both are unknown.
    """
    tables = {torch.bfloat16: _BF16_DENSE, torch.float16: _BF16_DENSE + _FP16_DENSE}
    model = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", name.strip())
    for pattern, tera in tables.get(dtype, ()):
        if "MIG" not in model and re.fullmatch(pattern, model, re.IGNORECASE):
            return tera * 1e12
    return None


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """Dense tensor-core peak of `device` in FLOP/s, for MFU; None where unknown, as on every CPU."""
    device = torch.device(device)
    return peak_flops_by_name(device_name(device), dtype) if device.type == "cuda" else None


def device_name(device: torch.device | str) -> str:
    """What a person calls the device: `NVIDIA H200`, or the CPU's model."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_model() if device.type == "cpu" else device.type


@cache
def cpu_model() -> str:
    """The CPU's model name, or its architecture where the system does not tell."""
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "CPU"


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Main memory, or the container's limit (cgroup v2) where that is lower; None where the system does not tell."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    if os.path.exists("/sys/fs/cgroup/memory.max"):
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def installed_version(package: str) -> str | None:
    """Version of an installed distribution, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_machine() -> dict[str, Any]:
    """Facts about this machine, ready for JSON.

    `python`, `torch`, `triton`, `cuda` (the version torch was built for) are strings or None; `gpus` is a list of
    {name, memory_bytes, capability, bf16, peak_bf16_flops}; `cpu`, `cores`, `memory_bytes`; `gloo`, `nccl`, `bf16` are booleans
    (`bf16`: the first GPU computes it, or without a GPU the CPU does, which it always can, natively or not).
    """
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "capability": f"{properties.major}.{properties.minor}",
                "bf16": properties.major >= 8,
                "peak_bf16_flops": peak_flops_by_name(properties.name, torch.bfloat16),
            }
        )
    distributed = torch.distributed.is_available()
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "gloo": distributed and torch.distributed.is_gloo_available(),
        "nccl": distributed and torch.distributed.is_nccl_available(),
        "bf16": gpus[0]["bf16"] if gpus else True,
    }
