"""docs/configuration.md is what the dataclasses say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from nsa_transformer.config import all_keys

ROOT = Path(__file__).resolve().parent.parent


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
