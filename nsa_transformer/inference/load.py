"""A model and its tokenizer from a folder."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from nsa_transformer.config import Config, ConfigError, ExpertOffloadingConfig
from nsa_transformer.data.tokenizer import Tokenizer
from nsa_transformer.distributed.checkpoint import CONFIG, load_weights, read_config, resolve_weights
from nsa_transformer.distributed.world import choose_device
from nsa_transformer.memory.expert_offload import NO_EXPERTS, offload_experts
from nsa_transformer.models.moe import MixtureOfExperts
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.utils.files import expand_home


def load_checkpoint(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    expert_offloading: ExpertOffloadingConfig | None = None,
) -> tuple[Transformer, Tokenizer]:
    """The model, in eval mode, and the tokenizer of a run, of one checkpoint of it, or of an exported folder.

    Args:
        path: `runs/x` (its newest checkpoint that verifies), `runs/x/checkpoints/step_…`, or a folder with
            `config.yaml`, `model.safetensors` and `tokenizer.json`.
        device: `cpu`, `cuda`, `auto`, or a torch device.
        dtype: of the weights; None: as saved, float32.
        expert_offloading: whether experts stay in host memory, and how; None: as the run was configured. `store_of(model)` then knows hits and copies.
            On a CPU the experts are in host memory as it is, and nothing changes.

    Raises:
        ConfigError: a ValueError that says what is missing or damaged.
    """
    return SavedModel(path).load(device, dtype, expert_offloading)


class SavedModel:
    """What a user means by a path: a run, one checkpoint of it, or an exported folder. A checkpoint is looked for and verified when it is first needed and
    no second time, since a large one takes minutes; where a damaged one is passed over for an older one, that is warned of once.

    Args:
        path: as `load_checkpoint` takes it.
        key: what errors call it.
    """

    def __init__(self, path: str | Path, key: str = "path") -> None:
        self.path, self.key = path, key

    @cached_property
    def folder(self) -> Path:
        """Where the weights are; a checkpoint, if any, verified. Raises `ConfigError` as `load_checkpoint`."""
        return resolve_weights(str(self.path), self.key)

    @cached_property
    def config(self) -> Config:
        """All settings: of a run its own, for which no checkpoint is read. Raises `ConfigError` as `load_checkpoint`."""
        given = expand_home(self.path)
        return read_config(given if (given / CONFIG).exists() else self.folder)

    def load(
        self, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, expert_offloading: ExpertOffloadingConfig | None = None
    ) -> tuple[Transformer, Tokenizer]:
        """`load_checkpoint` of the path."""
        if dtype is not None and not dtype.is_floating_point:
            raise ConfigError(f"dtype={dtype} cannot hold weights; give torch.bfloat16, torch.float16, torch.float32 or None")
        target = _device(device)
        folder = self.folder
        config = read_config(folder)  # that of the weights
        tokenizer = Tokenizer.load(folder)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model a vocabulary of {config.model.vocab_size}")
        offloading = expert_offloading or config.memory.expert_offloading
        if offloading.enabled and not config.model.has_experts:
            raise ConfigError(NO_EXPERTS)
        model = _offloaded(folder, config, target, dtype, offloading) if offloading.enabled and target.type != "cpu" else _whole(folder, config, target, dtype)
        return model.requires_grad_(False).eval(), tokenizer


def on_meta(config: Config, dtype: torch.dtype | None) -> Transformer:
    """The model without memory, its weights in the dtypes that they are loaded in."""
    with torch.device("meta"):
        model = Transformer(config.model)
    if dtype is not None:
        for name, parameter in model.named_parameters():
            # The router decides in float32, whatever the rest computes in.
            if not name.endswith("router.weight"):
                parameter.data = parameter.data.to(dtype)
    return model


def _whole(folder: Path, config: Config, device: torch.device, dtype: torch.dtype | None) -> Transformer:
    model = on_meta(config, dtype)
    model.to_empty(device=device)
    load_weights(folder, model)
    return model


def _offloaded(folder: Path, config: Config, device: torch.device, dtype: torch.dtype | None, offloading: ExpertOffloadingConfig) -> Transformer:
    """The experts go from the file into the store, one at a time; neither memory ever holds them twice."""
    model = on_meta(config, dtype)
    for module in model.modules():
        if not isinstance(module, MixtureOfExperts):  # its own parameters are the experts
            module.to_empty(device=device, recurse=False)
    store = offload_experts(model, device, offloading)
    load_weights(folder, model, elsewhere=store.destinations(model))
    return model


def _device(device: str | torch.device) -> torch.device:
    if device in ("auto", "cpu", "cuda"):
        return choose_device(str(device))
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={device} is not there ({str(error).splitlines()[0]}); write cpu, cuda or auto") from None
    return target
