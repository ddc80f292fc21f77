"""Sentence pairs in batches of similar length: what a translation network is trained on.

A batch is padded to its longest sentence, so sentences of similar length share one, and its size is bounded in tokens,
not in sentences (fairseq's `--max-tokens`).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset

PADDING = 1
"""Id of the padding token in both languages (fairseq's)."""
IGNORED = -100
"""A target that no loss counts (torch's default)."""
END = 2  # of a sentence; with PADDING = 1, fairseq's numbering
FIRST_BYTE = 4  # without a tokenizer: after <s>, <pad>, </s>, <unk>
READ = 1000

Pairs = list[tuple[list[int], list[int]]]


class Batch(NamedTuple):
    """What a network is trained or evaluated on at once; the first axis of `targets` is the network."""

    inputs: tuple[Tensor, ...]
    """What the network is called with."""
    targets: Tensor
    """Classes (S, B, ...), `IGNORED` where there is none, or probabilities (S, B, K)."""
    real: Tensor | None = None
    """(S,) how many targets count, on average over micro-batches and processes, where some are ignored; None: all."""

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        inputs = tuple(part.to(device, non_blocking=True) for part in self.inputs)
        real = None if self.real is None else self.real.to(device)
        return Batch(inputs, self.targets.to(device, non_blocking=True), real)


def vocabulary(folder: str) -> int:
    """Number of tokens of a saved tokenizer.

    Raises:
        FileNotFoundError: `folder` is not a folder.
    """
    return len(_tokenizer(folder))


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    place = os.path.expanduser(folder)
    if not os.path.isdir(place):
        raise FileNotFoundError(errno.ENOENT, "no such folder", folder)
    return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)


def languages(split: Dataset, column: str) -> list[str]:
    """The two languages of a column of sentence pairs, source first.

    Raises:
        ValueError: the column has no such pairs.
    """
    feature = split.features[column]
    found = list(getattr(feature, "languages", feature if isinstance(feature, dict) else ()))
    if len(found) != 2:
        raise ValueError(f"data.inputs={column}: must be a column of sentence pairs in two languages, it is {feature}")
    return found


def encode(split: Dataset, column: str, folder: str, sizes: tuple[int, int]) -> Pairs:
    """All pairs of a split as token ids, the end of the sentence included.

    Args:
        split: rows of {<source>: text, <target>: text}.
        column: their column.
        folder: has a saved tokenizer in a folder of each language's name; empty means bytes.
        sizes: tokens that the network knows, source and target.

    Raises:
        FileNotFoundError: a tokenizer is missing.
        ValueError: a vocabulary is larger than the network's, or numbered otherwise.
    """
    sides = [
        _encode_side(split, column, language, folder, key, size)
        for language, key, size in zip(languages(split, column), ("source_vocab", "vocab"), sizes, strict=True)
    ]
    return list(zip(*sides, strict=True))


def _encode_side(split: Dataset, column: str, language: str, folder: str, key: str, size: int) -> list[list[int]]:
    rows = (pair[language] for start in range(0, len(split), READ) for pair in split[start : start + READ][column])
    if not folder:
        if size < FIRST_BYTE + 256:
            raise ValueError(f"model.{key}={size}: must be >= {FIRST_BYTE + 256} for bytes, or set data.tokenizer")
        return [[FIRST_BYTE + byte for byte in row.encode()] + [END] for row in rows]
    encoder = _tokenizer(os.path.join(folder, language))
    if (encoder.pad_token_id, encoder.eos_token_id) != (PADDING, END):
        found = f"{encoder.pad_token_id} and {encoder.eos_token_id}"
        raise ValueError(f"data.tokenizer={folder}: padding and end must have ids {PADDING} and {END}, not {found}")
    if len(encoder) > size:
        raise ValueError(f"model.{key}={size}: must be >= {len(encoder)}, the tokens of {folder}/{language}")
    return [[*ids, END] for ids in encoder(list(rows), add_special_tokens=False)["input_ids"]]


def token_batches(pairs: Pairs, order: list[int], max_tokens: int) -> list[list[int]]:
    """Cut sentences, sorted by length, into batches whose padded sides have at most `max_tokens` tokens.

    Args:
        pairs: all sentences.
        order: indices, which decide between sentences of equal length.
        max_tokens: upper bound on sentences times the longest of them, in either language.

    Raises:
        ValueError: a sentence alone is longer.
    """
    batches: list[list[int]] = [[]]
    longest = 0
    for i in sorted(order, key=lambda i: (len(pairs[i][0]), len(pairs[i][1]))):
        length = max(map(len, pairs[i]))
        if length > max_tokens:
            raise ValueError(f"task.batch_tokens={max_tokens}: must be >= {length}, the longest sentence")
        longest = max(longest, length)
        if (len(batches[-1]) + 1) * longest > max_tokens:
            batches.append([])
            longest = length
        batches[-1].append(i)
    return batches


def collate(pairs: list[Pairs], multiple: int = 1) -> Batch:
    """Pad the sentences of every network to one shape.

    Args:
        pairs: one list of pairs a network; networks may have different numbers of them.
        multiple: sentences a network are filled up to a multiple of this.

    Returns:
        Inputs: source (S, B, T) and target (S, B, T'), which starts with the end token; targets (S, B, T'), `IGNORED`
        at padding; real (S,), the number of others.
    """
    rows = -(-max(map(len, pairs)) // multiple) * multiple
    # filler sentences are not empty, since attention over nothing is NaN; none of their targets counts
    filled = [[*own, *[([END], [])] * (rows - len(own))] for own in pairs]
    flat = [pair for own in filled for pair in own]
    source = _padded([s for s, _ in flat], PADDING)
    target = _padded([t for _, t in flat], IGNORED)
    previous = torch.cat([target.new_full((len(target), 1), END), target[:, :-1]], 1)
    previous = previous.masked_fill(target == IGNORED, PADDING)
    source, previous, target = (part.unflatten(0, (len(pairs), rows)) for part in (source, previous, target))
    return Batch((source, previous), target, (target != IGNORED).flatten(1).sum(1).float())


def _padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
