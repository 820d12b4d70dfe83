"""Compiles every launch of a Triton pipeline for a GPU that is not here, and says what each kernel takes of it.

    python -m tests.kernels.aot [--target 90] [--fast | --slow] [--kernel TEXT] [--json FILE] [--update]
    python -m tests.kernels.aot --call package.module:function      # any callable that launches kernels

`record` stands in for the launch, so the host code runs on CPU tensors and nothing else does; `compile_launch` then takes each launch through
Triton's own binder, compiler and ptxas. `tests/kernels/aot_cases.py` lists the launches, `triton_budget.json` what they may take.

Triton decides at import whether kernels are compiled or interpreted, so this runs in a process of its own and imports Triton late: the
command line removes TRITON_INTERPRET from its environment first. Nothing here needs Triton in the process that only compares with the budget.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.kernels import aot_budget

ROOT = Path(__file__).resolve().parents[2]

# Compute capability: shared memory one block may take, multiprocessors of the chip host code asks for.
TARGETS = {80: (163 * 1024, 108), 90: (227 * 1024, 132), 100: (227 * 1024, 148)}

INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma.sync": r"\bmma\.sync",
    "tma": r"\bcp\.async\.bulk\.tensor",
    "cp.async": r"\bcp\.async\.(?:ca|cg)\b",
    "atomics": r"\b(?:atom|red)\.",
}

Kernels = dict[str, dict[str, Any]]  # what one case's kernels take, by name


@dataclass(frozen=True)
class Case:
    """`call` launches kernels; `targets` are the chips it is for; `slow` leaves it out of the fast tier."""

    name: str
    call: Callable[[], object]
    slow: bool = False
    targets: tuple[int, ...] = tuple(TARGETS)


@dataclass
class Launch:
    """One launch: the kernel, its arguments by name with defaults filled in, and how it would be specialised."""

    fn: Any
    args: dict[str, Any]
    options: dict[str, Any]  # as written at the launch: num_warps, num_stages, maxnreg, num_ctas …
    grid: tuple[int, ...] | None
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    compile_options: Any

    @property
    def name(self) -> str:
        return self.fn.__name__

    @property
    def key(self) -> str:
        """Equal for launches that are the same machine code."""
        constants = {path: getattr(value, "cache_key", value) for path, value in self.constants.items()}
        return repr((self.fn.cache_key, self.signature, constants, self.attrs, self.compile_options))

    def choices(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What may tell two variants of one kernel apart: what the launch chose; and what Triton made of the other arguments."""
        names = self.fn.arg_names
        values = {".".join([names[path[0]], *map(str, path[1:])]): getattr(value, "__name__", value) for path, value in self.constants.items()}
        written = {param.name for param in self.fn.params if param.is_constexpr}
        chosen = {name: value for name, value in values.items() if name.partition(".")[0] in written}
        types = {name: values.get(name, kind) for name, kind in self.signature.items() if name not in written}
        divisible = {f"{names[path[0]]}%16": bool(attr) for path, attr in self.attrs.items() if path not in self.constants}
        return chosen | dict(sorted(self.options.items())), types | divisible


@dataclass
class Recording:
    target: int
    launches: list[Launch] = field(default_factory=list)

    def variants(self) -> dict[str, Launch]:
        """The distinct kernels by name; where one was launched in several ways, its name carries what differs: `sum[BLOCK=64,num_warps=8]`."""
        distinct: dict[str, dict[str, Launch]] = {}
        for launch in self.launches:
            distinct.setdefault(launch.name, {}).setdefault(launch.key, launch)
        named: dict[str, Launch] = {}
        for name, same in distinct.items():
            if len(same) == 1:
                named[name] = next(iter(same.values()))
                continue
            chosen, rest = zip(*(launch.choices() for launch in same.values()), strict=True)
            told = [""] * len(same)
            # All choices that differ; of the rest only what tells apart those still called the same.
            for choices, always in ((chosen, True), (rest, False)):
                for label in dict.fromkeys(label for one in choices for label in one):
                    values = [str(one.get(label)) for one in choices]
                    longer = [f"{text},{label}={value}" for text, value in zip(told, values, strict=True)]
                    if len(set(values)) > 1 and (always or len(set(longer)) > len(set(told))):
                        told = longer
            for at, (text, launch) in enumerate(zip(told, same.values(), strict=True)):
                named[f"{name}[{text[1:]}]" if told.count(text) == 1 else f"{name}[{text[1:]}#{at}]"] = launch
        return named


def gpu_target(target: int) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", target, 32)


@contextlib.contextmanager
def record(target: int = 90) -> Iterator[Recording]:
    """Inside, `kernel[grid](...)` notes the launch and runs nothing, and host code that asks torch or Triton for the chip is told `target`."""
    import torch
    import triton
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if target not in TARGETS:
        raise ValueError(f"target is {target}: write one of {', '.join(map(str, TARGETS))}")
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it before Triton is imported")
    backend = make_backend(gpu_target(target))
    recording = Recording(target)
    binders: dict[int, Any] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        # The steps of JITFunction.run up to the compilation, with its own helpers.
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        kwargs["debug"] = kwargs.get("debug", self.debug) or triton.knobs.runtime.debug
        kwargs["instrumentation_mode"] = triton.knobs.compilation.instrumentation_mode
        if id(self) not in binders:
            binders[id(self)] = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, unused = binders[id(self)](*args, **kwargs)
        compile_options, signature, constants, attrs = self._pack_args(backend, kwargs, bound, specialization, unused)
        size = grid(bound) if callable(grid) else grid
        size = None if size is None else tuple(size)
        recording.launches.append(Launch(self, bound, options, size, signature, constants, attrs, compile_options))

    shared, processors = TARGETS[target]
    properties = SimpleNamespace(
        major=target // 10,
        minor=target % 10,
        name=f"sm_{target}",
        multi_processor_count=processors,
        shared_memory_per_block_optin=shared,
        total_memory=80 << 30,
        warp_size=32,
    )
    driver = SimpleNamespace(
        get_current_target=lambda: gpu_target(target),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
        utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": shared, "multiprocessor_count": processors, "warpSize": 32}),
    )
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (target // 10, target % 10)),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
    ):
        yield recording


def read_ptxas(log: str) -> dict[str, Any]:
    """Registers, bytes of spills and of stack from what `ptxas -v` said; several functions (a kernel and what it calls) count together."""
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", log)]
    if not registers:
        raise RuntimeError(f"ptxas -v said nothing about registers:\n{log}")
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    stack, stores, loads = (sum(int(frame[i]) for frame in frames) for i in range(3))
    losses = sorted(set(re.findall(r"Potential Performance Loss: ([^\n]*?)(?: in the function[^\n]*)?\n", log)))
    return {"registers": max(registers), "spill_stores": stores, "spill_loads": loads, "spills": stores + loads, "stack": stack, "losses": losses}


def compile_launch(launch: Launch, target: int, keep: Path | None = None) -> dict[str, Any]:
    """What the kernel takes, or {"error": …}. The numbers are ptxas's own, of the very run that makes the cubin. `keep`: write PTX and TTGIR there."""
    import triton
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    kind = GluonASTSource if launch.fn.is_gluon() else ASTSource
    source = kind(launch.fn, launch.signature, launch.constants, launch.attrs)
    said = io.StringIO()
    started = time.perf_counter()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(said):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True  # a cached kernel has no log
        try:
            compiled = triton.compile(source, target=gpu_target(target), options=launch.compile_options.__dict__)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
    found = read_ptxas(said.getvalue())
    ptx = compiled.asm["ptx"]
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        for stage in ("ptx", "ttgir"):
            (keep / f"{launch.name}.{stage}").write_text(compiled.asm[stage])
    return found | {
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "instructions": {name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()},
        "seconds": round(time.perf_counter() - started, 2),
    }


def describe(found: dict[str, Any]) -> str:
    if "error" in found:
        lines = found["error"].strip().splitlines()
        return "does not compile: " + next((line for line in lines if re.search(r"\bfatal\b|\berror +:", line)), lines[0])
    line = (
        f"{found['registers']:>3} registers, spills {found['spill_stores']}+{found['spill_loads']} B, stack {found['stack']} B, "
        f"shared {found['shared'] / 1024:.1f} KiB, {found['warps']} warps, {found['seconds']} s"
    )
    counts = " ".join(f"{name} {count}" for name, count in found["instructions"].items() if count)
    return ", ".join([line, *([counts] if counts else []), *found["losses"]])


def compile_cases(chosen: list[Case], target: int, kernel: str = "", keep: Path | None = None) -> dict[str, Kernels]:
    """Every kernel of each case, one printed line each; what two cases share is compiled once."""
    known: dict[str, dict[str, Any]] = {}
    results: dict[str, Kernels] = {}
    for case in chosen:
        with record(target) as recording:
            case.call()
        results[case.name] = {}
        for name, launch in recording.variants().items():
            if kernel not in name:
                continue
            # Before the compilation, so that a compiler that crashes leaves its kernel's name.
            print(f"sm_{target} {case.name} {name}: ", end="", flush=True)
            if launch.key not in known:
                known[launch.key] = compile_launch(launch, target, keep and keep / f"sm_{target}" / case.name)
            results[case.name][name] = known[launch.key]
            print(describe(known[launch.key]), flush=True)
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.aot", description="Compile every launch of the Triton kernels; no GPU is needed.")
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="compute capability, may be repeated (default: all)")
    tier = parser.add_mutually_exclusive_group()
    tier.add_argument("--fast", action="store_true", help="only the cases of the fast tier")
    tier.add_argument("--slow", action="store_true", help="only the others")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases with TEXT in their name")
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only kernels with TEXT in their name")
    parser.add_argument("--call", metavar="MODULE:FUNCTION", help="launches of this function instead of the cases, without a budget")
    parser.add_argument("--cases", default="tests.kernels.aot_cases:cases", metavar="MODULE:FUNCTION", help="where the cases come from")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write PTX and TTGIR there")
    parser.add_argument("--update", action="store_true", help=f"write what was found into {aot_budget.PATH.name}")
    options = parser.parse_args(argv)
    if options.update and (options.call or options.kernel or options.cases != parser.get_default("cases")):
        parser.error("--update takes all kernels of the listed cases: leave out --call, --kernel and --cases")
    targets = options.target or list(TARGETS)
    if len(targets) > 1:  # a process each, since host code may remember what chip it was told of
        given = sys.argv[1:] if argv is None else argv
        if options.json:
            parser.error("--json takes one --target")
        rest = [word for at, word in enumerate(given) if word != "--target" and (at == 0 or given[at - 1] != "--target")]
        rest = [word for word in rest if not word.startswith("--target=")]
        return max(subprocess.run([sys.executable, "-m", "tests.kernels.aot", *rest, f"--target={target}"], cwd=ROOT).returncode for target in targets)

    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory(prefix="aot-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        sys.path.insert(0, os.getcwd())
        import triton

        module, _, function = (options.call or options.cases).partition(":")
        found = getattr(importlib.import_module(module), function)
        every = [Case(function, found)] if options.call else [case for case in found() if targets[0] in case.targets]
        chosen = [case for case in every if options.case in case.name and (case.slow if options.slow else not (options.fast and case.slow))]
        kernels = compile_cases(chosen, targets[0], options.kernel, options.keep)
    report = {"triton": triton.__version__, "target": targets[0], "limit": TARGETS[targets[0]][0], "cases": [case.name for case in every], "kernels": kernels}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.update:
        aot_budget.write(aot_budget.update(report, aot_budget.read()))
    return int(any("error" in kernel for case in kernels.values() for kernel in case.values()))


if __name__ == "__main__":
    sys.exit(main())
