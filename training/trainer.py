"""Train: `python training/trainer.py [group=choice] [key=value] …`, or the same under `torchrun --nproc_per_node=N`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nsa_transformer.config import Config, ConfigError, build_config, unknown_key_message

CONFIGS = str(Path(__file__).resolve().parent.parent / "configs")


def typed(composed: DictConfig) -> Config:
    values: Any = OmegaConf.to_container(composed, resolve=True)
    return build_config(values)


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="config")
def run(composed: DictConfig) -> None:
    from nsa_transformer.training.resume import continued_config
    from nsa_transformer.training.trainer import Trainer

    status = Trainer(continued_config(typed(composed), HydraConfig.get().overrides.task)).train()
    if status:
        sys.exit(status)


def check_shown(arguments: list[str]) -> None:
    """`--cfg` prints a configuration without running; what it prints must be valid all the same."""
    if any(a in ("--cfg", "-c") or a.startswith("--cfg=") for a in arguments):
        shown = arguments.index("--cfg") + 1 if "--cfg" in arguments else arguments.index("-c") + 1 if "-c" in arguments else len(arguments)
        overrides = [a for i, a in enumerate(arguments) if i != shown and not a.startswith("-")]
        with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
            typed(hydra.compose("config", overrides))


def explain(error: Exception) -> str:
    """Hydra's complaint as one message; of an unknown key, the one that was meant."""
    text = str(error).strip()
    unknown = re.search(r"Could not override '([^']+)'", text)
    return unknown_key_message(unknown.group(1)) if unknown else re.sub(r"\n\s*full_key:.*|\n\s*object_type=.*", "", text)


def main() -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors on instead of printing them and exiting with 1
    from nsa_transformer.training.faults import TrainingError

    try:
        check_shown(sys.argv[1:])
        run()
    except (ConfigError, HydraException, OmegaConfBaseException, TrainingError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error if isinstance(error, ConfigError | TrainingError) else explain(error)}", file=sys.stderr)
        return 1 if isinstance(error, TrainingError) else 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
