"""Mixtures: shares that hold, sources that lose nothing, and a sequence that follows from the number of the pack alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_transformer.config import ConfigError, DataConfig, MixtureSource, build_config, to_dict
from nsa_transformer.data.loader import open_data, packs_of_step
from nsa_transformer.data.mixture import CYCLE, MixtureStream, apportion, mixture_weights
from nsa_transformer.training.trainer import Trainer
from tests.data.test_loader import make_stream, same
from tests.runs import QUIET, final_files, small_config, steady_rows, write_corpus

LENGTHS = [np.random.default_rng(seed).integers(1, 40, count).tolist() for seed, count in ((0, 30), (1, 9), (2, 50))]


def make_mixture(weights: list[float], seed: int = 0, lengths: list[list[int]] = LENGTHS) -> MixtureStream:
    total = sum(weights)
    return MixtureStream([make_stream(part, seed=seed) for part in lengths[: len(weights)]], [weight / total for weight in weights], seed)


WEIGHTS = st.lists(st.floats(0.05, 5), min_size=1, max_size=3)


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=8), st.integers(1, 2000))
def test_apportion(weights: list[float], total: int) -> None:
    exact = np.array(weights) / sum(weights)
    parts = apportion(exact.tolist(), total)
    assert sum(parts) == total
    assert all(abs(part - share * total) < 1 for part, share in zip(parts, exact, strict=True))


@settings(deadline=None, max_examples=25)
@given(WEIGHTS, st.integers(0, 5), st.integers(0, 3 * CYCLE))
def test_each_source_comes_in_the_order_of_its_own_stream_and_in_its_share(weights: list[float], seed: int, begin: int) -> None:
    mixture = make_mixture(weights, seed)
    located = [mixture.locate(i) for i in range(begin, begin + CYCLE)]
    shares = np.array(weights) / sum(weights)
    for source, share in enumerate(shares):
        numbers = [number for which, number in located if which == source]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert abs(len(numbers) - share * CYCLE) < 3
        # Not only on the whole: anywhere, over a hundred packs.
        counts = np.convolve([which == source for which, _ in located], np.ones(100), "valid")
        assert abs(counts - 100 * share).max() < 4
    assert mixture.locate(0)[1] == 0


@settings(deadline=None, max_examples=20)
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=12), min_size=2, max_size=3), st.integers(0, 3))
def test_an_epoch_of_each_source_holds_every_token_of_it_once(lengths: list[list[int]], seed: int) -> None:
    mixture = make_mixture([1.0, 2.0, 0.5][: len(lengths)], seed, lengths)
    seen: list[list[list[int]]] = [[] for _ in lengths]
    wanted = [sum(stream.packs_in_epoch(epoch) for epoch in range(2)) for stream in mixture.streams]
    index = 0
    while any(len(packs) < count for packs, count in zip(seen, wanted, strict=True)):
        source, _ = mixture.locate(index)
        pack = mixture.pack(index)
        assert len(pack.cu_seqlens) == mixture.num_boundaries
        seen[source].append(pack.tokens[pack.valid].tolist())
        index += 1
    for packs, stream, part in zip(seen, mixture.streams, lengths, strict=True):
        first, second = stream.packs_in_epoch(0), stream.packs_in_epoch(1)
        for epoch in (packs[:first], packs[first : first + second]):
            assert Counter(token for pack in epoch for token in pack) == Counter(range(1, sum(part) + 1))


@settings(deadline=None, max_examples=25)
@given(WEIGHTS, st.lists(st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 4])), min_size=1, max_size=4), st.booleans())
def test_a_run_resumed_on_other_numbers_of_ranks_reads_the_same_packs(weights: list[float], segments: list[tuple[int, int]], with_position: bool) -> None:
    batch, read = 4, []
    for steps, ranks in segments:
        mixtures = [make_mixture(weights) for _ in range(ranks)]
        if with_position:
            for mixture in mixtures:
                mixture.start_at(make_mixture(weights).position(len(read)))
        for _ in range(steps):
            numbers = [packs_of_step(len(read), batch, 1, rank, ranks) for rank in range(ranks)]
            packs = [[mixture.pack(number) for number in mine] for mixture, mine in zip(mixtures, numbers, strict=True)]
            read += [pack for one_pass in zip(*packs, strict=True) for pack in one_pass]
    alone = make_mixture(weights)
    assert all(same(pack, alone.pack(number)) for number, pack in enumerate(read))


def test_a_position_depends_on_the_number_alone_and_spares_the_epochs_before() -> None:
    reader = make_mixture([1.0, 2.0, 0.5])
    for index in (0, 1, 999, 1000, 1001, 5432):
        fresh = make_mixture([1.0, 2.0, 0.5])
        if index:
            reader.pack(index - 1)
        position = reader.position(index)
        assert position == fresh.position(index)
        resumed = make_mixture([1.0, 2.0, 0.5])
        resumed.start_at(position)
        assert same(resumed.pack(index), fresh.pack(index))
    plans = [len(stream._starts) for stream in resumed.streams]
    assert plans == [2, 2, 2]  # the first epoch, and the one it was told of


def test_fingerprint_of_a_mixture() -> None:
    prints = {
        make_mixture([1.0, 2.0]).fingerprint,
        make_mixture([2.0, 1.0]).fingerprint,
        make_mixture([1.0, 2.0], seed=1).fingerprint,
        make_mixture([1.0, 2.0, 1.0]).fingerprint,
    }
    assert len(prints) == 4
    assert make_mixture([2.0, 4.0]).fingerprint in prints


def test_the_order_of_a_mixture_stays_what_it_was() -> None:
    """Where this changes on purpose, raise _ORDER_VERSION of mixture.py."""
    mixture = make_mixture([1.0, 2.0], seed=7)
    assert [mixture.locate(i)[0] for i in range(9)] == [1, 0, 1, 1, 0, 1, 1, 0, 1]
    assert [mixture.locate(CYCLE + i)[0] for i in range(9)] == [1, 1, 0, 1, 1, 0, 1, 1, 0]


def test_a_share_too_small_for_a_cycle_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.mixture\[1\] would get 1\.00e-04 of the packs; write weights that give it at least 0\.001"):
        make_mixture([1.0, 0.0001])


def test_validation_packs_of_a_mixture_are_those_of_the_first_epoch() -> None:
    mixture = make_mixture([1.0, 5.0])
    everything = mixture.first_epoch(10_000)
    assert len(everything) == sum(stream.packs_in_epoch(0) for stream in mixture.streams)
    for stream in mixture.streams:
        assert sum(any(same(pack, mine) for mine in stream.first_epoch(10_000)) for pack in everything) >= stream.packs_in_epoch(0)
    assert all(same(a, b) for a, b in zip(mixture.first_epoch(5), everything, strict=False))


def test_epochs_become_weights() -> None:
    weighted = [MixtureSource("a", weight=3), MixtureSource("b", weight=1)]
    assert mixture_weights(weighted, [10, 1000]) == [0.75, 0.25]
    read_twice = [MixtureSource("a", epochs=2), MixtureSource("b", epochs=1)]
    assert mixture_weights(read_twice, [100, 300]) == [0.4, 0.6]


# ------------------------------------------------------------------------------------------------------- from settings to a run


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mixture": 3}, r"data\.mixture=3 must be a list of groups"),
        ({"mixture": ["a"]}, r"data\.mixture\[0\] must be a group of keys, not 'a'"),
        ({"mixture": [{"weight": 1}]}, r"data\.mixture\[0\] needs a path"),
        ({"mixture": [{"path": "a"}]}, r"data\.mixture\[0\]\.path=a needs a weight or epochs"),
        ({"mixture": [{"path": "a", "weight": 1, "epochs": 1}]}, r"data\.mixture\[0\]\.path=a needs a weight or epochs, and not both"),
        ({"mixture": [{"path": "a", "weight": 1}, {"path": "b", "weight": 0}]}, r"data\.mixture\[1\]\.weight=0\.0 must be greater than 0"),
        ({"mixture": [{"path": "a", "weight": 1}, {"path": "b", "epochs": 1}]}, r"data\.mixture has weights and epochs"),
        ({"mixture": [{"path": "a", "wieght": 1}]}, r"unknown key data\.mixture\[0\]\.wieght"),
        ({"mixture": [{"path": "a", "weight": "much"}]}, r"data\.mixture\[0\]\.weight=much must be a number"),
        ({"mixture": [{"path": "a", "weight": 1}], "path": "b"}, r"data\.path=b and data\.mixture exclude each other"),
        ({"mixture": [{"path": "a", "weight": 1}], "length_curriculum": 5}, r"data\.length_curriculum does not go with data\.mixture"),
    ],
)
def test_settings_that_cannot_work(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_config({"data": values})


def test_settings_survive_being_written_and_read() -> None:
    values = {"mixture": [{"path": "a", "weight": 1}, {"path": "b", "weight": 2.5, "text_column": "body"}]}
    config = build_config({"data": values})
    assert to_dict(config)["data"]["mixture"][1] == values["mixture"][1] | {"epochs": None, "messages_column": None}
    assert build_config(to_dict(config)) == config


def test_a_mixture_of_files(tmp_path: Path) -> None:
    write_corpus(tmp_path / "a")
    (tmp_path / "b.jsonl").write_text("".join(f'{{"body": "number {i} of another kind"}}\n' for i in range(300)))
    mixture = (MixtureSource(str(tmp_path / "a"), weight=3), MixtureSource(str(tmp_path / "b.jsonl"), weight=1, text_column="body"))
    config = DataConfig(mixture=mixture, cache_dir=str(tmp_path / "cache"), max_length=96, val_fraction=0.2)
    messages: list[str] = []
    data = open_data(config, 300, 0, messages.append)
    assert any("25.0% of the packs from" in message and "b.jsonl" in message for message in messages)
    texts = [data.tokenizer.decode(pack.tokens[pack.valid].tolist()) for pack in map(data.train.pack, range(400))]
    assert 95 <= sum("of another kind" in text for text in texts) <= 105
    validation = data.validation_packs(10_000)
    assert any("of another kind" in data.tokenizer.decode(pack.tokens[pack.valid].tolist()) for pack in validation)
    assert len({tuple(len(part) for part in vars(pack).values()) for pack in validation}) == 1
    with pytest.raises(ConfigError, match=r"data\.mixture\[1\]\.path=.*nowhere does not exist"):
        open_data(DataConfig(mixture=(mixture[0], MixtureSource("nowhere", weight=1))), 300, 0, messages.append)


def test_a_run_on_a_mixture_resumes_exactly(tmp_path: Path) -> None:
    runs = []
    for name, stops in (("whole", [6]), ("parts", [2, 4, 6])):
        folder = tmp_path / name
        write_corpus(folder / "text")
        write_corpus(folder / "more", documents=4, seed=1)
        mixture = f"data.mixture=[{{path:{folder / 'text'},epochs:1}},{{path:{folder / 'more'},epochs:2}}]"
        for stop in stops:
            resume = [] if stop == stops[0] else ["training.resume=auto"]
            config = small_config(folder, *QUIET, mixture, "data.path=null", f"training.max_steps={stop}", "training.schedule=wsd", *resume)
            assert Trainer(config).train() == 0
        runs.append((steady_rows(folder / "run"), final_files(folder / "run")["state.json"]))
    assert [row["tokens"] for row in runs[0][0] if "tokens" in row] == [row["tokens"] for row in runs[1][0] if "tokens" in row]
    assert runs[0][1] == runs[1][1]
