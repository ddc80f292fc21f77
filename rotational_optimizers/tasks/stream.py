"""Images of any size, read and cropped by worker processes while the network trains (ImageNet).

Every crop is a pure function of (seed, step, place in the batch): a run resumes at any step, and neither the number of
processes nor that of workers changes what a network sees. (Mixup pairs the images of one process's micro-batch.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.data.crops import (
    Crop,
    CroppedImages,
    DeiTConfig,
    Items,
    centre_crop,
    deit_crop,
    deit_mix,
    loader,
    normalised,
    random_crop,
    seeded,
)
from common.data.pairs import Batch
from common.streams import generator, key
from rotational_optimizers.tasks.batches import ORDER, SUBSET, WINDOWS, Shard

if TYPE_CHECKING:
    from datasets import DatasetDict

    from rotational_optimizers.config import NetworkTaskConfig, TrialConfig

DEIT = DeiTConfig("rand-m9-mstd0.5-inc1", color_jitter=0.3, erasing=0.25, mixup=0.8, cutmix=1.0)
"""Touvron et al. 2021."""


class _Order:
    """Which images every network sees when: new order every epoch, a random subset for every seed."""

    def __init__(self, rows: int, size: int, seeds: list[int], task: NetworkTaskConfig, shard: Shard) -> None:
        self.seeds, self.size, self.batch_size, self.parts = seeds, size, task.batch_size, task.accumulate
        self.steps_per_epoch = size // task.batch_size
        self.steps = task.steps if task.epochs is None else max(1, round(task.epochs * self.steps_per_epoch))
        self.mine = shard.of(torch.arange(task.batch_size)[None])[0]  # (b,) places in the batch
        self.subsets = [torch.randperm(rows, generator=generator(s, SUBSET))[:size] for s in seeds]
        self._epoch, self._rows = -1, self.subsets

    def after(self, first: int) -> Iterator[Items]:
        """The micro-batches of this process from a step on."""
        for step in range(first, self.steps):
            yield from self.step(step)

    def step(self, step: int) -> Iterator[Items]:
        """The micro-batches of this process in one step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            orders = [torch.randperm(self.size, generator=generator(s, ORDER, epoch)) for s in self.seeds]
            self._rows = [subset[order] for subset, order in zip(self.subsets, orders, strict=True)]
            self._epoch = epoch
        for part in self.mine.chunk(self.parts):
            items: Items = []
            for seed, rows in zip(self.seeds, self._rows, strict=True):
                crops = [key(seed, WINDOWS, step * self.batch_size + place) for place in part.tolist()]
                items += zip(rows[position * self.batch_size + part].tolist(), crops, strict=True)
            yield items


class ImageStream:
    """A `Source` of images from disk.

    Args:
        config: `task.image_size` is the side of the crops; `threads` - 1 workers read.
        data: splits with a column of images and one of labels.
        seeds: one network each, with its own order, crops and (`task.train_samples`) subset.
        device: where the batches go.
        shard: this process's part.

    Raises:
        ValueError: more samples than there are, micro-batches that cannot be mixed in pairs, or no timm.
    """

    def __init__(
        self, config: TrialConfig, data: DatasetDict, seeds: list[int], device: torch.device, shard: Shard
    ) -> None:
        task, c, rows = config.task, config.data, len(data["train"])
        assert task.image_size is not None
        size = rows if task.train_samples is None else task.train_samples
        if not task.batch_size <= size <= rows:
            allowed = f"in [{task.batch_size}, {rows}], from the batch size to the size of the training split"
            raise ValueError(f"task.train_samples={task.train_samples}: must be {allowed}")
        deit = task.augment == "deit"
        if deit and task.batch_size % (2 * task.accumulate * shard.world):
            raise ValueError(f"task.augment=deit: mixes pairs, task.batch_size={task.batch_size} has odd parts")
        self.config, self.data, self.seeds, self.device, self.shard = config, data, seeds, device, shard
        self.order = _Order(rows, size, seeds, task, shard)
        self.middle = partial(centre_crop, size=task.image_size)
        plain = self.middle if task.augment == "none" else partial(random_crop, size=task.image_size)
        self.crop: Crop = deit_crop(task.image_size, c.mean, c.std, DEIT) if deit else plain
        self.mix = deit_mix(c.classes, DEIT) if deit else None
        self._next = -1
        self._batches: Iterator[tuple[Tensor, Tensor]] = iter(())

    def steps(self, task: NetworkTaskConfig) -> int:
        """Length of the run in optimizer steps."""
        return self.order.steps

    def train_batches(self, step: int, parts: int) -> Iterator[Batch]:
        """This process's part of one step; reading goes on in the background where steps follow each other."""
        if step != self._next:
            self._batches = iter(self._loader("train", self.crop, self.order.after(step)))
        self._next = step + 1
        for part in range(parts):
            x, y = next(self._batches)
            y = y.view(len(self.seeds), -1)  # (S, b)
            x = self._floats(x).unflatten(0, y.shape)  # (S, b, 3, H, W)
            if self.mix is not None:
                x, y = self._mixed(x, y, step * parts + part)
            yield Batch((x.transpose(0, 1).flatten(1, 2),), y.to(self.device))

    def eval_batches(self, split: str) -> Iterator[Batch]:
        """A whole split in order, every network on the same centre crops."""
        rows = torch.arange(len(self.data[split])).split(self.config.task.eval_batch_size)
        networks = len(self.seeds)
        for x, y in self._loader(split, self.middle, [[(row, 0) for row in part.tolist()] for part in rows]):
            yield Batch((self._floats(x).repeat(1, networks, 1, 1),), y.to(self.device).expand(networks, -1))

    def _loader(self, split: str, crop: Crop, plan: Iterable[Items]) -> Iterable[tuple[Tensor, Tensor]]:
        c = self.config.data
        images = CroppedImages(self.data[split], c.inputs, c.label, crop)
        return loader(images, plan, self.config.threads - 1, self.device)

    def _floats(self, x: Tensor) -> Tensor:
        return normalised(x, self.config.data.mean, self.config.data.std, self.device)

    def _mixed(self, x: Tensor, y: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Mixup or cutmix within every network's micro-batch: images (S, b, 3, H, W), probabilities (S, b, K)."""
        assert self.mix is not None
        mixed = []
        for seed, images, labels in zip(self.seeds, x, y.to(self.device), strict=True):
            with seeded(key(seed, WINDOWS, index * self.shard.world + self.shard.rank)):
                mixed.append(self.mix(images.clone(), labels))
        return torch.stack([images for images, _ in mixed]), torch.stack([labels for _, labels in mixed])
