"""Which settings a continued run has, and which checkpoint it continues."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nsa_transformer.config import Config, ConfigError, to_dict
from nsa_transformer.distributed.checkpoint import find_damage, list_checkpoints, newest_valid, read_config
from nsa_transformer.training.metrics import read_metrics
from nsa_transformer.training.resume import continued_config, find_start
from nsa_transformer.training.trainer import Trainer
from tests.runs import QUIET, small_config, steady_rows, write_corpus


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("template")
    write_corpus(folder / "text")
    assert Trainer(small_config(folder, *QUIET, "training.max_steps=4", "training.learning_rate=0.002")).train() == 0
    return folder


@pytest.fixture
def work(template: Path, tmp_path: Path) -> Path:
    """That run, to be spoilt; it still reads the corpus of the template."""
    shutil.copytree(template / "run", tmp_path / "run")
    return tmp_path


@pytest.fixture
def resumed(template: Path, work: Path) -> Callable[..., Config]:
    """The configuration of `trainer.py run_dir=… training.resume=auto OVERRIDES…`, as the command makes it."""

    def make(*overrides: str, resume: str = "auto", run_dir: str | None = None) -> Config:
        named = [f"training.resume={resume}", f"run_dir={run_dir or work / 'run'}", *overrides]
        # What the command does not name comes from the defaults, which differ from the run's settings.
        today = small_config(template, *QUIET, *named)
        return continued_config(today, named)

    return make


def damage(checkpoint: Path, name: str = "model.safetensors") -> None:
    content = bytearray((checkpoint / name).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / name).write_bytes(content)


# ------------------------------------------------------------------------------------------------------- settings


def test_saved_values_stay(resumed: Callable[..., Config]) -> None:
    config = resumed()
    assert (config.training.max_steps, config.training.learning_rate) == (4, 0.002)
    assert config.training.resume == "auto"


def test_an_override_need_not_fit_the_defaults_it_was_composed_with(work: Path) -> None:
    """Values are checked together once the saved ones lie beneath."""
    saved = read_config(work / "run")
    batch = saved.training.batch_size
    composed = to_dict(saved)
    composed["training"] |= {"resume": "auto", "micro_batch_size": batch, "batch_size": batch + 1}
    composed["run_dir"] = str(work / "run")
    overrides = ["training.resume=auto", f"run_dir={work / 'run'}", f"training.micro_batch_size={batch}"]
    config = continued_config(composed, overrides)
    assert (config.training.micro_batch_size, config.training.batch_size) == (batch, batch)
    with pytest.raises(ConfigError, match="micro_batch_size"):
        continued_config(composed | {"run_dir": str(work / "other")}, overrides)
    with pytest.raises(ConfigError, match=r"unknown key nonsense\.key"):
        continued_config(composed | {"nonsense": {"key": 1}}, [*overrides, "+nonsense.key=1"])


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("training.max_steps=9", lambda c: c.training.max_steps == 9),
        ("training.learning_rate=0.5", lambda c: c.training.learning_rate == 0.5),
        ("++training.learning_rate=0.5", lambda c: c.training.learning_rate == 0.5),
        ("training.schedule=wsd", lambda c: c.training.schedule == "wsd"),
        ("training.micro_batch_size=2", lambda c: c.training.micro_batch_size == 2),
        ("logging.log_every=3", lambda c: c.logging.log_every == 3),
        ("logging.profiling.enabled=true", lambda c: c.logging.profiling.enabled),
        ("logging.wandb.project=x", lambda c: c.logging.wandb.project == "x"),
        ("memory.activation_checkpointing=full", lambda c: c.memory.activation_checkpointing == "full"),
        ("model.moe.bias_update_rate=0.5", lambda c: c.model.moe.bias_update_rate == 0.5),
        ("model.moe.global_loss_weight=0.5", lambda c: c.model.moe.global_loss_weight == 0.5),
        ("memory=base", lambda c: c.memory.activation_checkpointing == "none"),
    ],
)
def test_an_override_beats_the_saved_value(resumed: Callable[..., Config], override: str, read: Callable[[Config], bool]) -> None:
    config = resumed(override)
    assert read(config)
    if "learning_rate" not in override:
        assert config.training.learning_rate == 0.002


def test_a_group_brings_all_of_its_values(resumed: Callable[..., Config]) -> None:
    config = resumed("training=base")
    assert config.training.max_steps == 6  # what today's command has, not the run's 4


@pytest.mark.parametrize(
    "override",
    [
        "model.hidden_size=64",
        "model.nsa.window=32",
        "model.moe.top_k=1",
        "model.max_position_embeddings=4096",
        "data.max_length=64",
        "data.path=/elsewhere",
        "data.val_fraction=0.5",
        "data.pack_buffer=7",
        "data.length_curriculum=3",
        "training.seed=1",
    ],
)
def test_what_the_weights_depend_on_is_refused(resumed: Callable[..., Config], override: str) -> None:
    key = override.split("=")[0]
    with pytest.raises(ConfigError, match=f"{key}.*drop the override, or start a new run"):
        resumed(override)


def test_another_model_is_refused(resumed: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"model\.[\w.]+=.* differs from the resumed run's"):
        resumed("model=base", "training.device=cpu")


def test_a_size_of_the_recipe_is_refused_rather_than_dropped(resumed: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.max_steps.*training\.max_steps"):
        resumed("recipe.max_steps=9")


def test_a_value_that_cannot_be_is_refused(resumed: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="micro_batch_size"):
        resumed("training.micro_batch_size=3")


def test_the_saved_settings_are_those_of_the_last_start(resumed: Callable[..., Config], work: Path) -> None:
    assert Trainer(resumed("training.max_steps=6", "training.learning_rate=0.004")).train() == 0
    saved = read_config(work / "run")
    assert (saved.training.max_steps, saved.training.learning_rate) == (6, 0.004)
    assert resumed().training.learning_rate == 0.004


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_auto_without_a_run_starts_fresh(template: Path, tmp_path: Path) -> None:
    config = small_config(template, "training.resume=auto", f"run_dir={tmp_path / 'new'}")
    assert continued_config(config, []) is config
    assert find_start(config, tmp_path / "new", pytest.fail) is None


def test_auto_passes_over_a_damaged_checkpoint(resumed: Callable[..., Config], work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(work / "run" / "checkpoints" / "step_00000004")
    assert Trainer(resumed()).train() == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: passing over a damaged checkpoint") and "step_00000004" in err
    # Steps 3 and 4 were made again, and the damaged checkpoint replaced.
    assert [row["step"] for row in read_metrics(work / "run" / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4]
    assert find_damage(work / "run" / "checkpoints" / "step_00000004") is None


def test_what_was_made_again_is_the_same(resumed: Callable[..., Config], template: Path, work: Path) -> None:
    damage(work / "run" / "checkpoints" / "step_00000004", "optimizer.safetensors")
    assert Trainer(resumed()).train() == 0
    assert steady_rows(work / "run") == steady_rows(template / "run")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml", "tokenizer.json", "manifest.json"])
def test_every_file_of_a_checkpoint_counts(work: Path, name: str) -> None:
    newest = work / "run" / "checkpoints" / "step_00000004"
    os.truncate(newest / name, 10)
    warnings: list[str] = []
    assert newest_valid(work / "run", warnings.append) == newest.with_name("step_00000002")
    assert len(warnings) == 1
    (newest / name).unlink()
    assert newest_valid(work / "run", warnings.append) == newest.with_name("step_00000002")


def test_a_lost_config_is_taken_from_the_newest_checkpoint(resumed: Callable[..., Config], work: Path) -> None:
    (work / "run" / "config.yaml").unlink()
    assert resumed().training.learning_rate == 0.002


def test_a_named_checkpoint_is_continued(resumed: Callable[..., Config], work: Path) -> None:
    newest = work / "run" / "checkpoints" / "step_00000004"
    config = resumed("training.max_steps=6", resume=str(newest))
    assert (config.training.learning_rate, config.run_dir) == (0.002, str(work / "run"))
    assert Trainer(config).train() == 0
    assert [path.name for path in list_checkpoints(work / "run")] == ["step_00000004", "step_00000006"]


def test_the_run_of_a_named_checkpoint_is_found(template: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from within `checkpoints/`; a copy elsewhere has no run and gets a new one, and is not written into."""
    names = {work / "run": "checkpoints/step_00000004", work / "run" / "checkpoints": "step_00000004"}
    for folder, name in names.items():
        monkeypatch.chdir(folder)
        today = small_config(template, "run_dir=null", f"training.resume={name}")
        assert Path(continued_config(today, []).run_dir or "").resolve() == work / "run"
    shutil.copytree("step_00000004", work / "copy")
    assert continued_config(small_config(template, "run_dir=null", f"training.resume={work / 'copy'}"), []).run_dir is None


def test_an_older_checkpoint_branches_off_into_another_folder(resumed: Callable[..., Config], work: Path) -> None:
    older = str(work / "run" / "checkpoints" / "step_00000002")
    with pytest.raises(ConfigError, match=r"already holds step_00000004.*another run_dir"):
        Trainer(resumed(resume=older)).train()
    assert Trainer(resumed(resume=older, run_dir=str(work / "branch"))).train() == 0
    assert [row["step"] for row in read_metrics(work / "branch" / "metrics.jsonl") if "loss" in row] == [3, 4]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("checkpoints/step_00000003", r"training\.resume=.* does not exist"),
        ("", r"is a run; write run_dir=.* training\.resume=auto"),
        ("config.yaml", r"training\.resume=.* does not exist"),
    ],
)
def test_a_name_that_is_no_checkpoint_is_an_error(resumed: Callable[..., Config], work: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(resumed(resume=str(work / "run" / name))).train()


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_a_named_checkpoint_that_is_damaged_is_an_error(resumed: Callable[..., Config], work: Path, file: str) -> None:
    newest = work / "run" / "checkpoints" / "step_00000004"
    os.truncate(newest / file, 20)
    before = sorted(work.rglob("*"))
    with pytest.raises(ConfigError, match=r"is damaged: .*training\.resume=auto"):
        Trainer(resumed(resume=str(newest))).train()
    assert sorted(work.rglob("*")) == before


def test_a_fresh_start_where_a_run_is_is_refused(template: Path, work: Path) -> None:
    with pytest.raises(ConfigError, match=r"already holds step_00000004; write training\.resume=auto"):
        Trainer(small_config(template, f"run_dir={work / 'run'}")).train()
    assert len(read_metrics(work / "run" / "metrics.jsonl")) == len(read_metrics(template / "run" / "metrics.jsonl"))


def test_fewer_steps_than_were_made_are_refused(resumed: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match=r"training\.max_steps=3 lies before step 4"):
        Trainer(resumed("training.max_steps=3")).train()


def test_resumed_at_its_very_end_a_run_only_reports(resumed: Callable[..., Config], template: Path, work: Path) -> None:
    assert Trainer(resumed("logging.sample_tokens=4")).train() == 0
    assert steady_rows(work / "run") == steady_rows(template / "run")
    assert (work / "run" / "sample.txt").exists()
