"""Tokenised corpora and trained tokenizers, cached by what they were made from.

    CACHE/tokenizers/<key>/tokenizer.json
    CACHE/corpora/<key>/tokens.npy       every document end to end, uint16 or uint32, memory-mapped
                        offsets.npy      int64 [num_documents + 1]
                        validation.npy   bool [num_documents]
                        assistant.npy    bool, of a corpus of conversations: which tokens the assistant writes
                        skipped.json     what is said of each bad document that was left out
    CACHE/hashes/                        content hashes of sources and entries, so that a start reads no file that has not changed

Each entry also has a sha256.json of its files. An entry is written beside its place and renamed into it, so processes may
race for it, and a killed one leaves nothing that looks whole.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import os
import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from nsa_transformer.config import ConfigError, DataConfig
from nsa_transformer.data.chat import ChatTemplate
from nsa_transformer.data.encoding import encode_documents
from nsa_transformer.data.files import HashRecord, LocalFile
from nsa_transformer.data.readers import Column
from nsa_transformer.data.sources import Document, Skips, Source, iter_documents
from nsa_transformer.data.tokenizer import PATTERN, Tokenizer, cut_text, train_tokenizer
from nsa_transformer.utils.files import atomic_folder

__all__ = ["Split", "cache_folder", "cached_tokenizer", "tokenized_corpus"]

_TOKENIZER_FORMAT, _FORMAT = 1, 2  # raise them when the same inputs come to be stored differently
_TOKEN_FILES = ("tokens.npy", "offsets.npy", "validation.npy")
_SAMPLE_BYTES = 16_000_000  # of text, for training a tokenizer
_STALE_SECONDS = 86_400  # a temporary folder this old belongs to a process that died

Log = Callable[[str], None]


@dataclass(frozen=True)
class Split:
    """Training or validation documents of a tokenised corpus.

    tokens     uint16 or uint32 [all tokens of the corpus], memory-mapped; no end-of-document tokens
    offsets    int64 [num_documents of the corpus + 1]
    documents  int64, those that belong to this split
    assistant  bool [all tokens of the corpus], memory-mapped: those the assistant writes; None where the corpus is no conversations
    """

    tokens: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray
    fingerprint: str
    assistant: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        return int((self.offsets[self.documents + 1] - self.offsets[self.documents]).sum())


def cache_folder(config: DataConfig) -> Path:
    """`data.cache_dir`, or the user's cache."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "nsa-transformer"
    except RuntimeError:
        raise ConfigError("there is no home folder to cache data in; write data.cache_dir=FOLDER") from None


# ----------------------------------------------------------------------------------------------------- tokenizer


def cached_tokenizer(readings: Sequence[tuple[Source, str | Column]], vocab_size: int, cache: Path, log: Log, max_bad: int = 0) -> Tokenizer:
    """The tokenizer trained on sources, each with its column, from the cache where it is there and whole. It can chat where one has conversations."""
    prints, columns = [_fingerprint(source, cache, log) for source, _ in readings], [_column_key(column) for _, column in readings]
    known = (prints[0], columns[0]) if len(readings) == 1 else (prints, columns)
    chat = any(Column.of(column).conversations for _, column in readings)
    folder = cache / "tokenizers" / _key(_TOKENIZER_FORMAT, *known, vocab_size, PATTERN, _SAMPLE_BYTES)

    def build(target: Path) -> None:
        began = time.perf_counter()
        documents = itertools.chain.from_iterable(iter_documents(source, column, _skips(source, max_bad)) for source, column in readings)
        tokenizer = train_tokenizer(_sample(documents, _SAMPLE_BYTES), vocab_size, chat_tokens=chat)
        tokenizer.save(target)
        log(f"data: trained a tokenizer of {tokenizer.vocab_size} tokens in {time.perf_counter() - began:.1f} s")

    _ensure_entry(folder, ("tokenizer.json",), build, log)
    return Tokenizer.load(folder)


def _fingerprint(source: Source, cache: Path, log: Log) -> str:
    return source.fingerprint(HashRecord(cache / "hashes" / f"{_key(source.place)}.json", log))


def _column_key(column: str | Column) -> object:
    column = Column.of(column)
    return {"conversations": column.name} if column.conversations else column.name


def _skips(source: Source, max_bad: int) -> Skips:
    return Skips(source.key, None if source.default else max_bad)


def _sample(documents: Iterable[Document], size: int) -> list[str]:
    """At most `size` bytes of text, spread evenly: the parts of documents with the smallest hashes, in their order."""
    heap: list[tuple[int, int, str]] = []
    kept = number = 0
    for document in documents:
        for place, part in enumerate(cut_text(document.text)):
            heapq.heappush(heap, (-_hash(f"{document.name}#{place}"), number, part))
            number += 1
            kept += len(part.encode())
            while kept > size and len(heap) > 1:
                kept -= len(heapq.heappop(heap)[2].encode())
    return [part for _, _, part in sorted(heap, key=lambda entry: entry[1])]


# -------------------------------------------------------------------------------------------------------- tokens


def tokenized_corpus(
    source: Source, column: str | Column, tokenizer: Tokenizer, val_fraction: float | None, cache: Path, log: Log, max_bad: int = 0, num_workers: int = 0
) -> tuple[Split, ...]:
    """(train, validation) of a source, or with `val_fraction=None` the whole of it as one split; from the cache where it is there and whole.

    Up to `max_bad` bad documents are left out and named in the log. `num_workers` processes tokenise, with 0 this one.
    """
    key = _key(_FORMAT, _fingerprint(source, cache, log), _column_key(column), tokenizer.fingerprint, val_fraction)
    folder = cache / "corpora" / key
    conversations = Column.of(column).conversations
    if conversations:
        ChatTemplate(tokenizer)  # refuses a tokenizer that cannot chat before anything is read
    token_files = (*_TOKEN_FILES, "assistant.npy") if conversations else _TOKEN_FILES

    def build(target: Path) -> None:
        began = time.perf_counter()
        skips = _skips(source, max_bad)
        documents = iter_documents(source, column, skips)
        offsets, validation = _write_tokens(target, documents, source.key, tokenizer, conversations, val_fraction, num_workers)
        source.check_unchanged()
        np.save(target / "offsets.npy", offsets)
        np.save(target / "validation.npy", validation)
        (target / "skipped.json").write_text(json.dumps(skips.found))
        if source.default and skips.found:
            log(f"data: left out {len(skips.found)} files that are not UTF-8 text, which Python's test-suite has on purpose")
        log(f"data: tokenised {offsets[-1] / 1e6:.2f} M tokens in {time.perf_counter() - began:.1f} s, kept in {folder}")

    _ensure_entry(folder, (*token_files, "skipped.json"), build, log)
    skips = _skips(source, max_bad)
    skips.found += json.loads((folder / "skipped.json").read_text())
    skips.check()
    if skips.found and not source.default:
        log(f"data: left out {len(skips.found)} bad documents: {'; '.join(skips.found[:3])}{'; …' * (len(skips.found) > 3)}")
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    offsets, validation = np.load(folder / "offsets.npy"), np.load(folder / "validation.npy")
    # Of what is stored, not of what it was made from: another version of a library may make something else of the same.
    hashes = json.loads((folder / "sha256.json").read_text())
    content = hashlib.sha256(json.dumps({name: hashes[name] for name in token_files}).encode()).hexdigest()[:24]
    assistant = None if not conversations else np.load(folder / "assistant.npy", mmap_mode="r")
    parts = {"all": np.arange(len(validation))} if val_fraction is None else {"train": np.flatnonzero(~validation), "validation": np.flatnonzero(validation)}
    return tuple(Split(tokens, offsets, documents, f"{content} {name}", assistant) for name, documents in parts.items())


def _write_tokens(
    folder: Path, documents: Iterator[Document], key: str, tokenizer: Tokenizer, conversations: bool, val_fraction: float | None, num_workers: int
) -> tuple[np.ndarray, np.ndarray]:
    """Encode every document into tokens.npy in `folder`, and assistant.npy beside it for conversations; returns offsets and which documents are for
    validation. Errors name the setting `key`."""
    first = list(itertools.islice(documents, 2))
    halves = None
    if val_fraction is not None and len(first) == 1 and not conversations:
        halves = first = _split_document(first[0], val_fraction, key)
    lengths, hashes = array("q"), array("Q")  # of many documents, in little memory
    with ExitStack() as stack:
        tokens = stack.enter_context(_ArrayFile(folder / "tokens.npy", np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32))
        assistant = stack.enter_context(_ArrayFile(folder / "assistant.npy", np.bool_)) if conversations else None
        encoding = encode_documents(itertools.chain(first, documents), tokenizer, conversations, num_workers)
        for document, encoded in stack.enter_context(closing(encoding)):
            if len(encoded.ids):  # a tokenizer of another make may drop blank space, and with it a whole document
                tokens.append(encoded.ids)
                lengths.append(len(encoded.ids))
                hashes.append(_hash(document.name))
                if assistant is not None:
                    assert encoded.assistant is not None
                    assistant.append(encoded.assistant)
    if not lengths:
        raise ConfigError(f"{key}: the corpus is empty: the tokenizer makes no tokens of it")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if val_fraction is None:
        return offsets, np.zeros(len(lengths), dtype=bool)
    if len(lengths) < 2:
        raise ConfigError(f"{key} has too little text to hold some out for validation; add text, or write data.val_path=FILE")
    if halves is not None:
        return offsets, np.array([False, True])
    return offsets, choose_validation(np.array(hashes, dtype=np.uint64), val_fraction)


def choose_validation(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """bool [num_documents]: those whose hash (uint64) lies in the lowest `fraction`, but never none and never all of two or more."""
    chosen = hashes.astype(np.float64) < fraction * 2.0**64
    by_hash = np.argsort(hashes, kind="stable")
    chosen[by_hash[0]] = True
    chosen[by_hash[-1]] = False
    return chosen


def _split_document(document: Document, val_fraction: float, key: str) -> list[Document]:
    """A lone document as two, cut at the line boundary nearest to where its last `val_fraction` begins."""
    text = document.text
    target = min(max(round(len(text) * (1 - val_fraction)), 1), len(text) - 1)
    before, after = text.rfind("\n", 0, target) + 1, text.find("\n", target) + 1
    cuts = [cut for cut in (before, after) if 0 < cut < len(text)]
    if not cuts:
        raise ConfigError(
            f"{key} holds a single document ({document.name}) of a single line, so none of it can be held out for validation; "
            "add documents or lines, or write data.val_path=FILE"
        )
    cut = min(cuts, key=lambda c: abs(c - target))
    return [Document(f"{document.name} (start)", text[:cut]), Document(f"{document.name} (end)", text[cut:])]


class _ArrayFile:
    """A flat .npy file that is written piece by piece."""

    def __init__(self, file: Path, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._stream = file.open("wb")
        self._count = 0
        self._write_header()

    def append(self, values: Sequence[int] | Sequence[bool] | np.ndarray) -> None:
        self._stream.write(np.array(values, dtype=self._dtype).tobytes())
        self._count += len(values)

    def _write_header(self) -> None:
        """Of one size whatever the count, so that it can be written over at the end."""
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self._count,)}
        np.lib.format.write_array_header_1_0(self._stream, header)

    def __enter__(self) -> _ArrayFile:
        return self

    def __exit__(self, *_error: object) -> None:
        with self._stream:
            size = self._stream.tell() - self._count * self._dtype.itemsize
            self._stream.seek(0)
            self._write_header()
            assert self._stream.tell() == size


# ------------------------------------------------------------------------------------------------------- entries


def _ensure_entry(folder: Path, files: tuple[str, ...], build: Callable[[Path], None], log: Log) -> None:
    """Leave a whole entry at `folder`: the one that is there, or what `build` writes into the folder it is given."""
    for _ in range(3):  # more than once only where another process put an entry there meanwhile
        if _is_whole(folder, files, log):
            return
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(folder.parent)
            with atomic_folder(folder) as temporary:
                build(temporary)
                (temporary / "sha256.json").write_text(json.dumps({name: _checksum(temporary / name) for name in files}))
        except OSError as error:
            if not folder.exists():
                raise ConfigError(f"the cache folder {folder.parent} cannot be written: {error.strerror or error}; write data.cache_dir=FOLDER") from None
    if not _is_whole(folder, files, log):
        raise ConfigError(f"the cache entry {folder} cannot be kept whole; delete it, or write data.cache_dir=FOLDER")


def _is_whole(folder: Path, files: tuple[str, ...], log: Log) -> bool:
    """Whether the contents are those that were written. What was found whole before and has not changed since is not read again."""
    if not folder.exists():
        return False
    record = HashRecord(folder.parent.parent / "hashes" / f"{folder.parent.name}-{folder.name}.json", log)
    try:
        expected = json.loads((folder / "sha256.json").read_text())
        wrong = [name for name in files if record.of(LocalFile(folder / name, name))[0] != expected[name]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = [str(error)]
    if wrong:
        log(f"data: the cache entry {folder} is damaged ({', '.join(wrong)}); building it again")
    else:
        record.save()
    return not wrong


def _remove_stale(parent: Path) -> None:
    for entry in parent.glob(".*.tmp-*"):
        try:
            if time.time() - entry.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(entry, ignore_errors=True)
        except FileNotFoundError:  # another process removed it first
            continue


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
