"""Train: `python training/trainer.py [group=choice] [key=value] …`, or the same under `torchrun --nproc_per_node=N`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nsa_transformer.config import ConfigError, build_config, unknown_key_message
from nsa_transformer.utils.threads import limit_spinning

CONFIGS = str(Path(__file__).resolve().parent.parent / "configs")
GROUPS = ("model", "training", "memory", "data", "logging")


def plain(composed: DictConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(composed, resolve=True)
    return values


def compose(arguments: list[str]) -> tuple[dict[str, Any], list[str]] | None:
    """The composed values, unchecked, and the overrides they come from; None where Hydra only shows something (`--cfg`, `--help`). Raises `ConfigError`.

    The run itself comes after Hydra, which adds lines of its own to every error in a job.
    """
    composed: list[tuple[DictConfig, Any]] = []

    @hydra.main(version_base="1.3", config_path=CONFIGS, config_name="config")
    def job(config: DictConfig) -> None:
        composed.append((config, OmegaConf.to_container(HydraConfig.get().overrides.task)))

    options = get_args_parser().parse_args(arguments)
    if options.multirun:
        raise ConfigError("--multirun is not supported; start one command per run")
    for override in options.overrides:
        if override.startswith("~"):
            raise ConfigError(f"{override} would delete a setting, and every one is needed; write {override[1:].split('=')[0]}=VALUE")
    try:
        if options.cfg is not None:  # what is shown must be valid as well
            with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
                build_config(plain(hydra.compose("config", options.overrides)))
        job()
        return (plain(composed[0][0]), composed[0][1]) if composed else None
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: Hydra's, of a group that is no text
        raise ConfigError(explain(error)) from None


def explain(error: Exception) -> str:
    """A complaint of Hydra or OmegaConf as one message; of an unknown key or group, the ones that exist."""
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group}={name} does not exist; write {' or '.join(f'{group}={option}' for option in error.options)}"
    text = str(error).strip()
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} is not KEY=VALUE as Hydra reads it ({text.splitlines()[0]}); put quotes around a value with special characters: \"KEY='VALUE'\""
        )
    unknown = re.search(r"Could not override '([^']+)'", text)
    if not isinstance(error, HydraException | OmegaConfBaseException) or (unknown and unknown.group(1) in GROUPS):
        return f"a group ({', '.join(GROUPS)}) takes the name of one of its files in configs/, such as model=tiny; set its keys one by one"
    return unknown_key_message(unknown.group(1)) if unknown else re.sub(r"\n\s*(full_key:|object_type=).*", "", text)


def main() -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them and exiting with 1
    limit_spinning()
    from nsa_transformer.training.faults import OutOfMemory, TrainingError
    from nsa_transformer.training.resume import continued_config
    from nsa_transformer.training.trainer import Trainer

    try:
        composed = compose(sys.argv[1:])
        return 0 if composed is None else Trainer(continued_config(*composed)).train()
    except (ConfigError, TrainingError) as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        elif isinstance(error, OutOfMemory):  # of which no other rank knows
            print(f"error: rank {rank}: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
