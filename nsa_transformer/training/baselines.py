"""What counting alone achieves on the same text: n-gram models to set beside a run's validation loss.

Interpolated modified Kneser-Ney (Chen and Goodman 1999, section 3), the strongest of the classic smoothings. Its discounts
come from the training counts by the closed form; nothing is tuned on validation data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from nsa_transformer.data.pack import IGNORE

__all__ = ["KneserNey", "bigram_baseline", "byte_order2_bpb"]

CHUNK = 1 << 22  # codes that are sorted or looked up at once

Codes = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int64]


class KneserNey:
    """P(target | the `order` symbols before it), backing off one symbol at a time down to a uniform distribution.

    An n-gram is one int64 code: its symbols as digits of base `base`, the oldest first and the target last, so the shorter
    n-gram is `code % base**k`. Symbols from `num_targets` to `base` - 1 occur in contexts alone (a start mark).
    """

    def __init__(self, codes: Iterable[Codes], order: int, base: int, num_targets: int) -> None:
        if base ** (order + 1) >= 2**63:
            raise ValueError(f"order={order} over base={base} symbols does not fit a 64-bit code")
        self.order, self.base, self.num_targets = order, base, num_targets
        self._levels: list[_Level] = []
        grams, counts = _count(codes)
        for k in range(order, -1, -1):
            self._levels.append(_Level(grams, counts, base))
            # The lower order counts in how many different contexts an n-gram was seen, not how often.
            grams, counts = _unique(grams % base**k) if k else (grams, counts)

    def probability(self, codes: Codes) -> npt.NDArray[np.float64]:
        """float64 probabilities of the n-grams' last symbols given the others. Over all targets of one context they sum to 1."""
        p = np.full(len(codes), 1.0 / self.num_targets)
        for k, level in enumerate(reversed(self._levels)):
            p = level.mix(codes % self.base ** (k + 1), p)
        return p

    def nats(self, codes: Iterable[Codes]) -> tuple[float, int]:
        """Sum of -ln P, and the number of n-grams."""
        total, number = 0.0, 0
        for chunk in _rechunk(codes):
            total -= float(np.log(self.probability(chunk)).sum())
            number += len(chunk)
        return total, number


class _Level:
    """Discounted counts of one order, and per context the share of probability that goes to the order below."""

    def __init__(self, grams: Codes, counts: Counts, base: int) -> None:
        self.base = base
        self.grams = grams
        discounts = _discounts(counts)
        taken = discounts[np.minimum(counts, 3)]
        self.kept = counts - taken
        contexts = grams // base
        starts = np.flatnonzero(np.diff(contexts, prepend=-1))
        self.contexts = contexts[starts]
        self.totals = np.add.reduceat(counts, starts).astype(np.float64) if len(grams) else np.zeros(0)
        self.back_off = np.add.reduceat(taken, starts) / self.totals if len(grams) else np.zeros(0)

    def mix(self, codes: Codes, lower: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if not len(self.grams):
            return lower
        at, seen = _find(self.contexts, codes // self.base)
        share, total = self.back_off[at], self.totals[at]
        place, known = _find(self.grams, codes)
        return np.where(seen, np.where(known, self.kept[place], 0.0) / total + share * lower, lower)


def _find(table: Codes, keys: Codes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Where each key is in the sorted table, and whether it is there at all."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys


def _discounts(counts: Counts) -> npt.NDArray[np.float64]:
    """Discounts of counts 0, 1, 2 and 3 or more (Chen and Goodman, equation 17).

    Counts so dense that the closed form has nothing to stand on (no n-gram seen once, say) get one absolute discount.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    if n[1] == 0 or n[2] == 0:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n[1] / (n[1] + 2 * n[2])
    if n[3] and n[4]:
        found = np.array([0.0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]])
        if (found[1:] > 0).all():  # below 1, 2 and 3 they always are
            return found
    return np.array([0.0, y, y, y])


def _unique(codes: Codes, weights: Counts | None = None) -> tuple[Codes, Counts]:
    """Distinct codes in ascending order, and how often each occurs (or the sum of its weights)."""
    if weights is None:
        grams, counts = np.unique(codes, return_counts=True)
        return grams, counts.astype(np.int64)
    by_code = np.argsort(codes, kind="stable")
    codes, weights = codes[by_code], weights[by_code]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    return codes[starts], np.add.reduceat(weights, starts) if len(codes) else weights


def _count(codes: Iterable[Codes]) -> tuple[Codes, Counts]:
    """Distinct codes and their counts, with memory for the distinct ones and one chunk."""
    grams, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for chunk in _rechunk(codes):
        more, times = _unique(chunk)
        grams, counts = _unique(np.concatenate([grams, more]), np.concatenate([counts, times]))
    return grams, counts


def _rechunk(arrays: Iterable[Codes]) -> Iterator[Codes]:
    """The same codes in arrays of about `CHUNK`: a corpus has many short documents."""
    held: list[Codes] = []
    size = 0
    for array in arrays:
        for start in range(0, len(array), CHUNK):
            held.append(array[start : start + CHUNK])
            size += len(held[-1])
            if size >= CHUNK:
                yield np.concatenate(held)
                held, size = [], 0
    if held:
        yield np.concatenate(held)


def _pair_codes(pairs: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> Iterator[Codes]:
    for tokens, targets in pairs:
        tokens, targets = np.asarray(tokens), np.asarray(targets)
        if tokens.shape != targets.shape:
            raise ValueError(f"tokens {tokens.shape} and targets {targets.shape} must have the same shape")
        counted = targets != IGNORE
        tokens, targets = tokens[counted].astype(np.int64), targets[counted].astype(np.int64)
        for name, ids in (("tokens", tokens), ("targets", targets)):
            if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
                raise ValueError(f"{name} range from {ids.min()} to {ids.max()}, outside vocab_size={vocab_size}")
        yield tokens * vocab_size + targets


def bigram_baseline(train_pairs: Iterable[tuple[np.ndarray, np.ndarray]], val_pairs: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> float:
    """Mean nats per target token that a bigram model counted on `train_pairs` reaches on `val_pairs`.

    Each pair is (tokens, targets), integer arrays of one shape; targets of -100 are left out, as in a pack. Comparable with
    `val_loss` on the same packs. Raises `ValueError` on ids outside the vocabulary and on empty validation data.
    """
    model = KneserNey(_pair_codes(train_pairs, vocab_size), order=1, base=vocab_size, num_targets=vocab_size)
    nats, number = model.nats(_pair_codes(val_pairs, vocab_size))
    if not number:
        raise ValueError("the validation data of the bigram baseline has no target token")
    return nats / number


def _byte_codes(documents: Iterable[bytes]) -> Iterator[Codes]:
    """Codes of each byte after the two before it; a document begins with two start marks (256)."""
    for document in documents:
        padded = np.full(len(document) + 2, 256, dtype=np.int64)
        padded[2:] = np.frombuffer(document, dtype=np.uint8)
        yield (padded[:-2] * 257 + padded[1:-1]) * 257 + padded[2:]


def byte_order2_bpb(train_bytes: Iterable[bytes], val_bytes: Iterable[bytes]) -> float:
    """Bits per byte of predicting each byte of `val_bytes` from the two before it, counted on `train_bytes`.

    One `bytes` per document; contexts do not reach across documents. Raises `ValueError` on empty validation data.
    """
    model = KneserNey(_byte_codes(train_bytes), order=2, base=257, num_targets=256)
    nats, number = model.nats(_byte_codes(val_bytes))
    if not number:
        raise ValueError("the validation data of the byte baseline is empty")
    return nats / number / math.log(2)
