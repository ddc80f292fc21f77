"""From a data set to streams of tokens and random windows of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.data import load, tokenise
from common.streams import generator
from sparse_flash_attention.tasks.words import Vocabulary

if TYPE_CHECKING:
    from sparse_flash_attention.config import TrialConfig

WINDOWS = 40  # random stream


@dataclass(frozen=True)
class Text:
    """Token streams (tokens,) of the training split and of the split to evaluate on."""

    train: Tensor
    held_out: Tensor
    context: int

    def batch(self, seed: int, step: int, size: int) -> Tensor:
        """Random windows of the training text, (size, T + 1) int64; a pure function of (seed, step)."""
        starts = torch.randint(len(self.train) - self.context, (size,), generator=generator(seed, WINDOWS, step))
        return torch.stack([self.train[i : i + self.context + 1] for i in starts.tolist()]).long()

    def evaluation(self, tokens: int) -> Tensor:
        """Consecutive windows of the first `tokens` held-out tokens, (n, T + 1) int64, n >= 1."""
        count = max(min(tokens, len(self.held_out) - 1) // self.context, 1)
        return torch.stack([self.held_out[i * self.context :][: self.context + 1] for i in range(count)]).long()


def read(config: TrialConfig) -> Text:
    """The text of a trial.

    Raises:
        ValueError: no split to evaluate on, a text shorter than a window, or more tokens than the network has.
        FileNotFoundError: `data.tokenizer` is not a folder.
    """
    task, data, vocab = config.task, config.data, config.model.vocab
    made = repr((data, task.vocabulary, vocab, task.evaluate))
    if made not in _streams:
        _streams.clear()
        _streams[made] = _read(config)
    streams, context = _streams[made], config.model.context
    if min(map(len, streams)) <= context:
        raise ValueError(
            f"model.context={context}: must be < {min(map(len, streams))}, the tokens of the shorter split"
        )
    return Text(*streams, context)


_streams: dict[str, tuple[Tensor, Tensor]] = {}
"""What the last trial of this process read: the trials of a sweep share it."""


def _read(config: TrialConfig) -> tuple[Tensor, Tensor]:
    """Streams of the training split and of the split to evaluate on."""
    task, data, vocab = config.task, config.data, config.model.vocab
    splits = load(data)
    if task.evaluate not in splits:
        raise ValueError(f"task.evaluate={task.evaluate}: data.{task.evaluate}=0 leaves no {task.evaluate} split")
    train, held_out = splits["train"], splits[task.evaluate]
    if task.vocabulary == "words":
        words = Vocabulary(list(train[data.inputs]), vocab)
        return words.encode(list(train[data.inputs])), words.encode(list(held_out[data.inputs]))
    folder = data.tokenizer if task.vocabulary == "tokenizer" else ""
    streams = tokenise(train, data.inputs, folder), tokenise(held_out, data.inputs, folder)
    largest = max(int(stream.max()) for stream in streams)
    if largest >= vocab:
        raise ValueError(f"model.vocab={vocab}: must be > {largest}, the largest token of the text")
    return streams
