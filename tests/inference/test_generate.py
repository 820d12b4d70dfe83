"""Sampling and generation against hand values and one prefill after the other; loading what a run saved."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from nsa_transformer import Transformer, load_checkpoint
from nsa_transformer.config import Config, ConfigError, DataConfig, ExpertOffloadingConfig, KVCacheConfig, MemoryConfig, TrainingConfig
from nsa_transformer.data.tokenizer import Tokenizer, train_tokenizer
from nsa_transformer.distributed.checkpoint import save_checkpoint, write_config
from nsa_transformer.distributed.world import World
from nsa_transformer.inference import generate as module
from nsa_transformer.inference.generate import SamplingConfig, TextStream, generate, generate_batch, generate_text, next_token_probabilities
from nsa_transformer.inference.load import SavedModel
from nsa_transformer.training.optimizer import build_optimizer

from ..models.small import random_tokens, small_config, small_model

GREEDY = SamplingConfig(temperature=0)


# ----------------------------------------------------------------------------------------------------------- probabilities


def probabilities(p: Sequence[float], **sampling) -> list[float]:
    """Of a model that gives the probabilities p."""
    logits = torch.tensor(p, dtype=torch.float64).log().float() + 3.0
    found = next_token_probabilities(logits, SamplingConfig(**{"temperature": 1.0, **sampling}))
    assert found.dtype == torch.float32 and found.sum() == pytest.approx(1.0)
    return found.tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 0, "top_k": 3, "top_p": 0.9}, [0, 1, 0, 0]),
        ({"temperature": 1e-40}, [0, 1, 0, 0]),
        ({"temperature": 1e30}, [0.25] * 4),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 3}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.35}, [0, 1, 0, 0]),
        ({"top_p": 0.45}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.95}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        # Temperature before top-p: at 0.5 the two likeliest reach 25/30, at 1 it takes three to reach 0.8.
        ({"temperature": 0.5, "top_p": 0.8}, [0, 16 / 25, 0, 9 / 25]),
        ({"temperature": 1.0, "top_p": 0.8}, [0, 4 / 9, 2 / 9, 3 / 9]),
        # Top-k before top-p: of the two kept, the first has 4/7 = 0.571 and suffices for 0.5, and would not have by its 0.4.
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        ({"top_k": 2, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 0.5}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"min_p": 0.51}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"top_k": 3, "min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
    ],
    ids=str,
)
def test_probabilities_by_hand(sampling: dict, expected: list[float]):
    assert probabilities([0.1, 0.4, 0.2, 0.3], **sampling) == pytest.approx(expected, abs=1e-6)


def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([2.0, -1.0, 0.5, 2.0])
    seen = torch.tensor([True, True, False, False])
    found = next_token_probabilities(logits, SamplingConfig(temperature=1.0, repetition_penalty=2.0), seen)
    torch.testing.assert_close(found, torch.tensor([1.0, -2.0, 0.5, 2.0]).softmax(0))
    assert next_token_probabilities(logits, SamplingConfig(temperature=0, repetition_penalty=1.1), seen).argmax() == 3


@pytest.mark.parametrize("penalty", [1e-300, 1e-40, 1e40, 1e300])
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_no_repetition_penalty_overflows(penalty: float, temperature: float):
    config = SamplingConfig(temperature=temperature, repetition_penalty=penalty)
    logits = torch.tensor([2.0, -1.0, 0.0, 0.5, -math.inf])
    for seen in ([True] * 5, [True, True, False, False, True], [False, True, True, True, False]):
        found = next_token_probabilities(logits, config, torch.tensor(seen))
        assert found.isfinite().all() and found.sum() == pytest.approx(1.0) and found[4] == 0, seen
    found = next_token_probabilities(logits, config, torch.tensor([True, False, False, False, False]))
    assert found.argmax() == (0 if penalty < 1 else 3)


def test_rows_are_independent():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
    seen = torch.rand(5, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    for sampling in ({"temperature": 0}, {"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3}):
        config = SamplingConfig(**{"temperature": 1.2, **sampling})
        together = next_token_probabilities(logits, config, seen)
        for row in range(5):
            torch.testing.assert_close(together[row], next_token_probabilities(logits[row], config, seen[row]))


def test_ties_keep_exactly_k_and_the_fewest():
    assert sorted(probabilities([0.25] * 4, top_k=2)) == pytest.approx([0, 0, 0.5, 0.5])
    assert sorted(probabilities([0.25] * 4, top_p=0.3)) == pytest.approx([0, 0, 0.5, 0.5])
    assert probabilities([0.25] * 4, temperature=0) == [1, 0, 0, 0]


def test_impossible_tokens_stay_impossible_and_half_precision_is_enough():
    logits = torch.tensor([1.0, -math.inf, 2.0]).bfloat16()
    found = next_token_probabilities(logits, SamplingConfig(temperature=2.0, top_k=3, top_p=0.999))
    assert found.dtype == torch.float32 and found[1] == 0 and found[2] > found[0] > 0


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}, {"top_p": math.nan}, {"seed": -1}],
    ids=str,
)
def test_bad_sampling_names_the_setting(bad: dict):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))}="):
        SamplingConfig(**bad)


# -------------------------------------------------------------------------------------------------------------- generation


@pytest.fixture(scope="module")
def model() -> Transformer:
    return small_model(tie_embeddings=False).eval()


PROMPT = random_tokens(11).tolist()


@pytest.mark.parametrize("chunk", [module.PREFILL_CHUNK, 3])
def test_greedy_is_the_argmax_of_a_prefill_at_each_step(model: Transformer, monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(module, "PREFILL_CHUNK", chunk)
    ids = list(PROMPT)
    with torch.no_grad():
        for token in generate(model, PROMPT, 30, GREEDY):
            logits = model(torch.tensor(ids))[-1]
            assert logits[token] >= logits.max() - 1e-4
            ids.append(token)
    assert len(ids) == len(PROMPT) + 30 and len(set(ids[len(PROMPT) :])) > 3


def test_the_same_seed_gives_the_same_ids(model: Transformer):
    def ids(seed: int | None) -> list[int]:
        return list(generate(model, PROMPT, 25, SamplingConfig(temperature=1.5, seed=seed)))

    torch.manual_seed(0)
    first = ids(3)
    torch.manual_seed(1)
    assert ids(3) == first, "whatever the global generator does"
    before = torch.get_rng_state()
    assert ids(4) != first and ids(None) != ids(None)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_follow_the_probabilities(model: Transformer):
    sampling = SamplingConfig(temperature=2.0, top_k=5)
    with torch.no_grad():
        expected = next_token_probabilities(model(torch.tensor(PROMPT))[-1], sampling)
    drawn = [next(generate(model, PROMPT, 1, SamplingConfig(temperature=2.0, top_k=5, seed=seed))) for seed in range(200)]
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / 200
    assert (counts[expected == 0] == 0).all()
    assert (counts - expected).abs().max() < 0.14  # four standard deviations


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(temperature=0.7, top_p=0.8), SamplingConfig(min_p=0.2), GREEDY], ids=str)
def test_each_row_draws_from_its_probabilities_with_its_generator(sampling: SamplingConfig):
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(0)) * 2
    logits[:, [0, 7, 29]] = -torch.inf
    expected = next_token_probabilities(logits, sampling)
    generators, draws = module.seeded_generators(5, 3), 4000
    found = torch.zeros_like(expected)
    kept = []
    for _ in range(draws):
        tokens, drawn = module.draw_tokens(logits, sampling, None, generators, [0, 2])
        assert tokens.tolist() == drawn and drawn[1] == 0
        kept.append(drawn[2])
        found[[0, 2], [drawn[0], drawn[2]]] += 1
    for row in (0, 2):
        assert not found[row][expected[row] == 0].any()
        share = expected[row][expected[row] > 0]
        squares = ((found[row] - draws * expected[row]) ** 2)[expected[row] > 0] / (draws * share)
        assert squares.sum() < len(share) - 1 + 5 * math.sqrt(2 * len(share))  # chi-squared
    alone = module.seeded_generators(7, 1)
    assert kept[:50] == [module.draw_tokens(logits[2:], sampling, None, alone, [0])[1][0] for _ in range(50)]


@pytest.mark.parametrize(("number", "place"), [(0.0, 1), (1 - 2.0**-53, 3)])
def test_the_least_and_the_largest_number_draw_tokens_with_a_share(monkeypatch: pytest.MonkeyPatch, number: float, place: int):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([number], dtype=torch.float64))
    logits = torch.tensor([[-torch.inf, 0.3, -torch.inf, 0.1, -torch.inf]])
    assert module.draw_tokens(logits, SamplingConfig(), None, module.seeded_generators(0, 1), [0])[1] == [place]


def test_end_of_document_stops(model: Transformer):
    ids = list(generate(model, PROMPT, 20, GREEDY))
    end = ids[7]
    assert list(generate(model, PROMPT, 20, GREEDY, eod_id=end)) == ids[: ids.index(end)]
    assert list(generate(model, PROMPT, 20, GREEDY, eod_id=10**6)) == ids


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(repetition_penalty=1.1, seed=1)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_named(sampling: SamplingConfig, value: float):
    broken = small_model(tie_embeddings=False).eval().requires_grad_(False)
    broken.head.weight.fill_(value)
    with pytest.raises(ValueError, match=r"^the model's logits are not finite.*overflows in float32; try another checkpoint"):
        list(generate_batch(broken, [PROMPT, PROMPT[:4]], 3, sampling))
    one = torch.zeros(2, 4)
    one[1, 2] = value
    alone = module.draw_tokens(one, sampling, None, module.seeded_generators(1, 2), [0])
    assert alone[1][0] == int(alone[0][0]), "a row that is not asked for may hold whatever it likes"
    if value == -math.inf:
        assert module.draw_tokens(one, sampling, None, module.seeded_generators(1, 2), [0, 1])[1][1] != 2


PROMPTS = [PROMPT, PROMPT[:4], [*PROMPT, 5, 6, 7], random_tokens(150, 3).tolist(), [9]]


@pytest.mark.parametrize(
    "prompts", [PROMPTS, [[*PROMPTS[3], *end] for end in ([1], [2, 3], [1, 4, 5, 6])], [PROMPT, PROMPT], [[3], [3]]], ids=["any", "prefix", "same", "one token"]
)
@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=1.0, top_k=20, repetition_penalty=1.2, seed=5)], ids=["greedy", "drawn"])
def test_a_batch_gives_each_prompt_what_it_gets_alone(model: Transformer, prompts: list[list[int]], sampling: SamplingConfig):
    found: list[list[int]] = [[] for _ in prompts]
    for number, token in generate_batch(model, prompts, 25, sampling):
        found[number].append(token)
    for number, prompt in enumerate(prompts):
        alone = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number)
        assert found[number] == list(generate(model, prompt, 25, alone)), number


def test_a_batch_goes_on_when_some_have_ended(model: Transformer):
    alone = [list(generate(model, prompt, 30, GREEDY)) for prompt in PROMPTS]
    end = alone[1][3]
    found: list[list[int]] = [[] for _ in PROMPTS]
    for number, token in generate_batch(model, PROMPTS, 30, GREEDY, eod_id=end):
        found[number].append(token)
    assert found == [ids[: ids.index(end)] if end in ids else ids for ids in alone]
    assert len({len(ids) for ids in found}) > 1
    assert list(generate_batch(model, [], 3, GREEDY)) == []


def test_a_quantized_cache(model: Transformer):
    """With nothing old enough it is the same; else it draws on."""
    assert list(generate(model, PROMPT, 30, GREEDY, kv_cache=KVCacheConfig("fp8", 512))) == list(generate(model, PROMPT, 30, GREEDY))
    assert len(list(generate(model, PROMPTS[3], 60, GREEDY, kv_cache=KVCacheConfig("fp8", 0)))) == 60


def test_length_limits(model: Transformer):
    limit = model.config.max_position_embeddings
    long = random_tokens(limit - 2).tolist()
    assert len(list(generate(model, long, 2, GREEDY))) == 2
    assert list(generate(model, random_tokens(limit).tolist(), 0, GREEDY)) == []
    assert list(generate(model, PROMPT, 0, GREEDY)) == []
    with pytest.raises(ValueError, match=rf"max_position_embeddings={limit}.*ask for 2 new tokens"):
        next(generate(model, long, 3, GREEDY))
    with pytest.raises(ValueError, match="ask for 0 new tokens"):
        next(generate(model, random_tokens(limit + 5).tolist(), 1, GREEDY))
    with pytest.raises(ValueError, match="prompt has no token"):
        next(generate(model, [], 3, GREEDY))
    with pytest.raises(ValueError, match=r"^max_new_tokens=-1"):
        next(generate(model, PROMPT, -1, GREEDY))
    with pytest.raises(ValueError, match=r"^tokens holds ids"):
        next(generate(model, [10**6], 1, GREEDY))


# ------------------------------------------------------------------------------------------------------------- stop texts


class Bytes:
    """A tokenizer of which we choose the tokens; id 0 ends the document."""

    eod_id, is_byte_level = 0, True

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = [b"", *pieces]
        self.vocab_size = len(self.pieces)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.pieces[i] for i in ids)


def scripted(monkeypatch: pytest.MonkeyPatch, pieces: Sequence[bytes], stop: Sequence[str]) -> tuple[list[list[int]], list[str]]:
    """What `generate_text` yields where the model says exactly these pieces."""

    def script(*_args) -> Iterator[int]:
        yield from range(1, len(pieces) + 1)

    monkeypatch.setattr(module, "generate", script)
    parts = list(generate_text(None, Bytes(pieces), [1], 99, GREEDY, stop))  # type: ignore[arg-type]
    return [ids for ids, _ in parts], [text for _, text in parts]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", [], "one two three"),
        ("one two three", ["two"], "one "),
        ("one two three", ["four"], "one two three"),
        ("one two three", ["e t", "ne"], "o"),
        ("one two three", ["two", "one two"], ""),
        ("one two three", ["three!"], "one two three"),
        ("aaab", ["aab"], "a"),
        ("abababc", ["ababc"], "ab"),
        ("xabcd", ["abc", "b"], "xa"),
        ("xabcd", ["d", "abcd", "bcd"], "x"),
        ("x\n\ny", ["\n\n"], "x"),
        ("price: 5 € or 6 €.", ["€ or"], "price: 5 "),
        ("añb", ["ñ"], "a"),
        ("ab€cd", ["b€"], "a"),
        ("日本語です", ["語"], "日本"),
        ("日本語です", ["本語で?"], "日本語です"),
        ("😀😀😁", ["😀😁"], "😀"),
    ],
)
def test_stop_texts_whatever_the_tokens(monkeypatch: pytest.MonkeyPatch, text: str, stop: list[str], expected: str):
    """Cut into tokens of 1, 2, 3, … bytes: characters and stop texts span them. What was shown is never taken back."""
    data = text.encode()
    for size in range(1, len(data) + 1):
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        ids, parts = scripted(monkeypatch, pieces, stop)
        assert "".join(parts) == expected, size
        flat = list(itertools.chain(*ids))
        assert flat == list(range(1, len(flat) + 1)), "each id once, in order"
        if expected == text:
            assert len(flat) == len(pieces)


def test_text_comes_as_soon_as_it_is_certain(monkeypatch: pytest.MonkeyPatch):
    ids, parts = scripted(monkeypatch, [b"a", b"b", b"S", b"x", b"\xe2", b"\x82", b"\xac", b"ST"], ["ST"])
    assert list(zip(ids, parts, strict=True)) == [([1], "a"), ([2], "b"), ([3, 4], "Sx"), ([5, 6, 7], "€"), ([8], "")]


def test_bytes_that_are_no_text_come_at_the_end(monkeypatch: pytest.MonkeyPatch):
    assert "".join(scripted(monkeypatch, [b"a", b"\xff", b"b", b"\xe2\x82"], [])[1]) == "a\ufffdb\ufffd"


@given(st.lists(st.binary(max_size=5), max_size=12))
def test_a_stream_is_the_text_of_all_its_bytes(pieces: list[bytes]) -> None:
    stream = TextStream(Bytes(pieces))  # type: ignore[arg-type]
    parts = [stream.add(i) for i in range(1, len(pieces) + 1)]
    assert "".join([*parts, stream.rest()]) == b"".join(pieces).decode(errors="replace")


def test_a_long_stream_costs_what_its_tokens_do() -> None:
    asked: list[int] = []

    class Counted(Bytes):
        def decode_bytes(self, ids: Sequence[int]) -> bytes:
            asked.append(len(ids))
            return super().decode_bytes(ids)

    stream = TextStream(Counted([b"ab "]), ["stop"])  # type: ignore[arg-type]
    assert "".join(stream.add(1) for _ in range(500)) == "ab " * 500 and sum(asked) == 500


def test_an_empty_stop_text_is_refused(model: Transformer):
    with pytest.raises(ValueError, match="stop text is empty"):
        next(generate_text(model, Bytes([b"x"] * 99), PROMPT, 5, GREEDY, [""]))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Transformer, Tokenizer]:
    """A run of two checkpoints, the model of the newer one, and the tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog " * 50], 280)
    model_config = small_config(vocab_size=300)
    config = Config(model=model_config, data=DataConfig(max_length=128), memory=MemoryConfig(kv_cache=KVCacheConfig(threshold=77)))
    texts = {"config.yaml": write_config(config), "tokenizer.json": tokenizer.to_json()}
    for name, text in texts.items():
        (folder / name).write_text(text)
    for step in (1, 2):
        model = small_model(model_config, seed=step)
        model.update_router_bias(torch.tensor([[5, 1, 0, 0]]))
        optimizer = build_optimizer(model, TrainingConfig())
        save_checkpoint(folder, step, model, optimizer, {"step": step}, texts, World(0, 1, torch.device("cpu"), None), 5)
    return folder, model.eval(), tokenizer


def test_load_a_run_a_checkpoint_and_a_copied_folder(run: tuple[Path, Transformer, Tokenizer], tmp_path: Path):
    folder, model, tokenizer = run
    newest = folder / "checkpoints" / "step_00000002"
    export = tmp_path / "export"
    export.mkdir()
    for name in ("config.yaml", "model.safetensors", "tokenizer.json"):
        shutil.copy(newest / name, export)
    ids = tokenizer.encode("the lazy fox")
    moved = shutil.copytree(newest, tmp_path / "copied")
    for path in (folder, str(folder), newest, moved, export):
        loaded, its_tokenizer = load_checkpoint(path)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert its_tokenizer.encode("the lazy fox") == ids and its_tokenizer.decode(ids) == "the lazy fox"
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert torch.equal(loaded(torch.tensor(ids)), model(torch.tensor(ids)).detach())
        assert all(buffer.device.type == "cpu" for buffer in loaded.buffers())
    older, _ = load_checkpoint(folder / "checkpoints" / "step_00000001")
    assert not torch.equal(older.embedding.weight, model.embedding.weight)
    assert {SavedModel(path).config.memory.kv_cache.threshold for path in (folder, newest, export)} == {77}


def test_load_passes_over_a_damaged_checkpoint(run: tuple[Path, Transformer, Tokenizer], tmp_path: Path):
    folder = shutil.copytree(run[0], tmp_path / "run")
    os.truncate(folder / "checkpoints" / "step_00000002" / "model.safetensors", 1000)
    loaded, _ = load_checkpoint(folder)
    older, _ = load_checkpoint(folder / "checkpoints" / "step_00000001")
    torch.testing.assert_close(loaded.state_dict(), older.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_load_in_half_precision(run: tuple[Path, Transformer, Tokenizer], dtype: torch.dtype):
    folder, model, tokenizer = run
    loaded, _ = load_checkpoint(folder, dtype=dtype)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("router.weight") else dtype), name
    assert all(buffer.dtype == torch.float32 for buffer in loaded.buffers()), "the balancing bias"
    tokens = torch.tensor(tokenizer.encode("the quick brown fox " * 5))
    with torch.no_grad():
        half, whole = loaded(tokens), model(tokens)
    assert half.dtype == dtype and half.isfinite().all()
    assert torch.nn.functional.cosine_similarity(half.float(), whole, dim=-1).median() > 0.95
    cache = loaded.new_cache()
    with torch.no_grad():
        stepped = torch.cat([loaded(tokens[i : i + 1], cache=cache) for i in range(len(tokens))])
    assert torch.nn.functional.cosine_similarity(stepped.float(), half.float(), dim=-1).median() > 0.98
    assert len(list(generate(loaded, tokens.tolist(), 5, SamplingConfig(seed=0)))) == 5


def test_generate_text_of_a_loaded_run(run: tuple[Path, Transformer, Tokenizer]):
    """The model has 300 rows and the tokenizer 280 tokens: the surplus is never drawn."""
    model, tokenizer = load_checkpoint(run[0])
    assert (model.config.vocab_size, tokenizer.vocab_size) == (300, 280)
    seen = [i for seed in range(4) for i in generate(model, [1, 2, 3], 50, SamplingConfig(temperature=5.0, seed=seed), num_tokens=280)]
    assert max(seen) < 280 and len(set(seen)) > 50
    parts = list(generate_text(model, tokenizer, tokenizer.encode("the"), 20, SamplingConfig(seed=1)))
    ids = [i for part, _ in parts for i in part]
    assert "".join(text for _, text in parts) == tokenizer.decode_bytes(ids).decode(errors="replace") and 0 < len(ids) <= 20


def test_bad_paths_devices_and_dtypes(run: tuple[Path, Transformer, Tokenizer], tmp_path: Path):
    folder = run[0]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for path in ("nowhere", "empty", "file"):
        with pytest.raises(ConfigError, match=rf"{path}\b"):
            load_checkpoint(tmp_path / path)
    for missing in ("config.yaml", "tokenizer.json"):
        export = tmp_path / f"without-{missing}"
        export.mkdir()
        for name in {"config.yaml", "model.safetensors", "tokenizer.json"} - {missing}:
            shutil.copy(folder / "checkpoints" / "step_00000002" / name, export)
        with pytest.raises(ConfigError, match=missing.split(".")[0]):
            load_checkpoint(export)
    with pytest.raises(ConfigError, match=r"^dtype=torch.int8"):
        load_checkpoint(folder, dtype=torch.int8)
    with pytest.raises(ConfigError, match=r"^device=gpu"):
        load_checkpoint(folder, device="gpu")
    if not torch.cuda.is_available():
        for device in ("cuda", "cuda:0"):
            with pytest.raises(ConfigError, match="cuda"):
                load_checkpoint(folder, device=device)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(run: tuple[Path, Transformer, Tokenizer], tmp_path: Path):
    export = tmp_path / "export"
    export.mkdir()
    for name in ("config.yaml", "model.safetensors"):
        shutil.copy(run[0] / "checkpoints" / "step_00000002" / name, export)
    train_tokenizer([" ".join(map(str, range(5000)))], 400).save(export)
    with pytest.raises(ConfigError, match="tokenizer has 400 tokens"):
        load_checkpoint(export)


def test_a_model_without_experts_has_none_to_offload(tmp_path: Path):
    """On a CPU too, where offloading would move nothing."""
    config = Config(model=small_config(vocab_size=300, moe={"num_experts": 0}), data=DataConfig(max_length=128))
    model = small_model(config.model)
    (tmp_path / "config.yaml").write_text(write_config(config))
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(["a b"], 257).to_json())
    save_file(dict(model.named_parameters()), tmp_path / "model.safetensors")
    load_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"this model has no experts; write memory\.expert_offloading\.enabled=false, or leave --expert-offloading out"):
        load_checkpoint(tmp_path, "cpu", expert_offloading=ExpertOffloadingConfig(enabled=True))
