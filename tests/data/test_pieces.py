"""Pieces by Python's regex are the library's, wherever a text is cut."""

from __future__ import annotations

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from nsa_transformer.data.pieces import _CUT_SIZE, PATTERN, cut_text, split_pieces
from tests.data.hard_texts import NAMES, hard_text

# A few of each kind, so that pieces of every alternative meet: letters, marks, numbers, blank space, signs, below and above U+FFFF.
KINDS = "aZ\u00e9\u4f60\u0301\u0e33\U00010330\U000e0100 17\u0663\u00bd\U0001d7d8 \t\n\r\x0b\x1c\x85\u00a0\u3000\u2028 .!_\u20ac\u200d\U0001f600\ufeff\0"
MIXED = st.text(alphabet=KINDS, max_size=300)
RUNS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 200)), max_size=8).map(lambda runs: "".join(c * n for c, n in runs))
ANY = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=100)


def by_library(text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizers.Split(Regex(PATTERN), "isolated").pre_tokenize_str(text)]


def joined(text: str, **how: int) -> list[str]:
    return list(chain.from_iterable(split_pieces(text, **how)))


@settings(deadline=None, max_examples=400)
@given(MIXED | RUNS | ANY, st.integers(1, 200))
def test_pieces_are_the_library_s_whatever_is_split_at_once(text: str, size: int) -> None:
    expected = by_library(text)
    assert joined(text) == expected
    assert joined(text, size=size) == expected
    assert all(len(piece) <= 81 for piece in expected)


@settings(deadline=None, max_examples=200)
@given(MIXED | RUNS, MIXED | RUNS, st.integers(1, 200))
def test_what_follows_changes_no_piece_given_before(text: str, following: str, size: int) -> None:
    early = joined(text, final=False, size=size)
    assert joined(text + following)[: len(early)] == early
    assert len(text) - sum(map(len, early)) < 96 + 81


@settings(deadline=None, max_examples=200)
@given(MIXED | RUNS, st.integers(1, 40))
def test_parts_end_where_pieces_do(text: str, size: int) -> None:
    parts = cut_text(text, size)
    assert "".join(parts) == text
    assert [piece for part in parts for piece in by_library(part)] == by_library(text)
    assert all(size <= len(part) <= 2 * size + 192 for part in parts[:-1])


def test_every_character_has_the_library_s_kind() -> None:
    text = "".join(f"a{c}b {c}1{c}{c}\n" for c in map(chr, (*range(0xD800), *range(0xE000, 0x10000))))
    assert joined(text) == by_library(text)


@pytest.mark.slow
def test_every_character_above_has_the_library_s_kind() -> None:
    for plane in range(1, 17):
        text = "".join(f"a{c}b {c}1{c}\n" for c in map(chr, range(plane << 16, (plane + 1) << 16)))
        assert joined(text) == by_library(text), f"plane {plane}"


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_without_a_place_to_cut(name: str) -> None:
    text = hard_text(name, 1_800_000)  # more than one part also of characters of three bytes
    parts = cut_text(text)
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 2 * _CUT_SIZE + 192
    assert [piece for part in parts for piece in joined(part)] == joined(text)
    assert max(map(len, joined(text))) <= 81


def test_the_usual_places_to_cut_come_first() -> None:
    assert cut_text("ab cd ef", 2) == ["ab", " cd", " ef"]
    assert cut_text("aaaaaaaa", 2) == ["aaaaaaaa"]
    assert cut_text("a" * 640, 64) == ["a" * 192, "a" * 192, "a" * 256]
    assert cut_text("") == [""]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("1234567", ["123", "456", "7"]),
        ("    return x", ["   ", " return", " x"]),
        ("It's 3.14!\n\n\nNo", ["It", "'s", " ", "3", ".", "14", "!\n\n\n", "No"]),
        ("a\r\n\t\tb", ["a", "\r\n", "\t", "\tb"]),
        ("x  \n  y", ["x", "  \n", " ", " y"]),
        ("(foo_bar)", ["(foo", "_bar", ")"]),
        ("e\u0301te\u0301", ["e\u0301te\u0301"]),
        ("\u4f60\u597d\uff0c\u4e16", ["\u4f60\u597d", "\uff0c\u4e16"]),
    ],
)
def test_digits_blanks_and_words(text: str, pieces: list[str]) -> None:
    assert joined(text) == pieces
