"""Documents to token ids, in this process or in others beside it. The ids and their order are the same either way.

The other processes are started afresh (`python -m nsa_transformer.data.encoding`) and fed through pipes: nothing of this process is forked, so threads and
devices that it has do no harm, and a script that calls needs no guard. Each ends when its pipe does, so also when this process is killed.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from nsa_transformer.config import ConfigError
from nsa_transformer.data.chat import ChatTemplate
from nsa_transformer.data.readers import Document
from nsa_transformer.data.tokenizer import Tokenizer, cut_text

__all__ = ["Encoded", "encode_documents"]

BATCH_CHARACTERS = 1 << 22  # of documents that are encoded at once


class Encoded(NamedTuple):
    """ids: whole numbers, one per token. assistant: as many bools for a conversation, those that the assistant writes; else None."""

    ids: Sequence[int] | np.ndarray
    assistant: Sequence[bool] | np.ndarray | None


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, conversations: bool, num_workers: int
) -> Generator[tuple[Document, Encoded], None, None]:
    """Every document with its ids, in order. `num_workers` processes encode; with 0 this one does. Close it to end them early.

    Raises `ConfigError` where a process ends before its work is done.
    """
    pieces = _pieces(documents, conversations, tokenizer)
    if num_workers == 0:
        template = ChatTemplate(tokenizer) if conversations else None
        yield from _whole((batch, _encode([piece.content for piece in batch], tokenizer, template)) for batch in _batches(pieces))
        return
    with closing(_encode_elsewhere(_batches(pieces), tokenizer, conversations, num_workers)) as encoded:
        yield from _whole(encoded)


def _encode_elsewhere(
    batches: Iterable[list[_Piece]], tokenizer: Tokenizer, conversations: bool, num_workers: int
) -> Generator[tuple[list[_Piece], list[Encoded]], None, None]:
    workers = [_Worker(tokenizer, conversations) for _ in range(num_workers)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def encode(contents: list[Any]) -> list[Encoded]:
        worker = idle.get()
        try:
            return worker.encode(contents)
        finally:
            idle.put(worker)

    pool = ThreadPoolExecutor(num_workers)  # threads that wait for the processes
    try:
        pending: deque[tuple[list[_Piece], Future[list[Encoded]]]] = deque()
        for batch in batches:
            pending.append((batch, pool.submit(encode, [piece.content for piece in batch])))
            if len(pending) > num_workers:  # one more than is being worked on
                ahead, future = pending.popleft()
                yield ahead, future.result()
        for ahead, future in pending:
            yield ahead, future.result()
    finally:
        for worker in workers:
            worker.close()
        pool.shutdown(cancel_futures=True)


class _Piece(NamedTuple):
    """What is encoded at once: a document, or a part of a huge one."""

    document: Document
    content: Any  # text, or the messages of a conversation
    last: bool


def _pieces(documents: Iterable[Document], conversations: bool, tokenizer: Tokenizer) -> Iterator[_Piece]:
    """Documents, huge ones in parts where the tokenizer allows it: so that processes share them, and since a list of Python's numbers takes many
    times the size of a text."""
    for document in documents:
        if conversations:
            yield _Piece(document, list(document.messages), True)
            continue
        cuttable = len(document.text) > BATCH_CHARACTERS and tokenizer.can_be_cut
        parts = cut_text(document.text, BATCH_CHARACTERS) if cuttable else [document.text]
        for number, part in enumerate(parts, 1):
            yield _Piece(document, part, number == len(parts))


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.content if isinstance(piece.content, str) else piece.document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _whole(encoded: Iterable[tuple[list[_Piece], Iterable[Encoded]]]) -> Iterator[tuple[Document, Encoded]]:
    """Documents of their pieces again."""
    parts: list[np.ndarray] = []
    for batch, found in encoded:
        for piece, one in zip(batch, found, strict=True):
            if piece.last and not parts:
                yield piece.document, one
                continue
            parts.append(np.asarray(one.ids, dtype=np.uint32))
            if piece.last:
                yield piece.document, Encoded(np.concatenate(parts), None)
                parts = []


def _encode(contents: list[Any], tokenizer: Tokenizer, template: ChatTemplate | None) -> list[Encoded]:
    """Of texts, or with a template of conversations."""
    if template is not None:
        return [Encoded(chat.ids, chat.assistant) for chat in template.encode_batch(contents)]
    return [Encoded(ids, None) for ids in tokenizer.encode_batch(contents)]


# ---------------------------------------------------------------------------------------------------------- the other processes


class _Worker:
    """A process that encodes. It is asked from one thread at a time."""

    def __init__(self, tokenizer: Tokenizer, conversations: bool) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "RAYON_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nsa_transformer.data.encoding"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._conversations = conversations
        self._send({"tokenizer": tokenizer.to_json(), "conversations": conversations})

    def encode(self, contents: list[Any]) -> list[Encoded]:
        self._send(contents)
        assert self._process.stdout is not None
        frame = _read_frame(self._process.stdout)
        if frame is None:
            self._died()
        return _unpack(frame, self._conversations)

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        try:
            _write_frame(self._process.stdin, json.dumps(value, ensure_ascii=False, default=str).encode())
        except OSError:  # a broken pipe
            self._died()

    def _died(self) -> NoReturn:
        status = self._process.wait()
        raise ConfigError(
            f"a process that tokenises ended with status {status}, which too little memory can cause; write data.num_workers=0 or fewer than there are"
        )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # what was still in the buffer has nobody to read it
                continue


def _write_frame(stream: BinaryIO | Any, content: bytes) -> None:
    stream.write(struct.pack("<Q", len(content)))
    stream.write(content)
    stream.flush()


def _read_frame(stream: BinaryIO | Any) -> bytes | None:
    """The next frame, None where the stream has ended."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    (size,) = struct.unpack("<Q", head)
    content: bytes = stream.read(size)
    return content if len(content) == size else None


def _pack(encoded: Sequence[Encoded]) -> bytes:
    lengths = np.array([len(encoding.ids) for encoding in encoded], dtype=np.int64)
    parts: list[np.ndarray] = [np.array([len(encoded)], dtype=np.int64), lengths, *(np.asarray(encoding.ids, dtype=np.uint32) for encoding in encoded)]
    parts += [np.asarray(encoding.assistant, dtype=np.bool_) for encoding in encoded if encoding.assistant is not None]
    return b"".join(part.tobytes() for part in parts)


def _unpack(frame: bytes, conversations: bool) -> list[Encoded]:
    count = int(np.frombuffer(frame, np.int64, 1)[0])
    lengths = np.frombuffer(frame, np.int64, count, 8)
    total, at = int(lengths.sum()), 8 * (count + 1)
    cuts = np.cumsum(lengths)[:-1]
    ids = np.split(np.frombuffer(frame, np.uint32, total, at), cuts)
    if not conversations:
        return [Encoded(part, None) for part in ids]
    return [Encoded(part, mask) for part, mask in zip(ids, np.split(np.frombuffer(frame, np.bool_, total, at + 4 * total), cuts), strict=True)]


def _serve() -> None:
    """Encode what comes on stdin until it ends. Ctrl-C goes to the parent, which then ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    head = _read_frame(stdin)
    if head is None:
        return
    settings: Mapping[str, Any] = json.loads(head)
    tokenizer = Tokenizer(settings["tokenizer"])
    template = ChatTemplate(tokenizer) if settings["conversations"] else None
    while (frame := _read_frame(stdin)) is not None:
        _write_frame(stdout, _pack(_encode(json.loads(frame), tokenizer, template)))


if __name__ == "__main__":
    _serve()
