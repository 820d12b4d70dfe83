"""`python setup.py build_ext --inplace` compiles csrc/*.cu into one shared library beside this file.

No header of torch goes in: the library has a plain C interface, so one build serves every torch. The package reads from here, too, what the library is called
and what it has to be built from.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
LIBRARY = FOLDER / "nsa_cuda.so"
COMMAND = "python setup.py build_ext --inplace"
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
FLAGS = [
    *("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC"),
    *("-gencode", "arch=compute_90,code=sm_90"),
    *("-gencode", "arch=compute_90,code=compute_90"),  # later GPUs compile this when they load it
]


def sources(*suffixes: str) -> list[Path]:
    """csrc's files with one of these suffixes; without any, all that the compiler reads: not what an editor or a system leaves beside them."""
    return sorted(path for path in (FOLDER / "csrc").glob("*") if path.suffix in (suffixes or (".cu", ".cuh")))


def source_hash() -> int:
    """64 bits of the sources and flags; the library keeps those that it was built from, and its `nsa_sources()` returns them."""
    found = hashlib.sha256("\0".join(FLAGS).encode())
    for path in sources():
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return int.from_bytes(found.digest()[:8], "big")


def find_nvcc() -> str:
    """`$CUDA_HOME/bin/nvcc`, else the one on PATH, else USUAL_NVCC. Raises: FileNotFoundError saying what to install."""
    home = os.environ.get("CUDA_HOME")
    for candidate in ([f"{home}/bin/nvcc"] if home else []) + ["nvcc", USUAL_NVCC]:
        found = shutil.which(candidate)
        if found is not None:
            return found
    raise FileNotFoundError(
        f"there is no nvcc in $CUDA_HOME/bin, on PATH or at {USUAL_NVCC}; install the CUDA toolkit, 12.0 or newer "
        "(https://developer.nvidia.com/cuda-downloads), or set CUDA_HOME to where it is"
    )


def build() -> None:
    """Raises: FileNotFoundError where there is no nvcc; subprocess.CalledProcessError where it fails, having said why. Then what was there before is left."""
    nvcc = find_nvcc()
    unfinished = LIBRARY.with_name(f"{LIBRARY.stem}.{os.getpid()}.so")
    print(f"{nvcc} compiles {', '.join(path.name for path in sources('.cu'))}", flush=True)
    try:
        subprocess.run([nvcc, *FLAGS, f"-DNSA_SOURCES={source_hash():#x}ULL", "-o", str(unfinished), *map(str, sources(".cu"))], check=True)
        unfinished.replace(LIBRARY)
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"built {LIBRARY}")


def main(arguments: list[str]) -> int:
    if arguments not in (["build_ext", "--inplace"], ["build_ext", "-i"]):
        given = " ".join(arguments) or "no command"
        print(f"error: {given}: this builds a library beside its sources and does nothing else; write {COMMAND}", file=sys.stderr)
        return 2
    try:
        build()
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: nvcc ended with status {error.returncode}; nothing was built", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
