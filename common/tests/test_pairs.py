"""Sentence pairs: encoded, cut into batches of bounded size, padded."""

from __future__ import annotations

import itertools

import datasets
import pytest
import torch

from common.data.pairs import END, FIRST_BYTE, IGNORED, PADDING, collate, encode, languages, token_batches

PAIRS = [([10 + i] * (1 + i % 4) + [END], [20 + i] * (1 + i % 3) + [END]) for i in range(12)]


def test_token_batches_hold_every_sentence_once_and_no_more_tokens_than_allowed() -> None:
    batches = token_batches(PAIRS, list(range(12)), 12)
    assert sorted(itertools.chain(*batches)) == list(range(12))
    sizes = [len(batch) * max(max(map(len, PAIRS[i])) for i in batch) for batch in batches]
    assert max(sizes) <= 12 and len(batches) < 8
    lengths = [len(PAIRS[i][0]) for batch in batches for i in batch]
    assert lengths == sorted(lengths)


def test_the_decoder_sees_the_sentence_shifted_by_one() -> None:
    batch = collate([[([4, 5, END], [6, 7, 8, END]), ([4, END], [9, END])]])
    source, before = batch.inputs
    assert source.tolist() == [[[4, 5, END], [4, END, PADDING]]]
    assert before.tolist() == [[[END, 6, 7, 8], [END, 9, PADDING, PADDING]]]
    assert batch.targets.tolist() == [[[6, 7, 8, END], [9, END, IGNORED, IGNORED]]]


def test_a_long_sentence_opens_a_batch_of_its_own() -> None:
    pairs = [([5] * 3, [5] * 3)] * 3 + [([5] * 9, [5] * 2)]
    assert token_batches(pairs, [0, 1, 2, 3], 9) == [[0, 1, 2], [3]]
    with pytest.raises(ValueError, match=r"task.batch_tokens=8: must be >= 9, the longest sentence"):
        token_batches(pairs, [0, 1, 2, 3], 8)


def rows(*pairs: tuple[str, str]) -> datasets.Dataset:
    features = datasets.Features({"translation": datasets.Translation(languages=["de", "en"])})
    return datasets.Dataset.from_dict({"translation": [{"de": a, "en": b} for a, b in pairs]}, features=features)


def test_without_a_tokenizer_sentences_are_bytes_and_an_end() -> None:
    split = rows(("ab", "c"), ("ß", ""))
    assert languages(split, "translation") == ["de", "en"]
    a, b, c = (FIRST_BYTE + value for value in b"abc")
    first, second = (FIRST_BYTE + value for value in "ß".encode())
    assert encode(split, "translation", "", (260, 260)) == [([a, b, END], [c, END]), ([first, second, END], [END])]
    with pytest.raises(ValueError, match=r"model.vocab=259: must be >= 260 for bytes, or set data.tokenizer"):
        encode(split, "translation", "", (260, 259))


def test_rows_written_as_json_have_languages_too() -> None:
    split = datasets.Dataset.from_list([{"translation": {"de": "a", "en": "b"}}])
    assert languages(split, "translation") == ["de", "en"]


def test_another_column_is_refused() -> None:
    with pytest.raises(ValueError, match="data.inputs=text: must be a column of sentence pairs in two languages"):
        languages(datasets.Dataset.from_dict({"text": ["a"]}), "text")


def test_sentences_are_filled_up_to_a_multiple_and_fillers_do_not_count() -> None:
    batch = collate([[([4, END], [5, 6, END])]], multiple=3)
    source, before = batch.inputs
    assert source.shape == (1, 3, 2) and before.shape == batch.targets.shape == (1, 3, 3)
    assert (batch.targets[0, 1:] == IGNORED).all() and source[0, 1:].tolist() == [[END, PADDING]] * 2
    assert batch.real is not None and torch.equal(batch.real, torch.tensor([3.0]))
