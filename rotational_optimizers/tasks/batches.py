"""Batches for networks trained side by side.

Every seed draws its own training subset and its own order; both are pure functions of (seed, epoch), so a run resumes
at any step without stored state, and a seed's batches do not depend on its companions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.streams import generator

SUBSET, ORDER, WINDOWS = 0, 1, 2  # independent random streams of one seed


def check_parts(batch_size: int, parts: int, world: int) -> None:
    """Refuse batches that do not fall into equal micro-batches, whose mean would not be the batch's.

    Raises:
        ValueError: `batch_size` is not a multiple of `parts * world`.
    """
    if batch_size % (parts * world):
        raise ValueError(
            f"task.batch_size={batch_size}: must be a multiple of {parts * world} "
            f"(task.accumulate={parts}, {world} processes)"
        )


@dataclass
class Shard:
    """Which part of every global batch this process trains on."""

    rank: int = 0
    world: int = 1

    def of(self, batch: Tensor) -> Tensor:
        """Every `world`-th sample of (S, B), starting at `rank`."""
        return batch[:, self.rank :: self.world]


class SampleBatches:
    """Labelled samples in memory: images, series or rows.

    Args:
        x: (N, C, ...) inputs, on the device of the run.
        y: (N,) integer labels.
        seeds: one network each.
        batch_size: samples a step and network, over all processes.
        subset: size of the random training subset of each seed; None takes all N.
        shard: this process's part.
        augment: maps a batch (B, C, ...) and a generator to a batch of the same shape.
    """

    axis = 0  # of the samples in the inputs

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        seeds: list[int],
        batch_size: int,
        subset: int | None = None,
        shard: Shard | None = None,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        size = len(x) if subset is None else subset
        if not 1 <= size <= len(x):
            raise ValueError(f"task.train_samples={subset}: must be in [1, {len(x)}], the size of the training split")
        if batch_size > size:
            raise ValueError(f"task.batch_size={batch_size}: must be <= {size}, the number of training samples")
        self.x, self.y, self.seeds, self.batch_size = x, y, seeds, batch_size
        self.shard, self.augment = shard or Shard(), augment
        self.steps_per_epoch = size // batch_size
        self.subset = torch.stack([torch.randperm(len(x), generator=generator(s, SUBSET))[:size] for s in seeds])
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (B, S*C, ...) and labels (S, B) of one step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            orders = [torch.randperm(self.subset.shape[1], generator=generator(s, ORDER, epoch)) for s in self.seeds]
            self._order = self.subset.gather(1, torch.stack(orders))  # (S, size)
            self._epoch = epoch
        start = position * self.batch_size
        index = self.shard.of(self._order[:, start : start + self.batch_size]).to(self.x.device)  # (S, B)
        x = self.x[index]  # (S, B, C, ...)
        if self.augment is not None:
            rngs = [generator(s, WINDOWS, step) for s in self.seeds]
            x = torch.stack([self.augment(batch, rng) for batch, rng in zip(x, rngs, strict=True)])
        return x.transpose(0, 1).flatten(1, 2), self.y[index]


class TokenBatches:
    """Random windows of one long token stream.

    Args:
        tokens: (N,) integers, N > context.
        seeds: one network each.
        batch_size: windows a step and network, over all processes.
        context: tokens a window.
        shard: this process's part.
    """

    axis = 1

    def __init__(
        self, tokens: Tensor, seeds: list[int], batch_size: int, context: int, shard: Shard | None = None
    ) -> None:
        if len(tokens) <= context:
            raise ValueError(f"model.context={context}: must be < {len(tokens)}, the length of the training text")
        self.tokens, self.seeds, self.batch_size, self.context = tokens, seeds, batch_size, context
        self.shard = shard or Shard()
        self.steps_per_epoch = max(1, len(tokens) // (batch_size * context))
        self._offset = torch.arange(context + 1)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (S, B, T) and next tokens (S, B, T) of one step."""
        high = len(self.tokens) - self.context
        draws = [torch.randint(high, (self.batch_size,), generator=generator(s, WINDOWS, step)) for s in self.seeds]
        start = self.shard.of(torch.stack(draws))  # (S, B)
        window = self.tokens[start[..., None] + self._offset].long()  # (S, B, T+1)
        return window[..., :-1], window[..., 1:]


def eval_samples(x: Tensor, y: Tensor, n_models: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole split in order, every network on the same samples: inputs (b, S*C, ...), labels (S, b)."""
    for part_x, part_y in zip(x.split(size), y.split(size), strict=True):
        repeats = [1, n_models] + [1] * (x.ndim - 2)
        yield part_x.repeat(repeats), part_y.expand(n_models, -1)


def eval_tokens(tokens: Tensor, n_models: int, context: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Disjoint consecutive windows of the text: inputs (S, b, T), next tokens (S, b, T)."""
    windows = (len(tokens) - 1) // context
    x = tokens[: windows * context].long().view(windows, context)
    y = tokens[1 : windows * context + 1].long().view(windows, context)
    for part_x, part_y in zip(x.split(size), y.split(size), strict=True):
        yield part_x.expand(n_models, -1, -1), part_y.expand(n_models, -1, -1)
