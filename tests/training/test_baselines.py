from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from nsa_transformer.training import baselines
from nsa_transformer.training.baselines import KneserNey, bigram_baseline, byte_order2_bpb


def pair(*ids: int) -> tuple[np.ndarray, np.ndarray]:
    return np.array(ids[:-1]), np.array(ids[1:])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [0, 1, 5, 200, 5000])
@pytest.mark.parametrize(("order", "base", "num_targets"), [(0, 5, 5), (1, 7, 7), (2, 5, 4)])
def test_probabilities_of_every_context_sum_to_one(seed: int, size: int, order: int, base: int, num_targets: int) -> None:
    rng = np.random.default_rng(seed)
    contexts = rng.integers(0, base - 1, size=(size, order))  # the last symbol stays an unseen context
    targets = rng.geometric(0.6, size=size).clip(1, num_targets) - 1
    codes = np.zeros(size, np.int64)
    for digit in itertools.chain(contexts.T, [targets]):
        codes = codes * base + digit
    model = KneserNey([codes], order, base, num_targets)
    every = np.arange(base**order)[:, None] * base + np.arange(num_targets)
    p = model.probability(every.ravel()).reshape(every.shape)
    assert (p > 0).all()
    np.testing.assert_allclose(p.sum(1), 1.0, rtol=1e-12)


def test_hand_computed_bigram() -> None:
    # Training bigrams over a, b, c, d = 0 … 3: ab ab ac bd. Counts 2, 1, 1: n1 = 2, n2 = 1, no n3, so one discount
    # y = n1 / (n1 + 2 n2) = 1/2. Below, b, c and d each follow one context: counts 1, n2 = 0, so the discount is 1/2 again.
    model = KneserNey([np.array([0 * 4 + 1, 0 * 4 + 1, 0 * 4 + 2, 1 * 4 + 3])], order=1, base=4, num_targets=4)
    lower = {0: 0.5 / 4, 1: 0.5 / 3 + 0.5 / 4, 2: 0.5 / 3 + 0.5 / 4, 3: 0.5 / 3 + 0.5 / 4}
    after_a = [1 / 3 * lower[0], 1.5 / 3 + 1 / 3 * lower[1], 0.5 / 3 + 1 / 3 * lower[2], 1 / 3 * lower[3]]
    after_b = [0.5 * lower[0], 0.5 * lower[1], 0.5 * lower[2], 0.5 + 0.5 * lower[3]]
    after_d = list(lower.values())  # never seen as a context
    for context, expected in ((0, after_a), (1, after_b), (3, after_d)):
        np.testing.assert_allclose(model.probability(context * 4 + np.arange(4)), expected, rtol=1e-12)
    train = [(np.array([0, 0, 0, 1, 2]), np.array([1, 1, 2, 3, -100]))]
    nats = bigram_baseline(train, [(np.array([0, 3, 3]), np.array([1, 0, -100]))], 4)
    assert nats == pytest.approx(-(math.log(after_a[1]) + math.log(after_d[0])) / 2, rel=1e-12)


def test_lower_order_counts_contexts_not_occurrences() -> None:
    # "b" only ever follows "a", 50 times; "c" follows three different symbols, once each. After a new symbol, c is likelier.
    model = KneserNey([np.array([0 * 6 + 1] * 50 + [0 * 6 + 2, 3 * 6 + 2, 4 * 6 + 2])], order=1, base=6, num_targets=6)
    b, c = model.probability(np.array([5 * 6 + 1, 5 * 6 + 2]))
    assert c > 2 * b


def test_chunked_counting_equals_counting_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    train = [pair(*rng.zipf(1.5, size=n).clip(max=60).tolist()) for n in rng.integers(2, 400, size=40)]
    val = [pair(*rng.zipf(1.5, size=300).clip(max=60).tolist())]
    whole = bigram_baseline(train, val, 64)
    monkeypatch.setattr(baselines, "CHUNK", 97)
    assert bigram_baseline(train, val, 64) == pytest.approx(whole, rel=1e-12)


def test_close_to_the_entropy_of_a_known_source() -> None:
    rng = np.random.default_rng(1)
    table = rng.dirichlet(np.full(8, 0.5), size=8)
    ids = [0]
    for u in rng.random(40_000):
        ids.append(min(int(np.searchsorted(table[ids[-1]].cumsum(), u)), 7))
    train, val = np.array(ids[:30_000]), np.array(ids[30_000:])
    best = -np.log(table[val[:-1], val[1:]]).mean()
    assert best - 1e-3 < bigram_baseline([pair(*train)], [pair(*val)], 8) < best + 0.01


def test_without_training_data_the_model_is_uniform() -> None:
    assert bigram_baseline([], [pair(0, 1, 2)], 16) == pytest.approx(math.log(16))
    assert byte_order2_bpb([], [b"abc"]) == pytest.approx(8.0)


def test_bytes_learn_their_order() -> None:
    text = b"the quick brown fox jumps over the lazy dog. " * 50
    assert byte_order2_bpb([text], [text]) < 0.5
    # Documents do not run into each other: the first bytes of a document are predicted from its start.
    assert byte_order2_bpb([b"ab"] * 1000, [b"ab"]) < 0.1
    assert byte_order2_bpb([b"ab"] * 1000, [b"abab"]) > 0.5


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="outside vocab_size=4"):
        bigram_baseline([pair(0, 4)], [pair(0, 1)], 4)
    with pytest.raises(ValueError, match="no target token"):
        bigram_baseline([pair(0, 1)], [(np.array([0]), np.array([-100]))], 4)
    with pytest.raises(ValueError, match="same shape"):
        bigram_baseline([(np.zeros(3, int), np.zeros(2, int))], [pair(0, 1)], 4)
    with pytest.raises(ValueError, match="empty"):
        byte_order2_bpb([b"a"], [])
