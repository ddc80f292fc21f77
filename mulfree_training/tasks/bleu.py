"""Corpus BLEU (Papineni et al. 2002) on detokenised text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

ORDER = 4
WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    """Words, and marks one by one, so that it does not matter whether a tokenizer put spaces around them."""
    return WORD.findall(text)


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """100 times the geometric mean of clipped n-gram precisions up to n = 4, times the brevity penalty.

    Counts are added over all sentences, case counts, nothing is smoothed: without one common 4-gram it is 0. Words are
    cut in our own way, so that the last points are not comparable with sacrebleu's.

    Args:
        hypotheses: translations.
        references: one for each.

    Raises:
        ValueError: different numbers of them, or none.
    """
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"{len(hypotheses)} hypotheses: must be as many as the {len(references)} references, >= 1")
    matched, found = [0] * ORDER, [0] * ORDER
    length = wanted = 0
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        own, other = words(hypothesis), words(reference)
        length, wanted = length + len(own), wanted + len(other)
        for n in range(1, ORDER + 1):
            grams = _grams(own, n)
            matched[n - 1] += (grams & _grams(other, n)).total()
            found[n - 1] += grams.total()
    if not all(matched):
        return 0.0
    precision = math.exp(sum(math.log(m / f) for m, f in zip(matched, found, strict=True)) / ORDER)
    return 100 * precision * min(1.0, math.exp(1 - wanted / length))


def _grams(sentence: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(sentence[i:] for i in range(n)), strict=False))
