"""The files of a corpus, wherever they lie: on this machine, or behind any URL that fsspec reads. Opened, unpacked, and known by their content."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from nsa_transformer.config import ConfigError
from nsa_transformer.utils.files import write_atomic

__all__ = ["BadDocument", "CorpusFile", "HashRecord", "LocalFile", "RemoteFile", "file_system", "unpacked"]

_UNPACKED = (".gz", ".zst")
_SETTLED = 2.0  # seconds; a file changed later than this before it was read may change again without its times showing it
# What stores say of a file that changes whenever its content does. Without one of them the content is read each time.
_TIMES = ("LastModified", "last_modified", "mtime", "modified", "updated")
_MARKS = ("ETag", "etag", "md5Hash", "md5", "checksum", "generation", "version_id", *_TIMES)


class BadDocument(ConfigError):
    """Content that is no text, named by file and place. It can be left out and counted: see `data.max_bad_documents`."""


class CorpusFile(Protocol):
    """name: relative to its source. where: path or URL, for messages."""

    @property
    def name(self) -> str: ...
    @property
    def where(self) -> str: ...
    def open(self) -> BinaryIO: ...
    def size(self) -> int: ...
    def stamp(self, fresh: bool = False) -> list[Any] | None:
        """What changes when the content does; None where the file system tells no such thing. `fresh`: as of now, not as of the listing."""

    def changed_at(self) -> float:
        """Newest time stamp, in seconds since 1970; 0 where the stamp rests on no time."""


@dataclass(frozen=True)
class LocalFile:
    path: Path
    name: str

    @property
    def where(self) -> str:
        return str(self.path)

    def open(self) -> BinaryIO:
        return self.path.open("rb")

    def size(self) -> int:
        return self.path.stat().st_size

    def stamp(self, fresh: bool = False) -> list[Any]:
        stat = self.path.stat()
        return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]

    def changed_at(self) -> float:
        stat = self.path.stat()
        return max(stat.st_mtime, stat.st_ctime)


@dataclass(frozen=True)
class RemoteFile:
    """`system` is an fsspec file system, `path` the file within it, `info` what the listing said of it."""

    system: Any
    path: str
    name: str
    info: dict[str, Any]

    @property
    def where(self) -> str:
        return str(self.system.unstrip_protocol(self.path))

    def open(self) -> BinaryIO:
        stream: BinaryIO = self.system.open(self.path, "rb")
        return stream

    def size(self) -> int:
        return int(self.info.get("size") or 0)

    def stamp(self, fresh: bool = False) -> list[Any] | None:
        info = self.info
        if fresh:
            self.system.invalidate_cache(self.system._parent(self.path))
            info = self.system.info(self.path)
        marks = [f"{key}={info[key]}" for key in _MARKS if info.get(key)]
        return [info.get("size"), *marks] if marks else None

    def changed_at(self) -> float:
        times = [getattr(value, "timestamp", lambda value=value: value)() for value in map(self.info.get, _TIMES)]
        return max((float(value) for value in times if isinstance(value, int | float)), default=0.0)


def file_system(url: str, key: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path within it. Raises `ConfigError` for a protocol that is not known or whose package is missing."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:  # fsspec names the package
        protocol = url.split("://")[0]
        packages = "pip install s3fs for s3, gcsfs for gs, requests aiohttp for http"
        raise ConfigError(f"{key}={url}: {error}; {protocol}:// needs a package that is not there ({packages})") from None
    except ValueError as error:
        raise ConfigError(f"{key}={url}: {error}; fsspec knows {', '.join(sorted(fsspec.available_protocols())[:12])}, …") from None
    return system, path


@contextmanager
def unpacked(file: CorpusFile, place: Callable[[], str] = str) -> Iterator[BinaryIO]:
    """The content of a file as a stream of bytes, without its .gz or .zst. Raises `BadDocument` where that is damaged or ends too early, with
    the byte of the file and `place()`."""
    with file.open() as raw:
        suffix = Path(file.name).suffix.lower()
        if suffix not in _UNPACKED:
            yield raw
            return
        try:
            stream: Any = gzip.GzipFile(fileobj=raw) if suffix == ".gz" else _unzstd(raw, file)
            yield stream
        except (EOFError, zlib.error, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the content
                raise
            kind = {".gz": "gzip", ".zst": "zstd"}[suffix]
            raise BadDocument(
                f"{file.where} is a damaged or truncated {kind} file near byte {raw.tell()}{place()} ({error}); fetch or compress it again"
            ) from None


def _unzstd(raw: BinaryIO, file: CorpusFile) -> Any:
    try:
        import pyarrow as pa
    except ImportError:
        raise ConfigError(f"{file.where} needs pyarrow to be read; pip install pyarrow") from None
    stream: Any = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
    return io.BufferedReader(stream, 1 << 20)


# ------------------------------------------------------------------------------------------------------------- content hashes


class HashRecord:
    """SHA-256 of files, remembered in a file by what the file system says of them, so that what has not changed is not read again.

    A changed size, time, inode or (behind a URL) ETag makes a file be read anew; so does a change within the last two seconds before it was
    read, since another one could follow that leaves the times as they are.
    """

    def __init__(self, path: Path | None, log: Callable[[str], None]) -> None:
        """`path` is where the record lies or will lie; None keeps nothing."""
        self._path, self._log = path, log
        self._known = self._load()
        self._new: dict[str, Any] = {}
        self.num_read = 0  # files that had to be read

    def _load(self) -> dict[str, Any]:
        if self._path is None:
            return {}
        try:
            known = json.loads(self._path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._log(f"data: the record of hashes {self._path} cannot be used ({error}); reading all files")
            return {}
        return known if isinstance(known, dict) else {}

    def of(self, file: CorpusFile) -> tuple[str, list[Any] | None]:
        """Hash of the content, and the stamp it was read under. Raises `OSError` where the file cannot be read."""
        stamp = file.stamp()
        known = self._known.get(file.name)
        if stamp is not None and isinstance(known, list) and len(known) == 2 and known[0] == stamp:
            self._new[file.name] = known
            return known[1], stamp
        settled = time.time() - file.changed_at() > _SETTLED
        with file.open() as stream:
            content = _sha256(stream)
        self.num_read += 1
        if stamp is not None and settled and file.stamp(fresh=True) == stamp:
            self._new[file.name] = [stamp, content]
        return content, stamp

    def save(self) -> None:
        """Keep what `of` learned. A record that cannot be written costs time at the next start, nothing else."""
        if self._path is None or self._new == self._known:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, json.dumps(self._new))
        except OSError as error:
            self._log(f"data: hashes cannot be kept in {self._path} ({error.strerror or error}); the files will be read again at the next start")


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
