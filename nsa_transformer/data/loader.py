"""The one call that opens a corpus, and which of its packs each rank reads."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable

from nsa_transformer.config import ConfigError, DataConfig, MixtureSource
from nsa_transformer.data.corpus import Split, cache_folder, cached_tokenizer, tokenized_corpus
from nsa_transformer.data.mixture import MixtureStream, mixture_weights
from nsa_transformer.data.pack import Pack, merge_packs
from nsa_transformer.data.readers import Column
from nsa_transformer.data.sources import open_source
from nsa_transformer.data.stream import PackStream, lay_pack
from nsa_transformer.data.tokenizer import Tokenizer

__all__ = ["MixtureStream", "PackStream", "TextData", "lay_pack", "merge_packs", "open_data", "packs_of_step"]

_VALIDATION_SEED = 0  # the same validation packs whatever the seed of the run


def packs_of_step(first: int, batch_size: int, micro_batch_size: int, rank: int, ranks: int) -> list[int]:
    """Numbers of the packs that a rank reads in the optimizer step that begins at pack `first`: the global sequence, cut by pass and then by rank.

    `batch_size` is a multiple of `micro_batch_size * ranks`. All ranks together read the same packs however many they are.
    """
    return [first + start + rank * micro_batch_size + offset for start in range(0, batch_size, micro_batch_size * ranks) for offset in range(micro_batch_size)]


class TextData:
    """A corpus ready to train on: `tokenizer`, the endless `train` stream, and fixed validation packs."""

    def __init__(self, tokenizer: Tokenizer, train: PackStream | MixtureStream, validation: PackStream | MixtureStream) -> None:
        self.tokenizer = tokenizer
        self.train = train
        self.validation = validation

    def validation_packs(self, count: int) -> list[Pack]:
        """`count` packs of validation data, the same ones at every call and for every seed; fewer if there are fewer."""
        return self.validation.first_epoch(count)

    @property
    def fingerprint(self) -> str:
        """Hash of everything the training order and the validation packs depend on."""
        return hashlib.sha256(f"{self.train.fingerprint} {self.validation.fingerprint}".encode()).hexdigest()[:32]


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def open_data(config: DataConfig, vocab_size: int, seed: int, log: Callable[[str], None] = _log) -> TextData:
    """Find, tokenise (or take from the cache), split and pack a corpus, or a mixture of several.

    vocab_size  rows of the model's embedding; a tokenizer trained here has at most as many tokens
    seed        of the order in which training packs come

    Raises `ConfigError` on data, a tokenizer or a cache folder that cannot be used.
    """
    default = Column(config.messages_column, conversations=True) if config.messages_column is not None else Column(config.text_column)
    if config.mixture:
        readings = [(open_source(part.path, key=f"data.mixture[{number}].path"), _column(part, default)) for number, part in enumerate(config.mixture)]
    else:
        readings = [(open_source(config.path), default)]
    if config.assistant_only_loss and not any(column.conversations for _, column in readings):
        raise ConfigError("data.assistant_only_loss=true needs conversations; write data.messages_column=KEY, or data.assistant_only_loss=false")
    for source, _ in readings:
        log(f"data: {source.described}")
    cache, max_bad = cache_folder(config), config.max_bad_documents
    if config.tokenizer is None:
        tokenizer = cached_tokenizer(readings, vocab_size, cache, log, max_bad)
    else:
        try:
            tokenizer = Tokenizer.load(config.tokenizer)
        except ConfigError as error:
            raise ConfigError(f"data.tokenizer: {error}") from None
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.vocab_size={vocab_size}; write model.vocab_size={tokenizer.vocab_size} or more"
        )

    val_fraction = config.val_fraction if config.val_path is None else None
    splits = [tokenized_corpus(source, column, tokenizer, val_fraction, cache, log, max_bad, config.num_workers) for source, column in readings]
    train = [split[0] for split in splits]
    if config.val_path is None:
        validation = [split[1] for split in splits]
    else:
        val_source = open_source(config.val_path, key="data.val_path")
        validation = list(tokenized_corpus(val_source, default, tokenizer, None, cache, log, max_bad, config.num_workers))
    log(f"data: {_amount(train)} to train on; {_amount(validation)} to validate on")

    def stream(split: Split, order_seed: int, curriculum: int) -> PackStream:
        return PackStream(
            split,
            max_length=config.max_length,
            seed=order_seed,
            pack_buffer=config.pack_buffer,
            eod_id=tokenizer.eod_id,
            length_curriculum=curriculum,
            assistant_only=config.assistant_only_loss,
        )

    if not config.mixture:
        return TextData(tokenizer, stream(train[0], seed, config.length_curriculum), stream(validation[0], _VALIDATION_SEED, 0))
    weights = mixture_weights(config.mixture, [split.num_tokens for split in train])
    mixed = MixtureStream([stream(split, seed, 0) for split in train], weights, seed)
    for part, share, split in zip(config.mixture, mixed.shares, train, strict=True):
        log(f"data: {share:.1%} of the packs from {part.path}, which has {split.num_tokens / 1e6:.2f} M tokens")
    if config.val_path is not None:
        return TextData(tokenizer, mixed, stream(validation[0], _VALIDATION_SEED, 0))
    return TextData(tokenizer, mixed, MixtureStream([stream(split, _VALIDATION_SEED, 0) for split in validation], weights, _VALIDATION_SEED))


def _column(part: MixtureSource, default: Column) -> Column:
    if part.messages_column is not None:
        return Column(part.messages_column, conversations=True)
    return default if part.text_column is None else Column(part.text_column)


def _amount(splits: list[Split]) -> str:
    return f"{sum(len(split.documents) for split in splits)} documents, {sum(split.num_tokens for split in splits) / 1e6:.2f} M tokens"
