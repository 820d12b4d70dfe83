"""The merges that are learnt are those of the `tokenizers` library's trainer."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from nsa_transformer.data.tokenizer import END_OF_DOCUMENT, PATTERN, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def by_library(texts: list[str], vocab_size: int) -> str:
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_DOCUMENT], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return backend.to_str(pretty=True)


# Few letters, so that counts tie, pairs overlap and different merges make the same token.
REPETITIVE = st.text(alphabet="aab \n", max_size=200)
MIXED = st.text(alphabet="abc ,1\n\u00e9\u4f60\U0001f600", max_size=200)


@settings(deadline=None, max_examples=400)
@given(st.lists(REPETITIVE | MIXED, max_size=6), st.integers(257, 330))
def test_a_tokenizer_is_the_one_that_the_library_trains(texts: list[str], vocab_size: int) -> None:
    assert train_tokenizer(texts, vocab_size).to_json() == by_library(texts, vocab_size)


def test_runs_of_one_letter() -> None:
    texts = [("a" * n + " ") * (n % 5 + 1) for n in range(1, 80)]
    assert train_tokenizer(texts, 400).to_json() == by_library(texts, 400)


def test_on_source_and_prose() -> None:
    files = [*sorted((ROOT / "nsa_transformer").rglob("*.py")), *sorted((ROOT / "docs").glob("*.md"))]
    texts = [file.read_text(encoding="utf-8") for file in files]
    ours = train_tokenizer(texts, 3000)
    assert ours.to_json() == by_library(texts, 3000)
    assert len(json.loads(ours.to_json())["model"]["merges"]) == 3000 - 257
