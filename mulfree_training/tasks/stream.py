"""Images read and cropped one by one by worker processes while the networks train: ImageNet, and timm's augmentation.

Every crop is a pure function of (seed, step, place in the batch): a run resumes at any step, and neither the number of
processes nor that of workers changes what a network sees. (Mixup pairs the images of one process's micro-batch.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.data.crops import (
    Crop,
    CroppedImages,
    Items,
    centre_crop,
    deit_crop,
    deit_mix,
    loader,
    normalised,
    random_crop,
    seeded,
)
from common.streams import key
from mulfree_training.tasks.training import Batch, epoch_order, own_rows

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from common.training import Run
    from mulfree_training.config import TrialConfig

WINDOWS, MIXES = 54, 55  # random streams
LOOK = 16
"""Images to look at: sets of one size say so at once."""


def is_streamed(config: TrialConfig, split: Dataset) -> bool:
    """Must the images be read one by one?

    Raises:
        ValueError: timm shall augment what are no images.
    """
    import datasets

    images = isinstance(split.features[config.data.inputs], datasets.Image)
    deit = config.task.augment == "deit"
    if deit and not images:
        raise ValueError(f"task.augment=deit: must be none or crop for data.name={config.data.name}, rows of numbers")
    return deit or (images and len({image.size for image in split[:LOOK][config.data.inputs]}) > 1)


class Stream:
    """Images from disk: batches by (seed, step), and whole splits.

    Crops: the middle 7/8 (`task.augment=none` and evaluation), a random part and mirror (`crop`), or timm's with mixup
    and cutmix, whose targets are probabilities (`deit`). Reading goes on in the background, by `threads` - 1 processes,
    where batches are asked for in the order of training.

    Args:
        config: `task.upsample` is the side of the crops.
        splits: with columns of images and labels.
        seeds: of the models.
        run: of which processes and micro-batches.

    Raises:
        ValueError: no side, another number of channels, micro-batches that cannot be mixed in pairs, or no timm.
    """

    def __init__(self, config: TrialConfig, splits: DatasetDict, seeds: list[int], run: Run) -> None:
        task, c = config.task, config.data
        side, channels = task.upsample, config.model.in_channels
        if side is None:
            raise ValueError(f"task.upsample=null: must be given, the images of {c.name} differ in size")
        if channels != 3 or len(c.mean) != 3:
            raise ValueError(f"model.in_channels={channels}: must be 3, with as many of data.mean={c.mean}")
        deit = task.augment == "deit"
        if deit and task.batch_size % (2 * task.accumulate * run.world):
            pairs = f"a multiple of 2 * task.accumulate={task.accumulate} * {run.world} processes"
            raise ValueError(f"task.batch_size={task.batch_size}: must be {pairs} for task.augment=deit, to mix pairs")
        self.config, self.splits, self.seeds, self.run = config, splits, seeds, run
        self.middle = partial(centre_crop, size=side)
        plain = partial(random_crop, size=side) if task.augment == "crop" else self.middle
        self.crop: Crop = deit_crop(side, c.mean, c.std, task.deit) if deit else plain
        self.mix = deit_mix(config.model.classes, task.deit) if deit else None
        self.steps_per_epoch = len(splits["train"]) // task.batch_size
        total = task.epochs * self.steps_per_epoch
        self.steps = total if config.max_steps is None else min(total, config.max_steps)
        self._next = -1
        self._read: Iterator[tuple[Tensor, Tensor]] = iter(())

    def __call__(self, seed: int, step: int) -> Promise:
        """The batch of one model, of which only the rows that are asked for are read."""
        return Promise(self, seed, step)

    def part(self, seed: int, step: int, rows: slice) -> Batch:
        """Some rows of a batch."""
        world, parts = self.run.world, self.config.task.accumulate
        micro = rows.start - self.run.rank * parts
        if rows != own_rows(self.run, micro, parts):
            raise ValueError(f"rows={rows}: must be the rows of a micro-batch of this process")
        place = (step * parts + micro) * len(self.seeds) + self.seeds.index(seed)
        if place != self._next:
            self._read = iter(self._loader("train", self.crop, self._plan(place)))
        self._next = place + 1
        x, y = next(self._read)
        x = self._floats(x)
        if self.mix is not None:
            with seeded(key(seed, MIXES, (step * parts + micro) * world + self.run.rank)):
                x, y = self.mix(x, y.to(x.device))
        return Batch((x,), y)

    def held_out(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The middles of a split's images in order, part by part."""
        rows = torch.arange(len(self.splits[split])).split(self.config.task.eval_batch_size)
        for x, y in self._loader(split, self.middle, [[(row, 0) for row in part.tolist()] for part in rows]):
            yield self._floats(x), y

    def _plan(self, first: int) -> Iterator[Items]:
        """What is read from a place on: step by step, micro-batch by micro-batch, model by model."""
        task, rows = self.config.task, len(self.splits["train"])
        for place in range(first, self.steps * task.accumulate * len(self.seeds)):
            rest, network = divmod(place, len(self.seeds))
            step, micro = divmod(rest, task.accumulate)
            seed, (epoch, position) = self.seeds[network], divmod(step, self.steps_per_epoch)
            places = range(task.batch_size)[own_rows(self.run, micro, task.accumulate)]
            order = epoch_order(seed, epoch, rows)[position * task.batch_size :][list(places)].tolist()
            crops = [key(seed, WINDOWS, step * task.batch_size + i) for i in places]
            yield list(zip(order, crops, strict=True))

    def _loader(self, split: str, crop: Crop, plan: Iterator[Items] | list[Items]) -> Iterator[tuple[Tensor, Tensor]]:
        c = self.config.data
        images = CroppedImages(self.splits[split], c.inputs, c.label, crop)
        return iter(loader(images, plan, self.config.threads - 1, self.run.device))

    def _floats(self, x: Tensor) -> Tensor:
        return normalised(x, self.config.data.mean, self.config.data.std, self.run.device)


@dataclass
class Promise:
    """A batch that is read in parts."""

    stream: Stream
    seed: int
    step: int

    def rows(self, part: slice) -> Batch:
        """Read some rows."""
        return self.stream.part(self.seed, self.step, part)
