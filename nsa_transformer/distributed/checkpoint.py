"""Checkpoints that exist whole or not at all.

    checkpoints/step_00000100/
        model.safetensors        weights (float32) and router biases by name
        optimizer.safetensors    AdamW's moments and step counts by parameter, RNG states
        state.json               step, tokens, position in the data, …
        config.yaml tokenizer.json
        manifest.json            size and SHA-256 of every other file, written last

Written into a hidden sibling, flushed, then renamed. Tensors are saved whole, so the number of ranks may change.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsa_transformer.config import Config, ConfigError, build_config, to_dict
from nsa_transformer.distributed.parallelize import Shards, reshard
from nsa_transformer.distributed.world import World
from nsa_transformer.memory.optimizer_offload import OffloadedAdamW, master_of
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.utils.files import MARK, atomic_folder, expand_home

MANIFEST, MODEL, OPTIMIZER, STATE, CONFIG = "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "config.yaml"
MOMENTS = ("exp_avg", "exp_avg_sq")


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, damaged ones included."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and re.fullmatch(r"step_\d{8,}", p.name)), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def find_damage(path: Path, hashes: bool = True) -> str | None:
    """What is wrong with a checkpoint, in a sentence, or None. Without `hashes` only the sizes are compared."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        if MODEL not in files:
            return f"{path / MANIFEST} lists no {MODEL}"
        for name, entry in files.items():
            size = (path / name).stat().st_size
            if size != entry["size"]:
                return f"{path / name} has {size} bytes instead of {entry['size']}"
            if hashes and _sha256(path / name) != entry["sha256"]:
                return f"{path / name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{path / MANIFEST} cannot be read ({error})"
    return None


def newest_valid(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are passed over with a warning."""
    for path in reversed(list_checkpoints(run_dir)):
        damage = find_damage(path)
        if damage is None:
            return path
        warn(f"passing over a damaged checkpoint: {damage}")
    return None


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    texts: dict[str, str],
    world: World,
    keep: int,
) -> Path:
    """Save a step and then, of the complete checkpoints up to it, drop the oldest beyond `keep`. `texts` are further files by name. Every rank must call.

    Raises `OSError` where it cannot be written; what was there before is then untouched.
    """
    weights, moments = _gather(model, optimizer, world)
    path = checkpoint_path(run_dir, step)
    if world.is_main:
        with atomic_folder(path, replace=True) as folder:
            _save_tensors(weights, folder / MODEL)
            _save_tensors(moments, folder / OPTIMIZER)
            for name, text in {**texts, STATE: json.dumps(state, indent=1)}.items():
                (folder / name).write_text(text, encoding="utf-8")
            files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())}
            (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
        _prune(run_dir, keep, step)
    world.barrier()
    return path


def _save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file)
    except SafetensorError as error:  # the library's word for a full disk as well
        raise OSError(None, str(error), str(file)) from None


def _prune(run_dir: Path, keep: int, step: int) -> None:
    """Delete complete checkpoints older than the newest `keep` up to `step`, which was just saved. Later ones are damaged ones that the
    run passed over at its start; counting them would cost whole ones. What is being deleted is no checkpoint any more: it is renamed first."""
    complete = [p for p in list_checkpoints(run_dir) if step_of(p) <= step and find_damage(p, hashes=False) is None]
    for path in complete[:-keep]:
        doomed = path.with_name(f".{path.name}{MARK}{os.getpid()}-deleting")  # remove_leftovers knows it, should a kill interrupt the deletion
        path.rename(doomed)
        shutil.rmtree(doomed)


def _gather(model: Transformer, optimizer: torch.optim.Optimizer, world: World) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole tensors on rank 0's CPU, one at a time; nothing on the others."""
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    reshard(model)
    shards = Shards(model)
    assert set(optimizer.state) <= set(model.parameters())

    def keep(into: dict[str, Tensor], name: str, tensor: Tensor, key: str = "") -> None:
        full = shards.whole(name, tensor.detach())
        if world.is_main:
            into[key + name] = full.to("cpu", copy=True).contiguous()

    for name, parameter in model.named_parameters():
        keep(weights, name, master_of(optimizer, parameter))
        for key, value in optimizer.state.get(parameter, {}).items():
            keep(moments, name, value, f"{key}/")
    for name, buffer in model.named_buffers():
        keep(weights, name, buffer)
    if world.is_main:
        moments["rng/cpu"] = torch.get_rng_state()
        if world.device.type == "cuda":
            moments["rng/cuda"] = torch.cuda.get_rng_state()
    return weights, moments


def load_weights(
    path: Path, model: Transformer, optimizer: torch.optim.Optimizer | None = None, elsewhere: Mapping[str, Callable[[Any], None]] | None = None
) -> None:
    """Copy `model.safetensors` of a folder into a model, sharded or not, or into the masters of an offloaded optimizer. Parameters named in `elsewhere` are not
    the model's to hold: what stands there takes the tensor from the file, which it may slice before it is read.

    Raises `ConfigError` where it is missing, damaged or of another shape, before anything is copied.
    """
    file = path / MODEL
    parameters = {name: parameter if optimizer is None else master_of(optimizer, parameter) for name, parameter in model.named_parameters()}
    targets = parameters | dict(model.named_buffers())
    shards = Shards(model)
    try:
        with safe_open(file, "pt") as saved:
            found = {name: list(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
            _match(file, found, {name: list(shards.shape(name, target)) for name, target in targets.items()})
            for name, target in targets.items():
                if elsewhere is not None and name in elsewhere:
                    elsewhere[name](saved.get_slice(name))
                else:
                    shards.assign(name, target, saved.get_tensor(name))
        if isinstance(optimizer, OffloadedAdamW):
            optimizer.publish()
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; name a run, a checkpoint or an export") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} is damaged ({error}); name another checkpoint") from None


def _match(file: Path, shapes: dict[str, list[int]], wanted: dict[str, list[int]]) -> None:
    for name, shape in wanted.items():
        if name not in shapes:
            raise ConfigError(f"{file} has no {name}: it is of another architecture; take its own model settings, from the config.yaml beside it")
        if shapes[name] != shape:
            raise ConfigError(
                f"{file} has {name} of shape {shapes[name]} where this model has {shape}; take its own model settings, from the config.yaml beside it"
            )
    extra = sorted(set(shapes) - set(wanted))
    if extra:
        raise ConfigError(f"{file} has {extra[0]}, which this model has not; take its own model settings, from the config.yaml beside it")


def load_checkpoint_into(path: Path, model: Transformer, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """Restore weights, router biases, moments and RNG states; returns state.json. Raises `ConfigError` on any damage or other shape."""
    load_weights(path, model, optimizer)
    names, shards = {parameter: name for name, parameter in model.named_parameters()}, Shards(model)
    try:
        with safe_open(path / OPTIMIZER, "pt") as saved:
            # Every update so far may have been skipped; then AdamW has no moments yet.
            has_moments = any(key.startswith("step/") for key in saved.keys())  # noqa: SIM118
            optimizer.state.clear()
            for group in optimizer.param_groups if has_moments else ():
                for parameter in group["params"]:
                    name = names[parameter]
                    state = _new_state(optimizer, parameter, group, world)
                    for key, value in state.items():
                        shards.assign(name, value, saved.get_tensor(f"{key}/{name}"))
            torch.set_rng_state(saved.get_tensor("rng/cpu"))
            if world.device.type == "cuda" and "rng/cuda" in saved.keys():  # noqa: SIM118
                torch.cuda.set_rng_state(saved.get_tensor("rng/cuda"))
        return json.loads((path / STATE).read_text())
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}); name another checkpoint, or training.resume=auto for the newest whole one") from None


def _new_state(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, group: dict[str, Any], world: World) -> dict[str, Tensor]:
    """Step count and moments of a parameter that has had no update yet, as AdamW keeps them."""
    if isinstance(optimizer, OffloadedAdamW):
        return optimizer.host_state(parameter)
    step = torch.zeros((), device=world.device if group["fused"] and world.device.type == "cuda" else "cpu")
    optimizer.state[parameter] = {"step": step} | {moment: torch.zeros_like(parameter) for moment in MOMENTS}
    return optimizer.state[parameter]


def resolve_weights(path: str, key: str) -> Path:
    """The folder with weights that a user means by a run, one checkpoint of it, or an export. Raises `ConfigError` naming `key`; warns where a run's newest
    checkpoint is damaged and an older one is taken."""
    folder = expand_home(path)
    if not folder.exists():
        raise ConfigError(f"{key}={path} does not exist; name a run, one checkpoint of it, or an export")
    if not folder.is_dir():
        raise ConfigError(f"{key}={path} is a file; name the folder of a run, a checkpoint or an export")
    is_checkpoint = any((folder / name).exists() for name in (MANIFEST, OPTIMIZER, STATE))  # an export has none of them
    if is_checkpoint or (folder / MODEL).exists():
        if is_checkpoint and (damage := find_damage(folder)):
            raise ConfigError(f"{key}={path} is damaged: {damage}; name another checkpoint")
        return folder
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise ConfigError(f"{key}={path} holds no checkpoint; name a run, one checkpoint of it, or an export")
    problems: list[str] = []
    newest = newest_valid(folder, problems.append)
    if newest is None:
        raise ConfigError(f"{key}={path} holds damaged checkpoints alone; {problems[0]}")
    if problems:
        warnings.warn(f"{'; '.join(problems)}; taking {newest}", stacklevel=2)
    return newest


def read_config(folder: Path) -> Config:
    """The `config.yaml` of a run or checkpoint. Raises `ConfigError` where it is missing or damaged."""
    file = folder / CONFIG
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist; name a run, a checkpoint or an export") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read ({str(error).splitlines()[0]}); restore it from the checkpoints of the run") from None
    try:
        return build_config(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def write_config(config: Config) -> str:
    """The text of a `config.yaml`."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
