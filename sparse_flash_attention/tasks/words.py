"""Word-level tokens without a tokenizer to download: pieces of program text and prose, the frequent ones kept."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

PIECES = re.compile(r"[A-Za-z]+|[0-9]|\n[ ]*| +|.", re.DOTALL)
"""Runs of letters, single digits, a new line with its indentation, runs of spaces, any other character."""

UNKNOWN = 0


def pieces(text: str) -> list[str]:
    """Cut a text into tokens; joined they give the text again."""
    return PIECES.findall(text)


class Vocabulary:
    """The most frequent tokens of a training text; all others are `UNKNOWN`.

    Args:
        texts: training documents.
        size: V, the unknown token included.

    Raises:
        ValueError: size < 2.
    """

    def __init__(self, texts: Sequence[str], size: int) -> None:
        if size < 2:
            raise ValueError(f"size={size}: must be >= 2")
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(pieces(text))
        # equal counts in the order of the alphabet, so that the ids do not hang on the order of the documents
        ranked = sorted(counts, key=lambda word: (-counts[word], word))[: size - 1]
        self.ids = {word: i for i, word in enumerate(ranked, 1)}

    def __len__(self) -> int:
        return len(self.ids) + 1

    def encode(self, texts: Sequence[str]) -> Tensor:
        """All documents as one stream (tokens,) int32."""
        return torch.tensor([self.ids.get(word, UNKNOWN) for text in texts for word in pieces(text)], dtype=torch.int32)
