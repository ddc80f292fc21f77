"""Train a network on tables in memory: one model, or a stack of models with their own rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import load_checkpoint, save_checkpoint
from common.config import check
from common.streams import generator, key
from multimodn.batch import observed
from multimodn.missing import Rule, equalising, leak, rule
from multimodn.model import MultiModN
from multimodn.network import Network
from multimodn.optim import StackedAdam
from multimodn.stacking import StackedDropout

BATCHES, HIDING, ORDERS, DROPOUT = 20, 21, 22, 23  # random streams
CHECKPOINT_SECONDS = 120.0


@dataclass(frozen=True)
class Rows:
    """Training rows on the model's device; leading axis N for a stack of models."""

    inputs: dict[str, Tensor]
    """Modality -> (..., n, F) floating point, 0 where missing."""
    masks: dict[str, Tensor]
    """Modality -> (..., n) bool, True = present."""
    targets: dict[str, Tensor]
    """Task -> (..., n), see `multimodn.loss.Targets`."""

    @staticmethod
    def of(
        inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
    ) -> Rows:
        """Rows with masks from NaN where none is given, and zeros where a modality is missing."""
        lead = _lead(inputs, targets, masks or {})
        told = {name: mask for name, mask in (masks or {}).items() if mask is not None}
        known = {name: told[name] if name in told else observed(x, lead) for name, x in inputs.items()}
        clean = {
            name: torch.where(known[name].view(*known[name].shape, *[1] * (x.ndim - lead)), x, 0.0)
            for name, x in inputs.items()
        }
        return Rows(clean, known, dict(targets))

    def take(self, index: Tensor) -> Rows:
        """Rows by number: index (..., b) int64."""

        def pick(x: Tensor) -> Tensor:
            if index.ndim == 1:
                return x[index]
            return x[torch.arange(len(index), device=index.device)[:, None], index]

        return Rows(*({k: pick(v) for k, v in part.items()} for part in (self.inputs, self.masks, self.targets)))

    def __len__(self) -> int:
        return next(iter(self.masks.values())).shape[-1]


def _lead(inputs: Mapping[str, Tensor], targets: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> int:
    """Sample dimensions, 1 or 2: those that all tensors share, since multi-label targets have one more."""
    if not targets and not masks:
        return 1
    shapes = [x.shape[:-1] for x in inputs.values()]
    shapes += [x.shape for x in (*targets.values(), *masks.values()) if x is not None]
    both = all(len(shape) >= 2 and shape[:2] == shapes[0][:2] for shape in shapes)
    return 2 if both else 1


def fit(
    model: Network,
    rows: Rows,
    *,
    missing: str | Rule = "sample",
    epochs: int = 20,
    batch_size: int = 32,
    lr: float = 1e-3,
    seeds: Sequence[int] | int = 0,
    shuffle: bool = True,
    error_weight: float = 1.0,
    state_change_weight: float = 0.0,
    normalise: str = "constant",
    max_steps: int | None = None,
    on_epoch: Callable[[int, Tensor], None] | None = None,
    checkpoints: Path | None = None,
) -> None:
    """Train in place by Adam, at a constant rate, without weight decay.

    Args:
        model: `MultiModN`, `PFusion`, or a stack of N of them.
        rows: training rows; for a stack (N, n, ...).
        missing: `sample`, `batch`, `robust` or a `Rule`; see `multimodn.missing`.
        epochs: passes over the rows.
        batch_size: B; the last batch of an epoch may be smaller.
        lr: Adam's rate.
        seeds: of batches and of what training hides, one a model; model i's training does not depend on the others.
        shuffle: draw the rows' order anew in every epoch; the official code does not.
        error_weight, state_change_weight, normalise: see `multimodn.loss.grid_loss`.
        max_steps: stop after so many steps.
        on_epoch: called with the number of finished epochs and the mean loss of the epoch, () or (N,).
        checkpoints: folder where a long training leaves checkpoints, and from which it goes on, bit for bit.

    Raises:
        KeyError: a task without labels.
        ValueError: an argument out of range, or labels that a task does not have.
    """
    check("epochs", epochs, epochs >= 0, ">= 0")
    check("batch_size", batch_size, batch_size >= 1, ">= 1")
    check("lr", lr, lr > 0, "> 0")
    single = model.n_models is None
    each = [seeds] if isinstance(seeds, int) else list(seeds)
    check("seeds", each, len(each) == (model.n_models or 1), "one seed a model")
    how = rule(missing)
    for name in model.tasks:
        if name not in rows.targets:
            raise KeyError(f"rows.targets: no labels of task {name!r}; labels that are not known are -100 or NaN")
        model.decoder(name).check_target(rows.targets[name])
    by_batch = how.train == "batch" and any(not mask.all() for mask in rows.masks.values())
    optimizer = (
        StackedAdam(model, lr) if by_batch and not single else torch.optim.Adam(model.parameters(), lr, fused=True)
    )
    keep = _keep(rows, how, single)
    first = 0 if checkpoints is None else load_checkpoint(checkpoints, model, optimizer) or 0
    saved = time.monotonic()
    per_epoch = -(-len(rows) // batch_size)
    done = first * per_epoch
    model.train()
    for epoch in range(first, epochs):
        _seed_dropout(model, each, epoch)
        part = _epoch(rows, each, epoch, shuffle, keep, single)
        complete = {name: None for name, mask in part.masks.items() if mask.all()}
        losses = []
        for begin in range(0, len(rows), batch_size):
            if done == max_steps:
                return
            batch = _slice(part, begin, begin + batch_size)
            options = {"order": _order(model, done)} if how.shuffle and isinstance(model, MultiModN) else {}
            optimizer.zero_grad()
            grid = model(batch.inputs, {**batch.masks, **complete}, missing=how.train, **options)
            loss = model.loss(
                grid,
                batch.targets,
                error_weight=error_weight,
                state_change_weight=state_change_weight,
                normalise=normalise,
                validate=False,
            )
            total = loss + how.leak_weight * leak(grid.states, grid.present) if how.leak_weight else loss
            total.sum().backward()
            if isinstance(optimizer, StackedAdam):
                optimizer.skip(grid.present, options.get("order", model.modalities))
            optimizer.step()
            losses.append(loss.detach())
            done += 1
        if on_epoch is not None and losses:
            on_epoch(epoch + 1, torch.stack(losses).mean(0))
        if checkpoints is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
            save_checkpoint(checkpoints, model, optimizer, step=epoch + 1)
            saved = time.monotonic()


def _seed_dropout(model: Network, seeds: list[int], epoch: int) -> None:
    """Draws of an epoch depend on the seed and the epoch alone, so that a resumed training repeats them."""
    torch.manual_seed(key(seeds[0], DROPOUT, epoch))
    for module in model.modules():
        if isinstance(module, StackedDropout):
            for own, seed in zip(module.generators, seeds, strict=True):
                own.manual_seed(key(seed, DROPOUT, epoch))


def _keep(rows: Rows, how: Rule, single: bool) -> dict[str, Tensor] | None:
    """Modality -> (..., n) probability that a present row keeps it in training; None = all keep all."""
    if not how.equalise and not how.dropout:
        return None
    keep = {name: torch.ones(mask.shape) for name, mask in rows.masks.items()}
    if how.equalise:
        if single:
            keep = equalising(rows.masks, rows.targets)
        else:
            n = len(next(iter(rows.masks.values())))
            own = [
                equalising({k: m[i] for k, m in rows.masks.items()}, {k: t[i] for k, t in rows.targets.items()})
                for i in range(n)
            ]
            keep = {name: torch.stack([one[name] for one in own]) for name in rows.masks}
    return {name: (1 - how.dropout) * p.cpu() for name, p in keep.items()}


def _epoch(
    rows: Rows, seeds: list[int], epoch: int, shuffle: bool, keep: dict[str, Tensor] | None, single: bool
) -> Rows:
    """The rows of one epoch in the order of its batches, with what it hides hidden."""
    n = len(rows)
    if keep is not None:
        masks = {}
        generators = [generator(seed, HIDING, epoch) for seed in seeds]
        for name, mask in rows.masks.items():
            draws = torch.stack([torch.rand(n, generator=g) for g in generators])
            masks[name] = mask & ((draws[0] if single else draws) < keep[name]).to(mask.device)
        rows = Rows(rows.inputs, masks, rows.targets)
    if not shuffle:
        return rows
    orders = torch.stack([torch.randperm(n, generator=generator(seed, BATCHES, epoch)) for seed in seeds])
    index = orders[0] if single else orders
    return rows.take(index.to(next(iter(rows.masks.values())).device))


def _slice(rows: Rows, begin: int, end: int) -> Rows:
    lead = next(iter(rows.masks.values())).ndim - 1
    where = (slice(None),) * lead + (slice(begin, end),)
    return Rows(*({k: v[where] for k, v in part.items()} for part in (rows.inputs, rows.masks, rows.targets)))


def _order(model: Network, step: int) -> list[str]:
    names = list(model.encoders)
    return [names[i] for i in torch.randperm(len(names), generator=generator(0, ORDERS, step)).tolist()]
