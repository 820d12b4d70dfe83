"""What the Triton kernels may take of a chip: `triton_budget.json`, and how a report of `tests/kernels/aot.py` is held against it. Needs no Triton."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("triton_budget.json")
LIMITED = ("registers", "spills", "shared")


def compare(report: dict[str, Any], budget: dict[str, Any]) -> list[str]:
    """Complaints, in words, about a report of `python -m tests.kernels.aot --json`: a kernel beyond its budget, a kernel or a budget without the other.

    Another minor version of Triton gives other numbers: then kernels must only compile and fit the chip.
    """
    target = report["target"]
    known = budget.get("targets", {}).get(str(target), {})
    same = budget.get("triton", report["triton"]).split(".")[:2] == report["triton"].split(".")[:2]
    again = f"python -m tests.kernels.aot --target {target} --update"
    wrong = []
    for case, kernels in report["kernels"].items():
        for name, found in kernels.items():
            where = f"sm_{target} {case} {name}"
            if "error" in found:
                wrong.append(f"{where} does not compile: {found['error']}")
                continue
            if found["shared"] > report["limit"]:
                wrong.append(f"{where} takes {found['shared']} bytes of shared memory, the chip has {report['limit']}")
            if not same:
                continue
            allowed = known.get(case, {}).get(name)
            if allowed is None:
                wrong.append(f"{where} has no budget: {again}")
                continue
            wrong += [f"{where}: {what} {found[what]}, budget {allowed[what]}" for what in LIMITED if found[what] > allowed[what]]
        if same:
            wrong += [f"sm_{target} {case} {name} has a budget and is launched no more: {again}" for name in known.get(case, {}) if name not in kernels]
    if same:
        wrong += [f"sm_{target} {case} has a budget and is no case any more: {again}" for case in known if case not in report["cases"]]
    return wrong


def read() -> dict[str, Any]:
    return json.loads(PATH.read_text()) if PATH.exists() else {}


def update(report: dict[str, Any], budget: dict[str, Any]) -> dict[str, Any]:
    """The budget with this report's kernels in place of what it held for their cases. Another version of Triton starts it anew."""
    for case, kernels in report["kernels"].items():
        for name, found in kernels.items():
            if "error" in found:
                raise ValueError(f"{case} {name} does not compile for sm_{report['target']}: no budget is written")
    targets = dict(budget.get("targets", {})) if budget.get("triton") == report["triton"] else {}
    held = {case: kernels for case, kernels in targets.get(str(report["target"]), {}).items() if case in report["cases"]}
    for case, kernels in report["kernels"].items():
        held[case] = {name: {what: found[what] for what in LIMITED} for name, found in sorted(kernels.items())}
    targets[str(report["target"])] = dict(sorted(held.items()))
    return {"triton": report["triton"], "targets": dict(sorted(targets.items(), key=lambda item: int(item[0])))}


def write(budget: dict[str, Any]) -> None:
    """A line per kernel, so that a change of one is a change of one line."""
    text = json.dumps(budget, indent=1)
    PATH.write_text(re.sub(r'\{\s*("registers[^}]*?)\s*\}', lambda found: "{" + re.sub(r"\s+", " ", found[1]) + "}", text) + "\n")
