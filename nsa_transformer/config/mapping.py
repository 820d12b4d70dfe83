"""From a nested mapping, as YAML has it, to settings and back."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from nsa_transformer.config.fields import ConfigError, coerce
from nsa_transformer.config.run import Config

GROUPS = ("model", "training", "memory", "data", "logging")  # whose choices are files in configs/
T = TypeVar("T")


def build_config(values: Mapping[str, Any], cls: type[T] = Config, path: str = "") -> T:  # type: ignore[assignment]
    """Merge a nested mapping onto `cls`; keys left out keep their defaults.

    Raises `ConfigError` on an unknown key, a wrong type or a value that `cls` refuses; the text starts with the full key.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'the configuration'} must be a group of keys, not {values!r}")
    hints = typing.get_type_hints(cls)
    built: dict[str, Any] = {}
    for key, value in values.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(unknown_key_message(full))
        kind = hints[key]
        built[key] = build_config(value, kind, full) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else coerce(full, value, kind, build_config)
    for f in dataclasses.fields(typing.cast(Any, cls)):
        if f.name not in built and f.default is f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{path} needs a {f.name}; write {f.name}: …")
    try:
        return cls(**built)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}" if path else str(error)) from None


def all_keys(cls: type = Config, path: str = "") -> list[str]:
    """Every leaf key, dotted, in order of declaration."""
    keys: list[str] = []
    for name, kind in typing.get_type_hints(cls).items():
        full = f"{path}.{name}" if path else name
        keys += all_keys(kind, full) if isinstance(kind, type) and dataclasses.is_dataclass(kind) else [full]
    return keys


def unknown_key_message(key: str) -> str:
    """What to say of a key that does not exist: the nearest ones that do."""
    keys = all_keys() if "." in key else [*all_keys(), *(f.name for f in dataclasses.fields(Config))]
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    near += [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1] and k not in near][:2]
    hint = f"; did you mean {' or '.join(near)}?" if near else "; docs/configuration.md lists every key"
    return f"unknown key {key}{hint}"


def to_dict(config: Any) -> dict[str, Any]:
    """The nested mapping that `build_config` takes back, with lists for tuples, as YAML has them."""
    plain: dict[str, Any] = _without_tuples(dataclasses.asdict(config))
    return plain


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_tuples(part) for key, part in value.items()}
    return [_without_tuples(part) for part in value] if isinstance(value, list | tuple) else value
