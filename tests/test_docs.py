"""docs/configuration.md is what the dataclasses say; what README.md and docs/*.md show runs, exists and resolves."""

from __future__ import annotations

import importlib.util
import re
import shlex
import typing
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file

from nsa_transformer import cli
from nsa_transformer.config import Config, all_keys, build_config
from nsa_transformer.data.tokenizer import train_tokenizer
from nsa_transformer.distributed.checkpoint import write_config
from nsa_transformer.models.transformer import Transformer, count_parameters

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUPS = ("model", "training", "memory", "data", "logging", "recipe")


class Fence(NamedTuple):
    """A fenced block: its page, the line it starts at, its language and its text."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"


def fences(*languages: str) -> list[Fence]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            found.append(Fence(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]))
    return [fence for fence in found if fence.language in languages]


def commands() -> list[Any]:
    """Every command line of a bash block, continuations joined, comments gone."""
    found = []
    for fence in fences("bash"):
        for line in fence.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(pytest.param(words, id=f"{fence.name} {' '.join(words)}"))
    return found


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        return build_config(typing.cast(dict[str, Any], OmegaConf.to_container(compose("config", list(overrides)), resolve=True)))


@pytest.fixture
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_configuration", ROOT / "docs" / "generate_configuration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_reference_is_current(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["generate_configuration.py", "--check"])
    assert generator.main() == 0, "run make docs"


def test_every_key_has_its_row(generator: ModuleType) -> None:
    text = generator.render()
    assert [key for key in all_keys() if f"\n| `{key}` | " not in text] == []


def test_check_notices_a_stale_file(generator: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale = tmp_path / "configuration.md"
    stale.write_text(generator.render().replace("whole number", "number", 1), encoding="utf-8")
    monkeypatch.setattr(generator, "TARGET", stale)
    monkeypatch.setattr("sys.argv", ["generate_configuration.py", "--check"])
    assert generator.main() == 1
    assert "make docs" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["generate_configuration.py"])
    assert generator.main() == 0
    assert stale.read_text(encoding="utf-8") == generator.render()


# ------------------------------------------------------------------------------------------------ what the pages show


@pytest.mark.parametrize("fence", fences("python"), ids=lambda fence: fence.name)
def test_python_examples_run(fence: Fence, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, where `runs/mine` is an untrained model."""
    if "runs/mine" in fence.text:
        write_model(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    exec(compile(fence.text, fence.name, "exec"), {"__name__": fence.name})


def write_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    config = composed("model=tiny", "model.vocab_size=257", "model.num_layers=2")
    model = Transformer(config.model)
    save_file({**dict(model.named_parameters()), **dict(model.named_buffers())}, folder / "model.safetensors")
    (folder / "config.yaml").write_text(write_config(config), encoding="utf-8")
    train_tokenizer(["text"], 257).save(folder)


def test_there_are_python_examples_on_the_pages_that_promise_them() -> None:
    assert {fence.page.name for fence in fences("python")} >= {"README.md", "attention.md", "data.md", "quickstart.md"}


@pytest.mark.parametrize("words", commands())
def test_commands_exist(words: list[str]) -> None:
    """Training commands compose, `nsa` commands parse, `make` targets and named scripts are there."""
    program = words[0].removeprefix(".venv/bin/")
    if program in ("python", "torchrun") and "training/trainer.py" in words:
        overrides = words[words.index("training/trainer.py") + 1 :]
        composed(*overrides[: overrides.index("--cfg")] if "--cfg" in overrides else overrides)
    elif program == "docker" and "python" in words:
        composed(*words[words.index("training/trainer.py") + 1 :])
    elif program == "nsa":
        _, rest = cli._parser().parse_known_args(words[1:])
        assert rest == []
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
        for argument in words[2:]:
            assert argument.startswith("ARGS=")
            composed("model=tiny", *shlex.split(argument.removeprefix("ARGS=")))
    elif program == "pytest":
        assert all(word.startswith("tests/") for word in words[1:])
    elif program == "pip":
        assert (ROOT / words[-1]).exists()
    else:
        assert program in ("git", "cd", "conda", "docker"), f"no test knows how to check {program}"


@pytest.mark.parametrize("fence", fences("yaml"), ids=lambda fence: fence.name)
def test_yaml_examples_are_valid_settings(fence: Fence) -> None:
    build_config(yaml.safe_load(fence.text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_is_named_exists(page: Path) -> None:
    keys = all_keys()
    # `data.md` and `training.py` are files.
    text = re.sub(r"[\w/]+\.(md|py|yaml|json|npy)\b", "", page.read_text(encoding="utf-8"))
    named = re.findall(rf"`((?:{'|'.join(GROUPS)})(?:\.\w+)+)(?=[`=.*])", text)
    named += re.findall(rf"(?<![\w.])((?:{'|'.join(GROUPS)})(?:\.\w+)+)=", text)
    assert [key for key in named if key not in keys and not any(k.startswith(f"{key}.") for k in keys)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    relative = [link.split("#")[0] for link in links if not re.match(r"[a-z]+://|#", link)]
    assert [link for link in relative if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_named_file_exists(page: Path) -> None:
    """Modules, tests and YAML in backticks, named from the root, the package or `configs/`."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`([\w./]+\.(?:py|yaml))`|`((?:nsa_transformer|configs|tests|docs)/[\w./]*)`", text)
    roots = (ROOT, ROOT / "nsa_transformer", ROOT / "configs")
    assert [path for path in map("".join, named) if not any((root / path).exists() for root in roots)] == []


def test_the_picture_is_well_formed_and_names_the_branches() -> None:
    import xml.etree.ElementTree as ElementTree

    root = ElementTree.parse(ROOT / "docs" / "three_branches.svg").getroot()
    texts = {"".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"Compressed", "Selected", "Window"} <= texts


# ------------------------------------------------------------------------------------------------- figures of docs/models.md


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


def test_the_parameter_counts_are_those_of_the_configurations() -> None:
    rows = {row[0].strip("`"): row[1:3] for row in table_rows((ROOT / "docs" / "models.md").read_text(encoding="utf-8"))}
    for name in ("tiny", "base", "large", "nsa_27b"):
        counted = count_parameters(composed(f"model={name}").model)
        assert rows[name] == [f"{count / 1e6:.1f}" for count in counted], name


def part_of(name: str) -> str:
    """The row of the breakdown that a parameter belongs to."""
    if name.startswith("embedding"):
        return "embedding"
    if name.startswith("head"):
        return "output projection"
    if "norm" in name or "router" in name:
        return "routers and norms"
    if ".attention." in name:
        return "attention: projections" if "_proj." in name else "attention: compression and gates"
    if ".shared." in name:
        return "shared experts"
    return "routed experts" if name.endswith(("w13", "w2")) else "dense first layer"


def test_the_breakdown_of_the_paper_s_model_is_counted() -> None:
    model = composed("model=nsa_27b").model
    with torch.device("meta"):
        parameters = dict(Transformer(model).named_parameters())
    total = Counter[str]()
    for name, parameter in parameters.items():
        total[part_of(name)] += parameter.numel()
    active = Counter(total)
    active["routed experts"] = total["routed experts"] * model.moe.top_k // model.moe.num_experts
    total["sum"], active["sum"] = count_parameters(model)
    assert (sum(total.values()), sum(active.values())) == (2 * total["sum"], 2 * active["sum"])
    rows = {row[0].split(",")[0]: row[1:] for row in table_rows((ROOT / "docs" / "models.md").read_text(encoding="utf-8")) if row[0].split(",")[0] in total}
    assert rows == {part: [f"{total[part] / 1e9:.3f}", f"{active[part] / 1e9:.3f}"] for part in total}
