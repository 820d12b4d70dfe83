"""`nsa doctor`: what this machine has, what works on it, and how to get what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from typing import Any

from nsa_transformer.kernels import dispatch, sparse_attention
from nsa_transformer.utils.hardware import GIB, describe_machine, installed_version

__all__ = ["doctor_report"]

# Distribution, what it is for, how to get it.
_OPTIONAL = (
    ("hydra-core", "python training/trainer.py", "pip install -r requirements.txt"),
    ("tokenizers", "tokenizer training and text", "pip install -r requirements.txt"),
    ("safetensors", "checkpoints", "pip install -r requirements.txt"),
    ("pyarrow", "parquet data", "pip install pyarrow"),
    ("rich", "the live panel", "pip install rich"),
    ("matplotlib", "plots/*.png", "pip install matplotlib"),
    ("tensorboard", "logging.tensorboard", "pip install tensorboard"),
    ("wandb", "logging.wandb.project", "pip install wandb"),
)


def doctor_report() -> str:
    """A plain table of the machine, the attention backends and the optional packages, one fact a line, ready to print."""
    machine = describe_machine()
    sections = [
        ("Machine", _machine_lines(machine)),
        ("Attention backends", _backend_lines(machine)),
        ("Distributed", _distributed_lines(machine)),
        ("Packages", _package_lines()),
    ]
    width = max(len(name) for _, lines in sections for _, name, _ in lines)
    text = []
    for title, lines in sections:
        text += [title, *(f"  {mark:7}  {name:{width}}  {value}".rstrip() for mark, name, value in lines), ""]
    return "\n".join(text).rstrip() + "\n"


Lines = list[tuple[str, str, str]]  # mark ("ok", "missing" or nothing), name, value


def _machine_lines(machine: dict[str, Any]) -> Lines:
    memory = machine["memory_bytes"]
    lines = [
        ("", "system", machine["system"]),
        ("", "python", machine["python"]),
        ("", "cpu", f"{machine['cpu']}, {machine['cores']} cores for this process"),
        ("", "memory", "unknown" if memory is None else f"{memory / GIB:.1f} GiB"),
        ("", "torch", f"{machine['torch']}, built for {'CUDA ' + machine['cuda'] if machine['cuda'] else 'the CPU'}"),
    ]
    for index, gpu in enumerate(machine["gpus"]):
        peak = gpu["peak_bf16_flops"]
        speed = "bf16 peak unknown, so MFU is not shown" if peak is None else f"bf16 peak {peak / 1e12:.0f} TFLOP/s"
        lines.append(("ok", f"gpu {index}", f"{gpu['name']}, {gpu['memory_bytes'] / GIB:.1f} GiB, compute capability {gpu['capability']}, {speed}"))
    if not machine["gpus"]:
        if machine["cuda"]:
            lines.append(("missing", "gpu", "torch sees none: `nvidia-smi` shows whether there is a driver; CUDA_VISIBLE_DEVICES must not be empty"))
        elif os.path.exists("/proc/driver/nvidia/version"):
            lines.append(
                ("missing", "gpu", "an NVIDIA driver is here, but this torch is the CPU build: install a CUDA build (https://pytorch.org/get-started)")
            )
        else:
            lines.append(("missing", "gpu", "none; training runs on the CPU, where model=tiny takes minutes"))
    elif not machine["bf16"]:
        lines.append(("missing", "bf16", f"{machine['gpus'][0]['name']} has no bf16 tensor cores; write training.precision=fp32"))
    if machine["bf16"]:
        lines.append(("ok", "bf16", "training.precision=bf16" + ("" if machine["gpus"] else ", emulated where the CPU lacks it")))
    return lines


def _backend_lines(machine: dict[str, Any]) -> Lines:
    lines = [("ok", "reference", "plain PyTorch, any device"), *_triton_lines(machine, dispatch.triton_missing()), ("", "auto", dispatch.describe_auto())]
    return [*lines, _extension_line(dispatch.extension_missing())]


def _extension_line(why_not: str | None) -> tuple[str, str, str]:
    if why_not is None:
        return "ok", "cuda", "the CUDA C++ extension, for nsa_decode"
    if sparse_attention.no_gpu() is not None:
        return "missing", "cuda", f"the CUDA C++ extension needs {sparse_attention.NEEDS}"
    return "missing", "cuda", f"{why_not}: cd {sparse_attention.setup.FOLDER} && {sparse_attention.setup.COMMAND}"


def _triton_lines(machine: dict[str, Any], why_not: str | None) -> Lines:
    version = f"triton {machine['triton']}"
    if why_not is not None:
        if platform.system() != "Linux":
            remedy = "Triton exists for Linux alone"
        elif machine["triton"] is None:
            remedy = "pip install 'triton>=3.6,<3.8'"
        elif machine["gpus"]:
            remedy = f"{version} is here; the kernels need an NVIDIA GPU of compute capability 8.0 (A100) or higher"
        else:
            remedy = f"{version} is here; TRITON_INTERPRET=1 runs the kernels slowly on the CPU, for tests"
        return [("missing", "triton", f"{why_not}: {remedy}")]
    if dispatch.interpreted():
        return [("ok", "triton", f"{version}, interpreted on the CPU since TRITON_INTERPRET is set: for tests, very slow")]
    lines = [("ok", "triton", version)]
    old = [f"gpu {index}" for index, gpu in enumerate(machine["gpus"]) if not gpu["bf16"]]
    if old:
        lines.append(("missing", "triton", f"not on {', '.join(old)}: compute capability below 8.0, so the reference computes there"))
    # Where Triton itself looks.
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        lines.append(("missing", "c compiler", "Triton builds small C modules at run time: install gcc (apt install gcc), or set CC"))
    elif not os.path.exists(os.path.join(_python_headers(), "Python.h")):
        lines.append(("missing", "Python.h", "Triton builds small C modules at run time: install Python's headers (apt install python3-dev)"))
    return lines


def _python_headers() -> str:
    """Debian's scheme for `pip install` outside of a virtual environment names a folder that headers are not in."""
    scheme = sysconfig.get_default_scheme()
    return sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)


def _distributed_lines(machine: dict[str, Any]) -> Lines:
    return [
        ("ok", "gloo", "torchrun on CPUs") if machine["gloo"] else ("missing", "gloo", "this torch was built without it"),
        ("ok", "nccl", "torchrun on GPUs") if machine["nccl"] else ("missing", "nccl", "this torch was built without it; a CUDA build has it"),
    ]


def _package_lines() -> Lines:
    lines: Lines = []
    for package, purpose, remedy in _OPTIONAL:
        version = installed_version(package)
        lines.append(("ok", package, f"{version}, for {purpose}") if version else ("missing", package, f"for {purpose}: {remedy}"))
    return lines
