"""Packs: every token an input once, every token but a document's first a target once, one end of document each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.data
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_transformer.config import DataConfig
from nsa_transformer.data.corpus import Split
from nsa_transformer.data.loader import PackStream, open_data, packs_of_step
from nsa_transformer.data.pack import IGNORE, Pack, merge_packs

EOD = 0


def make_split(lengths: list[int], documents: list[int] | None = None) -> Split:
    """Tokens that all differ, so that each tells where it came from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    chosen = np.arange(len(lengths)) if documents is None else np.array(documents)
    return Split(np.arange(1, offsets[-1] + 1, dtype=np.uint32), offsets, chosen, "test")


def make_stream(
    lengths: list[int], max_length: int = 16, seed: int = 0, documents: list[int] | None = None, pack_buffer: int = 8, curriculum: int = 0
) -> PackStream:
    split = make_split(lengths, documents)
    return PackStream(split, max_length=max_length, seed=seed, pack_buffer=pack_buffer, eod_id=EOD, length_curriculum=curriculum)


def ends(pack: Pack) -> list[int]:
    """Boundaries without their padding."""
    return sorted(set(pack.cu_seqlens.tolist()))


def check_form(pack: Pack, max_length: int, num_boundaries: int) -> None:
    assert pack.tokens.dtype == pack.targets.dtype == torch.int64
    assert pack.cu_seqlens.dtype == torch.int32 and pack.valid.dtype == torch.bool
    assert len(pack.tokens) == len(pack.targets) == len(pack.valid) == max_length
    assert pack.cu_seqlens[0] == 0 and pack.cu_seqlens[-1] == max_length
    assert len(pack.cu_seqlens) == num_boundaries
    assert pack.cu_seqlens.tolist() == ends(pack) + [max_length] * (num_boundaries - len(ends(pack)))
    n = pack.num_tokens
    assert pack.valid.tolist() == [True] * n + [False] * (max_length - n)
    assert n in pack.cu_seqlens
    assert (pack.tokens[n:] == EOD).all() and (pack.targets[n:] == IGNORE).all()
    assert (pack.targets[:n] != IGNORE).all()
    if n < max_length:
        assert ends(pack)[-2] == n  # the tail is one document


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
        check_form(pack, max_length, stream.num_boundaries)
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
    assert [ends(pack) for pack in packs] == [[0, 4], [0, 4], [0, 2, 4]]
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
    assert [stream.pack(i).tokens[0].item() for i in range(6)] == [22, 58, 6, 38, 49, 58]
    cut = make_stream([9] * 40, seed=7)
    assert [cut.pack(i).tokens[0].item() for i in range(6)] == [289, 307, 190, 91, 235, 208]


def test_fingerprint() -> None:
    prints = {
        make_stream(LENGTHS).fingerprint,
        make_stream(LENGTHS, max_length=17).fingerprint,
        make_stream(LENGTHS, seed=1).fingerprint,
        make_stream(LENGTHS, pack_buffer=9).fingerprint,
        make_stream(LENGTHS, curriculum=5).fingerprint,
    }
    assert len(prints) == 5
    assert make_stream(LENGTHS).fingerprint in prints


def test_an_order_that_a_library_changed_has_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = make_stream(LENGTHS).fingerprint
    monkeypatch.setattr(np.random, "Philox", np.random.PCG64)
    assert make_stream(LENGTHS).fingerprint != before


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_any_seed_of_the_configuration(seed: int) -> None:
    assert make_stream([3, 3], seed=seed).pack(0).num_tokens == 6


# ------------------------------------------------------------------------------------- ranks, workers, resuming


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3))
def test_ranks_read_the_same_packs_however_many_they_are(first: int, micro: int, passes: int) -> None:
    batch = 4 * micro * passes
    for ranks in (1, 2, 4):
        steps = [packs_of_step(first, batch, micro, rank, ranks) for rank in range(ranks)]
        in_order = [number for start in range(0, batch // ranks, micro) for step in steps for number in step[start : start + micro]]
        assert in_order == list(range(first, first + batch))


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    segments=st.lists(st.tuples(st.integers(1, 5), st.sampled_from([1, 2, 4])), min_size=1, max_size=4),
    curriculum=st.sampled_from([0, 3, 1000]),
)
def test_a_run_resumed_on_other_numbers_of_ranks_reads_what_an_uninterrupted_one_reads(
    lengths: list[int], segments: list[tuple[int, int]], curriculum: int
) -> None:
    """Every segment is a process of its own: a fresh stream that knows nothing but the number of the next pack."""
    batch, read = 4, []
    for steps, ranks in segments:
        streams = [make_stream(lengths, curriculum=curriculum) for _ in range(ranks)]
        for _ in range(steps):
            numbers = [packs_of_step(len(read), batch, 1, rank, ranks) for rank in range(ranks)]
            packs = [[stream.pack(number) for number in mine] for stream, mine in zip(streams, numbers, strict=True)]
            read += [pack for one_pass in zip(*packs, strict=True) for pack in one_pass]
    alone = make_stream(lengths, curriculum=curriculum)
    assert len(read) == batch * sum(steps for steps, _ in segments)
    assert all(same(pack, alone.pack(number)) for number, pack in enumerate(read))


class PackDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.stream = make_stream(LENGTHS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return vars(self.stream.pack(index))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_worker_processes_read_the_same_packs(workers: int) -> None:
    alone = make_stream(LENGTHS)
    for begin in (0, 37, 5):  # resumed twice
        numbers = range(begin, begin + 60)
        loader = torch.utils.data.DataLoader(PackDataset(), batch_size=None, sampler=numbers, num_workers=workers)
        assert all(same(Pack(**fields), alone.pack(number)) for number, fields in zip(numbers, loader, strict=True))


def test_all_packs_of_all_epochs_have_one_shape() -> None:
    stream = make_stream([1] * 40 + LENGTHS)
    shapes = {tuple(tuple(part.shape) for part in vars(stream.pack(i)).values()) for i in range(sum(stream.packs_in_epoch(e) for e in range(4)))}
    assert shapes == {((16,), (16,), (stream.num_boundaries,), (16,))}
    assert stream.num_boundaries == 16 + 8 + 2
    assert len({tuple(merge_packs([stream.pack(i), stream.pack(i + 1)]).cu_seqlens.shape) for i in range(20)}) == 1


# --------------------------------------------------------------------------------------------- length curriculum


def mean_length(pack: Pack) -> float:
    lengths = pack.document_lengths
    return sum(n * n for n in lengths) / sum(lengths)


def keys(packs: list[Pack]) -> list[tuple[int, ...]]:
    return [tuple(pack.tokens.tolist()) for pack in packs]


@pytest.mark.parametrize("curriculum", [1, 20, 10**9])
def test_a_curriculum_sorts_the_first_packs_and_leaves_the_rest(curriculum: int) -> None:
    plain, sorted_ = make_stream(LENGTHS), make_stream(LENGTHS, curriculum=curriculum)
    epoch = plain.packs_in_epoch(0)
    head = min(curriculum, epoch)
    before, after = ([stream.pack(i) for i in range(2 * epoch)] for stream in (plain, sorted_))
    lengths = [mean_length(pack) for pack in after[:head]]
    assert lengths == sorted(lengths)
    assert Counter(keys(after[:head])) == Counter(keys(before[:head]))
    assert keys(after[head:]) == keys(before[head:])


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


# ---------------------------------------------------------------------------------------------------- position in the stream


@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=20), stops=st.lists(st.integers(0, 400), min_size=1, max_size=3))
def test_a_position_resumes_the_stream_twice_and_depends_on_the_number_alone(lengths: list[int], stops: list[int]) -> None:
    alone, position, at = make_stream(lengths), None, 0
    for count in stops:
        resumed = make_stream(lengths)
        if position is not None:
            resumed.start_at(position)
        for number in range(at, at + min(count, 20)):
            assert same(resumed.pack(number), alone.pack(number))
        at += count
        position = resumed.position(at)
        assert position == make_stream(lengths).position(at)


def test_a_position_spares_the_planning_of_epochs_before() -> None:
    whole = make_stream(LENGTHS)
    index = 100_000
    position = whole.position(index)
    resumed = make_stream(LENGTHS)
    planned: list[int] = []
    plan = resumed.plan_in_order
    resumed.plan_in_order = lambda order: planned.append(1) or plan(order)  # type: ignore[method-assign,func-returns-value]
    resumed.start_at(position)
    assert same(resumed.pack(index), whole.pack(index))
    assert len(planned) <= 2
    assert same(resumed.pack(3), whole.pack(3))  # what lies before can still be had
