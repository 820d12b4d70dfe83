"""What lies in a file: text, JSONL or parquet to documents or conversations. What is neither is named by file and place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_transformer.config import ConfigError
from nsa_transformer.data.chat import check_conversation
from nsa_transformer.data.files import BadDocument, CorpusFile, unpacked

__all__ = ["Column", "Document", "read_file", "suffix_of"]

_JSONL = (".jsonl", ".ndjson")
Bad = Callable[[BadDocument], None]


@dataclass(frozen=True)
class Column:
    """The key or column that is read, and whether it holds conversations (lists of {"role": …, "content": …}) in place of text."""

    name: str
    conversations: bool = False

    @property
    def setting(self) -> str:
        return "data.messages_column" if self.conversations else "data.text_column"

    @classmethod
    def of(cls, column: str | Column) -> Column:
        return column if isinstance(column, Column) else cls(column)


@dataclass(frozen=True)
class Document:
    """name: path relative to the source, and `#row` (from 1) inside JSONL, parquet and datasets. text: not empty where sources hand it out.

    messages: the conversation, for a column of such; `text` is then what is said in it.
    """

    name: str
    text: str
    messages: tuple[Mapping[str, Any], ...] = ()


def suffix_of(name: str) -> str:
    """The last suffix, lower case, under any .gz or .zst."""
    name = name.lower()
    return Path(name.removesuffix(".gz").removesuffix(".zst")).suffix


def read_file(file: CorpusFile, column: Column, bad: Bad) -> Iterator[Document]:
    """The documents of a file, empty ones too.

    `bad` is called with each `BadDocument` and raises it or lets it pass; then the document is left out, and where a file is damaged all that
    comes after the damage. Raises `OSError` where the file cannot be read, `ConfigError` for what leaving out would not help.
    """
    suffix = suffix_of(file.name)
    try:
        if suffix == ".parquet" and file.name.lower().endswith(".parquet"):
            yield from _read_parquet(file, column, bad)
        elif suffix in _JSONL:
            yield from _read_jsonl(file, column, bad)
        elif column.conversations:
            raise ConfigError(f"{file.where} is text; conversations come from .jsonl, .parquet or hf://. Leave it out, or write data.messages_column=null")
        else:
            with unpacked(file) as stream:
                content = stream.read()
            yield Document(file.name, _decode(content, file.where))
    except BadDocument as error:
        bad(error)


def _decode(content: bytes, where: str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise BadDocument(f"{where} is UTF-16, not UTF-8; convert it, for example with iconv -f utf-16 -t utf-8")
    nul = content.find(b"\0")
    if nul >= 0:
        raise BadDocument(f"{where} is a binary file, not text: NUL byte at offset {nul} (line {_line(content, nul)}); leave it out of the corpus")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"offset {error.start} (line {_line(content, error.start)})"
        raise BadDocument(f"{where} is not valid UTF-8: byte 0x{content[error.start]:02x} at {place}; convert it to UTF-8 or leave it out") from None


def _line(content: bytes, offset: int) -> int:
    return content.count(b"\n", 0, offset) + 1


def _read_jsonl(file: CorpusFile, column: Column, bad: Bad) -> Iterator[Document]:
    number = 0
    with unpacked(file, lambda: f", after line {number}") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{file.where} line {number}"
            try:
                yield document_of_row(f"{file.name}#{number}", _parse_line(line, number, where, column), where, column)
            except BadDocument as error:
                bad(error)


def _parse_line(line: bytes, number: int, where: str, column: Column) -> object:
    """The value of `column`, as it is; "" for a blank line."""
    text = _decode(line, where).removeprefix("\ufeff" if number == 1 else "")
    if not text.strip():
        return ""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"{where} is not valid JSON ({error}); each line must be one object") from None
    if not isinstance(row, dict):
        raise BadDocument(f"{where} is {type(row).__name__}, not an object with a {column.name!r} key")
    if column.name not in row:
        raise BadDocument(f"{where} has no key {column.name!r}, only {listed(row)}; write {column.setting}=KEY")
    return row[column.name]


def _read_parquet(file: CorpusFile, column: Column, bad: Bad) -> Iterator[Document]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(f"{file.where} needs pyarrow to be read; pip install pyarrow") from None
    number = 0
    with file.open() as raw:
        try:
            with pq.ParquetFile(raw) as table:
                _check_schema(table.schema_arrow, file.where, column)
                for batch in table.iter_batches(batch_size=1024, columns=[column.name]):
                    for cell in batch.column(0):
                        number += 1
                        where = f"{file.where} row {number}"
                        try:
                            yield document_of_row(f"{file.name}#{number}", _text_of(cell, where), where, column)
                        except BadDocument as error:
                            bad(error)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the content
                raise
            raise BadDocument(f"{file.where} is a damaged or truncated parquet file, after row {number} ({error}); fetch or write it again") from None


def _check_schema(schema: Any, where: str, column: Column) -> None:
    import pyarrow as pa

    names = listed(schema.names)
    if column.name not in schema.names:
        raise ConfigError(f"{where} has no column {column.name!r}, only {names}; write {column.setting}=COLUMN")
    kind = schema.field(column.name).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if column.conversations:
        fits = (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_struct(kind.value_type)
    else:
        fits = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    if not fits:
        what = "conversations" if column.conversations else "text"
        raise ConfigError(f"{where} column {column.name!r} holds {kind}, not {what}; write {column.setting}=COLUMN with one of {names}")


def _text_of(cell: object, where: str) -> object:
    try:
        return cell.as_py()  # type: ignore[attr-defined]
    except UnicodeDecodeError as error:
        raise BadDocument(f"{where} is not valid UTF-8 ({error}); convert it or leave it out") from None


def document_of_row(name: str, value: object, where: str, column: Column) -> Document:
    """A cell as a document; null and a conversation without messages are empty ones."""
    if value is None:
        value = [] if column.conversations else ""
    if column.conversations:
        return _conversation(name, value, where)
    if not isinstance(value, str):
        raise BadDocument(f"{where}: {column.name!r} is {type(value).__name__}, not text; write data.text_column=KEY")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadDocument(f"{where}: {column.name!r} has a lone surrogate at character {error.start}, which is not valid text") from None
    return Document(name, value)


def _conversation(name: str, value: object, where: str) -> Document:
    if isinstance(value, list) and not value:
        return Document(name, "")
    try:
        check_conversation(value)
    except ValueError as error:
        raise BadDocument(f"{where}: {error}") from None
    assert isinstance(value, list)
    return Document(name, "\n".join(message["content"] for message in value) or "\n", tuple(value))


def listed(names: object) -> str:
    """Names for a message, the first eight of them."""
    texts = [str(name) for name in names]  # type: ignore[attr-defined]
    return ", ".join(texts[:8]) + (", …" if len(texts) > 8 else "") if texts else "nothing"
