"""Sentence pairs in batches of similar length: what a translation network is trained on.

A batch is padded to its longest sentence, so sentences of similar length share one, and its size is bounded in tokens,
not in sentences (fairseq's `--max-tokens`). Batches are pure functions of (seed, step).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.models.translation import PADDING
from common.streams import generator
from rotational_optimizers.tasks.batches import IGNORED, ORDER, SUBSET, Batch, Shard

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from rotational_optimizers.config import NetworkTaskConfig, TrialConfig

END = 2  # of a sentence; with PADDING = 1, fairseq's numbering
FIRST_BYTE = 4  # without a tokenizer: after <s>, <pad>, </s>, <unk>
READ = 1000

Pairs = list[tuple[list[int], list[int]]]


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


class TranslationSource:
    """A `Source` of sentence pairs.

    Args:
        config: `task.batch_tokens` bounds a batch over all processes.
        data: splits with a column of pairs.
        seeds: one network each, with its own batches in its own order.
        device: where the batches go.
        shard: this process's part.

    Raises:
        ValueError: no `task.batch_tokens`, or what `encode` and `token_batches` refuse.
    """

    def __init__(
        self, config: TrialConfig, data: DatasetDict, seeds: list[int], device: torch.device, shard: Shard
    ) -> None:
        task, c = config.task, config.data
        if task.batch_tokens is None:
            raise ValueError("task.batch_tokens=null: must be > 0 for model.name=translation")
        sizes = config.model.source_vocab, config.model.vocab
        self.pairs = {name: encode(data[name], c.inputs, c.tokenizer, sizes) for name in data}
        self.seeds, self.device, self.shard, self.max_tokens = seeds, device, shard, task.batch_tokens
        count = len(self.pairs["train"])
        size = count if task.train_samples is None else task.train_samples
        if size > count:
            raise ValueError(f"task.train_samples={size}: must be in [1, {count}], the size of the training split")
        subsets = [torch.randperm(count, generator=generator(s, SUBSET))[:size].tolist() for s in seeds]
        self.batches = [token_batches(self.pairs["train"], subset, self.max_tokens) for subset in subsets]

    def steps(self, task: NetworkTaskConfig) -> int:
        """Length of the run in optimizer steps; an epoch is one of the first seed's."""
        return task.steps if task.epochs is None else max(1, round(task.epochs * len(self.batches[0])))

    def train_batches(self, step: int, parts: int) -> Iterator[Batch]:
        """This process's part of one step, in `parts` micro-batches, weighted as one batch over all processes."""
        own = [self._chosen(seed, step) for seed in range(len(self.seeds))]
        whole = collate([[self.pairs["train"][i] for i in chosen] for chosen in own], parts * self.shard.world)
        assert whole.real is not None
        real = whole.real / (parts * self.shard.world)
        mine = [self.shard.of(part).chunk(parts, 1) for part in (*whole.inputs, whole.targets)]
        for source, previous, target in zip(*mine, strict=True):
            yield Batch((source, previous), target, real).to(self.device)

    def _chosen(self, network: int, step: int) -> list[int]:
        batches = self.batches[network]
        epoch, position = divmod(step, len(batches))
        order = torch.randperm(len(batches), generator=generator(self.seeds[network], ORDER, epoch))
        return batches[int(order[position])]

    def eval_batches(self, split: str) -> Iterator[Batch]:
        """A whole split, sorted by length, every network on the same sentences."""
        pairs = self.pairs[split]
        for batch in token_batches(pairs, list(range(len(pairs))), self.max_tokens):
            yield collate([[pairs[i] for i in batch]] * len(self.seeds)).to(self.device)
