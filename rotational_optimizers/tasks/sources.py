"""From a data set to batches: what a trial trains and evaluates on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import load, normalise, standardise, tensors, tokenise
from common.training import Run
from rotational_optimizers.tasks.batches import SampleBatches, Shard, TokenBatches, eval_samples, eval_tokens

if TYPE_CHECKING:
    from datasets import DatasetDict

    from rotational_optimizers.config import NetworkTaskConfig, TrialConfig

PAD = 4  # pixels around a CIFAR image before the random crop


class Source(Protocol):
    """Training batches by step and evaluation batches by split; the first axis of targets is the network."""

    def steps(self, task: NetworkTaskConfig) -> int:
        """Length of the run in optimizer steps."""

    def train_batches(self, step: int, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of one step, in `parts` micro-batches."""

    def eval_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
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

    def train_batches(self, step: int, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = self.batches(step)
        for part_x, part_y in zip(x.chunk(parts, self.batches.axis), y.chunk(parts, 1), strict=True):
            yield part_x.to(self.device, non_blocking=True), part_y.to(self.device, non_blocking=True)

    def eval_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in self.evaluation(split):
            yield x.to(self.device), y.to(self.device)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift by up to 4 pixels and random mirror of each image, (B, C, H, W) -> the same shape."""
    count, _, height, width = images.shape
    padded = F.pad(images, (PAD,) * 4)
    top, left = torch.randint(2 * PAD + 1, (2, count), generator=generator)
    rows = top[:, None] + torch.arange(height)  # (B, H)
    columns = left[:, None] + torch.arange(width)  # (B, W)
    mirror = torch.rand(count, generator=generator) < 0.5
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    batch = torch.arange(count)[:, None, None]
    index = tuple(i.to(images.device) for i in (batch, rows[:, :, None], columns[:, None, :]))
    return padded.permute(0, 2, 3, 1)[index].permute(0, 3, 1, 2)


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
    augment = crop_and_flip if images and task.augment else None
    batches = SampleBatches(x["train"], y["train"], seeds, task.batch_size, task.train_samples, shard, augment)
    size = task.eval_batch_size
    return _Source(batches, lambda split: eval_samples(x[split], y[split], len(seeds), size), run.device)


def standardise_all(train: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Series (N, L) at mean 0 and standard deviation 1 over all points of the training set, as MNIST-1D is used."""
    flat = standardise(train.reshape(-1, 1), *(other.reshape(-1, 1) for other in others))
    return tuple(part.view_as(whole) for part, whole in zip(flat, (train, *others), strict=True))


def _text(config: TrialConfig, data: DatasetDict, seeds: list[int], run: Run, shard: Shard) -> _Source:
    """One stream of tokens a split."""
    streams = {split: tokenise(data[split], config.data.inputs, config.data.tokenizer) for split in data}
    context, size = config.model.context, config.task.eval_batch_size
    batches = TokenBatches(streams["train"], seeds, config.task.batch_size, context, shard)
    limit = config.task.eval_tokens
    return _Source(batches, lambda split: eval_tokens(streams[split][:limit], len(seeds), context, size), run.device)


def open_source(config: TrialConfig, seeds: list[int], run: Run) -> Source:
    """The data of a trial.

    Raises:
        ValueError: the data set does not fit the task (too small, unknown columns).
    """
    data = load(config.data)
    make = _samples if config.data.label else _text
    return make(config, data, seeds, run, Shard(run.rank, run.world))
