"""From a data set to batches: what a trial trains and evaluates on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from common.data import load, normalise, standardise, tensors, tokenise
from common.data.augment import crop_and_flip
from common.data.pairs import Batch, vocabulary
from common.training import Run
from rotational_optimizers.tasks.batches import (
    SampleBatches,
    Shard,
    TokenBatches,
    check_parts,
    eval_samples,
    eval_tokens,
)
from rotational_optimizers.tasks.stream import ImageStream
from rotational_optimizers.tasks.translation import TranslationSource

if TYPE_CHECKING:
    from datasets import DatasetDict

    from rotational_optimizers.config import NetworkTaskConfig, TrialConfig

BYTES = 256


class Source(Protocol):
    """Training batches by step and evaluation batches by split."""

    def steps(self, task: NetworkTaskConfig) -> int:
        """Length of the run in optimizer steps."""

    def train_batches(self, step: int, parts: int) -> Iterator[Batch]:
        """This process's part of one step, in `parts` micro-batches."""

    def eval_batches(self, split: str) -> Iterator[Batch]:
        """A whole split in order."""


class _Source:
    """A `Source` of in-memory batches."""

    def __init__(
        self,
        batches: SampleBatches | TokenBatches,
        evaluation: Callable[[str], Iterator[tuple[Tensor, Tensor]]],
        device: torch.device,
    ) -> None:
        self.batches, self.evaluation, self.device = batches, evaluation, device

    def steps(self, task: NetworkTaskConfig) -> int:
        return task.steps if task.epochs is None else max(1, round(task.epochs * self.batches.steps_per_epoch))

    def train_batches(self, step: int, parts: int) -> Iterator[Batch]:
        x, y = self.batches(step)
        for part_x, part_y in zip(x.chunk(parts, self.batches.axis), y.chunk(parts, 1), strict=True):
            yield Batch((part_x,), part_y).to(self.device)

    def eval_batches(self, split: str) -> Iterator[Batch]:
        for x, y in self.evaluation(split):
            yield Batch((x,), y).to(self.device)


def _samples(config: TrialConfig, data: DatasetDict, seeds: list[int], run: Run, shard: Shard) -> _Source:
    """Labelled samples: series (N, L) -> (N, 1, L), images (N, C, H, W) normalised, rows standardised."""
    c = config.data
    parts = {split: tensors(data[split], [c.inputs, c.label]) for split in data}
    x = {split: part[c.inputs] for split, part in parts.items()}
    images = x["train"].ndim == 4
    if images:
        x = {split: normalise(value, c.mean, c.std) for split, value in x.items()}
    else:
        scaled = standardise_all(x["train"], *(x[s] for s in x if s != "train"))
        x = {s: v[:, None] for s, v in zip(["train", *(s for s in x if s != "train")], scaled, strict=True)}
    x = {split: value.to(run.device) for split, value in x.items()}
    y = {split: part[c.label].to(run.device) for split, part in parts.items()}
    task = config.task
    augment = crop_and_flip if images and task.augment == "crop_flip" else None
    batches = SampleBatches(x["train"], y["train"], seeds, task.batch_size, task.train_samples, shard, augment)
    size = task.eval_batch_size
    return _Source(batches, lambda split: eval_samples(x[split], y[split], len(seeds), size), run.device)


def standardise_all(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Series (N, L) at mean 0 and standard deviation 1 over all points of the training set, as MNIST-1D is used."""
    flat = standardise(train.reshape(-1, 1), *(other.reshape(-1, 1) for other in others))
    return tuple(part.view_as(whole) for part, whole in zip(flat, (train, *others), strict=True))


def _text(config: TrialConfig, data: DatasetDict, seeds: list[int], run: Run, shard: Shard) -> _Source:
    """One stream of tokens a split."""
    folder = config.data.tokenizer
    tokens = vocabulary(folder) if folder else BYTES
    # bytes would train a network of 50,257 tokens without complaint, and mean nothing
    if tokens > config.model.vocab or (not folder and config.model.vocab != BYTES):
        kind = f"data.tokenizer={folder}" if folder else "bytes: set data.tokenizer=<folder of a saved tokenizer>"
        raise ValueError(f"model.vocab={config.model.vocab}: the text has {tokens} tokens ({kind})")
    streams = {split: tokenise(data[split], config.data.inputs, folder) for split in data}
    context, size = config.model.context, config.task.eval_batch_size
    batches = TokenBatches(streams["train"], seeds, config.task.batch_size, context, shard)
    limit = config.task.eval_tokens
    return _Source(batches, lambda split: eval_tokens(streams[split][:limit], len(seeds), context, size), run.device)


def open_source(config: TrialConfig, seeds: list[int], run: Run) -> Source:
    """The data of a trial.

    Raises:
        ValueError: the data set does not fit the task (too small, unknown columns, no split to evaluate on, a
            vocabulary that the network does not have, micro-batches of unequal size).
        FileNotFoundError: `data.path` or `data.tokenizer` is not a folder.
    """
    task, data, shard = config.task, load(config.data), Shard(run.rank, run.world)
    for split in ("validation", "test") if task.evaluate == "both" else (task.evaluate,):
        if split not in data:
            raise ValueError(f"task.evaluate={task.evaluate}: data.{split}=0 leaves no {split} split")
    if config.model.name == "translation":
        return TranslationSource(config, data, seeds, run.device, shard)
    check_parts(task.batch_size, task.accumulate, run.world)
    if not config.data.label:
        return _text(config, data, seeds, run, shard)
    if task.image_size is not None:
        return ImageStream(config, data, seeds, run.device, shard)
    return _samples(config, data, seeds, run, shard)
