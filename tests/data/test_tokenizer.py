"""The tokenizer: lossless, deterministic, linear, and never an end of document out of text."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
import tracemalloc
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from nsa_transformer.config import ConfigError
from nsa_transformer.data import tokenizer as module
from nsa_transformer.data.tokenizer import END_OF_DOCUMENT, Tokenizer, train_tokenizer
from tests.data.hard_texts import NAMES, hard_text

TEXTS = [
    "def f(x):\n    return x + 1\n\n\nclass A:\n    '''Ein Würfel.'''\n" * 20,
    "The quick brown fox jumps over 12345 lazy dogs. It's 3.14159!\r\n\tTabs, too.\n" * 20,
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \U0001f680 na\u00efve caf\u00e9\n" * 5,
]
RUNS = st.lists(st.tuples(st.sampled_from("a \n\u4f60!7\u0301\U0001f600\u00a0"), st.integers(1, 200)), max_size=6).map(
    lambda runs: "".join(c * n for c, n in runs)
)
ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200)
CODE_LIKE = st.text(alphabet="ab1 _\n\r\t.!\u00e9\u4f60\u3000\x85\x1c", max_size=400)


@cache
def small() -> Tokenizer:
    return train_tokenizer(TEXTS, 350)


@cache
def gpt2_like() -> Tokenizer:
    """A byte-level BPE with a pattern that is not this project's."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=350, special_tokens=[END_OF_DOCUMENT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return Tokenizer(backend.to_str())


@settings(deadline=None)
@given(ANY_TEXT | CODE_LIKE)
def test_round_trip_and_byte_lengths(text: str) -> None:
    tokenizer = small()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.eod_id not in ids


@settings(deadline=None, max_examples=200)
@given(ANY_TEXT | CODE_LIKE)
def test_ids_are_the_library_s(text: str) -> None:
    assert small().encode(text) == small()._backend.encode(text).ids


def test_a_long_text_is_encoded_as_by_the_library_at_once() -> None:
    text = "".join(TEXTS) * 150
    assert len(text) > 1 << 18
    assert small().encode(text) == small()._backend.encode(text).ids


def test_a_full_table_of_pieces_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa_transformer.data.pieces._PIECES_KEPT", 3)
    tokenizer = Tokenizer(small().to_json())
    assert tokenizer.encode("".join(TEXTS)) == small().encode("".join(TEXTS))
    assert tokenizer._pieces is not None and len(tokenizer._pieces) <= 3


def test_a_tokenizer_can_be_sent_to_another_process() -> None:
    small().encode(TEXTS[0])
    again = pickle.loads(pickle.dumps(small()))
    assert (again.fingerprint, again.encode(TEXTS[0])) == (small().fingerprint, small().encode(TEXTS[0]))


# ------------------------------------------------------------------------------------------------ bytes and streams

UTF8_LIKE = st.lists(st.binary(max_size=6) | CODE_LIKE.map(str.encode) | st.sampled_from([b"\xed\xa0\x80", b"\xf0\x9f\x98", b"\xc0\xaf", b"\xff"]), max_size=12)
CUTS = st.lists(st.integers(1, 300), max_size=40)


def cut_into(whole: Any, lengths: list[int]) -> list[Any]:
    parts, at = [], 0
    for length in lengths:
        parts.append(whole[at : at + length])
        at += length
    return [*parts, whole[at:]]


@settings(deadline=None, max_examples=200)
@given(UTF8_LIKE.map(b"".join))
def test_any_bytes_come_back(content: bytes) -> None:
    for tokenizer in (small(), gpt2_like()):
        ids = tokenizer.encode_bytes(content)
        assert tokenizer.decode_bytes(ids) == content
        assert tokenizer.byte_lengths[ids].sum() == len(content)
        assert tokenizer.eod_id not in ids


@settings(deadline=None)
@given(ANY_TEXT | CODE_LIKE)
def test_bytes_of_a_text_have_the_ids_of_the_text(text: str) -> None:
    for tokenizer in (small(), gpt2_like()):
        assert tokenizer.encode_bytes(text.encode()) == tokenizer.encode(text)


@settings(deadline=None, max_examples=300)
@given(CODE_LIKE | ANY_TEXT | RUNS, CUTS, st.integers(1, 500))
def test_a_stream_of_text_has_the_ids_of_the_whole(text: str, cuts: list[int], at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STREAM_SIZE", at_once)
        for tokenizer in (small(), gpt2_like()):
            assert [i for ids in tokenizer.encode_stream(cut_into(text, cuts)) for i in ids] == tokenizer.encode(text)


@settings(deadline=None, max_examples=300)
@given(UTF8_LIKE.map(b"".join) | RUNS.map(str.encode), CUTS, st.integers(1, 500))
def test_a_stream_of_bytes_has_the_ids_of_the_whole(content: bytes, cuts: list[int], at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_STREAM_SIZE", at_once)
        for tokenizer in (small(), gpt2_like()):
            assert [i for ids in tokenizer.encode_stream(cut_into(content, cuts)) for i in ids] == tokenizer.encode_bytes(content)


def test_a_stream_is_not_held_whole() -> None:
    part = "\u4f60\u597d" * 100_000  # 0.4 MB in memory, and no place to cut it
    for _ in small().encode_stream([part]):
        pass
    tracemalloc.start()
    count = sum(len(ids) for ids in small().encode_stream(part for _ in range(30)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert small().byte_lengths.max() * count >= 30 * len(part.encode())
    assert peak < 12e6  # the text is 18 MB, its ids at least as many


def test_a_lone_surrogate_in_a_stream_of_text_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        list(small().encode_stream(["a", "b\udcff"]))


def test_batch_equals_one_by_one() -> None:
    texts = ["", "a", *TEXTS, "", "x" * 1000]
    assert small().encode_batch(texts) == [small().encode(text) for text in texts]
    assert small().encode("") == []


@pytest.mark.parametrize("text", ["<|endoftext|>", "a <|endoftext|> b", "<|endoftext|><|endoftext|>"])
def test_the_name_of_a_special_token_is_text(text: str) -> None:
    ids = small().encode(text)
    assert small().eod_id not in ids
    assert small().decode(ids) == text


def test_special_tokens_have_no_bytes_and_no_text() -> None:
    tokenizer = small()
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    assert tokenizer.byte_lengths[tokenizer.eod_id] == 0
    assert (np.delete(tokenizer.byte_lengths, tokenizer.eod_id) > 0).all()
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.eod_id]) == "ab"


@pytest.mark.parametrize("bad", [-1, 350])
def test_decode_refuses_ids_outside_the_vocabulary(bad: int) -> None:
    assert small().vocab_size == 350
    for decode in (small().decode, small().decode_bytes):
        with pytest.raises(ValueError, match=f"{bad} is outside the vocabulary of 350"):
            decode([1, bad])


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        small().encode("a\ud800b")


def test_time_grows_as_length_does() -> None:
    """For every text that has been known to take long. Process time, the lesser of two: the machine may have others to serve."""
    for name in NAMES:
        seconds = []
        for text in (hard_text(name, 30_000), hard_text(name, 240_000)):
            runs = []
            for _ in range(2):
                tokenizer = Tokenizer(small().to_json())  # one that has met no piece before
                began = time.process_time()
                tokenizer.encode(text)
                runs.append(time.process_time() - began)
            seconds.append(min(runs))
        assert seconds[1] < 8 * 2.5 * seconds[0] + 0.1, name  # quadratic would be 64


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ten_megabytes_of_one_thing_take_seconds(name: str) -> None:
    text = hard_text(name, 10_000_000)
    began = time.perf_counter()
    ids = small().encode(text)
    assert time.perf_counter() - began < 40, name  # at most 4 s on an idle core; hours if anything were quadratic
    assert small().decode_bytes(ids) == text.encode()


def test_training_on_one_long_word_takes_seconds() -> None:
    began = time.perf_counter()
    tokenizer = train_tokenizer(["x" * 2_000_000], 300)
    assert time.perf_counter() - began < 30
    assert 257 < tokenizer.vocab_size <= 300


def test_training_is_deterministic_across_processes() -> None:
    code = f"from nsa_transformer.data.tokenizer import train_tokenizer; print(train_tokenizer({TEXTS!r}, 350).fingerprint)"
    root = Path(__file__).resolve().parents[2]
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert again.stdout.strip() == small().fingerprint


def test_a_small_corpus_gives_a_smaller_vocabulary() -> None:
    assert train_tokenizer(["ab"], 5000).vocab_size < 300
    assert train_tokenizer([], 5000).vocab_size == 257


def test_progress_counts_characters() -> None:
    seen: list[int] = []
    train_tokenizer(["abc", "de"], 300, progress=seen.append)
    assert seen == [3, 5]


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    assert train_tokenizer(TEXTS, 257).vocab_size == 257
    with pytest.raises(ConfigError, match=r"256 .*model\.vocab_size=257"):
        train_tokenizer(TEXTS, 256)


def test_save_and_load(tmp_path: Path) -> None:
    small().save(tmp_path / "new" / "tokenizer.json")
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json", str(tmp_path / "new")):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == small().fingerprint
        assert loaded.eod_id == small().eod_id
        assert loaded.encode(TEXTS[0]) == small().encode(TEXTS[0])
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["tokenizer.json"]
    assert train_tokenizer(TEXTS, 351).fingerprint != small().fingerprint


def test_save_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        small().save(tmp_path / "file" / "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"model": 3, "added_tokens": []}', b"\xff\xfe\x00", b"null"])
def test_a_corrupt_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "tokenizer.json"):
        with pytest.raises(ConfigError, match="there is no tokenizer at"):
            Tokenizer.load(path)


def _write_word_level(path: Path, vocab: dict[str, int], added: list[str], special: bool = True) -> Path:
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_tokens([AddedToken(name, special=special, normalized=False) for name in added])
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(path))
    return path


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"])
@pytest.mark.parametrize("special", [True, False])
def test_end_of_document_of_other_tokenizers(tmp_path: Path, name: str, special: bool) -> None:
    vocab = {"?": 0, "a": 1, "b": 2, "\u2581": 3}
    tokenizer = Tokenizer.load(_write_word_level(tmp_path / "t.json", vocab, [name], special))
    assert (tokenizer.eod_token, tokenizer.eod_id, tokenizer.vocab_size) == (name, 4, 5)
    assert tokenizer.encode("a b a b a") == [1, 2, 1, 2, 1]  # neither truncated nor padded
    assert 4 not in tokenizer.encode(f"a{name}b")
    assert tokenizer.byte_lengths.tolist() == [1, 1, 1, 1, 0]


def test_end_of_document_in_the_vocabulary_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(_write_word_level(tmp_path / "t.json", {"?": 0, "</s>": 1, "a": 2}, []))
    assert tokenizer.eod_id == 1
    assert tokenizer.encode("a</s>") == [2, 0, 0, 0, 0]
    assert tokenizer.decode([2, 1]) == "a"


def test_no_end_of_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"t\.json.*no end-of-document token"):
        Tokenizer.load(_write_word_level(tmp_path / "t.json", {"?": 0, "a": 1}, ["<pad>"]))


def test_the_name_of_the_end_in_a_model_s_own_vocabulary_is_text(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"?": 0, "</s>": 1, "<": 2, "/s>": 3}, "unk_token": "?"}
    spec = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model}
    (tmp_path / "t.json").write_text(json.dumps(spec))
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert (tokenizer.eod_id, tokenizer.encode("</s>"), tokenizer.encode("</s></s>")) == (1, [2, 3], [2, 0, 3])
    assert Tokenizer(tokenizer.to_json()).fingerprint == tokenizer.fingerprint


def test_the_special_name_is_the_usual_one() -> None:
    assert small().eod_token == END_OF_DOCUMENT == "<|endoftext|>"
