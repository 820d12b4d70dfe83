"""Packs: every token an input once, every token but a document's first a target once, one end of document each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_transformer.config import DataConfig
from nsa_transformer.data.corpus import Split
from nsa_transformer.data.loader import PackStream, open_data
from nsa_transformer.data.pack import IGNORE, Pack, merge_packs

EOD = 0


def make_split(lengths: list[int], documents: list[int] | None = None) -> Split:
    """Tokens that all differ, so that each tells where it came from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    chosen = np.arange(len(lengths)) if documents is None else np.array(documents)
    return Split(np.arange(1, offsets[-1] + 1, dtype=np.uint32), offsets, chosen, "test")


def make_stream(lengths: list[int], max_length: int = 16, seed: int = 0, documents: list[int] | None = None, pack_buffer: int = 8) -> PackStream:
    return PackStream(make_split(lengths, documents), max_length=max_length, seed=seed, pack_buffer=pack_buffer, eod_id=EOD)


def check_form(pack: Pack, max_length: int) -> None:
    assert pack.tokens.dtype == pack.targets.dtype == torch.int64
    assert pack.cu_seqlens.dtype == torch.int32 and pack.valid.dtype == torch.bool
    assert len(pack.tokens) == len(pack.targets) == len(pack.valid) == max_length
    assert pack.cu_seqlens[0] == 0 and pack.cu_seqlens[-1] == max_length
    assert (pack.cu_seqlens.diff() > 0).all()
    n = pack.num_tokens
    assert pack.valid.tolist() == [True] * n + [False] * (max_length - n)
    assert n in pack.cu_seqlens
    assert (pack.tokens[n:] == EOD).all() and (pack.targets[n:] == IGNORE).all()
    assert (pack.targets[:n] != IGNORE).all()
    if n < max_length:
        assert pack.cu_seqlens[-2] == n  # the tail is one document


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 20), st.integers(0, 5), st.data())
def test_an_epoch_holds_every_token_once_with_its_target(lengths: list[int], max_length: int, seed: int, data: st.DataObject) -> None:
    documents = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
    stream = make_stream(lengths, max_length, seed, documents)
    epoch = data.draw(st.integers(0, 3))
    begin = sum(stream.packs_in_epoch(e) for e in range(epoch))
    packs = [stream.pack(begin + i) for i in range(stream.packs_in_epoch(epoch))]

    offsets = stream.split.offsets
    following = {}
    for d in documents:
        ids = list(range(int(offsets[d]) + 1, int(offsets[d + 1]) + 1))
        following.update(zip(ids, [*ids[1:], EOD], strict=True))
    inputs: Counter[int] = Counter()
    for pack in packs:
        check_form(pack, max_length)
        n = pack.num_tokens
        tokens, targets, positions = pack.tokens[:n].tolist(), pack.targets[:n].tolist(), pack.positions[:n].tolist()
        inputs.update(tokens)
        assert targets == [following[token] for token in tokens]
        for i in range(1, n):  # inside a fragment the next token follows
            assert positions[i] == 0 or tokens[i] == targets[i - 1]
    assert inputs == Counter(following.keys())


def test_a_document_longer_than_a_pack() -> None:
    stream = make_stream([10], max_length=4)
    packs = sorted((stream.pack(i) for i in range(3)), key=lambda pack: pack.tokens[0].item())
    assert [pack.tokens.tolist() for pack in packs] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, EOD, EOD]]
    assert [pack.targets.tolist() for pack in packs] == [[2, 3, 4, 5], [6, 7, 8, 9], [10, EOD, IGNORE, IGNORE]]
    assert [pack.cu_seqlens.tolist() for pack in packs] == [[0, 4], [0, 4], [0, 2, 4]]
    assert packs[2].positions.tolist() == [0, 1, 0, 1]


def same(a: Pack, b: Pack) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "targets", "cu_seqlens", "valid"))


LENGTHS = np.random.default_rng(0).integers(1, 60, 50).tolist()


def test_random_access_equals_reading_in_order() -> None:
    reader = make_stream(LENGTHS)
    count = sum(reader.packs_in_epoch(e) for e in range(5))
    in_order = [reader.pack(i) for i in range(count)]
    for i in np.random.default_rng(1).permutation(count):
        assert same(reader.pack(int(i)), in_order[i])
    for i in (count - 1, 0, count // 2):
        assert same(make_stream(LENGTHS).pack(i), in_order[i])
    assert len(reader._plans) <= 2


def test_order_depends_on_seed_and_epoch() -> None:
    stream = make_stream(LENGTHS)
    n = stream.packs_in_epoch(0)
    assert stream.locate(n - 1) == (0, n - 1) and stream.locate(n) == (1, 0)
    assert [stream.pack(i).tokens.tolist() for i in range(8)] != [stream.pack(n + i).tokens.tolist() for i in range(8)]
    assert [stream.pack(i).tokens.tolist() for i in range(8)] != [make_stream(LENGTHS, seed=1).pack(i).tokens.tolist() for i in range(8)]


def test_the_order_stays_what_it_was() -> None:
    """A run of an older version must continue with the same packs: where this changes on purpose, raise _ORDER_VERSION."""
    stream = make_stream([5, 40, 3, 9, 12, 1], seed=7)
    assert [stream.pack(i).tokens[0].item() for i in range(6)] == [22, 38, 6, 49, 58, 70]


def test_fingerprint() -> None:
    prints = {
        make_stream(LENGTHS).fingerprint,
        make_stream(LENGTHS, max_length=17).fingerprint,
        make_stream(LENGTHS, seed=1).fingerprint,
        make_stream(LENGTHS, pack_buffer=9).fingerprint,
    }
    assert len(prints) == 4
    assert make_stream(LENGTHS).fingerprint in prints


def test_an_order_that_a_library_changed_has_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = make_stream(LENGTHS).fingerprint
    monkeypatch.setattr(np.random, "Philox", np.random.PCG64)
    assert make_stream(LENGTHS).fingerprint != before


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_any_seed_of_the_configuration(seed: int) -> None:
    assert make_stream([3, 3], seed=seed).pack(0).num_tokens == 6


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(IndexError, match="index=-1"):
        make_stream([3]).pack(-1)
    with pytest.raises(IndexError, match="epoch=-1"):
        make_stream([3]).packs_in_epoch(-1)


def test_merge_packs() -> None:
    stream = make_stream([5, 3, 14], max_length=16)
    packs = [stream.pack(i) for i in range(2)]
    merged = merge_packs(packs)
    assert merged.tokens.tolist() == packs[0].tokens.tolist() + packs[1].tokens.tolist()
    assert merged.targets.tolist() == packs[0].targets.tolist() + packs[1].targets.tolist()
    assert merged.positions.tolist() == packs[0].positions.tolist() + packs[1].positions.tolist()
    assert merged.cu_seqlens.dtype == torch.int32
    assert merged.cu_seqlens.tolist() == packs[0].cu_seqlens.tolist() + [16 + bound for bound in packs[1].cu_seqlens.tolist()[1:]]
    assert merged.num_tokens == 22 == sum(pack.num_tokens for pack in packs)
    assert not merged.valid[:16].all() and not merged.valid[16:].all()
    assert (merged.targets[~merged.valid] == IGNORE).all()
    assert merge_packs(packs[:1]) is packs[0]
    with pytest.raises(ValueError, match="at least one pack"):
        merge_packs([])


def test_validation_packs_are_fixed(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 30)
    config = DataConfig(path=str(tmp_path / "*.txt"), cache_dir=str(tmp_path / "cache"), max_length=128, val_fraction=0.3)
    one, two = (open_data(config, 300, seed, lambda message: None) for seed in (0, 1))
    assert one.fingerprint != two.fingerprint
    assert all(same(a, b) for a, b in zip(one.validation_packs(4), two.validation_packs(4), strict=True))
    assert all(same(a, b) for a, b in zip(one.validation_packs(2), one.validation_packs(4), strict=False))
    everything = one.validation_packs(10_000)
    assert sum(pack.num_tokens for pack in everything) == one.validation.split.num_tokens
    assert len(everything) == one.validation.packs_in_epoch(0)
    assert not same(one.train.pack(0), two.train.pack(0))
