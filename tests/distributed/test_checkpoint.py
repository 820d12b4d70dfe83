"""Checkpoints: exact, whole or not at all, and never one too few."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nsa_transformer.config import Config, ConfigError, DataConfig, TrainingConfig
from nsa_transformer.distributed import checkpoint
from nsa_transformer.distributed.checkpoint import (
    checkpoint_path,
    find_damage,
    list_checkpoints,
    load_checkpoint_into,
    load_weights,
    newest_valid,
    read_config,
    resolve_weights,
    save_checkpoint,
    write_config,
)
from nsa_transformer.distributed.world import World
from nsa_transformer.models.transformer import Transformer
from nsa_transformer.training.optimizer import build_optimizer

from ..models.small import random_tokens, small_config, small_model

WORLD = World(0, 1, torch.device("cpu"), None)
CONFIG = Config(model=small_config(), data=DataConfig(max_length=128))
FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "tokenizer.json", "manifest.json"]
TEXTS = {"config.yaml": write_config(CONFIG), "tokenizer.json": '{"not": "read here"}'}


def trained(seed: int = 0, steps: int = 2, **changes: Any) -> tuple[Transformer, torch.optim.Optimizer]:
    model = small_model(seed=seed, **changes)
    optimizer = build_optimizer(model, TrainingConfig())
    for number in range(steps):
        out = model(random_tokens(50, number), targets=random_tokens(50, number + 100))
        (out.loss + out.auxiliary).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_router_bias(out.load)
    return model, optimizer


def save(run_dir: Path, step: int, keep: int = 100, pair: tuple[Transformer, torch.optim.Optimizer] | None = None) -> Path:
    model, optimizer = pair or trained()
    return save_checkpoint(run_dir, step, model, optimizer, {"step": step, "rate": 0.1 + 0.2}, TEXTS, WORLD, keep)


def flip(file: Path, place: float = 0.6) -> None:
    """One bit of one byte, the size unchanged."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


DAMAGE = {"truncated": truncate, "emptied": lambda file: os.truncate(file, 0), "flipped": flip, "deleted": Path.unlink}


def states_equal(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    first, second = a.state_dict()["state"], b.state_dict()["state"]
    return first.keys() == second.keys() and all(torch.equal(first[i][key], second[i][key]) for i in first for key in ("step", "exp_avg", "exp_avg_sq"))


# ----------------------------------------------------------------------------------------------------------- save and load


def test_loading_restores_every_bit(tmp_path: Path):
    model, optimizer = trained()
    torch.manual_seed(7)
    torch.rand(3)
    path = save(tmp_path, 12, pair=(model, optimizer))
    drawn = torch.rand(5)
    assert path == tmp_path / "checkpoints" / "step_00000012"
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)

    other, other_optimizer = trained(seed=9, steps=1)
    torch.manual_seed(0)
    state = load_checkpoint_into(path, other, other_optimizer, WORLD)
    assert state == {"step": 12, "rate": 0.1 + 0.2}
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert any(value.abs().sum() > 0 for name, value in other.state_dict().items() if name.endswith("router.bias"))
    assert states_equal(optimizer, other_optimizer)
    assert torch.equal(torch.rand(5), drawn), "the generator goes on where it was"
    assert read_config(path) == CONFIG

    for pair in ((model, optimizer), (other, other_optimizer)):  # and both go on alike
        out = pair[0](random_tokens(50), targets=random_tokens(50, 1))
        out.loss.backward()
        pair[1].step()
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_weights_are_safetensors_by_name(tmp_path: Path):
    model, optimizer = trained()
    saved = load_file(save(tmp_path, 1, pair=(model, optimizer)) / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(value.dtype == torch.float32 and torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_before_any_update(tmp_path: Path):
    """A run whose updates were all skipped has no moments to save, and continues all the same."""
    path = save(tmp_path, 1, pair=trained(steps=0))
    model, optimizer = trained(seed=3)
    load_checkpoint_into(path, model, optimizer, WORLD)
    assert optimizer.state == {}
    torch.testing.assert_close(model.state_dict(), small_model().state_dict(), rtol=0, atol=0)


def test_a_missing_moment_is_damage(tmp_path: Path):
    model, optimizer = trained()
    del optimizer.state[next(model.parameters())]
    path = save(tmp_path, 1, pair=(model, optimizer))
    with pytest.raises(ConfigError, match="damaged"):
        load_checkpoint_into(path, *trained(), WORLD)


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    save(tmp_path, 5)
    model, optimizer = trained(seed=4)
    path = save(tmp_path, 5, pair=(model, optimizer))
    other, _ = trained()
    load_weights(path, other)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert os.listdir(tmp_path / "checkpoints") == ["step_00000005"]


# ------------------------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_damage_of_any_file_is_found_and_passed_over(tmp_path: Path, file: str, how: str):
    pair = trained(steps=1)
    older, newer = save(tmp_path, 1, pair=pair), save(tmp_path, 2, pair=pair)
    assert find_damage(newer) is None
    DAMAGE[how](newer / file)
    named = "" if (file, how) == ("manifest.json", "flipped") else file  # a checksum that changed blames the file it was of
    message = find_damage(newer)
    assert message is not None and named in message
    warnings: list[str] = []
    assert newest_valid(tmp_path, warnings.append) == older
    assert len(warnings) == 1 and named in warnings[0]
    with pytest.raises(ConfigError, match=r"^training.init_from=.* is damaged"):
        resolve_weights(str(newer), "training.init_from")
    with pytest.warns(UserWarning, match=f"passing over a damaged checkpoint: .*{newer.name}.*; taking {older}"):
        assert resolve_weights(str(tmp_path), "training.init_from") == older


def test_any_flipped_bit_of_the_manifest_is_found_or_harmless(tmp_path: Path):
    """Harmless: blank space that is still JSON's."""
    path = save(tmp_path, 1)
    manifest = path / "manifest.json"
    whole = manifest.read_bytes()
    parsed = json.loads(whole)
    for place in range(0, len(whole), 7):
        for bit in (1, 4, 128):
            changed = bytearray(whole)
            changed[place] ^= bit
            manifest.write_bytes(changed)
            if find_damage(path) is None:
                assert json.loads(changed) == parsed


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": {}}', '{"files": []}', '{"files": {"model.safetensors": 3}}', "null", "\x00"])
def test_a_manifest_that_says_nothing(tmp_path: Path, content: str):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(content)
    assert find_damage(path) is not None


def test_all_damaged(tmp_path: Path):
    pair = trained(steps=1)
    for step in (1, 2):
        flip(save(tmp_path, step, pair=pair) / "model.safetensors")
    warnings: list[str] = []
    assert newest_valid(tmp_path, warnings.append) is None and len(warnings) == 2
    with pytest.raises(ConfigError, match="holds damaged checkpoints alone"):
        resolve_weights(str(tmp_path), "path")


def test_leftovers_are_no_checkpoints(tmp_path: Path):
    path = save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    shutil.copytree(path, folder / ".step_00000002.tmp-123-abcd")
    shutil.copytree(path, folder / ".step_00000001.tmp-deleting")
    shutil.copytree(path, folder / "step_3")
    shutil.copytree(path, folder / "step_00000004.bak")
    (folder / "step_00000005").write_text("a file")
    assert list_checkpoints(tmp_path) == [path] and newest_valid(tmp_path, pytest.fail) == path
    assert list_checkpoints(tmp_path / "nowhere") == []


def test_order_is_that_of_the_steps(tmp_path: Path):
    for step in (100_000_000, 99_999_999, 5):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    assert [checkpoint.step_of(p) for p in list_checkpoints(tmp_path)] == [5, 99_999_999, 100_000_000]


def test_a_failed_save_leaves_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(tmp_path, 1)
    before = {file: (path / file).read_bytes() for file in FILES}

    def full_disk(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.json, "dumps", full_disk)
    for step in (1, 2):
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, step)
    assert os.listdir(tmp_path / "checkpoints") == [path.name]
    assert {file: (path / file).read_bytes() for file in FILES} == before


# --------------------------------------------------------------------------------------------------------------- retention


def steps_kept(run_dir: Path) -> list[int]:
    return [checkpoint.step_of(p) for p in list_checkpoints(run_dir)]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int):
    pair = trained(steps=1)
    for step in range(1, 6):
        save(tmp_path, step, keep, pair)
        assert steps_kept(tmp_path) == list(range(max(1, step - keep + 1), step + 1))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [f"step_{s:08d}" for s in range(6 - keep, 6)]


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_never_cost_the_newest_complete_one(tmp_path: Path, keep: int, how: str):
    """Steps 100 to 400, of which 300 and 400 get damaged; the run goes on from 200 and saves more often than before."""
    pair = trained(steps=1)
    for step in (100, 200, 300, 400):
        save(tmp_path, step, 4, pair)
    for step in (300, 400):
        DAMAGE[how](checkpoint_path(tmp_path, step) / "model.safetensors")
    for step in (220, 240, 260, 300, 320, 440):
        saved = save(tmp_path, step, keep, pair)
        assert find_damage(saved) is None, "what was just saved is there"
        whole = [p for p in list_checkpoints(tmp_path) if find_damage(p) is None]
        assert saved in whole and (keep == 1 or len(whole) >= 2 or step == 440), step


# ---------------------------------------------------------------------------------------------------------- another shape


OTHERS: dict[str, dict[str, Any]] = {
    "wider": {"hidden_size": 32},
    "deeper": {"num_layers": 3},
    "shallower": {"num_layers": 1},
    "untied": {"tie_embeddings": False},
    "more experts": {"moe": {"num_experts": 5}},
    "dense attention": {"attention": "dense"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_shape_is_refused_before_anything_is_copied(tmp_path: Path, name: str):
    path = save(tmp_path, 1)
    model, optimizer = trained(seed=8, steps=1, **OTHERS[name])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for load in (lambda: load_weights(path, model), lambda: load_checkpoint_into(path, model, optimizer, WORLD)):
        with pytest.raises(ConfigError, match="model settings"):
            load()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_loading_what_is_missing_or_damaged(tmp_path: Path):
    path = save(tmp_path, 1)
    model, optimizer = trained()
    with pytest.raises(ConfigError, match="does not exist"):
        load_weights(tmp_path / "nowhere", model)
    truncate(path / "optimizer.safetensors")
    with pytest.raises(ConfigError, match="is damaged"):
        load_checkpoint_into(path, model, optimizer, WORLD)
    truncate(path / "model.safetensors")
    with pytest.raises(ConfigError, match="is damaged"):
        load_weights(path, model)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "model: [", "model:\n  hidden_siz: 3\n", "model:\n  hidden_size: wide\n", "\x00", "text"])
def test_a_damaged_config_is_named(tmp_path: Path, content: str):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_config(tmp_path)


def test_paths_that_are_no_run(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, words in (("nowhere", "does not exist"), ("file", "is a file"), ("empty", "holds no checkpoint")):
        with pytest.raises(ConfigError, match=rf"^training.init_from=.*{words}"):
            resolve_weights(str(tmp_path / name), "training.init_from")
