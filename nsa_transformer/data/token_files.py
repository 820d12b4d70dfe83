"""Files to token ids and back, a few megabytes at a time: what `nsa tokenizer encode` and `decode` do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nsa_transformer.config import ConfigError
from nsa_transformer.data.tokenizer import Tokenizer
from nsa_transformer.utils.files import atomic_file

__all__ = ["decode_file", "encode_file"]

_READ_SIZE = 1 << 22  # bytes
_IDS_AT_ONCE = 1 << 20


def encode_file(tokenizer: Tokenizer, file: str | os.PathLike[str], output: str | os.PathLike[str]) -> tuple[int, int, int]:
    """Write the ids of a file's bytes to a .npy, uint16 where the vocabulary allows it, else uint32.

    Returns how many tokens they are, the bytes of the file, and the bytes that the tokens stand for: the same for a tokenizer that loses
    nothing. Raises `ConfigError` naming the file where it has bytes that the tokenizer has no token for.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32)
    count = size = meant = 0

    def parts() -> Iterator[bytes]:
        nonlocal size
        while part := source.read(_READ_SIZE):
            size += len(part)
            yield part

    with open(file, "rb") as source, atomic_file(output) as stream:
        header = _write_header(stream, dtype, 0)
        try:
            for ids in tokenizer.encode_stream(parts()):
                stream.write(ids.astype(dtype).tobytes())
                count += len(ids)
                meant += int(tokenizer.byte_lengths[ids].sum())
        except ValueError as error:
            raise ConfigError(f"{file}: {error}") from None
        stream.seek(0)
        assert _write_header(stream, dtype, count) == header
    return count, size, meant


def decode_file(tokenizer: Tokenizer, file: str | os.PathLike[str], output: str | os.PathLike[str]) -> int:
    """Write the bytes that the ids of a .npy stand for; returns how many ids there are. Raises `ConfigError` where they are no ids of the tokenizer."""
    try:
        ids = np.load(file, allow_pickle=False, mmap_mode="r" if Path(file).stat().st_size else None)
    except (ValueError, EOFError) as error:
        raise ConfigError(f"{file} is no .npy of token ids ({error})") from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "ui":
        kind = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else "several arrays"
        raise ConfigError(f"{file} holds {kind}; token ids are whole numbers in one row")
    # The text of a token depends on its neighbours in other vocabularies, which are decoded at once.
    step = _IDS_AT_ONCE if tokenizer.is_byte_level else max(len(ids), 1)
    with atomic_file(output) as stream:
        for start in range(0, len(ids), step):
            part = ids[start : start + step]
            wrong = part[(part < 0) | (part >= tokenizer.vocab_size)]
            if len(wrong):
                raise ConfigError(f"{file} holds {wrong[0]}, which is no token of this tokenizer: it has {tokenizer.vocab_size}, from 0 on")
            stream.write(tokenizer.decode_bytes(part.tolist()))
    return len(ids)


def _write_header(stream: BinaryIO, dtype: np.dtype, count: int) -> int:
    """The .npy header of a flat array; its size is the same for every count, so that it can be written over at the end."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.tell()
