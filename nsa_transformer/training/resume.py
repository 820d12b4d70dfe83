"""Where a run continues from, and with which settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nsa_transformer.config import GROUPS, Config, ConfigError, build_config, to_dict, unknown_key_message
from nsa_transformer.distributed.checkpoint import CONFIG, find_damage, list_checkpoints, newest_valid, read_config, step_of

# What a continued run cannot change, since its weights, moments or place in the data depend on it.
FIXED = (
    *("data.max_length", "data.pack_buffer", "data.length_curriculum", "data.path", "data.val_path", "data.val_fraction", "data.text_column"),
    *("data.mixture", "data.messages_column", "data.assistant_only_loss"),
    "training.seed",
)


def continued_config(composed: Config | Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """The settings of a run that `training.resume` continues: its saved ones, with today's overrides on top.

    `composed` is today's configuration, a `Config` or the nested mapping of one; `overrides` are the command's own (`key=value` or
    `group=choice`), and what they do not name keeps the saved value. Values are checked together only after that, so that an override
    need not fit the defaults that it was composed with. A fresh start returns `composed`, checked.
    Raises `ConfigError` for what `build_config` refuses, and where an override contradicts what cannot change.
    """
    today = to_dict(composed) if isinstance(composed, Config) else composed
    training, run_dir = today.get("training"), today.get("run_dir")
    resume = training.get("resume") if isinstance(training, Mapping) else None
    source = _run_to_continue(resume, run_dir) if isinstance(resume, str) and isinstance(run_dir, str | None) else None
    if source is None:
        return composed if isinstance(composed, Config) else build_config(today)
    saved = read_config(source)
    merged = to_dict(saved)
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+~").split("@")[0]
        *parents, last = key.split(".")
        if parents == ["recipe"]:
            raise ConfigError(f"{key} counts at the start of a run alone; to change the resumed run write the setting it feeds, such as training.{last}")
        if parents or key not in GROUPS:
            into, take = merged, today
            for parent in parents:
                if not isinstance(into.get(parent), dict):
                    raise ConfigError(unknown_key_message(key))
                into, take = into[parent], take[parent]
            into[last] = take[last]
        else:
            merged[key] = today[key]
    merged["training"]["resume"] = resume
    merged["training"]["init_from"] = training["init_from"] if isinstance(training, Mapping) else None  # where the saved run once began no longer matters
    merged["run_dir"] = run_dir if run_dir is not None else _run_of(source)
    result: Config = build_config(merged)
    _refuse_changes(to_dict(saved), to_dict(result))
    return result


def find_start(config: Config, run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint to load, verified, or None for a fresh start.

    Raises `ConfigError` where a named checkpoint is missing or damaged, or where a fresh start would overwrite a run.
    """
    resume = config.training.resume
    existing = list_checkpoints(run_dir)
    if resume is None:
        if existing:
            raise ConfigError(f"run_dir={run_dir} already holds {existing[-1].name}; write training.resume=auto to continue it, or another run_dir")
        return None
    if resume == "auto":
        return newest_valid(run_dir, warn)
    path = Path(resume)
    if not path.is_dir():
        raise ConfigError(f"training.resume={resume} does not exist; write auto, or the folder of a checkpoint")
    if list_checkpoints(path):
        raise ConfigError(f"training.resume={resume} is a run; write run_dir={resume} training.resume=auto, or training.resume={list_checkpoints(path)[-1]}")
    damage = find_damage(path)
    if damage is not None:
        raise ConfigError(f"training.resume={resume} is damaged: {damage}; write training.resume=auto for the newest whole checkpoint of run_dir")
    later = [p for p in existing if step_of(p) > step_of(path)]
    if later or (existing and path.resolve() not in [p.resolve() for p in existing]):
        raise ConfigError(f"run_dir={run_dir} already holds {existing[-1].name}, which {resume} does not lead to; write another run_dir to branch off")
    return path


def _run_to_continue(resume: str, run_dir: str | None) -> Path | None:
    """The folder whose settings a resumed run takes up."""
    if resume == "auto":
        checkpoints = [] if run_dir is None else list_checkpoints(Path(run_dir))
        return next((p for p in (Path(run_dir or ""), *reversed(checkpoints)) if checkpoints and (p / CONFIG).exists()), None)
    path = Path(resume)
    return path if (path / CONFIG).exists() else None


def _run_of(checkpoint: Path) -> str | None:
    """The run that a checkpoint lies in, `runs/x` of `runs/x/checkpoints/step_…`; None for one that was copied elsewhere."""
    folder = checkpoint if checkpoint.parent.name == "checkpoints" else checkpoint.resolve()
    return str(folder.parent.parent) if folder.parent.name == "checkpoints" else None


def _refuse_changes(saved: dict[str, Any], now: dict[str, Any]) -> None:
    for key in FIXED:
        group, name = key.split(".")
        _refuse(key, saved[group][name], now[group][name])
    _refuse_tree("model", saved["model"], now["model"])


def _refuse_tree(path: str, saved: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in saved.items():
        key = f"{path}.{name}"
        if isinstance(value, dict):
            _refuse_tree(key, value, now[name])
        elif key not in MAY_CHANGE:
            _refuse(key, value, now[name])


# Settings of the model that shape neither weights nor what they mean.
MAY_CHANGE = tuple(f"model.moe.{name}" for name in ("bias_update_rate", "sequence_loss_weight", "global_loss_weight", "z_loss_weight"))


def _refuse(key: str, saved: Any, now: Any) -> None:
    if saved != now:
        raise ConfigError(
            f"{key}={now} differs from the resumed run's {key}={saved}; drop the override, or start a new run (training.init_from takes its weights)"
        )
