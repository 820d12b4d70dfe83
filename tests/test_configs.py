"""configs/*.yaml against the dataclasses, and the commands of the README as Hydra composes them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from nsa_transformer.config import Config, ConfigError, all_keys, build_config, to_dict

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONFIGS), version_base=None):
        return typing.cast(dict[str, Any], OmegaConf.to_container(compose("config", list(overrides)), resolve=True))


def build(*overrides: str) -> Config:
    return build_config(composed(*overrides))


def leaves(tree: dict[str, Any], path: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in tree.items():
        full = f"{path}.{key}" if path else key
        keys += leaves(value, full) if isinstance(value, dict) else [full]
    return keys


def test_the_yaml_defaults_are_the_dataclass_defaults() -> None:
    assert composed() == to_dict(Config())


def test_every_key_stands_in_the_base_files() -> None:
    """Each by its own file, in the order of its dataclass, so that a reader of configs/ sees all there is."""
    keys: list[str] = []
    for group in ("model", "training", "memory", "data", "logging"):
        tree = OmegaConf.to_container(OmegaConf.load(CONFIGS / group / "base.yaml"), resolve=False)
        assert isinstance(tree, dict)
        named = typing.cast(dict[str, Any], tree)
        keys += leaves(named if group == "model" else {group: named})
    assert sorted([*keys, "run_dir"]) == sorted(all_keys())


@pytest.mark.parametrize("model", MODELS)
def test_each_model_composes_and_builds(model: str) -> None:
    config = build(f"model={model}")
    assert config.data.max_length == config.recipe.max_length
    for name in ("batch_size", "max_steps", "learning_rate", "warmup_steps", "eval_every", "checkpoint_every"):
        assert getattr(config.training, name) == getattr(config.recipe, name)
    assert config.training.warmup_steps < config.training.max_steps


@pytest.mark.parametrize("model", MODELS)
def test_a_model_file_holds_model_and_recipe_alone(model: str) -> None:
    tree = OmegaConf.to_container(OmegaConf.load(CONFIGS / "model" / f"{model}.yaml"))
    assert isinstance(tree, dict)
    assert set(tree) - {"defaults"} == {"model", "recipe"}


def test_the_models_are_those_of_the_documentation() -> None:
    assert set(MODELS) == {"tiny", "base", "large", "nsa_27b"}


def test_tiny_is_sparse_over_most_of_a_pack() -> None:
    config = build("model=tiny")
    nsa = config.model.nsa
    assert nsa.num_selected * nsa.select_block + nsa.window <= config.data.max_length // 2


def test_large_has_the_published_shape() -> None:
    model = build("model=large").model
    assert (model.num_layers, model.hidden_size, model.num_heads, model.num_kv_heads, model.head_dim) == (16, 1024, 32, 2, 128)
    assert (model.moe.num_experts, model.moe.top_k, model.moe.expert_size, model.vocab_size) == (64, 6, 512, 32768)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.max_steps=7", "training.max_steps", 7),
        ("training.batch_size=2", "training.batch_size", 2),
        ("training.learning_rate=0.5", "training.learning_rate", 0.5),
        ("training.warmup_steps=1", "training.warmup_steps", 1),
        ("training.eval_every=3", "training.eval_every", 3),
        ("training.checkpoint_every=3", "training.checkpoint_every", 3),
        ("data.max_length=128", "data.max_length", 128),
    ],
)
def test_an_override_wins_over_the_recipe_on_either_side_of_the_model(override: str, key: str, value: float) -> None:
    group, name = key.split(".")
    for order in ([override, "model=tiny"], ["model=tiny", override]):
        assert getattr(getattr(build(*order), group), name) == value


def test_the_readme_example_composes() -> None:
    config = build("model=large", "model.max_position_embeddings=32768", "training.batch_size=16", "memory.kv_cache.quantization=fp8")
    assert (config.model.max_position_embeddings, config.training.batch_size, config.memory.kv_cache.quantization) == (32768, 16, "fp8")
    assert config.memory.kv_cache.threshold == 512


def test_every_key_of_the_readme_exists() -> None:
    named = {
        "memory.kv_cache.quantization",
        "memory.kv_cache.threshold",
        "memory.expert_offloading.enabled",
        "memory.expert_offloading.pin_memory",
        "memory.cuda_kernels.enable_hbm_optimizations",
        "memory.cuda_kernels.enable_bank_conflict_avoidance",
        "logging.wandb.project",
        "logging.wandb.entity",
        "logging.profiling.enabled",
        "logging.profiling.trace_memory",
    }
    assert named <= set(leaves(composed()))


def test_a_misspelt_key_is_refused_with_the_right_one() -> None:
    with pytest.raises(ConfigCompositionException, match="max_step"):
        composed("training.max_step=7")
    with pytest.raises(ConfigError, match=r"did you mean training\.max_steps"):
        build("+training.max_step=7")


@pytest.mark.parametrize("setting", ["model.moe.forced_balance=true", "training.expert_parallel_size=2"])
@pytest.mark.parametrize("without", ["model.moe.num_experts=0", "model.moe.num_dense_layers=4"])
def test_what_is_for_experts_alone_is_refused_without(setting: str, without: str) -> None:
    build("model=tiny", setting)
    with pytest.raises(ConfigError, match=rf"^{setting}, and no layer of the model has experts; write {setting.split('=')[0]}=(1|false)$"):
        build("model=tiny", setting, without)


def test_hydra_leaves_no_folder_of_its_own(tmp_path: Path) -> None:
    """As in training/trainer.py: no outputs/, no .hydra/, no log file, and the working directory stays."""
    script = tmp_path / "entry.py"
    script.write_text(
        "import os, hydra\n"
        f"@hydra.main(version_base=None, config_path={str(CONFIGS)!r}, config_name='config')\n"
        "def main(cfg):\n"
        "    print(os.getcwd(), cfg.model.num_layers)\n"
        "main()\n"
    )
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run([sys.executable, str(script), "model=tiny"], cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(work), "4"]
    assert list(work.iterdir()) == []


def test_every_field_is_explained() -> None:
    def walk(cls: type) -> None:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            assert f.metadata.get("doc"), f"{cls.__name__}.{f.name}"
            if dataclasses.is_dataclass(hints[f.name]):
                walk(hints[f.name])

    walk(Config)
