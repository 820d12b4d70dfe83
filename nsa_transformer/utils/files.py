"""Files and folders that exist whole or not at all, also after `kill -9` or a power cut; and what a user means by a path."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_file", "atomic_folder", "expand_home", "remove_leftovers", "write_atomic"]

MARK = ".tmp-"  # `.<name>.tmp-<pid>-<random>`: hidden, and never mistaken for a finished one


def expand_home(path: str | os.PathLike[str]) -> Path:
    """A path to be read, `~` in front being a home. That of nobody stays as it is, and so is what does not exist; pathlib's own raises RuntimeError."""
    return Path(os.path.expanduser(path))


def _sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}{MARK}{os.getpid()}-{secrets.token_hex(4)}")


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replace the file at `path`; a reader sees the old content or the new one, never a part. Text is written as UTF-8.

    The folder must exist. Raises `OSError` where it cannot be written, and then leaves `path` as it was.
    """
    with atomic_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """`write_atomic` for content that comes piece by piece: yields a file that replaces the one at `path` when the block ends without an error."""
    path = Path(path)
    temporary = _sibling(path)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `path`; when the block ends without an error it is flushed and renamed to `path`.

    On any error (Ctrl-C included) the temporary folder is removed and `path` is untouched. Parents are created.
    A `path` that exists raises `FileExistsError` before anything is written, unless `replace`: then the old one, file or
    folder, is moved aside for the rename and deleted after it (a kill between the two renames leaves no `path`, never half of one).
    """
    path = Path(path)
    if not replace and os.path.lexists(path):
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                if not os.path.islink(os.path.join(folder, name)):
                    _sync(Path(folder, name))
            _sync(Path(folder))
        old = None
        if replace and os.path.lexists(path):
            old = _sibling(path)
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except BaseException:
            if old is not None:
                os.rename(old, path)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)
    if old is not None:
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def remove_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Delete what a killed process left unfinished directly in `folder`; returns what was deleted.

    Call it where no other process is writing there: a run that owns its folder, at its start.
    """
    found = list(Path(folder).glob(f".*{MARK}*-*"))
    for entry in found:
        _remove(entry)
    return found
