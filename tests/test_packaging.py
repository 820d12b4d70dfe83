"""What an installed wheel holds, and that the requirements agree with the metadata."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import nsa_transformer

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "nsa_transformer").rglob("*.py"))  # those of the wheel
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins(name: str) -> dict[str, Requirement]:
    """Requirements of a file by package; every line but options and comments is an exact pin."""
    lines = [line.strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    found = {}
    for line in lines:
        if line and not line.startswith(("#", "-")):
            pin = Requirement(line)
            assert [specifier.operator for specifier in pin.specifier] == ["=="], line
            found[pin.name] = pin
    return found


def test_the_pins_lie_in_the_ranges() -> None:
    exact = pins("requirements.txt") | pins("requirements-dev.txt")
    ranges = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"], *PROJECT["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, ranges):
        pin = exact[requirement.name]
        (specifier,) = pin.specifier
        assert requirement.specifier.contains(specifier.version), f"{requirement} against {pin}"
        assert requirement.marker == pin.marker, f"{requirement} against {pin}"


def test_triton_is_asked_for_on_linux_alone() -> None:
    """There are no wheels for others; a Mac installs the rest and takes the reference backend."""
    (triton,) = [requirement for requirement in map(Requirement, PROJECT["dependencies"]) if requirement.name == "triton"]
    assert triton.marker is not None
    assert [triton.marker.evaluate({"sys_platform": platform}) for platform in ("linux", "darwin", "win32")] == [True, False, False]


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Packages of others that a module needs to be imported, and those that it imports only where it uses them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    early: set[str] = set()
    every: set[str] = set()
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = {node.module.split(".")[0]}
            else:
                continue
            every |= names
            early |= names if parent is tree else set()
    own = sys.stdlib_module_names | {"nsa_transformer"}
    return early - own, every - early - own


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_is_declared(path: Path) -> None:
    """What a module imports at its top is a dependency; what it imports where it uses it may be an extra."""
    called = {"yaml": "pyyaml", "hydra": "hydra-core"}
    required = {Requirement(line).name for line in PROJECT["dependencies"]}
    extras = {Requirement(line).name for extra in PROJECT["optional-dependencies"].values() for line in extra}
    early, late = ({called.get(name, name) for name in names} for names in imports(path))
    assert early - required == set()
    assert late - required - extras == set()
    if path.parent.name != "triton":  # the kernels themselves, which are imported where they are called
        assert "triton" not in early, "triton is not everywhere: import it where it is used"


def test_requirements_end_in_the_package_itself() -> None:
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()[-1] == "-e ."


def test_the_citation_names_this_version() -> None:
    cited = [line.split()[1] for line in (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines() if line.startswith("version:")]
    assert cited == [nsa_transformer.__version__]


def test_the_wheel_carries_the_package_and_the_configuration(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs the setuptools of requirements-dev.txt")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("configs", "nsa_transformer"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "build"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"nsa_transformer-{nsa_transformer.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entries,) = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    expected = {f"nsa_transformer/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert len(expected) == 9
    assert {name for name in names if name.endswith(".yaml")} == expected
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "nsa_transformer").rglob("*.py") if (path.parent / "__init__.py").exists()}
    assert modules <= names
    extension = "nsa_transformer/kernels/sparse_attention"
    sources = {f"{extension}/csrc/{path.name}" for path in (ROOT / extension / "csrc").iterdir()}
    assert {f"{extension}/setup.py", f"{extension}/csrc/decode.cu"} <= names and sources <= names
    assert not {name for name in names if name.endswith(".so")}
    assert "nsa = nsa_transformer.cli:main" in entries
    assert not {name for name in names if name.split("/")[0] in ("tests", "docs", "training", "benchmarks", "configs")}
