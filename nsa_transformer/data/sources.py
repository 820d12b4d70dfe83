"""Where documents come from: files, folders, globs, URLs, datasets by name. What cannot be read whole is refused by name, or counted."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

from nsa_transformer.config import ConfigError
from nsa_transformer.data.files import BadDocument, CorpusFile, HashRecord, LocalFile, RemoteFile, file_system
from nsa_transformer.data.readers import Column, Document, read_file, suffix_of
from nsa_transformer.utils.files import expand_home

__all__ = ["Column", "Document", "FileSource", "Skips", "Source", "iter_documents", "open_source", "read_documents"]

# Files that lie beside text in many folders and are never text: passed over when a folder or glob finds them, refused when named outright.
_BINARY = frozenset(
    f".{suffix}"
    for group in (
        "avif bmp gif ico jpeg jpg png tif tiff webp mkv mov mp3 mp4 ogg wav webm eot otf ttf woff woff2",
        "7z bz2 gz jar lz4 rar tar tgz whl xz zip zst doc docx odt pdf ppt pptx xls xlsx",
        "a bin class db dll dylib exe gguf idx mo npy npz o onnx pack pkl pt pth pyc pyd safetensors so sqlite wasm",
    )
    for suffix in group.split()
)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::[^:]+)*://")
_HUB_FILES = ("datasets/", "buckets/", "spaces/")  # after hf://, of fsspec's own hf:// file system


class Source(Protocol):
    """A corpus. `key` is the setting that errors name."""

    @property
    def key(self) -> str: ...
    @property
    def described(self) -> str:
        """For people: what it is and how much."""

    @property
    def place(self) -> str:
        """What a record of its hashes is kept under: the same for the same files at the next start."""

    @property
    def default(self) -> bool:
        """Python's own library, where files that are no UTF-8 text (its test-suite has some on purpose) are left out without limit."""

    def fingerprint(self, record: HashRecord | None = None) -> str:
        """Hash of all names and contents, found out once; `record` spares it what has not changed since it was written."""

    def check_unchanged(self) -> None:
        """Raises `ConfigError` where the content is not what `fingerprint` saw."""

    def documents(self, column: Column, bad: Callable[[BadDocument], None]) -> Iterator[Document]: ...


@dataclass
class Skips:
    """Takes the bad documents of a source: refuses the first beyond `limit` (None: no limit), and keeps what is said of the others."""

    key: str
    limit: int | None = 0
    found: list[str] = field(default_factory=list)

    def __call__(self, error: BadDocument) -> None:
        self.found.append(str(error))
        self.check()

    def check(self) -> None:
        """Raises `ConfigError` where more were left out than `limit` allows."""
        if self.limit is None or len(self.found) <= self.limit:
            return
        if self.limit == 0:
            hint = "; data.max_bad_documents=N leaves out up to N such documents" if self.key.startswith("data.") else ""
            raise ConfigError(f"{self.key}: {self.found[0]}{hint}")
        raise ConfigError(f"{self.key}: {self.found[self.limit]}; this is bad document {self.limit + 1}, and data.max_bad_documents={self.limit}")


@dataclass
class FileSource:
    """Files, in the order of their names."""

    key: str
    root: str
    files: list[CorpusFile]
    default: bool = False
    _stamps: dict[str, list[Any] | None] = field(default_factory=dict)
    _fingerprint: str | None = None

    @property
    def described(self) -> str:
        name = "source of the Python standard library" if self.default else self.root
        return f"{name}, {len(self.files)} files, {self.num_bytes / 1e6:.1f} MB"

    @property
    def place(self) -> str:
        return self.root if _URL.match(self.root) else os.path.abspath(self.root)

    @property
    def num_bytes(self) -> int:
        total = 0
        for file in self.files:
            with self._named(file):
                total += file.size()
        return total

    @contextmanager
    def _named(self, file: CorpusFile) -> Iterator[None]:
        """Whatever keeps a file from being read is said with its name; stores and networks have errors of many makes."""
        try:
            yield
        except ConfigError:
            raise
        except OSError as error:
            raise ConfigError(f"{self.key}: {file.where} cannot be read: {error.strerror or error}") from None
        except Exception as error:
            if not isinstance(file, RemoteFile):
                raise
            raise ConfigError(f"{self.key}: {file.where} cannot be read: {type(error).__name__}: {error}") from error

    def fingerprint(self, record: HashRecord | None = None) -> str:
        if self._fingerprint is not None:
            return self._fingerprint
        record = record or HashRecord(None, print)
        digest = hashlib.sha256(str(self.default).encode())
        for file in self.files:
            with self._named(file):
                content, self._stamps[file.name] = record.of(file)
            digest.update(f"{os.fsencode(file.name).hex()} {content}\n".encode())
        record.save()
        self._fingerprint = digest.hexdigest()[:32]
        return self._fingerprint

    def check_unchanged(self) -> None:
        for file in self.files:
            with self._named(file):
                if file.stamp(fresh=True) != self._stamps.get(file.name):
                    raise ConfigError(f"{self.key}: {file.where} changed while it was being read; start again when nothing writes to it")

    def documents(self, column: Column, bad: Callable[[BadDocument], None]) -> Iterator[Document]:
        for file in self.files:
            with self._named(file):
                yield from read_file(file, column, bad)


def read_documents(path: str | os.PathLike[str] | None, text_column: str = "text") -> Iterator[Document]:
    """The documents of `path` in the order of their files; empty ones are left out.

    Raises `ConfigError` naming file and place of what is no text: invalid UTF-8, NUL bytes, broken JSON, gzip, zstd or parquet, a missing column.
    """
    return iter_documents(open_source(path), text_column)


def iter_documents(source: Source, column: str | Column, skips: Skips | None = None) -> Iterator[Document]:
    """The documents of a source; see `read_documents`. `skips` says how many bad ones may be left out (None: not one), and what they were."""
    skips = skips or Skips(source.key, None if source.default else 0)
    empty = True
    for document in source.documents(Column.of(column), skips):
        if document.text:
            empty = False
            yield document
    if empty:
        raise ConfigError(f"{source.key}: the corpus is empty: no text in {source.described}")


# ---------------------------------------------------------------------------------------------------------------- finding files


def open_source(path: str | os.PathLike[str] | None, key: str = "data.path") -> Source:
    """What `path` stands for: a file, a folder (recursive, without hidden entries), a glob, a URL of one of these that fsspec reads, or
    `hf://NAME[:CONFIG][@SPLIT][?REVISION]` for a dataset of the `datasets`
    library. None: Python's own standard library.

    `key` is the setting that errors name. Raises `ConfigError` where there is nothing to read.
    """
    if path is None:
        return _standard_library(key)
    text = os.fspath(path)
    if not text:
        raise ConfigError(f"{key}= is empty; name a file, a folder or a glob{_or_default(key)}")
    if text.startswith("hf://") and not text.startswith(tuple(f"hf://{kind}" for kind in _HUB_FILES)):
        from nsa_transformer.data.hub import HubSource

        return HubSource.open(text, key)
    if text.startswith("file://"):
        text = url2pathname(urlsplit(text).path)
    elif _URL.match(text):
        return _remote_source(text, key)
    given = expand_home(text)
    if given.is_file():
        return FileSource(key, str(given), [LocalFile(given, given.name)])
    if given.is_dir():
        root, found = given, list(_walk(given))
        nothing = "no text files in it (hidden files and binary formats do not count)"
    elif given.exists():
        raise ConfigError(f"{key}={path} is neither a file nor a folder; name one, or a glob")
    elif glob.has_magic(str(given)):
        root = Path(*_plain_prefix(given))
        found = [Path(match) for match in glob.glob(str(given), recursive=True) if os.path.isfile(match)]
        nothing = "no text files that match it; a glob matches files, and ** any folders (data/**/*.txt)"
    else:
        raise ConfigError(f"{key}={path} does not exist; name a file, a folder or a glob{_or_default(key)}")
    named = {file.relative_to(root).as_posix(): file for file in found if suffix_of(file.name) not in _BINARY}
    if not named:
        raise ConfigError(f"{key}={path} has {nothing}; name text, .jsonl or .parquet files")
    return FileSource(key, str(given), [LocalFile(named[name], name) for name in sorted(named)])


def _or_default(key: str) -> str:
    """The way to the default, where errors name a setting that has one."""
    return f", or write {key}=null for the default" if key == "data.path" else ""


def _remote_source(url: str, key: str) -> Source:
    system, path = file_system(url, key)
    try:
        system.invalidate_cache()
        if not path.endswith("/") and system.isfile(path):  # over HTTP a folder is a page as well, and ? no wildcard
            root, found = path.rpartition("/")[0], {path: system.info(path)}
        elif glob.has_magic(path):
            root = re.split(r"[*?[]", path)[0].rpartition("/")[0]
            found = {name: info for name, info in system.glob(path, detail=True).items() if info["type"] == "file"}
        else:
            root, found = path.rstrip("/"), system.find(path, detail=True)
    except OSError as error:
        raise ConfigError(f"{key}={url} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a store's own; what it is, is in its name
        raise ConfigError(f"{key}={url} cannot be read: {type(error).__name__}: {error}") from error
    named = {place.removeprefix(root).lstrip("/"): (place, info) for place, info in found.items()}
    if url.startswith("http"):  # what follows a ? is for the server
        named = {name.partition("?")[0]: file for name, file in named.items()}
    alone = list(found) == [path]
    kept = [name for name in sorted(named) if alone or (suffix_of(name) not in _BINARY and not any(part.startswith(".") for part in name.split("/")))]
    if not kept:
        raise ConfigError(f"{key}={url} has no text files (or does not exist); name text, .jsonl or .parquet files")
    return FileSource(key, url, [RemoteFile(system, named[name][0], name, named[name][1]) for name in kept])


def _standard_library(key: str) -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {file.relative_to(root).as_posix(): file for file in _walk(root, without=("site-packages", "dist-packages", "__pycache__")) if file.suffix == ".py"}
    if not files:
        raise ConfigError(f"this Python has no source of its standard library in {root}; write {key}=FILE_OR_FOLDER")
    return FileSource(key, str(root), [LocalFile(files[name], name) for name in sorted(files)], default=True)


def _walk(root: Path, without: tuple[str, ...] = ()) -> Iterator[Path]:
    seen = set()  # a link may lead back to a folder above it
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in without)
        for name in names:
            file = Path(folder, name)
            if not name.startswith(".") and file.is_file():
                yield file


def _plain_prefix(pattern: Path) -> list[str]:
    parts = []
    for part in pattern.parts[:-1]:
        if glob.has_magic(part):
            break
        parts.append(part)
    return parts
