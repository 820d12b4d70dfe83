"""Writes docs/configuration.md from the dataclasses of nsa_transformer/config/ and the sizes in configs/model/.

python docs/generate_configuration.py            write it
python docs/generate_configuration.py --check    exit status 1 when the file is not what would be written
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from nsa_transformer.config import Config, ModelConfig, RecipeConfig, build_config, to_dict

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "configuration.md"
MODELS = ("tiny", "base", "large", "nsa_27b")

HEAD = """\
# Configuration

<!-- Written by docs/generate_configuration.py from nsa_transformer/config/: change it there, then run `make docs`. -->

Every key, its type, its default and what it does. Write any of them after the command:

```bash
python training/trainer.py model=large model.max_position_embeddings=32768 training.batch_size=16 memory.kv_cache.quantization=fp8
```

`model=tiny` (no dot) chooses a file of `configs/model/`; `model.num_layers=6` sets one key. `--cfg job` prints the result and starts
nothing. A key that does not exist, a value of the wrong type and values that cannot work together are refused with the override to write
instead. The same keys with the same defaults lie in `configs/`, as YAML to copy or edit.
"""


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(show, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def type_name(kind: Any) -> str:
    """`int`, `text`, `nsa \\| dense`, `int or null`: the type of a key as a reader of YAML would say it."""
    if typing.get_origin(kind) is Literal:
        return " \\| ".join(f"`{show(choice)}`" for choice in typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join("`null`" if part is type(None) else type_name(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "list of groups"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}[kind]


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def section(cls: type, path: str, level: int, explanation: str) -> list[str]:
    """The heading, table and subsections of one dataclass."""
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    defaults = cls()
    lines = [f"{'#' * level} `{path}`", "", explanation, ""]
    leaves = [f for f in fields if not dataclasses.is_dataclass(hints[f.name])]
    if leaves:
        lines += ["| key | type | default | what it does |", "|---|---|---|---|"]
        for f in leaves:
            default = show(getattr(defaults, f.name))
            lines.append(f"| `{path}.{f.name}` | {type_name(hints[f.name])} | `{default}` | {cell(f.metadata['doc'])} |")
        lines.append("")
    for f in fields:
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            lines += section(typing.cast(type, kind), f"{path}.{f.name}", level + 1, describe(typing.cast(type, kind), f.metadata["doc"]))
    return lines


def describe(cls: type, fallback: str) -> str:
    """The class's own docstring; dataclasses without one carry a generated signature, which says nothing to a reader."""
    text = cls.__doc__ or ""
    return fallback if text.startswith(f"{cls.__name__}(") else " ".join(text.split())


def model_table() -> list[str]:
    """What each `model=` choice sets: the keys in which the sizes differ."""
    chosen = [flatten(load_model(name)) for name in MODELS]
    differing = [key for key in chosen[0] if len({show(values[key]) for values in chosen}) > 1]
    lines = ["## The sizes", "", "What `model=…` chooses, where the sizes differ; `model=base` is the default.", ""]
    lines += ["| key | " + " | ".join(f"`{name}`" for name in MODELS) + " |", "|---" * (len(MODELS) + 1) + "|"]
    for key in differing:
        lines.append(f"| `{key}` | " + " | ".join(show(values[key]) for values in chosen) + " |")
    return [*lines, ""]


def load_model(name: str) -> dict[str, Any]:
    """`model` and `recipe` of configs/model/<name>.yaml over the defaults, with every key and value checked."""
    values = typing.cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "model" / f"{name}.yaml")))
    return {
        "model": to_dict(build_config(values["model"], ModelConfig, "model")),
        "recipe": to_dict(build_config(values["recipe"], RecipeConfig, "recipe")),
    }


def flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        full = f"{path}.{key}" if path else key
        flat |= flatten(value, full) if isinstance(value, dict) else {full: value}
    return flat


def render() -> str:
    hints = typing.get_type_hints(Config)
    lines = [*HEAD.splitlines(), ""]
    top = [f for f in dataclasses.fields(Config) if not dataclasses.is_dataclass(hints[f.name])]
    lines += ["| key | type | default | what it does |", "|---|---|---|---|"]
    lines += [f"| `{f.name}` | {type_name(hints[f.name])} | `{show(getattr(Config(), f.name))}` | {cell(f.metadata['doc'])} |" for f in top]
    lines += ["", *model_table()]
    for f in dataclasses.fields(Config):
        if f not in top:
            kind = typing.cast(type, hints[f.name])
            lines += section(kind, f.name, 2, describe(kind, f.metadata["doc"]))
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/configuration.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 when the file is stale")
    check = parser.parse_args().check
    text = render()
    if check:
        if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
            print("docs/configuration.md is stale; run make docs", file=sys.stderr)
            return 1
        return 0
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
