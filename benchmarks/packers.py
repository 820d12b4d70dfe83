"""Other ways from documents to batches, to compare the project's packing with."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from nsa_transformer.data.corpus import Split
from nsa_transformer.data.packing import PackPlan

HF_BATCH = 8  # rows of a padded batch
HF_MAP_BATCH = 1000  # documents that `Dataset.map` hands over at once, by default


def concatenate_and_split(lengths: np.ndarray, max_length: int, order: np.ndarray) -> PackPlan:
    """All documents end to end, cut every `max_length` tokens; the last pack may be shorter."""
    ends = np.cumsum(lengths[order])
    begins = ends - lengths[order]
    first, count = begins // max_length, (ends - 1) // max_length - begins // max_length + 1
    place = np.repeat(np.arange(len(order)), count)
    pack = first[place] + np.arange(len(place)) - np.repeat(np.cumsum(count) - count, count)
    start = np.maximum(begins[place], pack * max_length)
    length = np.minimum(ends[place], (pack + 1) * max_length) - start
    offsets = np.concatenate([[0], np.cumsum(np.bincount(pack))]).astype(np.int64)
    return PackPlan(order[place], start - begins[place], length, offsets)


def first_fit(lengths: np.ndarray, max_length: int, order: np.ndarray) -> PackPlan:
    """Each document, cut to full fragments and a remainder, goes to the first pack that has room; all packs stay open to the end."""
    space = np.full(int((-(-lengths[order] // max_length)).sum()) + 1, max_length, dtype=np.int64)
    used, packs = 0, []
    fragments = []
    for document in order.tolist():
        for start in range(0, int(lengths[document]), max_length):
            length = min(max_length, int(lengths[document]) - start)
            pack = int(np.argmax(space[: used + 1] >= length))
            space[pack] -= length
            used = max(used, pack + 1)
            packs.append(pack)
            fragments.append((document, start, length))
    by_pack = np.argsort(packs, kind="stable")
    document, start, length = np.array(fragments, dtype=np.int64).reshape(-1, 3)[by_pack].T
    offsets = np.concatenate([[0], np.cumsum(np.bincount(np.array(packs, dtype=np.int64), minlength=used))]).astype(np.int64)
    return PackPlan(document, start, length, offsets)


# ------------------------------------------------------------------------------------------------------ Hugging Face datasets


def hf_dataset(split: Split) -> Any:
    """The tokenised documents as a `datasets.Dataset`, in the order of their files."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    column = pyarrow.LargeListArray.from_arrays(pyarrow.array(split.offsets), pyarrow.array(split.tokens.astype(np.int32)))
    return datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table({"input_ids": column})), fingerprint="tokens")


def padded_counts(lengths: np.ndarray, max_length: int) -> tuple[int, int]:
    """(tokens of documents, tokens with padding) of batches that are truncated to `max_length` and padded to their longest row."""
    kept = np.minimum(lengths, max_length)
    whole = np.pad(kept, (0, -len(kept) % HF_BATCH)).reshape(-1, HF_BATCH)
    rows = (whole > 0).sum(1)
    return int(kept.sum()), int((whole.max(1) * rows).sum())


def padded_batches(dataset: Any, max_length: int, eod_id: int) -> Iterator[int]:
    """Tokens of documents in each batch, as a collator with truncation and padding makes it."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = [row["input_ids"][:max_length] for row in rows]
        tokens = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=eod_id)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in ids])[:, None]
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(~mask, -100)}

    for batch in torch.utils.data.DataLoader(dataset.with_format("torch"), batch_size=HF_BATCH, collate_fn=collate):
        yield int(batch["attention_mask"].sum())


def grouped(dataset: Any, max_length: int) -> Any:
    """`group_texts` of Hugging Face's language modelling examples: concatenation within each batch of documents, the remainder dropped."""

    def group_texts(examples: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined = list(itertools.chain(*examples["input_ids"]))
        total = len(joined) // max_length * max_length
        ids = [joined[i : i + max_length] for i in range(0, total, max_length)]
        return {"input_ids": ids, "labels": ids.copy()}

    name = f"grouped-{max_length}"  # or datasets would hash the function and all that it refers to
    return dataset.map(group_texts, batched=True, batch_size=HF_MAP_BATCH, keep_in_memory=True, load_from_cache_file=False, new_fingerprint=name)


def grouped_counts(lengths: np.ndarray, max_length: int) -> tuple[int, int]:
    """(tokens kept, fragments) of `grouped`."""
    kept = fragments = 0
    for begin in range(0, len(lengths), HF_MAP_BATCH):
        part = lengths[begin : begin + HF_MAP_BATCH]
        total = int(part.sum()) // max_length * max_length
        plan = concatenate_and_split(part, max_length, np.arange(len(part)))
        kept += total
        fragments += int(plan.offsets[total // max_length])
    return kept, fragments


def grouped_batches(dataset: Any) -> Iterator[int]:
    for batch in torch.utils.data.DataLoader(dataset.with_format("torch"), batch_size=1):
        yield batch["input_ids"].numel()
