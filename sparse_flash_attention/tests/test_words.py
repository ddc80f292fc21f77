"""Word-level tokens: nothing of a text is lost, ids do not hang on the order of documents."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_flash_attention.tasks.words import UNKNOWN, Vocabulary, pieces

CODE = "def f(x_1):\n    return  x_1 + 42  # é\n"


@settings(deadline=None)
@given(st.text())
def test_pieces_joined_are_the_text(text: str) -> None:
    assert "".join(pieces(text)) == text
    assert "".join(pieces(text + CODE)) == text + CODE


def test_pieces_are_words_digits_indents_and_single_characters() -> None:
    assert pieces(CODE) == [
        "def", " ", "f", "(", "x", "_", "1", ")", ":", "\n    ", "return", "  ", "x", "_", "1", " ", "+", " ", "4", "2",
        "  ", "#", " ", "é", "\n",
    ]  # fmt: skip
    assert pieces("") == [] and pieces("\n\n\t\r ") == ["\n", "\n", "\t", "\r", " "]


def test_the_most_frequent_pieces_are_kept_in_order() -> None:
    words = Vocabulary(["b b b a a c"], 4)
    assert words.ids == {" ": 1, "b": 2, "a": 3} and len(words) == 4
    assert words.encode(["b c", "a"]).tolist() == [2, 1, UNKNOWN, 3]


def test_equal_counts_are_in_the_order_of_the_alphabet() -> None:
    for text in ("z.a.m.", "m.z.a.", "a.m.z."):
        assert Vocabulary([text], 9).ids == {".": 1, "a": 2, "m": 3, "z": 4}
    one, other = Vocabulary(["x y", "p-q"], 5), Vocabulary(["p-q", "x y"], 5)
    assert one.ids == other.ids == {" ": 1, "-": 2, "p": 3, "q": 4}


def test_unknown_pieces_are_one_token_and_known_ones_come_back() -> None:
    words = Vocabulary([CODE], 50)
    back = {i: word for word, i in words.ids.items()}
    stream = words.encode([CODE])
    assert stream.dtype is torch.int32 and UNKNOWN not in stream.tolist()
    assert "".join(back[i] for i in stream.tolist()) == CODE
    assert words.encode(["while"]).tolist() == [UNKNOWN] and words.encode([]).shape == (0,)
    assert UNKNOWN not in back and max(back) == len(words) - 1


def test_the_size_counts_the_unknown_token() -> None:
    text = ["a b c d e f"]
    for size in (2, 3, 5):
        words = Vocabulary(text, size)
        assert len(words) == size and int(words.encode(text).max()) == size - 1
    assert len(Vocabulary(text, 100)) == 8  # six letters, the space, the unknown
    with pytest.raises(ValueError, match="size=1: must be >= 2"):
        Vocabulary(text, 1)
