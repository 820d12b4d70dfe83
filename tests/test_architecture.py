"""Imports run one way, and the kernels can be had without the rest.

    {utils, config} <- kernels <- models <- memory <- distributed <- {training, inference, interop} <- cli

`data` needs only `utils` and `config`. Imports inside functions count like those at the top: they are made late, not sideways.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "nsa_transformer"
SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))

CHAIN = ["kernels", "models", "memory", "distributed"]
USES: dict[str, set[str]] = {"config": set(), "utils": {"config"}, "data": {"utils", "config"}}
for _position, _part in enumerate(CHAIN):
    USES[_part] = {"utils", "config", *CHAIN[:_position]}
for _part in ("training", "inference", "interop"):
    USES[_part] = {"utils", "config", "data", *CHAIN, "training", "inference", "interop"}
USES["cli"] = {*USES, PACKAGE}
USES[PACKAGE] = set(USES) - {"cli"}  # the root's __init__ hands out names of every part


def part_of(module: str) -> str:
    """`nsa_transformer.models.rope` -> `models`; the package itself -> `nsa_transformer`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else PACKAGE


def imported(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that `module` imports; `from a import b` gives `a.b`, which may be an attribute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                base = module.split(".")[: len(module.split(".")) - node.level + is_package]
                origin = ".".join([*base, origin] if origin else base)
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".", 1)[-1] in ("import_module", "__import__"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    own = part_of(module)
    if own not in USES:
        return [f"{module}: {own} has no place in the order of tests/test_architecture.py"]
    found = []
    for line, name in imported(source, module, is_package):
        top = name.split(".")[0]
        if top in ("training", "configs"):
            found.append(f"{module}:{line} imports {name}; the folder {top}/ at the root is not a package")
        if top != PACKAGE:
            continue
        target = part_of(name)
        if target not in USES:  # `from nsa_transformer import Name`: the root's own attribute
            target = PACKAGE
        if target != own and target not in USES[own]:
            found.append(f"{module}:{line} imports {name}; {own} may use {', '.join(sorted(USES[own])) or 'nothing of the package'}")
    return found


def module_name(path: Path) -> str:
    names = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("nsa_transformer.kernels.nsa", "from nsa_transformer.models import rope"),
        ("nsa_transformer.kernels.nsa", "import nsa_transformer.models.rope"),
        ("nsa_transformer.kernels.nsa", "from ..models.rope import rotate"),
        ("nsa_transformer.kernels.nsa", "def late():\n    from .. import models"),
        ("nsa_transformer.kernels.nsa", "import importlib\nimportlib.import_module('nsa_transformer.models')"),
        ("nsa_transformer.models.rope", "from nsa_transformer import Transformer"),
        ("nsa_transformer.models.rope", "from nsa_transformer.memory import offload"),
        ("nsa_transformer.memory.offload", "from nsa_transformer.distributed import mesh"),
        ("nsa_transformer.distributed.mesh", "from nsa_transformer.training import loop"),
        ("nsa_transformer.data.pack", "from nsa_transformer.kernels import nsa"),
        ("nsa_transformer.config", "from nsa_transformer.utils import files"),
        ("nsa_transformer.inference.generate", "from nsa_transformer import cli"),
        ("nsa_transformer.training.loop", "from training.trainer import main"),
        ("nsa_transformer.training.loop", "import configs"),
        ("nsa_transformer.stray", "import os"),
    ],
)
def test_a_sideways_import_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("nsa_transformer.models.rope", "from ..kernels.nsa import nsa_attention\nfrom nsa_transformer import kernels", False),
        ("nsa_transformer.models", "from .rope import rotate\nfrom . import transformer", True),
        ("nsa_transformer.training.loop", "from nsa_transformer.inference import generate\nfrom .optimizer import build", False),
        ("nsa_transformer.data.pack", "import torch\nfrom nsa_transformer.config import DataConfig", False),
        ("nsa_transformer.cli", "from nsa_transformer import load_checkpoint\nfrom nsa_transformer.interop import export", False),
        ("nsa_transformer", "from .models import Transformer\nfrom .config import ModelConfig", True),
    ],
)
def test_the_allowed_direction_is_not(module: str, source: str, is_package: bool) -> None:
    assert violations(source, module, is_package) == []


def test_triton_lives_in_its_folder_and_comes_with_a_call() -> None:
    """Outside of kernels/triton nothing names Triton, and that folder is imported inside functions."""
    kernels = f"{PACKAGE}.kernels.triton"
    for path in SOURCES:
        module, source = module_name(path), path.read_text(encoding="utf-8")
        if module.startswith(kernels):
            continue
        names = [name for _, name in imported(source, module, path.name == "__init__.py")]
        assert [name for name in names if name.split(".")[0] == "triton"] == [], module
        top = ast.unparse(ast.Module([node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)], []))
        assert [name for _, name in imported(top, module, path.name == "__init__.py") if name.startswith(kernels)] == [], module


def test_hydra_lives_in_the_entry_and_the_command_line_alone() -> None:
    found = [
        f"{module_name(path)}:{line} imports {name}"
        for path in SOURCES
        if module_name(path) != f"{PACKAGE}.cli"
        for line, name in imported(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py")
        if name.split(".")[0] in ("hydra", "omegaconf")
    ]
    assert found == []


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.kernels"])
def test_the_kernels_bring_torch_alone(module: str) -> None:
    """In a fresh interpreter: this one has imported half of the list already. Triton and torch's compiler come with the first call that needs them."""
    late = ["triton", "torch._dynamo"]
    unwanted = [*late, "hydra", "omegaconf", "transformers", "datasets", "tokenizers", "safetensors", "pyarrow", "wandb", "matplotlib", "rich", "tensorboard"]
    script = f"import sys, {module}; print(*[name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
