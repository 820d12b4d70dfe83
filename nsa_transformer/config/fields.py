"""What the fields of settings have in common: their explanation, types and bounds, and the error that names what to write."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from dataclasses import field
from typing import Any, Literal


class ConfigError(ValueError):
    """A setting that cannot work. The message says what was wrong and what to write instead."""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def positive(obj: Any, *names: str) -> None:
    for name in names:
        value = getattr(obj, name)
        need(value > 0, f"{name}={value} must be greater than 0")


def not_negative(obj: Any, *names: str) -> None:
    for name in names:
        value = getattr(obj, name)
        need(value >= 0, f"{name}={value} must be 0 or greater")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def check_types(obj: Any) -> None:
    """Of a class that callers build themselves; `build_config` has checked already."""
    cls: Any = type(obj)
    for name, kind in _hints(cls).items():
        value = getattr(obj, name)
        if dataclasses.is_dataclass(kind):
            need(isinstance(value, typing.cast(type, kind)), f"{name} is {type(value).__name__}; give a {typing.cast(type, kind).__name__}")
        else:
            coerce(name, value, kind)


def doc(text: str, default: Any = dataclasses.MISSING, factory: Any = dataclasses.MISSING) -> Any:
    """A dataclass field with its explanation; `docs/configuration.md` is generated from these."""
    if factory is not dataclasses.MISSING:
        return field(default_factory=factory, metadata={"doc": text})
    return field(default=default, metadata={"doc": text})


def coerce(key: str, value: Any, kind: Any, build: Callable[[Any, Any, str], Any] | None = None) -> Any:
    """`value` as `kind`, refusing what is not of that type; whole numbers pass as floats, `1e3` as an int is refused. `build` makes groups of mappings."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices or isinstance(value, bool):
            raise ConfigError(f"{key}={_show(value)} is unknown; write one of {', '.join(map(str, choices))}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (kind,) = [k for k in typing.get_args(kind) if k is not type(None)]
        return coerce(key, value, kind, build)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}={_show(value)} must be a list of groups, such as [{{path: a, weight: 1}}, {{path: b, weight: 2}}]")
        (part, _) = typing.get_args(kind)
        found = []
        for number, item in enumerate(value):
            if not isinstance(item, part) and build is None:
                raise ConfigError(f"{key}[{number}] is {type(item).__name__}; give a {part.__name__}")
            found.append(item if isinstance(item, part) or build is None else build(item, part, f"{key}[{number}]"))
        return tuple(found)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value} is not a finite number; write one")
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise ConfigError(f"{key}={_show(value)} must be {names[kind]}")
    return value


def _show(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
