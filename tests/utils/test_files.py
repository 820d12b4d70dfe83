from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nsa_transformer.utils.files import atomic_folder, expand_home, remove_leftovers, write_atomic


def test_write_atomic_replaces_text_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomic(path, "é\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_write_atomic_honours_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_folder_appears_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "step_1"
    with atomic_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x").write_text("1")
        assert not path.exists()
    assert (path / "sub" / "x").read_text() == "1"
    assert os.listdir(path.parent) == ["step_1"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_folder_is_removed_on_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), atomic_folder(tmp_path / "x") as temporary:
        (temporary / "half").write_text("1")
        raise error
    assert os.listdir(tmp_path) == []


def test_existing_folder_is_refused_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.mkdir()
    (path / "old").write_text("1")
    with pytest.raises(FileExistsError, match="exists already"), atomic_folder(path):
        raise AssertionError("the block must not run")
    with pytest.raises(RuntimeError), atomic_folder(path, replace=True):
        raise RuntimeError
    assert os.listdir(path) == ["old"]
    with atomic_folder(path, replace=True) as temporary:
        (temporary / "new").write_text("1")
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["x"]


def test_killed_writer_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    code = """
        import sys, time
        from nsa_transformer.utils.files import atomic_folder
        with atomic_folder(sys.argv[1] + "/step_1") as folder:
            (folder / "half").write_text("x")
            print("ready", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    process.stdout.close()
    assert not (tmp_path / "step_1").exists()
    assert list(tmp_path.glob("step_*")) == []
    (tmp_path / ".keep").write_text("")
    assert len(remove_leftovers(tmp_path)) == 1
    assert os.listdir(tmp_path) == [".keep"]


def test_homes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ours")
    assert expand_home("~/runs/x") == Path("/home/ours/runs/x") and expand_home(Path("~")) == Path("/home/ours")
    assert expand_home("~nobody-here/x") == Path("~nobody-here/x") and expand_home("runs/~x") == Path("runs/~x")
