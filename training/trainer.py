"""Train: `python training/trainer.py [group=choice] [key=value] …`, or the same under `torchrun --nproc_per_node=N`."""

from __future__ import annotations

import os
import sys
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nsa_transformer.cli import compose_config, configs_folder, explain_hydra, plain, refuse_deletions
from nsa_transformer.config import ConfigError
from nsa_transformer.utils.threads import limit_spinning


def compose(arguments: list[str]) -> tuple[dict[str, Any], list[str]] | None:
    """The composed values, unchecked, and the overrides they come from; None where Hydra only shows something (`--cfg`, `--help`). Raises `ConfigError`.

    The run itself comes after Hydra, which adds lines of its own to every error in a job.
    """
    composed: list[tuple[DictConfig, Any]] = []

    @hydra.main(version_base="1.3", config_path=configs_folder(), config_name="config")
    def job(config: DictConfig) -> None:
        composed.append((config, OmegaConf.to_container(HydraConfig.get().overrides.task)))

    options = get_args_parser().parse_args(arguments)
    if options.multirun:
        raise ConfigError("--multirun is not supported; start one command per run")
    refuse_deletions(options.overrides)
    if options.cfg is not None:  # what is shown must be valid as well
        compose_config(options.overrides)
    try:
        job()
        return (plain(composed[0][0]), composed[0][1]) if composed else None
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: Hydra's, of a group that is no text
        raise ConfigError(explain_hydra(error)) from None


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
