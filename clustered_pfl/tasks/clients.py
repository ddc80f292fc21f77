"""The clients' images: which rows each holds, its view of them, its batches, and what it is tested on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.data import load, normalise, partition, tensors
from common.data.augment import crop_and_flip
from common.streams import generator, key

if TYPE_CHECKING:
    from clustered_pfl.config import TrialConfig
    from common.data.partition import Partition

DEAL, ORDER, AUGMENT = 0, 1, 2  # independent random streams of one seed


@dataclass(frozen=True)
class Split:
    """Images (n, C, H, W) float32 and labels (n,) of one split, as they are in the data set."""

    x: Tensor
    y: Tensor


def read(config: TrialConfig, device: torch.device) -> dict[str, Split]:
    """The three splits, scaled by one mean and deviation a channel, so that turning an image commutes with it."""
    data = config.data
    found = {}
    for name, split in load(data).items():
        columns = tensors(split, [data.inputs, data.label])
        found[name] = (columns[data.inputs], columns[data.label])
    if data.mean:
        return {k: Split(normalise(x, data.mean, data.std).to(device), y.to(device)) for k, (x, y) in found.items()}
    side = round(found["train"][0].shape[1] ** 0.5)
    if side * side != found["train"][0].shape[1]:
        raise ValueError(f"data={data.name}: {found['train'][0].shape[1]} values a row, must be a square image")
    mean, std = found["train"][0].mean(), found["train"][0].std()
    return {
        k: Split(((x - mean) / std).view(-1, 1, side, side).to(device), y.to(device)) for k, (x, y) in found.items()
    }


def deal(config: TrialConfig, labels: Tensor, seed: int) -> Partition:
    """The partition of the training rows for one seed."""
    c, classes = config.partition, config.data.classes
    how = {
        "n_clusters": c.n_clusters, "samples": c.samples, "cluster_sizes": c.cluster_sizes, "classes": classes,
        "seed": seed,
    }  # fmt: skip
    return getattr(partition, c.kind)(labels.cpu(), c.n_clients, **how)


class Clients:
    """Data of N clients (and b poisoned ones) for R seeds, on one device.

    Args:
        config: the trial's.
        splits: from `read`.
        seeds: R of them; each has a partition and an order of its own.
    """

    def __init__(self, config: TrialConfig, splits: dict[str, Split], seeds: list[int]) -> None:
        self.config, self.splits, self.seeds = config, splits, seeds
        train = splits["train"]
        self.device = train.x.device
        first = self._deal(0)
        self.clusters = torch.from_numpy(first[0].clusters).to(self.device)  # (N,), the same for every seed
        self.turns = torch.from_numpy(first[0].quarter_turns).to(self.device)
        self.shift = torch.from_numpy(first[0].label_shift).to(self.device)
        self.label_counts = first[0].label_counts(train.y.cpu()).tolist()
        self.samples = int(first[0].sizes.min())
        self.rows = self._rows(first)  # (R, N, n)
        # every view of the training images, once
        self.views = torch.stack([partition.turn(train.x, k) for k in range(int(self.turns.max()) + 1)])  # (V, n, ...)
        poisoned = config.attack.clients if config.attack.name == "label_flip" else 0
        # attackers hold honest clients' rows, dealt evenly over the clusters
        self.copies = torch.arange(poisoned, device=self.device) * len(self.clusters) // max(1, poisoned)
        self.batch_size = min(config.task.batch_size, self.samples)
        self.steps_per_epoch = max(1, self.samples // self.batch_size)
        self._epoch, self._order = -1, self.rows

    def _deal(self, epoch: int) -> list[Partition]:
        return [deal(self.config, self.splits["train"].y, key(seed, DEAL, epoch)) for seed in self.seeds]

    def _rows(self, dealt: list[Partition]) -> Tensor:
        """Row numbers (R, N, n); clients with more rows than the smallest one leave the rest unused."""
        rows = [torch.stack([torch.from_numpy(i[: self.samples]) for i in p.indices]) for p in dealt]
        return torch.stack(rows).to(self.device)

    def batch(self, step: int, kept: float = 1.0) -> tuple[Tensor, Tensor]:
        """Inputs (R, N + b, B, C, H, W) and labels (R, N + b, B) of one step.

        kept: only this fraction of each client's rows is used (kNN-Per holds out the rest).
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            if self.config.task.redraw:
                self.rows = self._rows(self._deal(epoch))
            count = max(1, round(kept * self.samples))
            shape = len(self.clusters), count
            draws = [torch.rand(shape, generator=generator(s, ORDER, epoch)).argsort(1) for s in self.seeds]
            self._order = self.rows.gather(2, torch.stack(draws).to(self.device))
            self._epoch = epoch
        begin, size = position * self.batch_size, min(self.batch_size, self._order.shape[-1])
        rows = self._order[..., begin : begin + size]  # (R, N, B)
        if rows.shape[-1] < size:  # fewer rows than a batch are left: begin again
            rows = torch.cat([rows, self._order[..., : size - rows.shape[-1]]], -1)
        x, y = self.seen(rows)
        if self.config.task.augment:
            at = 0 if self.config.task.repeat_noise else step
            rngs = [generator(s, AUGMENT, at) for s in self.seeds]
            x = torch.stack([crop_and_flip(part.flatten(0, 1), g) for part, g in zip(x, rngs, strict=True)]).view_as(x)
        if len(self.copies):
            # attacks.label_flip, under the view of the client that is copied
            hostile = self.config.data.classes - 1 - y[:, self.copies]
            x, y = torch.cat([x, x[:, self.copies]], 1), torch.cat([y, hostile], 1)
        return x, y

    def seen(self, rows: Tensor, clients: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Training rows (R, c, B) as the given clients see them."""
        turns = self.turns[None, clients, None]
        labels = self.splits["train"].y[rows]
        return self.views[turns, rows], (labels + self.shift[clients, None]) % self.config.data.classes

    def test_rows(self, split: str) -> Tensor:
        """Rows of a split that each client is tested on, (N, t); -1 fills up where clients have unlike many."""
        y, count = self.splits[split].y, len(self.clusters)
        every = torch.arange(len(y), device=self.device)
        chosen = [every] * count
        if self.config.task.own_test_share:
            chosen = [every[i::count] for i in range(count)]
        if self.config.partition.kind == "label_groups":
            width = self.config.data.classes // self.config.partition.n_clusters
            chosen = [rows[y[rows] // width == k] for rows, k in zip(chosen, self.clusters, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-1)

    def tested(self, split: str, rows: Tensor, clients: slice) -> tuple[Tensor, Tensor]:
        """Rows (c, t) as the given clients see them: inputs (c, t, C, H, W), labels (c, t), -1 where none."""
        part, none = self.splits[split], rows < 0
        x, y = part.x[rows.clamp_min(0)], part.y[rows.clamp_min(0)]
        turns = self.turns[clients]
        for k in turns.unique().tolist():
            if k:
                x[turns == k] = partition.turn(x[turns == k], k)
        y = (y + self.shift[clients, None]) % self.config.data.classes
        return x, torch.where(none, -1, y)
