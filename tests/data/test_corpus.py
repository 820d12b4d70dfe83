"""The cached corpus: what is held out, what damage and races do, and errors that name the setting."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_transformer.config import ConfigError, DataConfig
from nsa_transformer.data.corpus import Split, _sample, cache_folder, choose_validation
from nsa_transformer.data.loader import TextData, open_data
from nsa_transformer.data.sources import Document, read_documents
from nsa_transformer.data.tokenizer import Tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(f"document {i}\n" + "some words, and more words\n" * (i % 7 + 1))
    return DataConfig(path=str(folder), cache_dir=str(tmp_path / "cache"), max_length=64, val_fraction=0.2)


def texts(data: TextData, split: Split) -> list[str]:
    return [data.tokenizer.decode(split.tokens[split.offsets[d] : split.offsets[d + 1]]) for d in split.documents]


def splits(data: TextData) -> tuple[list[str], list[str]]:
    return texts(data, data.train.split), texts(data, data.validation.split)


def opened(config: DataConfig, vocab_size: int = 300, seed: int = 0) -> tuple[TextData, list[str]]:
    messages: list[str] = []
    return open_data(config, vocab_size, seed, messages.append), messages


def test_every_document_lies_whole_in_one_split(config: DataConfig) -> None:
    data, _ = opened(config)
    train, validation = splits(data)
    assert train and validation
    assert sorted(train + validation) == sorted(document.text for document in read_documents(config.path, "text"))
    assert data.train.split.tokens.dtype == np.uint16
    assert data.tokenizer.eod_id not in data.train.split.tokens


def test_the_split_follows_names_not_the_other_documents(config: DataConfig) -> None:
    _, before = splits(opened(config)[0])
    for i in range(0, 40, 2):
        (Path(config.path) / f"{i:02}.txt").unlink()  # type: ignore[arg-type]
    train, after = splits(opened(config)[0])
    kept = [text for text in before if int(text.split()[1]) % 2]
    assert kept and kept == after
    assert len(train) + len(after) == 20


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=30), st.floats(0.001, 0.999))
def test_no_split_is_empty(hashes: list[int], fraction: float) -> None:
    chosen = choose_validation(np.array(hashes, dtype=np.uint64), fraction)
    assert 0 < chosen.sum() < len(hashes)
    assert max(np.array(hashes, dtype=np.uint64)[chosen]) <= min(np.array(hashes, dtype=np.uint64)[~chosen])


def test_the_share_held_out() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 100_000, dtype=np.uint64)
    assert abs(choose_validation(hashes, 0.05).mean() - 0.05) < 0.003


@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.5, 0.999])
def test_a_single_document_is_cut_at_a_line(tmp_path: Path, fraction: float) -> None:
    text = "".join(f"line {i}\r\n" for i in range(1000))
    (tmp_path / "book.txt").write_bytes(text.encode())
    data, _ = opened(DataConfig(path=str(tmp_path / "book.txt"), cache_dir=str(tmp_path / "c"), val_fraction=fraction))
    (train,), (validation,) = splits(data)
    assert train + validation == text
    assert train.endswith("\r\n")
    assert abs(len(validation) - fraction * len(text)) < 12


@pytest.mark.parametrize(("text", "train"), [("a\nb", "a\n"), ("\n\n", "\n"), ("a\n" + "b" * 999 + "\n", "a\n"), ("a" * 999 + "\nb", "a" * 999 + "\n")])
def test_a_single_document_of_few_lines(tmp_path: Path, text: str, train: str) -> None:
    (tmp_path / "x.txt").write_text(text)
    data, _ = opened(DataConfig(path=str(tmp_path / "x.txt"), cache_dir=str(tmp_path / "c")))
    assert splits(data) == ([train], [text.removeprefix(train)])


@pytest.mark.parametrize("text", ["a", "one line", "one line\n", "\n"])
def test_a_single_line_cannot_be_split(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.txt").write_text(text)
    config = DataConfig(path=str(tmp_path / "x.txt"), cache_dir=str(tmp_path / "c"))
    with pytest.raises(ConfigError, match=r"data\.path holds a single document \(x\.txt\) of a single line.*data\.val_path"):
        opened(config)
    assert list((tmp_path / "c" / "corpora").iterdir()) == []
    data, _ = opened(replace(config, val_path=config.path))
    assert splits(data) == ([text], [text])


def test_separate_validation_data(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text('{"text": "held out"}\n{"text": "this too"}\n')
    data, _ = opened(replace(config, val_path=str(tmp_path / "val.jsonl")))
    train, validation = splits(data)
    assert len(train) == 40 and validation == ["held out", "this too"]
    with pytest.raises(ConfigError, match=r"data\.val_path=.*nowhere does not exist"):
        opened(replace(config, val_path=str(tmp_path / "nowhere")))


def test_a_second_opening_reads_the_cache(config: DataConfig) -> None:
    first, cold = opened(config)
    second, warm = opened(config)
    assert any("trained a tokenizer" in m for m in cold) and any("tokenised" in m for m in cold)
    assert not any("trained a tokenizer" in m or "tokenised" in m for m in warm)
    assert first.fingerprint == second.fingerprint
    assert splits(first) == splits(second)
    assert isinstance(second.train.split.tokens, np.memmap)


def test_what_the_fingerprint_and_the_cache_depend_on(config: DataConfig, tmp_path: Path) -> None:
    first, _ = opened(config)
    changed = [
        opened(replace(config, val_fraction=0.3))[0],
        opened(replace(config, max_length=65))[0],
        opened(replace(config, pack_buffer=7))[0],
        opened(config, vocab_size=301)[0],
        opened(config, seed=1)[0],
    ]
    assert len({first.fingerprint, *(data.fingerprint for data in changed)}) == 6
    assert opened(replace(config, cache_dir=str(tmp_path / "elsewhere")))[0].fingerprint == first.fingerprint
    file = Path(config.path) / "03.txt"  # type: ignore[arg-type]
    stat = file.stat()
    file.write_text(file.read_text().replace("more", "less"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    data, _ = opened(config)
    assert data.fingerprint != first.fingerprint
    assert any("less" in text for text in itertools.chain(*splits(data)))


def test_tokens_that_a_library_changed_have_another_fingerprint(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that was lost, and filled again by another version that cuts the same text otherwise."""
    before = opened(config)[0].fingerprint
    encode = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts: [ids[::-1] for ids in encode(self, texts)])
    assert opened(replace(config, cache_dir=str(tmp_path / "elsewhere")))[0].fingerprint != before


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": _flip,
    "cut short": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "validation.npy", "sha256.json", "tokenizer.json"])
def test_a_damaged_cache_is_built_again(config: DataConfig, name: str, how: str) -> None:
    first, _ = opened(config)
    expected = splits(first)
    (file,) = (file for file in Path(cache_folder(config)).rglob(name) if name != "sha256.json" or file.parent.parent.name == "corpora")
    DAMAGE[how](file)
    again, messages = opened(config)
    assert any("is damaged (" in message for message in messages)
    assert splits(again) == expected
    assert again.fingerprint == first.fingerprint
    assert not any("is damaged (" in message for message in opened(config)[1])


def test_an_entry_that_is_a_file_or_an_empty_folder_is_replaced(config: DataConfig) -> None:
    opened(config)
    (entry,) = (cache_folder(config) / "corpora").iterdir()
    shutil.rmtree(entry)
    entry.mkdir()
    assert any("is damaged (" in message for message in opened(config)[1])
    shutil.rmtree(entry)
    entry.write_text("")
    with pytest.raises(ConfigError, match=r"cannot be kept whole; delete it"):
        opened(config)


RACE = """
import json, sys
from nsa_transformer.config import DataConfig
from nsa_transformer.data.loader import open_data
sys.stdin.readline()
data = open_data(DataConfig(**json.loads(sys.argv[1])), 300, 0)
print(data.fingerprint, data.train.pack(3).tokens.sum().item())
"""


def test_two_processes_on_a_cold_cache(config: DataConfig) -> None:
    settings = json.dumps({"path": config.path, "cache_dir": config.cache_dir, "max_length": 64, "val_fraction": 0.2})
    pipe = subprocess.PIPE
    racers = [subprocess.Popen([sys.executable, "-c", RACE, settings], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    results = [racer.communicate(timeout=120) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], results
    data, messages = opened(config)
    assert {out for out, _ in results} == {f"{data.fingerprint} {data.train.pack(3).tokens.sum()}\n"}
    assert not any("is damaged (" in message or "tokenised" in message for message in messages)
    for kind in ("tokenizers", "corpora"):
        assert len(list((cache_folder(config) / kind).iterdir())) == 1  # nothing temporary is left


def test_leftovers_of_killed_processes_go_when_they_are_old(config: DataConfig) -> None:
    corpora = cache_folder(config) / "corpora"
    old, new = corpora / ".x.tmp-1-a", corpora / ".y.tmp-2-b"
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    opened(config)
    assert not old.exists() and new.exists()


def test_a_cache_that_cannot_be_written(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache folder .*file.* cannot be written: .*; write data\.cache_dir=FOLDER"):
        opened(replace(config, cache_dir=str(tmp_path / "file")))


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder(DataConfig()) == tmp_path / "xdg" / "nsa-transformer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(DataConfig()) == tmp_path / "home" / ".cache" / "nsa-transformer"
    assert cache_folder(DataConfig(cache_dir="~/c")) == tmp_path / "home" / "c"


def test_bad_data_leaves_no_entry(config: DataConfig) -> None:
    opened(config)
    (Path(config.path) / "17.txt").write_bytes(b"\xff")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"data\.path: .*17\.txt is not valid UTF-8"):
        opened(config)
    for kind in ("tokenizers", "corpora"):
        assert len(list((cache_folder(config) / kind).iterdir())) == 1


def test_a_given_tokenizer(config: DataConfig, tmp_path: Path) -> None:
    mine = train_tokenizer(["other text"], 300)
    mine.save(tmp_path / "tok" / "tokenizer.json")
    data, messages = opened(replace(config, tokenizer=str(tmp_path / "tok")), vocab_size=mine.vocab_size)
    assert data.tokenizer.fingerprint == mine.fingerprint
    assert not any("trained" in message for message in messages)
    with pytest.raises(ConfigError, match=rf"{mine.vocab_size} tokens but model\.vocab_size=100; write model\.vocab_size={mine.vocab_size}"):
        opened(replace(config, tokenizer=str(tmp_path / "tok")), vocab_size=100)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: there is no tokenizer at"):
        opened(replace(config, tokenizer=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"write model\.vocab_size=257 or more"):
        opened(config, vocab_size=100)


def test_a_large_vocabulary_takes_wider_tokens(config: DataConfig, tmp_path: Path) -> None:
    spec = json.loads(train_tokenizer([], 257)._backend.to_str())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 257, "content": "<x>"})
    vocab = spec["model"]["vocab"]
    spec["model"]["vocab"] = {token: i + (66_000 if token == "e" else 0) for token, i in vocab.items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    data, _ = opened(replace(config, tokenizer=str(tmp_path)), vocab_size=70_000)
    assert data.train.split.tokens.dtype == np.uint32
    assert all(text.startswith("document ") for text in itertools.chain(*splits(data)))


def test_a_huge_document_has_the_tokens_of_the_whole(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    (Path(config.path) / "17.txt").write_text("words of a long document, and more of them\n" * 4000)  # type: ignore[arg-type]
    whole = opened(config)[0]
    monkeypatch.setattr("nsa_transformer.data.encoding.BATCH_CHARACTERS", 100)
    pieces = opened(replace(config, cache_dir=f"{config.cache_dir}2"))[0]
    assert pieces.fingerprint == whole.fingerprint


STOPPED = """
import json, sys
import nsa_transformer.data.encoding as encoding
from nsa_transformer.config import DataConfig
from nsa_transformer.data.loader import open_data
from nsa_transformer.training.faults import Stopped, StopSignal

def slowly(pieces, plain=encoding._batches):
    for batch in plain(pieces):
        yield batch
        print("tokenising", flush=True)
        sys.stdin.readline()

encoding._batches = slowly
with StopSignal():
    try:
        open_data(DataConfig(**json.loads(sys.argv[1])), 300, 0)
    except Stopped as stopped:
        sys.exit(128 + stopped.signal)
"""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_tokenising_leaves_nothing(config: DataConfig, number: signal.Signals, workers: int) -> None:
    settings = json.dumps({"path": config.path, "cache_dir": config.cache_dir, "max_length": 64, "val_fraction": 0.2, "num_workers": workers})
    process = subprocess.Popen([sys.executable, "-c", STOPPED, settings], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "tokenising\n"
    children = [child for task in Path(f"/proc/{process.pid}/task").iterdir() for child in (task / "children").read_text().split()]
    assert len(children) == workers
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert list((cache_folder(config) / "corpora").iterdir()) == []
    assert splits(opened(config)[0])


def test_the_tokenizer_sample_is_even_bounded_and_ordered() -> None:
    documents = [Document(f"{i}", f"{i:04}" * 25) for i in range(1000)]
    sample = _sample(documents, 10_000)
    numbers = [int(part[:4]) for part in sample]
    assert len(sample) == 100
    assert numbers == sorted(numbers)
    assert 350 < np.mean(numbers) < 650
    assert _sample(documents, 10**6) == [document.text for document in documents]
