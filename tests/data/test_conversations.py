"""Conversations: read from rows, written as ChatML, and learned whole or where the assistant speaks."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_transformer.config import ConfigError, DataConfig, MixtureSource
from nsa_transformer.data.chat import ChatTemplate
from nsa_transformer.data.corpus import Split
from nsa_transformer.data.loader import TextData, open_data
from nsa_transformer.data.pack import IGNORE
from nsa_transformer.data.sources import Column, Skips, iter_documents, open_source
from nsa_transformer.data.stream import PackStream
from nsa_transformer.data.tokenizer import train_tokenizer
from nsa_transformer.training.trainer import Trainer
from tests.data.test_files import fake_datasets
from tests.runs import QUIET, small_config, steady_rows, write_corpus

CHAT = Column("messages", conversations=True)


def conversation(number: int, turns: int = 1) -> list[dict[str, str]]:
    messages = []
    for turn in range(turns):
        messages += [{"role": "user", "content": f"What is {number} and {turn}?"}, {"role": "assistant", "content": f"It is {number + turn}, I think."}]
    return messages


CONVERSATIONS = [conversation(number, 1 + number % 3) for number in range(60)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in CONVERSATIONS))
    return path


def settings_of(file: Path, **more: Any) -> DataConfig:
    return DataConfig(path=str(file), cache_dir=str(file.parent / "cache"), max_length=64, val_fraction=0.2, messages_column="messages", **more)


def opened(config: DataConfig) -> TextData:
    return open_data(config, 400, 0, lambda _: None)


def read(path: Path | str, max_bad: int = 0) -> tuple[list[list[dict[str, Any]]], list[str]]:
    skips = Skips("data.path", max_bad)
    return [[dict(message) for message in document.messages] for document in iter_documents(open_source(path), CHAT, skips)], skips.found


def test_conversations_come_from_jsonl_parquet_and_datasets(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    assert read(file) == (CONVERSATIONS, [])
    pq.write_table(pa.table({"messages": [*CONVERSATIONS, [], None]}), file.with_suffix(".parquet"))
    assert read(file.with_suffix(".parquet")) == (CONVERSATIONS, [])
    monkeypatch.setitem(sys.modules, "datasets", fake_datasets([{"messages": messages} for messages in CONVERSATIONS], columns=("messages",)))
    assert read("hf://owner/name") == (CONVERSATIONS, [])


def test_what_is_no_conversation_is_named_and_counted(tmp_path: Path) -> None:
    rows: list[Any] = [
        conversation(1), "text", [{"role": "user"}], [{"role": "robot", "content": "x"}], [{"role": "user", "content": None}],
        [{"role": "assistant", "content": "x", "tool_calls": [1]}], [], None, conversation(2),
    ]  # fmt: skip
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    found, skipped = read(tmp_path / "x.jsonl", max_bad=5)
    assert found == [conversation(1), conversation(2)]
    assert [text.split(" line ")[1][0] for text in skipped] == ["2", "3", "4", "5", "6"]
    with pytest.raises(ConfigError, match=r"^data\.path: .*x\.jsonl line 2: a conversation is a list"):
        read(tmp_path / "x.jsonl")


def test_columns_that_hold_none(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"messages": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"column 'messages' holds string, not conversations; write data\.messages_column=COLUMN"):
        read(tmp_path / "x.parquet")
    (tmp_path / "y.jsonl").write_text('{"turns": []}\n')
    with pytest.raises(ConfigError, match=r"line 1 has no key 'messages', only turns; write data\.messages_column=KEY"):
        read(tmp_path / "y.jsonl")
    (tmp_path / "z.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"z\.txt is text; conversations come from \.jsonl"):
        read(tmp_path / "z.txt")


def test_packs_hold_the_conversations_as_chatml(file: Path) -> None:
    data = opened(settings_of(file))
    template = ChatTemplate(data.tokenizer)
    found = []
    for split in (data.train.split, data.validation.split):  # type: ignore[union-attr]
        for document in split.documents:
            part = slice(split.offsets[document], split.offsets[document + 1])
            found.append(template.decode(split.tokens[part].tolist()))
            assert split.assistant[part].tolist() == template.encode(found[-1]).assistant
    assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, CONVERSATIONS))
    targets = [pack.targets[pack.valid] for pack in data.train.first_epoch(1000)]
    assert all((part != IGNORE).all() for part in targets)


def test_the_loss_on_the_assistant_alone_is_another_stream(file: Path) -> None:
    whole, alone = opened(settings_of(file)), opened(settings_of(file, assistant_only_loss=True))
    assert whole.fingerprint != alone.fingerprint
    said = []
    for pack in alone.train.first_epoch(1000):
        kept = pack.targets != IGNORE
        said.append(alone.tokenizer.decode_bytes(pack.targets[kept].tolist()).decode())
        ends = pack.targets[kept] == alone.tokenizer.special_tokens["<|im_end|>"]
        assert not (pack.targets == alone.tokenizer.eod_id).any() and ends.any()
    text = "".join(said)
    assert "What is" not in text and "user" not in text
    assert text.count("I think.") == sum(len(messages) // 2 for messages in CONVERSATIONS) - _held_out(alone)


def _held_out(data: TextData) -> int:
    packs = data.validation.first_epoch(1000)
    return sum(data.tokenizer.decode_bytes(pack.targets[pack.targets != IGNORE].tolist()).decode().count("I think.") for pack in packs)


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 16), st.randoms())
def test_targets_are_kept_where_the_assistant_writes_wherever_documents_are_cut(lengths: list[int], max_length: int, random: Any) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    assistant = np.array([random.random() < 0.5 for _ in range(offsets[-1])])
    split = Split(np.arange(1, offsets[-1] + 1, dtype=np.uint32), offsets, np.arange(len(lengths)), "test", assistant)
    stream = PackStream(split, max_length=max_length, seed=0, pack_buffer=8, eod_id=0, assistant_only=True)
    kept = []
    for pack in stream.first_epoch(10_000):
        for token, target in zip(pack.tokens[pack.valid].tolist(), pack.targets[pack.valid].tolist(), strict=True):
            assert target in (IGNORE, token + 1)
            kept += [target] if target != IGNORE else []
    begins = set(offsets.tolist())
    assert sorted(kept) == [token + 1 for token in range(offsets[-1]) if assistant[token] and token not in begins]


def test_a_tokenizer_that_cannot_chat_is_refused(file: Path) -> None:
    train_tokenizer(["text"], 300).save(file.parent / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"the tokenizer has no <\|im_start\|>"):
        opened(settings_of(file, tokenizer=str(file.parent / "tokenizer.json")))


def test_assistant_only_needs_conversations(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.assistant_only_loss=true needs conversations; write data\.messages_column=KEY"):
        opened(replace(settings_of(file), messages_column=None, assistant_only_loss=True))
    with pytest.raises(ConfigError, match=r"has a text_column and a messages_column"):
        MixtureSource("a", weight=1, text_column="text", messages_column="messages")


def test_conversations_and_text_in_one_mixture(file: Path) -> None:
    write_corpus(file.parent / "text")
    mixture = (MixtureSource(str(file), weight=1, messages_column="messages"), MixtureSource(str(file.parent / "text"), weight=1))
    config = DataConfig(mixture=mixture, cache_dir=str(file.parent / "cache"), max_length=64, val_fraction=0.2, assistant_only_loss=True)
    data = opened(config)
    for number in range(20):
        pack = data.train.pack(number)
        is_text = data.train.locate(number)[0] == 1
        assert bool((pack.targets[pack.valid] != IGNORE).all()) == is_text


def test_a_run_on_conversations(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [f"data.path={file}", "data.messages_column=messages", "data.assistant_only_loss=true"]
    assert Trainer(small_config(tmp_path, *QUIET, *more)).train() == 0
    rows = steady_rows(tmp_path / "run")
    assert all(math.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert rows[-1]["step"] == 6
    tokens = [row["tokens"] for row in rows if "tokens" in row]
    assert tokens[-1] < 6 * 2 * 96 * 0.8  # only what the assistant writes is counted as learned
    out = capsys.readouterr().out
    assert "bigram model" in out and "order-2" not in out
