"""The endless sequence of packs, addressed by number, and the one call that opens a corpus."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch

from nsa_transformer.config import ConfigError, DataConfig
from nsa_transformer.data.corpus import Split, cache_folder, cached_tokenizer, tokenized_corpus
from nsa_transformer.data.pack import IGNORE, Pack, merge_packs
from nsa_transformer.data.packing import PackPlan, most_fragments, plan_packs
from nsa_transformer.data.sources import open_source
from nsa_transformer.data.tokenizer import Tokenizer

__all__ = ["PackStream", "TextData", "lay_pack", "merge_packs", "open_data", "packs_of_step"]

_ORDER_VERSION = 2  # raise it when the same settings come to mean another order
_PLANS_KEPT = 2
_VALIDATION_SEED = 0  # the same validation packs whatever the seed of the run


def lay_pack(split: Split, fragments: list[tuple[int, int, int]], max_length: int, eod_id: int, num_boundaries: int) -> Pack:
    """The pack of these (document, start, length). The unused tail is one padding document; `cu_seqlens` is padded to `num_boundaries`."""
    tokens = np.full(max_length, eod_id, dtype=np.int64)
    targets = np.full(max_length, IGNORE, dtype=np.int64)
    bounds = np.full(num_boundaries, max_length, dtype=np.int32)
    bounds[0] = at = 0
    flat, offsets = split.tokens, split.offsets
    for number, (document, start, length) in enumerate(fragments, 1):
        begin, end = int(offsets[document]), int(offsets[document + 1])
        here = flat[begin + start : min(begin + start + length + 1, end)]
        tokens[at : at + length] = here[:length]
        targets[at : at + len(here) - 1] = here[1:]
        if len(here) == length:  # the document ends here
            targets[at + length - 1] = eod_id
        at += length
        bounds[number] = at
    return Pack(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        cu_seqlens=torch.from_numpy(bounds),
        valid=torch.arange(max_length) < at,
    )


class PackStream:
    """Packs of a split, epoch after epoch without end, each epoch in an order of its own.

    `pack(index)` depends on nothing but the split, `max_length`, `seed`, `pack_buffer`, `length_curriculum` and `index`: not on ranks, nor on what
    was read before.
    """

    def __init__(self, split: Split, *, max_length: int, seed: int, pack_buffer: int, eod_id: int, length_curriculum: int = 0) -> None:
        self.split = split
        self.max_length = max_length
        self.seed = seed
        self.pack_buffer = pack_buffer
        self.length_curriculum = length_curriculum
        self.eod_id = eod_id
        self._ends = [0]  # packs before the end of each epoch planned so far
        self._plans: OrderedDict[int, PackPlan] = OrderedDict()

    @cached_property
    def num_boundaries(self) -> int:
        """Length of every pack's `cu_seqlens`, in all epochs, so that nothing is compiled anew for another number of documents."""
        return most_fragments(self._lengths[self.split.documents], self.max_length) + 2  # the start, and the end of the padding document

    @property
    def _lengths(self) -> np.ndarray:
        return np.diff(self.split.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything the order depends on, and of the first epoch's: streams with the same one yield the same packs."""
        parts = (_ORDER_VERSION, self.split.fingerprint, self.max_length, self.seed, self.pack_buffer, self.length_curriculum, self.eod_id)
        digest = hashlib.sha256(json.dumps(parts).encode())
        plan = self._plan(0)  # numpy promises no one order for a seed in all of its versions
        for part in (plan.document, plan.start, plan.length, plan.offsets):
            digest.update(part.tobytes())
        return digest.hexdigest()[:32]

    def packs_in_epoch(self, epoch: int) -> int:
        """Packs of an epoch. They differ a little, because another order packs differently."""
        if epoch < 0:
            raise IndexError(f"epoch={epoch} must be 0 or greater")
        while len(self._ends) <= epoch + 1:
            self._plan(len(self._ends) - 1)
        return self._ends[epoch + 1] - self._ends[epoch]

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, place within it) of a pack of the endless sequence."""
        if index < 0:
            raise IndexError(f"pack index={index} must be 0 or greater")
        while self._ends[-1] <= index:
            self._plan(len(self._ends) - 1)
        epoch = int(np.searchsorted(self._ends, index, side="right")) - 1
        return epoch, index - self._ends[epoch]

    def pack(self, index: int) -> Pack:
        """Pack number `index`: tokens and targets [max_length] int64. The unused tail is one padding document."""
        epoch, place = self.locate(index)
        return lay_pack(self.split, self._plan(epoch).fragments(place), self.max_length, self.eod_id, self.num_boundaries)

    def plan_in_order(self, order: np.ndarray) -> PackPlan:
        """The packs of these documents, taken up in this order."""
        return plan_packs(self._lengths, self.max_length, order, self.pack_buffer)

    def _plan(self, epoch: int) -> PackPlan:
        plan = self._plans.get(epoch)
        if plan is None:
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
            plan = self.plan_in_order(rng.permutation(self.split.documents))
            # Packs of one long document come in a row; a batch of neighbours would see little else.
            places = rng.permutation(len(plan))
            if epoch == 0 and self.length_curriculum:
                head = places[: self.length_curriculum]
                places[: self.length_curriculum] = head[np.argsort(plan.mean_lengths()[head], kind="stable")]
            plan = plan.reordered(places)
            self._plans[epoch] = plan
            while len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(epoch)
        if epoch == len(self._ends) - 1:
            self._ends.append(self._ends[-1] + len(plan))
        return plan


def packs_of_step(first: int, batch_size: int, micro_batch_size: int, rank: int, ranks: int) -> list[int]:
    """Numbers of the packs that a rank reads in the optimizer step that begins at pack `first`: the global sequence, cut by pass and then by rank.

    `batch_size` is a multiple of `micro_batch_size * ranks`. All ranks together read the same packs however many they are.
    """
    return [first + start + rank * micro_batch_size + offset for start in range(0, batch_size, micro_batch_size * ranks) for offset in range(micro_batch_size)]


class TextData:
    """A corpus ready to train on: `tokenizer`, the endless `train` stream, and fixed validation packs."""

    def __init__(self, tokenizer: Tokenizer, train: PackStream, validation: PackStream) -> None:
        self.tokenizer = tokenizer
        self.train = train
        self.validation = validation

    def validation_packs(self, count: int) -> list[Pack]:
        """`count` packs of validation data, the same ones at every call and for every seed; fewer if there are fewer."""
        return [self.validation.pack(i) for i in range(min(count, self.validation.packs_in_epoch(0)))]

    @property
    def fingerprint(self) -> str:
        """Hash of everything the training order and the validation packs depend on."""
        return hashlib.sha256(f"{self.train.fingerprint} {self.validation.fingerprint}".encode()).hexdigest()[:32]


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def open_data(config: DataConfig, vocab_size: int, seed: int, log: Callable[[str], None] = _log) -> TextData:
    """Find, tokenise (or take from the cache), split and pack a corpus.

    vocab_size  rows of the model's embedding; a tokenizer trained here has at most as many tokens
    seed        of the order in which training packs come

    Raises `ConfigError` on data, a tokenizer or a cache folder that cannot be used.
    """
    source = open_source(config.path)
    log(f"data: {source.described}")
    cache, max_bad = cache_folder(config), config.max_bad_documents
    if config.tokenizer is None:
        tokenizer = cached_tokenizer([(source, config.text_column)], vocab_size, cache, log, max_bad)
    else:
        try:
            tokenizer = Tokenizer.load(config.tokenizer)
        except ConfigError as error:
            raise ConfigError(f"data.tokenizer: {error}") from None
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size={vocab_size}; write model.vocab_size={tokenizer.vocab_size} or more"
        )

    if config.val_path is None:
        train, validation = tokenized_corpus(source, config.text_column, tokenizer, config.val_fraction, cache, log, max_bad)
    else:
        val_source = open_source(config.val_path, key="data.val_path")
        (train,) = tokenized_corpus(source, config.text_column, tokenizer, None, cache, log, max_bad)
        (validation,) = tokenized_corpus(val_source, config.text_column, tokenizer, None, cache, log, max_bad)
    log(
        f"data: {len(train.documents)} documents, {train.num_tokens / 1e6:.2f} M tokens to train on; "
        f"{len(validation.documents)} documents, {validation.num_tokens / 1e6:.2f} M tokens to validate on"
    )

    def stream(split: Split, order_seed: int, curriculum: int) -> PackStream:
        return PackStream(
            split,
            max_length=config.max_length,
            seed=order_seed,
            pack_buffer=config.pack_buffer,
            eod_id=tokenizer.eod_id,
            length_curriculum=curriculum,
        )

    return TextData(tokenizer, stream(train, seed, config.length_curriculum), stream(validation, _VALIDATION_SEED, 0))
