"""Batches of sentence pairs, pure functions of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from common.data.pairs import Batch, collate, encode, token_batches
from common.streams import generator
from rotational_optimizers.tasks.batches import ORDER, SUBSET, Shard

if TYPE_CHECKING:
    from datasets import DatasetDict

    from rotational_optimizers.config import NetworkTaskConfig, TrialConfig


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
