"""Datasets by name: `hf://NAME[:CONFIG][@SPLIT][?REVISION]`, streamed by the `datasets` library, of the Hugging Face Hub or of a local folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nsa_transformer.config import ConfigError
from nsa_transformer.data.files import BadDocument, HashRecord, LocalFile
from nsa_transformer.data.readers import Column, Document, document_of_row, listed
from nsa_transformer.data.sources import FileSource

__all__ = ["HubSource"]

_FORM = re.compile(r"hf://(?P<name>[^:@?]+)(:(?P<config>[^:@?]+))?(@(?P<split>[^:@?]+))?(\?(?P<revision>[^:@?]+))?")


class HubSource:
    """One split of a dataset, row after row in the order of its files. Nothing is downloaded but what is read.

    Its content is known by the contents of local files, and by the addresses of those on the Hub, which name the commit.
    """

    default = False

    def __init__(self, key: str, address: str, builder: Any, split: str) -> None:
        self.key = key
        self._address, self._builder, self._split = address, builder, split
        paths = [Path(str(file)) for file in builder.config.data_files[split]]
        local = all(path.is_file() for path in paths)
        self._local = FileSource(key, address, [LocalFile(path, path.as_posix()) for path in paths]) if local else None

    @classmethod
    def open(cls, address: str, key: str) -> HubSource:
        """Raises `ConfigError` where the address is none, the package is missing, or there is no such dataset, configuration or split."""
        match = _FORM.fullmatch(address)
        if match is None:
            raise ConfigError(f"{key}={address} is not hf://NAME[:CONFIG][@SPLIT][?REVISION]; write for example hf://owner/name:default@train")
        name, config, split = match["name"], match["config"], match["split"] or "train"
        try:
            import datasets
        except ImportError:
            raise ConfigError(f"{key}={address} needs the package datasets; pip install datasets") from None
        with _named(key, address):
            builder = datasets.load_dataset_builder(name, config, revision=match["revision"])
        files = builder.config.data_files
        if not files:
            raise ConfigError(f"{key}={address} is a dataset without data files, which cannot be streamed; export it to parquet and name the files")
        if split not in files:
            raise ConfigError(f"{key}={address} has no split {split!r}, only {listed(files)}; write hf://{name}@SPLIT")
        return cls(key, address, builder, split)

    @property
    def described(self) -> str:
        return f"{self._address} (split {self._split}, {len(self._builder.config.data_files[self._split])} files)"

    @property
    def place(self) -> str:
        return self._address

    def fingerprint(self, record: HashRecord | None = None) -> str:
        files = self._builder.config.data_files[self._split]
        content = (list(files), files.origin_metadata) if self._local is None else self._local.fingerprint(record)
        known = (self._builder.config.name, self._split, content)
        return hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()[:32]

    def check_unchanged(self) -> None:
        if self._local is not None:  # a commit of the Hub does not change
            self._local.check_unchanged()

    def documents(self, column: Column, bad: Callable[[BadDocument], None]) -> Iterator[Document]:
        with _named(self.key, self._address):
            rows = self._builder.as_streaming_dataset(split=self._split)
            if rows.features is not None and column.name not in rows.features:
                raise ConfigError(f"{self.key}={self._address} has no column {column.name!r}, only {listed(rows.features)}; write {column.setting}=COLUMN")
            for number, row in enumerate(rows, start=1):
                where = f"{self._address} row {number}"
                try:
                    if column.name not in row:
                        raise BadDocument(f"{where} has no column {column.name!r}, only {listed(row)}; write {column.setting}=COLUMN")
                    yield document_of_row(f"{self._split}#{number}", row[column.name], where, column)
                except BadDocument as error:
                    bad(error)


@contextmanager
def _named(key: str, address: str) -> Iterator[None]:
    """The library and what it calls raise errors of many makes; all mean that the dataset cannot be read."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        said = str(error).strip().splitlines()
        raise ConfigError(f"{key}={address} cannot be read: {type(error).__name__}: {said[0] if said else 'no reason given'}") from error
