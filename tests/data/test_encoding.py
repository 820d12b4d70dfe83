"""Tokenising in this process and in others: the same ids in the same order, and processes that end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nsa_transformer.config import ConfigError, DataConfig
from nsa_transformer.data import encoding
from nsa_transformer.data.encoding import Encoded, encode_documents
from nsa_transformer.data.loader import open_data
from nsa_transformer.data.readers import Document
from nsa_transformer.data.tokenizer import Tokenizer, train_tokenizer
from tests.data.test_conversations import CONVERSATIONS
from tests.runs import write_corpus

TEXTS = ["", "a", "words\u2028and \U0001f680 more\r\n" * 50, "\0\x1f\ufeff", *(f"number {i} " * (i % 90) for i in range(300)), "x" * 5000]
TEXT_DOCUMENTS = [Document(str(i), text) for i, text in enumerate(TEXTS)]
CHAT_DOCUMENTS = [Document(str(i), "text", tuple(messages)) for i, messages in enumerate(CONVERSATIONS)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["user assistant words and more numbers " * 20], 320, chat_tokens=True)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 700)


def plain(found: Iterator[tuple[Document, Encoded]]) -> list[tuple[str, list[int], list[bool] | None]]:
    return [(doc.name, list(map(int, one.ids)), None if one.assistant is None else list(map(bool, one.assistant))) for doc, one in found]


@pytest.mark.parametrize("conversations", [False, True])
def test_the_number_of_processes_changes_nothing(tokenizer: Tokenizer, conversations: bool) -> None:
    documents = CHAT_DOCUMENTS if conversations else TEXT_DOCUMENTS
    alone = plain(encode_documents(documents, tokenizer, conversations, 0))
    assert [name for name, _, _ in alone] == [document.name for document in documents]
    if not conversations:
        assert [ids for _, ids, _ in alone] == [tokenizer.encode(text) for text in TEXTS]
    for workers in (1, 4):
        assert plain(encode_documents(documents, tokenizer, conversations, workers)) == alone


def test_nothing_to_encode_and_few_batches(tokenizer: Tokenizer) -> None:
    assert plain(encode_documents([], tokenizer, False, 2)) == []
    assert len(plain(encode_documents(TEXT_DOCUMENTS[:1], tokenizer, False, 4))) == 1


def running() -> set[str]:
    """Processes that this one has started and not ended."""
    return {child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()}


def test_processes_end_with_the_work_or_when_it_is_given_up(tokenizer: Tokenizer) -> None:
    before = running()
    found = encode_documents(TEXT_DOCUMENTS, tokenizer, False, 2)
    next(found)
    assert len(running() - before) == 2
    found.close()
    assert running() - before == set()
    plain(encode_documents(TEXT_DOCUMENTS, tokenizer, False, 2))
    assert running() - before == set()

    def failing() -> Iterator[Document]:
        yield from TEXT_DOCUMENTS[:200]
        raise ConfigError("a bad document")

    with pytest.raises(ConfigError, match="a bad document"):
        plain(encode_documents(failing(), tokenizer, False, 2))
    assert running() - before == set()


def test_a_process_that_is_killed_is_an_error(tokenizer: Tokenizer) -> None:
    before = running()
    found = encode_documents(TEXT_DOCUMENTS * 20, tokenizer, False, 2)
    next(found)
    for child in running() - before:
        os.kill(int(child), signal.SIGKILL)
    with pytest.raises(ConfigError, match=r"a process that tokenises ended with status -9.*write data\.num_workers=0"):
        plain(found)
    assert running() - before == set()


def test_a_process_ends_with_its_parent() -> None:
    """Also when the parent is killed and can end nobody: the pipe ends."""
    worker = subprocess.Popen([sys.executable, "-m", "nsa_transformer.data.encoding"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(timeout=60) == 0


def test_ids_survive_the_pipe() -> None:
    texts = [Encoded([1, 2**32 - 1], None), Encoded([], None), Encoded(np.array([7], dtype=np.uint32), None)]
    assert [one.ids.tolist() for one in encoding._unpack(encoding._pack(texts), False)] == [[1, 2**32 - 1], [], [7]]  # type: ignore[union-attr]
    chats = [Encoded([1, 2], [True, False]), Encoded([3], [True])]
    assert [one.assistant.tolist() for one in encoding._unpack(encoding._pack(chats), True)] == [[True, False], [True]]  # type: ignore[union-attr]


def test_a_corpus_tokenised_by_other_processes_is_the_same(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text", documents=30)
    config = DataConfig(path=str(tmp_path / "text"), cache_dir=str(tmp_path / "one"), max_length=64, val_fraction=0.2)
    alone = open_data(config, 300, 0, lambda _: None)
    others = open_data(replace(config, cache_dir=str(tmp_path / "two"), num_workers=2), 300, 0, lambda _: None)
    assert others.fingerprint == alone.fingerprint
