"""The CUDA extension: how it is built, found and refused."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa_transformer.config import NSAConfig
from nsa_transformer.kernels import append_rows, available_backends, dispatch, experts, nsa_attention, nsa_decode, sparse_attention
from nsa_transformer.kernels import decode as door
from nsa_transformer.kernels.paged import NewRows, page_rows
from nsa_transformer.kernels.sparse_attention import decode as extension
from nsa_transformer.kernels.sparse_attention import setup

PAPER = NSAConfig()
SOURCE = setup.FOLDER / "csrc" / "decode.cu"
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in setup.sources())


def nvcc_missing() -> str | None:
    try:
        setup.find_nvcc()
    except FileNotFoundError as error:
        return str(error)
    return None


needs_nvcc = pytest.mark.skipif(nvcc_missing() is not None, reason=f"{nvcc_missing()}")

# ---------------------------------------------------------------------------------------------------------------- setup.py


def copied(folder: Path, text: str | None = None) -> Path:
    """setup.py and its sources, or one source of `text`, in a folder of their own."""
    (folder / "csrc").mkdir(parents=True)
    shutil.copy(setup.FOLDER / "setup.py", folder)
    if text is None:
        for path in setup.sources():
            shutil.copy(path, folder / "csrc")
    else:
        (folder / "csrc" / "some.cu").write_text(text, encoding="utf-8")
    return folder


def run_setup(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "setup.py", *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def fake_nvcc(folder: Path, script: str) -> Path:
    """A CUDA_HOME whose nvcc runs `script`, in which $out is what it was told to write."""
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nout="$2"\n{script}\n', encoding="utf-8")
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize("arguments", [[], ["install"], ["build_ext"], ["build_ext", "--inplace", "--force"], ["bdist_wheel"]], ids=str)
def test_another_command_is_refused_by_name(arguments: list[str], tmp_path: Path) -> None:
    done = run_setup(copied(tmp_path / "a", ""), *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {' '.join(arguments) or 'no command'}: ") and "write python setup.py build_ext --inplace" in done.stderr


def test_without_nvcc_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(setup, "USUAL_NVCC", str(tmp_path / "usual" / "nvcc"))
    monkeypatch.setattr(setup, "LIBRARY", tmp_path / "nsa_cuda.so")
    assert setup.main(["build_ext", "--inplace"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: there is no nvcc in $CUDA_HOME/bin, on PATH or at {tmp_path}/usual/nvcc; install the CUDA toolkit")
    assert list(tmp_path.iterdir()) == []


def test_nvcc_of_cuda_home_goes_before_the_one_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, other = fake_nvcc(tmp_path / "named", ""), fake_nvcc(tmp_path / "other", "")
    monkeypatch.setenv("PATH", str(other / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert setup.find_nvcc() == str(named / "bin" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert setup.find_nvcc() == str(other / "bin" / "nvcc")


def test_a_build_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    folder = copied(tmp_path / "a", "")
    home = fake_nvcc(tmp_path / "home", 'echo half > "$out"; echo "some.cu(1): error: no" >&2; exit 7')
    (folder / "nsa_cuda.so").write_text("before", encoding="utf-8")
    done = run_setup(folder, "build_ext", "--inplace", CUDA_HOME=str(home), PATH="/usr/bin:/bin")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "some.cu(1): error: no" in done.stderr and "error: nvcc ended with status 7; nothing was built" in done.stderr
    assert [path.name for path in folder.glob("*.so")] == ["nsa_cuda.so"] and (folder / "nsa_cuda.so").read_text(encoding="utf-8") == "before"


def test_a_build_replaces_the_library_at_once(tmp_path: Path) -> None:
    folder = copied(tmp_path / "a", "")
    home = fake_nvcc(tmp_path / "home", 'case "$out" in */nsa_cuda.so) exit 1;; esac; echo whole > "$out"')
    done = run_setup(folder, "build_ext", "--inplace", CUDA_HOME=str(home), PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.glob("*.so")] == ["nsa_cuda.so"] and (folder / "nsa_cuda.so").read_text(encoding="utf-8") == "whole\n"


def test_the_hash_knows_sources_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "FOLDER", copied(tmp_path / "a", "one"))
    first = setup.source_hash()
    (tmp_path / "a" / "csrc" / ".some.cu.swp").write_text("an editor's", encoding="utf-8")
    (tmp_path / "a" / "csrc" / ".ipynb_checkpoints").mkdir()
    assert first == setup.source_hash() and 0 <= first < 1 << 64
    (tmp_path / "a" / "csrc" / "some.cu").write_text("two", encoding="utf-8")
    second = setup.source_hash()
    monkeypatch.setattr(setup, "FLAGS", [*setup.FLAGS, "-G"])
    assert len({first, second, setup.source_hash()}) == 3


@needs_nvcc
@pytest.mark.slow
def test_every_kernel_compiles_without_spills(tmp_path: Path) -> None:
    flags = [*setup.FLAGS[:5], "-gencode", "arch=compute_90,code=sm_90", "-Xptxas", "-v", "-DNSA_SOURCES=1ULL"]
    done = subprocess.run([setup.find_nvcc(), *flags, "-o", str(tmp_path / "library.so"), str(SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(registers) == 8 and max(registers) <= 255, "two dtypes, two widths, with and without e4m3"
    assert spills == [("0", "0", "0")] * 8
    assert "smem" not in done.stderr, "all shared memory is what a launch asks for"


@needs_nvcc
@pytest.mark.slow
def test_what_is_built_here_is_loaded_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without a GPU. A change of the sources makes it stale, and its sizes are those that Python asks with."""
    folder = copied(tmp_path / "a")
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=folder, check=True)
    monkeypatch.setattr(setup, "FOLDER", folder)
    monkeypatch.setattr(setup, "LIBRARY", folder / "nsa_cuda.so")
    fresh(monkeypatch)
    assert sparse_attention.library_missing() is None
    floats = sparse_attention.library().nsa_decode_notes
    step = extension._sizes(groups=5000, cluster=16, bfloat16=True, width=128, fp8=False, pairs=3)
    assert step.most_groups == 313 and floats(step) == 3 * 16 * 313 * 100
    assert floats(extension._sizes(groups=5000, cluster=16, bfloat16=False, width=64, fp8=True, pairs=3)) == 0
    if not torch.cuda.is_available():  # to the library this is a driver that is too old, or none
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            fresh(patch)
            found = sparse_attention.library_missing()
            assert found is not None and re.fullmatch(r"the CUDA extension as it is built cannot use the GPU \(.*CUDA.*\)", found)
    with (folder / "csrc" / "tiles.cuh").open("a", encoding="utf-8") as file:
        file.write("// changed\n")
    fresh(monkeypatch)
    assert sparse_attention.library_missing() == "the CUDA extension was built from other sources, and is to be built again"


# ----------------------------------------------------------------------------------------------------------------- the loader


def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets for a test whether the library is there."""
    monkeypatch.setattr(sparse_attention, "_load", sparse_attention.cache(sparse_attention._load.__wrapped__))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an H200, as far as the loader and the choice go."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(shared_memory_per_block_optin=227 << 10, multi_processor_count=132))


def test_a_library_that_is_not_there_or_none(hopper: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(setup, "LIBRARY", tmp_path / "nsa_cuda.so")
    fresh(monkeypatch)
    assert sparse_attention.missing() == "the CUDA extension is not built"
    assert "cuda" not in available_backends()
    (tmp_path / "nsa_cuda.so").write_text("no library", encoding="utf-8")
    fresh(monkeypatch)
    found = sparse_attention.missing()
    assert found is not None and found.startswith("the CUDA extension cannot be loaded (") and str(tmp_path) in found


def test_gpus_that_do_not_do(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_attention, "_load", lambda: SimpleNamespace())
    assert sparse_attention.missing() is None and available_backends()[-1] == "cuda"
    needs = "an NVIDIA GPU of compute capability 9.0 (H100, H200) or higher with 227 KB of shared memory for a block"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
        assert sparse_attention.missing() == f"no GPU here is {needs}"
    with monkeypatch.context() as patch:  # an RTX 5090
        patch.setattr(torch.cuda, "get_device_capability", lambda index: (12, 0))
        patch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(shared_memory_per_block_optin=99 << 10))
        assert sparse_attention.missing() == f"no GPU here is {needs}"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert sparse_attention.missing() == "torch sees no NVIDIA GPU"


def test_importing_the_package_loads_nothing() -> None:
    script = "import nsa_transformer.kernels as k, nsa_transformer.kernels.sparse_attention.decode; print(k.sparse_attention._load.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", script], cwd=setup.FOLDER.parents[2], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_the_arguments_are_those_of_the_source() -> None:
    (body,) = re.findall(r'extern "C" struct NsaDecode \{(.*?)\};', TEXT, re.DOTALL)
    declared = []
    for kind, names in re.findall(r"^ +(?:const )?(void|int|float) ([^;]+);", body, re.MULTILINE):
        for name in names.split(","):
            pointer = name.strip().startswith("*")
            declared.append((name.strip(" *"), "c_void_p" if pointer else {"int": "c_int", "float": "c_float"}[kind]))
    assert declared == [(name, kind.__name__) for name, kind in sparse_attention.Arguments._fields_]


def test_constants_are_those_of_the_source() -> None:
    found = {name: int(size) for name, size in re.findall(r"\b([A-Z_]+) = (\d+)\b", TEXT)}
    assert (found["STRIDE"], found["BLOCK"], found["SELECT"]) == (PAPER.compress_stride, PAPER.compress_block, PAPER.select_block)
    assert (found["HEADS"], found["MOST_CHOSEN"], found["BEST"]) == (extension.MOST_HEADS, extension.MOST_SELECTED, extension.MOST_CHOSEN)
    assert (found["KEYS"], found["ROWS"], found["MOST_BLOCKS"]) == (extension.KEYS, page_rows(PAPER), extension.CLUSTERS[0])
    assert f"SHARED = {sparse_attention.SHARED >> 10} << 10;" in TEXT


# --------------------------------------------------------------------------------------------------------------- what it takes


class OnGPU(SimpleNamespace):
    """What `refuses` looks at of a tensor on a GPU."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda:0", at: int = 0) -> None:
        super().__init__(shape=shape, dtype=dtype, device=torch.device(device), data_ptr=lambda: at, is_contiguous=lambda: True)

    def __len__(self) -> int:
        return self.shape[0]


def step(sequences: int = 8, kv_heads: int = 4, group: int = 16, dk: int = 128, dv: int = 128, max_pages: int = 8, q: dict[str, Any] | None = None) -> Any:
    """q and a cache of which every pointer is aligned."""
    stores = {name: OnGPU(1, kv_heads, 64, dk if name[0] == "k" else dv) for name in sparse_attention.STORES}
    cache = SimpleNamespace(**stores, pages=OnGPU(sequences, max_pages), lengths=OnGPU(sequences), threshold=0)
    return OnGPU(sequences, kv_heads * group, dk, **(q or {})), cache


REFUSED = [
    ({"q": {"device": "cpu"}}, PAPER, "q is on cpu, which is not an NVIDIA GPU of compute capability 9.0"),
    ({"q": {"dtype": torch.float32}}, PAPER, "q has dtype torch.float32, not one of bfloat16, float16"),
    ({"dk": 192}, PAPER, "the head widths 192 and 128 are not both one of 64, 128"),
    ({"dk": 256, "dv": 256}, PAPER, "the head widths 256 and 256 are not both one of 64, 128"),
    ({"dk": 64}, PAPER, "the head widths 64 and 128 are not both one of 64, 128"),
    ({"group": 17}, PAPER, "17 query heads share a key/value head, more than 16"),
    ({}, NSAConfig(16, 16, 64), "compress_block is 16, not 32"),
    ({}, NSAConfig(32, 8, 64), "compress_stride is 8, not 16"),
    ({}, NSAConfig(32, 16, 128), "select_block is 128, not 64"),
    ({}, NSAConfig(num_local=0), "num_local is 0, not 1 or more"),
    ({}, NSAConfig(num_selected=33, num_local=20), "num_selected is 33, more than 32"),
    ({}, NSAConfig(num_selected=20), "num_selected - num_initial - num_local, blocks chosen by importance, is 17, more than 16"),
    ({"sequences": 0}, PAPER, "there is no sequence, or none with a page"),
    ({"max_pages": 0}, PAPER, "there is no sequence, or none with a page"),
    ({"sequences": 16384}, PAPER, "16384 sequences with 4 key/value heads are 65536 pairs, more than 65535"),
    ({"q": {"at": 8}}, PAPER, "q begins at an address that is no multiple of 16 bytes"),
]


@pytest.mark.parametrize(("changes", "config", "why"), REFUSED, ids=[why for _, _, why in REFUSED])
def test_what_it_does_not_take(hopper: None, changes: dict[str, Any], config: NSAConfig, why: str) -> None:
    found = extension.refuses(*step(**changes), config)
    assert found is not None and found.startswith(why)


@pytest.mark.parametrize("name", sparse_attention.STORES)
def test_a_store_at_an_odd_address(hopper: None, name: str) -> None:
    q, cache = step()
    getattr(cache, name).data_ptr = lambda: 24
    assert extension.refuses(q, cache, PAPER) == f"{name} begins at an address that is no multiple of 16 bytes"


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({}, PAPER),
        ({"dk": 64, "dv": 64, "group": 1, "q": {"dtype": torch.float16}}, NSAConfig(num_selected=32, num_local=15, window=1)),
        ({"sequences": 65535, "kv_heads": 1}, NSAConfig(num_selected=3, num_initial=0, num_local=3, compression="mean")),
    ],
    ids=str,
)
def test_what_it_takes(hopper: None, changes: dict[str, Any], config: NSAConfig) -> None:
    assert extension.refuses(*step(**changes), config) is None


def test_auto_takes_it_for_many_pairs(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where enough of 132 multiprocessors have work, also in the last of several rounds."""
    monkeypatch.setattr(sparse_attention, "_load", lambda: SimpleNamespace())
    monkeypatch.setattr(extension, "cluster_size", lambda device, pairs, **kind: next((size for size, most in ((4, 30), (2, 66)) if pairs <= most), 1))
    assert "nsa_decode: cuda where it takes the step and there are many sequences" in dispatch.describe_auto()
    taken = [pairs for pairs in (4, 20, 23, 24, 30, 32, 40, 66, 68, 79, 80, 132, 150, 158, 159, 1000) if door._takes_extension("auto", *step(pairs, 1), PAPER)]
    assert taken == [24, 30, 40, 66, 80, 132, 159, 1000]
    assert door._takes_extension("cuda", *step(sequences=1), PAPER)
    assert not door._takes_extension("triton", *step(), PAPER) and not door._takes_extension("reference", *step(), PAPER)
    assert not door._takes_extension("auto", *step(dk=256, dv=256), PAPER), "what it does not take goes to the others"
    with pytest.raises(ValueError, match=r"^backend='cuda' does not take these inputs: the head widths 256 and 256 .*; write backend='auto' or 'reference'"):
        door._takes_extension("cuda", *step(dk=256, dv=256), PAPER)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not door._takes_extension("auto", *step(132, 1), PAPER) and door._takes_extension("cuda", *step(132, 1), PAPER)
    monkeypatch.setattr(sparse_attention, "_load", lambda: "the CUDA extension is not built")
    assert not door._takes_extension("auto", *step(132, 1), PAPER) and "cuda" not in dispatch.describe_auto()


def test_a_cluster_is_sized_for_the_device_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `auto` asks about while another one is the current one."""
    current, asked = ["cuda:0"], []

    @contextmanager
    def device(there: torch.device) -> Iterator[None]:
        current.append(str(there))
        yield
        current.pop()

    def clusters(step: sparse_attention.Arguments) -> int:
        asked.append((current[-1], step.cluster))
        return -1 if step.cluster == 16 else 100 // step.cluster

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(extension, "library", lambda: SimpleNamespace(nsa_decode_clusters=clusters))
    size = extension.cluster_size.__wrapped__
    kind = {"groups": 32, "bfloat16": 1, "width": 128, "fp8": 0}
    assert size(torch.device("cuda:1"), pairs=25, **kind) == 4
    assert asked == [("cuda:1", 16), ("cuda:1", 8), ("cuda:1", 4)] and current == ["cuda:0"]
    assert size(torch.device("cuda:1"), pairs=101, **kind) == 1


def test_nsa_decode_says_why_it_is_not_there(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_attention, "_load", lambda: "the CUDA extension is not built")
    with pytest.raises(ValueError, match=r"^backend='cuda' is not available here: the CUDA extension is not built; write one of auto, reference"):
        nsa_decode(torch.zeros(1), torch.zeros(1), None, PAPER, backend="cuda")  # type: ignore[arg-type]


def test_nothing_else_is_computed_by_it(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where it is there; and what is to be written instead does not name it."""
    monkeypatch.setattr(sparse_attention, "_load", lambda: SimpleNamespace())
    x, rows = torch.zeros(4, 2, 64), NewRows(*(torch.zeros(1, 2, 64) for _ in range(6)))
    calls: list[Callable[[], object]] = [
        lambda: nsa_attention(x, x, x, x, x, x, x, x[..., :3], PAPER, backend="cuda"),
        lambda: append_rows(rows, None, PAPER, backend="cuda"),  # type: ignore[arg-type]
        lambda: experts(x[:, 0], torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), torch.zeros(1, 8, 64), torch.zeros(1, 64, 4), "cuda"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^backend='cuda' is not available here: the CUDA extension computes nsa_decode alone; write one of") as error:
            call()
        assert "cuda" not in str(error.value).split("write")[1]
