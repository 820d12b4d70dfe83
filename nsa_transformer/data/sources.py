"""Documents from files: any text, JSONL or parquet, as they are. What cannot be read whole is refused by name."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from nsa_transformer.config import ConfigError

__all__ = ["Document", "Source", "find_files", "open_source", "read_documents"]

_JSONL = (".jsonl", ".ndjson")
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


@dataclass(frozen=True)
class Document:
    """name: path relative to the source, and `#row` (from 1) inside JSONL and parquet. text: never empty."""

    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """The files of a corpus.

    root is what names are relative to; `default` marks Python's own library, where files that are no UTF-8 text
    (its test-suite has some on purpose) are skipped and counted in `skipped` while reading.
    """

    root: Path
    files: list[Path]
    key: str
    default: bool = False
    skipped: list[str] = field(default_factory=list)

    def name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the names and contents of the files."""
        digest = hashlib.sha256(str(self.default).encode())
        for file in self.files:
            try:
                with file.open("rb") as stream:
                    content = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise ConfigError(f"{self.key}: {file} cannot be read: {error.strerror or error}") from None
            digest.update(f"{os.fsencode(self.name(file)).hex()} {content}\n".encode())
        return digest.hexdigest()[:32]


def find_files(path: str | os.PathLike[str] | None) -> list[Path]:
    """The files that `path` stands for, sorted: a file, a folder (recursive, without hidden entries) or a glob.

    None: Python's own standard library. Raises `ConfigError` if there are none.
    """
    return open_source(path).files


def read_documents(path: str | os.PathLike[str] | None, text_column: str = "text") -> Iterator[Document]:
    """The documents of `path` in the order of `find_files`; empty ones are left out.

    Raises `ConfigError` naming file and place of what is no text: invalid UTF-8, NUL bytes, broken JSON, gzip or parquet, a missing column.
    """
    return iter_documents(open_source(path), text_column)


def open_source(path: str | os.PathLike[str] | None, key: str = "data.path") -> Source:
    """`find_files` with what goes with it; `key` is the setting that errors name."""
    if path is None:
        return _standard_library(key)
    if not os.fspath(path):
        raise ConfigError(f"{key}= is empty; name a file, a folder or a glob{_or_default(key)}")
    given = Path(path).expanduser()
    if given.is_file():
        return Source(given.parent, [given], key)
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
    files = sorted({file for file in found if _suffix(file) not in _BINARY}, key=lambda file: file.relative_to(root).as_posix())
    if not files:
        raise ConfigError(f"{key}={path} has {nothing}; name text, .jsonl or .parquet files")
    return Source(root, files, key)


def _or_default(key: str) -> str:
    """The way to the default, where errors name a setting that has one."""
    return f", or write {key}=null for the default" if key == "data.path" else ""


def _standard_library(key: str) -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in _walk(root, without=("site-packages", "dist-packages", "__pycache__")) if file.suffix == ".py"]
    if not files:
        raise ConfigError(f"this Python has no source of its standard library in {root}; write {key}=FILE_OR_FOLDER")
    return Source(root, sorted(files, key=lambda file: file.relative_to(root).as_posix()), key, default=True)


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


def _suffix(file: Path) -> str:
    """The last suffix, lower case, under any .gz."""
    name = file.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def iter_documents(source: Source, text_column: str) -> Iterator[Document]:
    """The documents of a source; see `read_documents`."""
    source.skipped.clear()
    empty = True
    for file in source.files:
        for document in _read_file(source, file, text_column):
            if document.text:
                empty = False
                yield document
    if empty:
        raise ConfigError(f"{source.key}: the corpus is empty: no text in {source.files[0]}" + (" and the other files" if len(source.files) > 1 else ""))


def _read_file(source: Source, file: Path, text_column: str) -> Iterator[Document]:
    name, suffix = source.name(file), _suffix(file)
    try:
        if suffix == ".parquet" and file.suffix.lower() != ".gz":
            yield from _read_parquet(file, name, text_column)
            return
        content = _read_bytes(file)
        if suffix in _JSONL:
            yield from _read_jsonl(content, file, name, text_column)
            return
        try:
            yield Document(name, _decode(content, str(file)))
        except ConfigError:
            if not source.default:
                raise
            source.skipped.append(name)
    except OSError as error:
        raise ConfigError(f"{source.key}: {file} cannot be read: {error.strerror or error}") from None
    except ConfigError as error:
        raise ConfigError(f"{source.key}: {error}") from None


def _read_bytes(file: Path) -> bytes:
    with file.open("rb") as raw:
        if file.suffix.lower() != ".gz":
            return raw.read()
        try:
            with gzip.GzipFile(fileobj=raw) as stream:
                return stream.read()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ConfigError(f"{file} is a damaged or truncated gzip file near byte {raw.tell()} ({error}); fetch or compress it again") from None


def _decode(content: bytes, where: str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{where} is UTF-16, not UTF-8; convert it, for example with iconv -f utf-16 -t utf-8")
    nul = content.find(b"\0")
    if nul >= 0:
        raise ConfigError(f"{where} is a binary file, not text: NUL byte at offset {nul} (line {_line(content, nul)}); leave it out of the corpus")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"offset {error.start} (line {_line(content, error.start)})"
        raise ConfigError(f"{where} is not valid UTF-8: byte 0x{content[error.start]:02x} at {place}; convert it to UTF-8 or leave it out") from None


def _line(content: bytes, offset: int) -> int:
    return content.count(b"\n", 0, offset) + 1


def _read_jsonl(content: bytes, file: Path, name: str, column: str) -> Iterator[Document]:
    for number, line in enumerate(io.BytesIO(content), start=1):
        where = f"{file} line {number}"
        text = _decode(line, where).removeprefix("\ufeff" if number == 1 else "")
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is not valid JSON ({error}); each line must be one object") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{where} is {type(row).__name__}, not an object with a {column!r} key")
        if column not in row:
            raise ConfigError(f"{where} has no key {column!r}, only {_names(row)}; write data.text_column=KEY")
        yield _row(f"{name}#{number}", row[column], where, column)


def _read_parquet(file: Path, name: str, column: str) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(f"{file} needs pyarrow to be read; pip install pyarrow") from None
    number = 0
    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            if column not in schema.names:
                raise ConfigError(f"{file} has no column {column!r}, only {_names(schema.names)}; write data.text_column=COLUMN")
            kind = schema.field(column).type
            value = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
                raise ConfigError(f"{file} column {column!r} holds {kind}, not text; write data.text_column=COLUMN with one of {_names(schema.names)}")
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for cell in batch.column(0):
                    number += 1
                    yield _row(f"{name}#{number}", cell.as_py(), f"{file} row {number}", column)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} row {number} is not valid UTF-8 ({error}); convert it or leave it out") from None
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{file} is a damaged or truncated parquet file, after row {number} ({error}); fetch or write it again") from None


def _row(name: str, text: object, where: str, column: str) -> Document:
    if text is None:
        text = ""  # a null is an empty document
    if not isinstance(text, str):
        raise ConfigError(f"{where}: {column!r} is {type(text).__name__}, not text; write data.text_column=KEY")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: {column!r} has a lone surrogate at character {error.start}, which is not valid text") from None
    return Document(name, text)


def _names(names: object) -> str:
    listed = [str(name) for name in names]  # type: ignore[attr-defined]
    return ", ".join(listed[:8]) + (", …" if len(listed) > 8 else "") if listed else "nothing"
