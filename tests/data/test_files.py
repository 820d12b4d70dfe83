"""Files behind URLs, packed files, the record of hashes, and datasets by name."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import re
import sys
import threading
import time
import types
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest

from nsa_transformer.config import ConfigError, DataConfig
from nsa_transformer.data import files as files_module
from nsa_transformer.data.files import BadDocument, HashRecord, LocalFile, RemoteFile
from nsa_transformer.data.loader import open_data
from nsa_transformer.data.sources import FileSource, Skips, iter_documents, open_source, read_documents

ROWS = [{"text": f"row {i} " * (i % 5)} for i in range(200)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(content: bytes) -> bytes:
    pa = pytest.importorskip("pyarrow")
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


PACK = {".gz": lambda content: gzip.compress(content, mtime=0), ".zst": zstd}


def found(path: Path | str, max_bad: int = 0, column: str = "text") -> tuple[dict[str, str], list[str]]:
    skips = Skips("data.path", max_bad)
    documents = {document.name: document.text for document in iter_documents(open_source(path), column, skips)}
    return documents, skips.found


def put(folder: Path, contents: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


# ------------------------------------------------------------------------------------------------------------ packed files


@pytest.mark.parametrize("suffix", PACK)
def test_packed_files_hold_what_was_packed(tmp_path: Path, suffix: str) -> None:
    twice = PACK[suffix](JSONL[: len(JSONL) // 2]) + PACK[suffix](JSONL[len(JSONL) // 2 :])  # as `cat a.zst b.zst` makes
    put(tmp_path, {"a.jsonl": JSONL, f"b.jsonl{suffix}": PACK[suffix](JSONL), f"c.jsonl{suffix}": twice, f"d.md{suffix}": PACK[suffix](b"text")})
    documents, _ = found(tmp_path)
    plain = [text for name, text in documents.items() if name.startswith("a.")]
    assert len(plain) == 160
    for name in (f"b.jsonl{suffix}", f"c.jsonl{suffix}"):
        assert [text for key, text in documents.items() if key.startswith(f"{name}#")] == plain
    assert documents[f"d.md{suffix}"] == "text"
    assert found(put(tmp_path / "tar", {"e.tar.zst": b"\0", "f.txt": b"f"}))[0] == {"f.txt": "f"}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("harm", ["cut", "flipped", "none", "emptied"])
def test_damaged_packed_files_are_named_with_their_place(tmp_path: Path, suffix: str, harm: str) -> None:
    rows = "".join(json.dumps({"text": os.urandom(40).hex()}) + "\n" for _ in range(5000)).encode()
    whole = PACK[suffix](rows)
    middle = len(whole) // 2 if suffix == ".gz" else 4  # zstd as Arrow writes it has no checksum: only broken structure shows
    content = {"cut": whole[:-9], "flipped": whole[:middle] + bytes(99) + whole[middle + 99 :], "none": b"no such file at all", "emptied": b""}[harm]
    put(tmp_path, {"a.txt": b"first", f"x.jsonl{suffix}": content, "y.txt": b"last"})
    kind = {".gz": "gzip", ".zst": "zstd"}[suffix]
    if harm == "emptied":  # nothing packed is nothing in it
        assert found(tmp_path) == ({"a.txt": "first", "y.txt": "last"}, [])
        return
    # A flipped bit may also leave text that is none; that is as good a reason.
    reason = rf"x\.jsonl\{suffix} is a damaged or truncated {kind} file near byte \d+, after line \d+|line \d+ is"
    with pytest.raises(ConfigError, match=rf"^data\.path: .*({reason}).*data\.max_bad_documents=N"):
        found(tmp_path)
    documents, skipped = found(tmp_path, max_bad=5000 if harm == "flipped" else 1)
    names = list(documents)
    assert names[0] == "a.txt" and names[-1] == "y.txt" and skipped
    kept = [documents[name] for name in names[1:-1]]
    assert harm == "flipped" or kept == [json.loads(line)["text"] for line in rows.splitlines()][: len(kept)]


# ------------------------------------------------------------------------------------------------------ bad documents, counted

MIXED = {
    "a.txt": b"a",
    "b.txt": b"\xe9",
    "c.jsonl": b'{"text": "1"}\n{"text": \n{"body": 2}\n{"text": "4"}\n[]\n{"text": "a\\ud800"}\n',
    "d.txt": b"x\0",
    "e.txt": b"e",
}


def test_bad_documents_are_left_out_within_the_limit_and_the_rest_keeps_its_order(tmp_path: Path) -> None:
    put(tmp_path, MIXED)
    documents, skipped = found(tmp_path, max_bad=6)
    assert list(documents) == ["a.txt", "c.jsonl#1", "c.jsonl#4", "e.txt"]
    places = [
        r"b\.txt .*offset 0 \(line 1\)",
        r"c\.jsonl line 2 is not valid JSON",
        r"line 3 has no key",
        r"line 5 is list",
        r"line 6.*surrogate",
        r"d\.txt.*NUL",
    ]
    assert len(skipped) == 6
    for text, place in zip(skipped, places, strict=True):
        assert re.search(place, text)
    with pytest.raises(ConfigError, match=r"d\.txt is a binary file.*this is bad document 6, and data\.max_bad_documents=5"):
        found(tmp_path, max_bad=5)
    with pytest.raises(ConfigError, match=r"b\.txt is not valid UTF-8.*; data\.max_bad_documents=N leaves out up to N"):
        found(tmp_path)


def test_a_bad_row_of_a_parquet_file_is_left_out_and_a_missing_column_never_is(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"\xff\xfe", b"fine"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": broken}), tmp_path / "x.parquet")
    documents, skipped = found(tmp_path, max_bad=1)
    assert list(documents.values()) == ["ok", "fine"] and "row 2 is not valid UTF-8" in skipped[0]
    with pytest.raises(ConfigError, match="has no column 'body'"):
        found(tmp_path, max_bad=9, column="body")


def test_the_limit_counts_for_a_cached_corpus_too(tmp_path: Path) -> None:
    put(tmp_path / "text", {**MIXED, "f.txt": b"more text\n" * 30, "g.txt": b"and more\n" * 30})
    config = DataConfig(path=str(tmp_path / "text"), cache_dir=str(tmp_path / "cache"), max_length=64, val_fraction=0.2, max_bad_documents=6)
    messages: list[str] = []
    first = open_data(config, 300, 0, messages.append)
    assert any("left out 6 bad documents" in message and "b.txt" in message for message in messages)
    messages.clear()
    assert open_data(replace(config, max_bad_documents=9), 300, 0, messages.append).fingerprint == first.fingerprint
    assert any("left out 6 bad documents" in message for message in messages) and not any("tokenised" in message for message in messages)
    with pytest.raises(ConfigError, match=r"this is bad document 3, and data\.max_bad_documents=2"):
        open_data(replace(config, max_bad_documents=2), 300, 0, messages.append)
    with pytest.raises(ConfigError, match=r"b\.txt is not valid UTF-8"):
        open_data(replace(config, max_bad_documents=0), 300, 0, messages.append)


def test_a_line_of_fifty_megabytes(tmp_path: Path) -> None:
    line = b'{"text": "' + b"long line " * 5_000_000 + b'"}\n'
    put(tmp_path, {"x.jsonl": b'{"text": "a"}\n' + line + b'{"text": "b"}\n'})
    began = time.perf_counter()
    documents, _ = found(tmp_path)
    assert [len(text) for text in documents.values()] == [1, 50_000_000, 1]
    assert time.perf_counter() - began < 20  # 0.2 s on an idle core


# ------------------------------------------------------------------------------------------------------------- record of hashes


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute after the files of the test were written."""
    now = time.time
    monkeypatch.setattr(files_module, "time", types.SimpleNamespace(time=lambda: now() + 60))


def print_of(folder: Path | str, record: Path, messages: list[str] | None = None) -> tuple[str, int]:
    """Fingerprint, and how many files were read for it."""
    hashes = HashRecord(record, (messages if messages is not None else []).append)
    return open_source(folder).fingerprint(hashes), hashes.num_read


def test_unchanged_files_are_not_read_again(tmp_path: Path, later: None) -> None:
    folder, record = put(tmp_path / "c", {"a.txt": b"a", "b.txt": b"b"}), tmp_path / "hashes" / "r.json"
    first, num_read = print_of(folder, record)
    assert num_read == 2 and print_of(folder, record) == (first, 0)
    assert open_source(folder).fingerprint() == first
    os.utime(folder / "a.txt")  # read again, and found the same
    assert print_of(folder, record) == (first, 1)
    before = (folder / "b.txt").stat()
    (folder / "b.txt").write_bytes(b"c")
    os.utime(folder / "b.txt", ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    changed, num_read = print_of(folder, record)
    assert changed != first and num_read == 1
    (folder / "c.txt").write_bytes(b"c")
    assert print_of(folder, record)[1] == 1
    os.replace(put(tmp_path / "d", {"x": b"a"}) / "x", folder / "a.txt")  # another inode
    assert print_of(folder, record)[1] == 1


def test_files_that_were_just_written_are_read_again(tmp_path: Path) -> None:
    folder, record = put(tmp_path / "c", {"a.txt": b"a"}), tmp_path / "r.json"
    assert print_of(folder, record)[1] == 1 and print_of(folder, record)[1] == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a.txt": 3}', '{"a.txt": [[1], 2, 3]}'])
def test_a_damaged_record_is_no_record(tmp_path: Path, later: None, content: str) -> None:
    folder, record = put(tmp_path / "c", {"a.txt": b"a"}), tmp_path / "r.json"
    first = print_of(folder, record)[0]
    record.write_text(content)
    assert print_of(folder, record) == (first, 1) and print_of(folder, record) == (first, 0)


def test_a_record_that_cannot_be_written_is_said(tmp_path: Path, later: None) -> None:
    folder = put(tmp_path / "c", {"a.txt": b"a"})
    (tmp_path / "file").write_text("")
    messages: list[str] = []
    assert print_of(folder, tmp_path / "file" / "r.json", messages)[1] == 1
    assert any("hashes cannot be kept" in message for message in messages)


def test_a_start_with_a_warm_cache_reads_nothing(tmp_path: Path, later: None, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "text", {f"{i}.txt": b"some words\n" * 40 for i in range(20)})
    config = DataConfig(path=str(tmp_path / "text"), cache_dir=str(tmp_path / "cache"), max_length=64, val_fraction=0.2)
    first = open_data(config, 300, 0, lambda _: None)
    open_data(config, 300, 0, lambda _: None)  # checks the entries it finds, once
    opened: list[Path] = []
    plain = LocalFile.open
    monkeypatch.setattr(LocalFile, "open", lambda self: opened.append(self.path) or plain(self))
    assert open_data(config, 300, 0, lambda _: None).fingerprint == first.fingerprint
    assert opened == []


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(tmp_path / "text", {f"{i}.txt": b"some words\n" * 40 for i in range(20)})
    config = DataConfig(path=str(folder), cache_dir=str(tmp_path / "cache"), max_length=64, val_fraction=0.2)
    plain = FileSource.documents

    def growing(self: FileSource, *arguments: Any) -> Any:
        (folder / "7.txt").write_bytes(b"other words\n" * 40)
        yield from plain(self, *arguments)

    open_data(replace(config, cache_dir=str(tmp_path / "other")), 300, 0, lambda _: None).tokenizer.save(tmp_path / "tokenizer.json")
    monkeypatch.setattr(FileSource, "documents", growing)
    with pytest.raises(ConfigError, match=r"7\.txt changed while it was being read"):
        open_data(replace(config, tokenizer=str(tmp_path / "tokenizer.json")), 300, 0, lambda _: None)
    assert list((tmp_path / "cache" / "corpora").iterdir()) == []


# -------------------------------------------------------------------------------------------------------------------- URLs


@pytest.fixture
def memory() -> Any:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_what_fsspec_reads(memory: Any) -> None:
    contents = {"a.txt": b"a", "sub/b.jsonl.gz": gzip.compress(b'{"text": "b"}\n', mtime=0), "sub/c.zst": zstd(b"c"), "p.png": b"\0", ".git/x": b"x"}
    for name, content in contents.items():
        memory.pipe(f"/corpus/{name}", content)
    assert found("memory://corpus")[0] == {"a.txt": "a", "sub/b.jsonl.gz#1": "b", "sub/c.zst": "c"}
    assert found("memory://corpus/a.txt")[0] == {"a.txt": "a"}
    assert found("memory://corpus/*.txt")[0] == {"a.txt": "a"}
    assert found("memory://corpus/sub/*")[0] == {"b.jsonl.gz#1": "b", "c.zst": "c"}
    with pytest.raises(ConfigError, match=r"memory://corpus/p\.png: NUL|memory:/.*p\.png is a binary file"):
        found("memory://corpus/p.png")
    with pytest.raises(ConfigError, match=r"data\.path=memory://nowhere has no text files"):
        found("memory://nowhere")


def test_a_parquet_behind_a_url(memory: Any, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "x.parquet")
    memory.pipe("/x.parquet", (tmp_path / "x.parquet").read_bytes())
    assert found("memory://x.parquet")[0] == {"x.parquet#1": "a", "x.parquet#2": "b"}


def test_the_same_files_behind_a_url_and_on_disk_have_one_fingerprint(memory: Any, tmp_path: Path) -> None:
    for name, content in (("a.txt", b"a"), ("b/c.txt", b"c")):
        memory.pipe(f"/corpus/{name}", content)
        put((tmp_path / name).parent, {(tmp_path / name).name: content})
    prints = {open_source(path).fingerprint() for path in ("memory://corpus", tmp_path, f"file://{tmp_path}")}
    assert len(prints) == 1
    assert dict(found(f"file://{tmp_path}/a.txt")[0]) == {"a.txt": "a"}


def test_a_store_that_marks_its_files_is_read_once(memory: Any, tmp_path: Path) -> None:
    memory.pipe("/a.txt", b"a")
    plain, marked = ({"size": 1, "type": "file"} | more for more in ({}, {"ETag": "x1"}))
    try:
        for info, reads in ((plain, [1, 1]), (marked, [1, 0]), (marked | {"ETag": "x2"}, [1])):
            memory.info = lambda path, info=info: info
            for expected in reads:
                record = HashRecord(tmp_path / "r.json", print)
                record.of(RemoteFile(memory, "/a.txt", "a.txt", info))
                record.save()
                assert record.num_read == expected
    finally:
        del memory.info


def test_protocols_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match=r"^data\.path=nosuch://x: Protocol not known: nosuch"):
        found("nosuch://x")


def test_a_protocol_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"^data\.path=s3://bucket/x: .*pip install s3fs"):
        found("s3://bucket/x")


class _Failing:
    """A stream that opens and cannot be read."""

    def __init__(self, fail: Any) -> None:
        self.read = fail

    def __enter__(self) -> _Failing:
        return self

    def __exit__(self, *_: object) -> None: ...


def test_a_store_that_fails(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/d/a.txt", b"a")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("credentials are wrong")

    source = open_source("memory://d")
    monkeypatch.setattr(memory, "open", fail)
    with pytest.raises(ConfigError, match=r"a\.txt cannot be read: RuntimeError: credentials are wrong"):
        source.fingerprint()
    monkeypatch.undo()
    monkeypatch.setattr(memory, "open", lambda *_: _Failing(fail))
    with pytest.raises(ConfigError, match=r"a\.txt cannot be read: RuntimeError: credentials are wrong"):
        list(iter_documents(source, "text"))
    monkeypatch.setattr(memory, "isfile", fail)
    with pytest.raises(ConfigError, match=r"memory://d cannot be read: RuntimeError: credentials"):
        open_source("memory://d")


# ------------------------------------------------------------------------------------------------------------ datasets by name


class FakeFiles(list):  # type: ignore[type-arg]
    def __init__(self, files: list[str], commit: str) -> None:
        super().__init__(files)
        self.origin_metadata = [("owner/name", commit)]


def fake_datasets(rows: list[Any], commit: str = "c1", columns: tuple[str, ...] = ("text", "id")) -> Any:
    """A `datasets` of one dataset, owner/name, with the splits train and test."""

    def load_dataset_builder(name: str, config: str | None, revision: str | None = None) -> Any:
        if name != "owner/name":
            raise FileNotFoundError(f"no dataset {name}\nand a long explanation")
        at = revision or commit
        files = {split: FakeFiles([f"hf://datasets/owner/name@{at}/{split}.parquet"], at) for split in ("train", "test")}

        class Rows(list):  # type: ignore[type-arg]
            features = dict.fromkeys(columns)

        return types.SimpleNamespace(config=types.SimpleNamespace(name=config or "default", data_files=files), as_streaming_dataset=lambda split: Rows(rows))

    module: Any = types.ModuleType("datasets")
    module.load_dataset_builder = load_dataset_builder
    return module


def test_a_dataset_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets([{"text": "a", "id": "x"}, {"text": None, "id": "y"}, {"text": "c", "id": "z"}]))
    assert found("hf://owner/name")[0] == {"train#1": "a", "train#3": "c"}
    assert found("hf://owner/name:small@test", column="id")[0] == {"test#1": "x", "test#2": "y", "test#3": "z"}
    prints = {open_source(f"hf://owner/name{more}").fingerprint() for more in ("", "@train", "@test", ":small")}
    assert len(prints) == 3
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets([], commit="c2"))
    assert open_source("hf://owner/name").fingerprint() not in prints
    assert open_source("hf://owner/name?c1").fingerprint() in prints


def test_datasets_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets([{"text": "a"}, {"text": 3}, {"text": "c"}]))
    for path, said in (
        ("hf://owner/other", r"cannot be read: FileNotFoundError: no dataset owner/other$"),
        ("hf://owner/name@dev", r"has no split 'dev', only train, test; write hf://owner/name@SPLIT"),
        ("hf://owner/name@a@b", r"is not hf://NAME"),
        ("hf://", r"is not hf://NAME"),
    ):
        with pytest.raises(ConfigError, match=rf"^data\.path={path} {said}"):
            found(path)
    with pytest.raises(ConfigError, match=r"has no column 'body', only text, id; write data\.text_column"):
        found("hf://owner/name", column="body")
    with pytest.raises(ConfigError, match=r"hf://owner/name row 2: 'text' is int, not text"):
        found("hf://owner/name")
    assert list(found("hf://owner/name", max_bad=1)[0].values()) == ["a", "c"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="needs the package datasets; pip install datasets"):
        found("hf://owner/name")


def test_a_local_folder_through_the_library(tmp_path: Path, later: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    put(tmp_path / "d", {"train.jsonl": JSONL, "test.jsonl": b'{"text": "t"}\n'})
    address = f"hf://{tmp_path}/d"
    assert [document.text for document in read_documents(address)] == [row["text"] for row in ROWS if row["text"]]
    assert found(f"{address}@test")[0] == {"test#1": "t"}
    first, num_read = print_of(address, tmp_path / "r.json")
    assert num_read == 1 and print_of(address, tmp_path / "r.json") == (first, 0)
    (tmp_path / "d" / "train.jsonl").write_bytes(JSONL + b'{"text": "new"}\n')
    assert print_of(address, tmp_path / "r.json")[0] != first


def test_a_bad_document_is_an_error_of_the_configuration() -> None:
    assert issubclass(BadDocument, ConfigError)


def test_times_of_a_store_count_as_those_of_a_disk(memory: Any, tmp_path: Path) -> None:
    """A file written in this second may be written again in it."""
    memory.pipe("/a.txt", b"a")
    for value in (time.time(), datetime.now(UTC)):
        file = RemoteFile(memory, "/a.txt", "a.txt", {"size": 1, "mtime": value})
        assert abs(file.changed_at() - time.time()) < 60
    assert RemoteFile(memory, "/a.txt", "a.txt", {"size": 1, "ETag": "x", "mtime": "Tue"}).changed_at() == 0


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None: ...


def test_files_of_a_web_server(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    pytest.importorskip("requests")
    put(tmp_path / "sub", {"b.jsonl.zst": zstd(b'{"text": "b"}\n')})
    put(tmp_path, {"a.txt": b"a"})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            assert found(f"{url}/a.txt?download=true")[0] == {"a.txt": "a"}
            assert found(f"{url}/sub/*.zst")[0] == {"b.jsonl.zst#1": "b"}
            assert found(f"{url}/")[0] == {"a.txt": "a", "sub/b.jsonl.zst#1": "b"}
            with pytest.raises(ConfigError, match="has no text files"):
                found(f"{url}/none.txt")
        finally:
            server.shutdown()
