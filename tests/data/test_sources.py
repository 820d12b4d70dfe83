"""Sources: what counts as a document, and one clear error for everything that is none."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import pytest

from nsa_transformer.config import ConfigError
from nsa_transformer.data.sources import FileSource, Skips, iter_documents, open_source, read_documents


def documents(path: Path | str | None, column: str = "text") -> dict[str, str]:
    found = [(document.name, document.text) for document in read_documents(path, column)]
    assert len(dict(found)) == len(found)
    return dict(found)


def find_files(path: Path | str | None) -> list[str]:
    """Names, in their order."""
    source = open_source(path)
    assert isinstance(source, FileSource)
    return [file.name for file in source.files]


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def write_parquet(file: Path, columns: dict[str, object]) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), file)
    return file


def test_a_folder(tmp_path: Path) -> None:
    files = {
        "b.txt": "b", "a/x.py": "x", "a.md": "a", "no_suffix": "n", "empty.txt": "", ".hidden": "h", ".git/config": "g", "picture.PNG": b"\x89PNG\0",
        "z.txt.gz": gzip.compress(b"z", mtime=0), "archive.tar.gz": b"\0",
    }  # fmt: skip
    folder = write(tmp_path / ".corpus", files)
    assert find_files(folder) == ["a.md", "a/x.py", "b.txt", "empty.txt", "no_suffix", "z.txt.gz"]
    assert documents(folder) == {"a.md": "a", "a/x.py": "x", "b.txt": "b", "no_suffix": "n", "z.txt.gz": "z"}


def test_a_file_and_a_glob(tmp_path: Path) -> None:
    write(tmp_path, {"c/a.txt": "a", "c/b.md": "b", "c/d/e.txt": "e", "c/d/.f.txt": "f"})
    assert documents(tmp_path / "c" / "a.txt") == {"a.txt": "a"}
    assert documents(str(tmp_path / "c" / "*.txt")) == {"a.txt": "a"}
    assert documents(str(tmp_path / "c" / "**" / "*.txt")) == {"a.txt": "a", "d/e.txt": "e"}
    assert documents(str(tmp_path / "*" / "[ab].*")) == {"c/a.txt": "a", "c/b.md": "b"}


def test_a_path_with_brackets_that_exists_is_no_glob(tmp_path: Path) -> None:
    write(tmp_path, {"[1].txt": "one", "1.txt": "wrong"})
    assert documents(tmp_path / "[1].txt") == {"[1].txt": "one"}


def test_a_link_to_a_folder_above_does_not_loop(tmp_path: Path) -> None:
    write(tmp_path, {"c/a.txt": "a", "other/b.txt": "b"})
    (tmp_path / "c" / "up").symlink_to(tmp_path / "c")
    (tmp_path / "c" / "more").symlink_to(tmp_path / "other")
    (tmp_path / "c" / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert documents(tmp_path / "c") == {"a.txt": "a", "more/b.txt": "b"}


def test_text_is_left_as_it_is(tmp_path: Path) -> None:
    text = "\ufeffone\r\ntwo\rthree\n\u2028\x0c\n"
    write(tmp_path, {"a.txt": text})
    assert documents(tmp_path) == {"a.txt": text}


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"text": "a\n\u0000b"}, {"text": ""}, {"text": None}, {"text": "\u4f60"}]
    content = "\ufeff" + "\n".join(json.dumps(row) for row in rows) + "\n\n  \r\n" + json.dumps({"text": "last", "body": "B"})
    write(tmp_path, {"x.jsonl": content, "y.jsonl.gz": gzip.compress(b'{"text": "zip"}\r\n', mtime=0)})
    assert documents(tmp_path) == {"x.jsonl#1": "a\n\0b", "x.jsonl#4": "\u4f60", "x.jsonl#7": "last", "y.jsonl.gz#1": "zip"}


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    values = ["a", "", None, "\u4f60"] + [f"row {i}" for i in range(3000)]
    array = pa.array(values, pa.large_string() if kind == "large_string" else pa.string())
    write_parquet(tmp_path / "x.parquet", {"body": array.dictionary_encode() if kind == "dictionary" else array, "n": list(range(len(values)))})
    found = documents(tmp_path, "body")
    assert list(found.items())[:3] == [("x.parquet#1", "a"), ("x.parquet#4", "\u4f60"), ("x.parquet#5", "row 0")]
    assert len(found) == 3002


def test_the_standard_library() -> None:
    names = find_files(None)
    assert len(names) > 400 and "dataclasses.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not any({"site-packages", "dist-packages", "__pycache__"} & set(name.split("/")) for name in names)


def test_files_that_are_no_text_are_left_out_in_the_standard_library_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"good.py": "x = 1", "latin.py": b"\xe9", "nul.py": b"a\0", "site-packages/p.py": "p", "note.txt": "n"})
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    skips = Skips("data.path", None)
    assert [document.name for document in iter_documents(open_source(None), "text", skips)] == ["good.py"]
    assert [re.search(r"\w+\.py", text)[0] for text in skips.found] == ["latin.py", "nul.py"]  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"latin\.py"):
        documents(tmp_path)


def test_fingerprint_follows_names_and_contents_but_not_the_place(tmp_path: Path) -> None:
    one = open_source(write(tmp_path / "1", {"a.txt": "a", "b.txt": "b"})).fingerprint()
    assert open_source(write(tmp_path / "2", {"a.txt": "a", "b.txt": "b"})).fingerprint() == one
    others = [{"a.txt": "a", "b.txt": "c"}, {"a.txt": "a", "c.txt": "b"}, {"a.txt": "ab", "b.txt": ""}, {"a.txt": "a"}]
    prints = [open_source(write(tmp_path / f"o{i}", files)).fingerprint() for i, files in enumerate(others)]
    assert len({one, *prints}) == 5


BAD_CONTENT = [
    ("x.txt", b"ok\nbad \xe9\n", r"x\.txt is not valid UTF-8: byte 0xe9 at offset 7 \(line 2\)"),
    ("x.txt", b"a\nb\0c", r"x\.txt is a binary file.*NUL byte at offset 3 \(line 2\)"),
    ("x.txt", "text".encode("utf-16"), r"x\.txt is UTF-16"),
    ("x.png", b"\x89PNG\0", r"x\.png is a binary file"),
    ("x.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"x\.txt\.gz is a damaged or truncated gzip"),
    ("x.txt.gz", b"no gzip", r"x\.txt\.gz is a damaged or truncated gzip"),
    ("x.txt.gz", gzip.compress(b"\xe9", mtime=0), r"x\.txt\.gz is not valid UTF-8"),
    ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl line 2 is not valid JSON"),
    ("x.jsonl", b"[" * 100_000, r"x\.jsonl line 1 is not valid JSON"),
    ("x.jsonl", b'{"text": "a"}\n\n["text"]\n', r"x\.jsonl line 3 is list"),
    ("x.jsonl", b'{"body": "a", "id": 1}', r"x\.jsonl line 1 has no key 'text', only body, id; write data\.text_column"),
    ("x.jsonl", b'{"text": 3}', r"x\.jsonl line 1: 'text' is int, not text"),
    ("x.jsonl", b'{"text": "a\xff"}', r"x\.jsonl line 1 is not valid UTF-8"),
    ("x.jsonl", b'{"text": "a\\ud800"}', r"x\.jsonl line 1: 'text' has a lone surrogate at character 1"),
    ("x.parquet", b"", r"x\.parquet is a damaged or truncated parquet"),
    ("x.parquet", b"PAR1 no parquet", r"x\.parquet is a damaged or truncated parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_CONTENT)
def test_what_is_no_text_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write(tmp_path, {name: content})
    with pytest.raises(ConfigError, match=f"^data.path: .*{message}"):
        documents(tmp_path / name)


def test_a_truncated_parquet(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", {"text": [str(i) * 50 for i in range(5000)]})
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"x\.parquet is a damaged or truncated parquet"):
        documents(file)
    file.write_bytes(whole[:1000] + bytes(len(whole) - 3000) + whole[-2000:])
    with pytest.raises(ConfigError, match=r"x\.parquet is a damaged or truncated parquet"):
        documents(file)


def test_parquet_columns(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "x.parquet", {"body": ["a"], "n": [1]})
    with pytest.raises(ConfigError, match=r"x\.parquet has no column 'text', only body, n; write data\.text_column=COLUMN"):
        documents(file)
    with pytest.raises(ConfigError, match=r"x\.parquet column 'n' holds int64, not text"):
        documents(file, "n")


def test_parquet_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"], pa.binary()).buffers())
    file = write_parquet(tmp_path / "x.parquet", {"text": broken})
    with pytest.raises(ConfigError, match=r"x\.parquet row 2 is not valid UTF-8"):
        documents(file)


@pytest.mark.parametrize("files", [{}, {".hidden.txt": "h", "a.png": b"\0"}, {"sub/.git/x": "x"}])
def test_a_folder_without_text(tmp_path: Path, files: dict[str, str | bytes]) -> None:
    with pytest.raises(ConfigError, match=r"^data\.path=.* has no text files"):
        find_files(write(tmp_path, files))


@pytest.mark.parametrize("files", [{"a.txt": ""}, {"a.txt": "", "b.jsonl": '{"text": ""}\n'}, {"b.jsonl": ""}])
def test_an_empty_corpus(tmp_path: Path, files: dict[str, str | bytes]) -> None:
    with pytest.raises(ConfigError, match=r"^data\.path: the corpus is empty"):
        documents(write(tmp_path, files))


def test_a_missing_path(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "no", "does not exist"), (str(tmp_path / "*.txt"), "has no text files"), ("", "is empty")):
        with pytest.raises(ConfigError, match=re.escape(f"data.path={path} {said}")):
            find_files(path)
    with pytest.raises(ConfigError, match=r"data\.val_path="):
        open_source(tmp_path / "no", key="data.val_path")


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="neither a file nor a folder"):
        find_files(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="no text files"):
        find_files(tmp_path)


def test_a_file_that_goes_away_while_reading(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "a", "b.txt": "b"})
    reading = read_documents(tmp_path)
    assert next(reading).text == "a"
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ConfigError, match=r"b\.txt cannot be read"):
        next(reading)
