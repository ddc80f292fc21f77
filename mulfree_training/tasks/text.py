"""From a text to streams of character or token ids and random windows of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.data import load, tokenise
from common.streams import generator

if TYPE_CHECKING:
    from mulfree_training.config import TrialConfig

WINDOWS = 53  # random stream
UNKNOWN = 0


class Characters:
    """The most frequent characters of a training text; all others are `UNKNOWN`.

    Args:
        texts: training documents.
        size: V, the unknown character included, >= 2.
    """

    def __init__(self, texts: Sequence[str], size: int) -> None:
        counts = Counter("".join(texts))
        # equal counts in the order of the alphabet, so that the ids do not hang on the order of the documents
        ranked = sorted(counts, key=lambda c: (-counts[c], c))[: size - 1]
        self.ids = {c: i for i, c in enumerate(ranked, 1)}

    def encode(self, texts: Sequence[str]) -> Tensor:
        """All documents as one stream (tokens,) int32."""
        return torch.tensor([self.ids.get(c, UNKNOWN) for text in texts for c in text], dtype=torch.int32)


@dataclass(frozen=True)
class Text:
    """Streams of ids (tokens,) by split, cut into windows of `context` + 1."""

    streams: dict[str, Tensor]
    context: int

    def batch(self, seed: int, step: int, size: int) -> Tensor:
        """Random windows of the training text, (size, T + 1) int64; a pure function of (seed, step)."""
        train = self.streams["train"]
        starts = torch.randint(len(train) - self.context, (size,), generator=generator(seed, WINDOWS, step))
        return torch.stack([train[i : i + self.context + 1] for i in starts.tolist()]).long()

    def evaluation(self, split: str, tokens: int) -> Tensor:
        """Consecutive windows of the first `tokens` ids of a split, (n, T + 1) int64, n >= 1."""
        stream = self.streams[split]
        count = max(min(tokens, len(stream) - 1) // self.context, 1)
        return torch.stack([stream[i * self.context :][: self.context + 1] for i in range(count)]).long()


def read(config: TrialConfig) -> Text:
    """The text of a trial.

    Raises:
        ValueError: no split to evaluate on, a text shorter than a window, or more tokens than the network has.
        FileNotFoundError: `data.tokenizer` is not a folder.
    """
    task, data, vocab, context = config.task, config.data, config.model.vocab, config.model.context
    splits = load(data)
    if task.evaluate not in splits:
        raise ValueError(f"task.evaluate={task.evaluate}: data.{task.evaluate}=0 leaves no {task.evaluate} split")
    if task.vocabulary == "characters":
        known = Characters(list(splits["train"][data.inputs]), vocab)
        streams = {name: known.encode(list(split[data.inputs])) for name, split in splits.items()}
    else:
        streams = {name: tokenise(split, data.inputs, data.tokenizer) for name, split in splits.items()}
    largest = max(int(stream.max()) for stream in streams.values())
    if largest >= vocab:
        raise ValueError(f"model.vocab={vocab}: must be > {largest}, the largest token of the text")
    shortest = min(map(len, streams.values()))
    if shortest <= context:
        raise ValueError(f"model.context={context}: must be < {shortest}, the tokens of the shortest split")
    return Text(streams, context)
