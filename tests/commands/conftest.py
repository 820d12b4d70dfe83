"""What tests of the commands share: a finished run, and the trainer in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nsa_transformer.training.trainer import Trainer
from tests.commands.answers import Answer
from tests.runs import ENTRY, QUIET, entry, small_config, write_corpus


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, a cache and a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    write_corpus(folder / "text")
    assert Trainer(small_config(folder, *QUIET)).train() == 0
    return folder


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """`python training/trainer.py …` in this process, in an empty working directory: status, stdout, stderr."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", [str(ENTRY), *arguments])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = entry().main()
            except SystemExit as stopped:  # argparse
                status = stopped.code if isinstance(stopped.code, int) else 1
        return status, out.getvalue(), err.getvalue()

    return call
