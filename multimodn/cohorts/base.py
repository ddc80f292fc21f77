"""A cohort: rows with named modalities and tasks; its splits and its scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from common.config import check
from common.streams import key

SPLIT = 40  # random stream
RARE = 10  # rows of a joint label that stratification still tells apart


@dataclass(frozen=True)
class Task:
    """What is predicted."""

    kind: str
    """`classes` or `regression`."""
    labels: Tensor
    """(n,) int64 with -100 where unknown, or (n,) float32 with NaN where unknown."""
    classes: int = 2
    """Number of classes; 0 for regression."""
    positive: str = ""
    """What label 1 means."""


@dataclass(frozen=True)
class Cohort:
    """Rows of real or generated data, in raw units."""

    name: str
    modalities: dict[str, Tensor]
    """In the chain's order: (n, F), (n, T, F) or (n, C, H, W) float32, NaN where not recorded."""
    features: dict[str, tuple[str, ...]]
    """Names of the last axis' columns."""
    tasks: dict[str, Task]
    groups: Tensor
    """(n,) int64; rows of one group never fall into different splits."""

    def __len__(self) -> int:
        return len(self.groups)

    def select(self, rows: Tensor) -> Cohort:
        """The rows by number, (m,) int64, or by a mask, (n,) bool."""
        return replace(
            self,
            modalities={name: x[rows] for name, x in self.modalities.items()},
            tasks={name: replace(task, labels=task.labels[rows]) for name, task in self.tasks.items()},
            groups=self.groups[rows],
        )

    def with_order(self, names: Sequence[str]) -> Cohort:
        """Only these modalities, in this order.

        Raises:
            KeyError: an unknown name.
        """
        _check_names("cohort.order", names, self.modalities)
        return replace(self, modalities={name: self.modalities[name] for name in names})

    def with_tasks(self, names: Sequence[str]) -> Cohort:
        """Only these tasks, in this order.

        Raises:
            KeyError: an unknown name.
        """
        _check_names("cohort.tasks", names, self.tasks)
        return replace(self, tasks={name: self.tasks[name] for name in names})


@dataclass(frozen=True)
class Split:
    """Row numbers of the three parts, sorted int64."""

    train: Tensor
    validation: Tensor
    test: Tensor


def split(cohort: Cohort, seed: int, *, folds: int = 5, validation: float = 0.1) -> Split:
    """One fold of a repeated cross-validation: seed // folds draws the partition, seed % folds picks the test fold.

    Stratified by the joint label of the class tasks; rows of one group stay together. The three sizes are the same for
    every seed of a cohort (surplus rows are left out at random), so that models of several seeds train side by side.

    Args:
        cohort: its rows.
        seed: >= 0.
        folds: number of folds.
        validation: share of all rows that is held out of the training folds.

    Raises:
        ValueError: too few groups, or a share that leaves no training rows.
    """
    check("folds", folds, folds >= 2, ">= 2")
    check("validation", validation, 0 <= validation < 1 - 1 / folds, f"in [0, {1 - 1 / folds:g})")
    n, (repeat, fold) = len(cohort), divmod(seed, folds)
    groups = cohort.groups.numpy()
    size, count = np.unique(groups, return_counts=True)
    check("cohort", f"{len(size)} groups", len(size) >= 2 * folds, f"at least {2 * folds} groups")
    labels = _joint_label(cohort)
    rest, test = _folds(labels, groups, folds, key(repeat, SPLIT))[fold]
    held = np.zeros(len(rest), dtype=bool)
    if validation:
        parts = max(2, round((1 - 1 / folds) / validation))
        held[_folds(labels[rest], groups[rest], parts, key(seed, SPLIT, 1))[0][1]] = True
    # a fold of whole groups may be smaller than its share by about a group
    slack = int(count.max()) if count.max() > 1 else 0
    sizes = [n // folds - slack, round(validation * n) - slack - 1 if validation else 0]
    sizes.append(n - sum(sizes) - 4 * slack - 3)
    check("cohort", f"{n} rows in {len(size)} groups", min(sizes) >= bool(validation), "more, or smaller, groups")
    draw = np.random.Generator(np.random.PCG64(key(seed, SPLIT, 2)))
    chosen = []
    for name, part, wanted in zip(("test", "validation", "train"), (test, rest[held], rest[~held]), sizes, strict=True):
        if len(part) < wanted:
            raise ValueError(f"cohort {cohort.name}: the {name} part of seed {seed} has {len(part)} rows, not {wanted}")
        chosen.append(torch.from_numpy(np.sort(draw.permutation(part)[:wanted])))
    return Split(train=chosen[2], validation=chosen[1], test=chosen[0])


def _folds(labels: np.ndarray, groups: np.ndarray, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(rest, fold) for each of `count` stratified folds of whole groups."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    options = {"n_splits": count, "shuffle": True, "random_state": seed}
    if len(np.unique(groups)) == len(groups):
        return list(StratifiedKFold(**options).split(labels, labels))
    return list(StratifiedGroupKFold(**options).split(labels, labels, groups))


def standardise(
    modalities: Mapping[str, Tensor], source: Mapping[str, Tensor] | None = None, rows: Tensor | None = None
) -> dict[str, Tensor]:
    """Centre and scale every feature by the visible values of some rows; NaN stays NaN, constants become 0.

    Args:
        modalities: (n, ..., F) each.
        source: where the statistics come from, of the same shapes, e.g. with training values hidden; None: the same.
        rows: training rows; None: all of them, which leaks the test rows (the official code).
    """
    scaled = {}
    for name, x in modalities.items():
        known = x if source is None else source[name]
        known = known if rows is None else known[rows]
        flat = known.reshape(-1, x.shape[-1]).double()
        count = (~flat.isnan()).sum(0).clamp_min(1)
        mean = flat.nansum(0) / count
        deviation = ((flat - mean).square().nansum(0) / count).sqrt()
        constant = deviation <= 1e-9 * mean.abs().clamp_min(1)
        shifted = (x.double() - mean) / torch.where(constant, 1.0, deviation)
        scaled[name] = torch.where(constant & ~x.isnan(), 0.0, shifted).float()
    return scaled


def _check_names(key_: str, names: Sequence[str], known: Mapping[str, object]) -> None:
    for name in names:
        if name not in known:
            raise KeyError(f"{key_}={list(names)}: {name!r} is not one of {', '.join(known)}")
    check(key_, list(names), len(set(names)) == len(names) and len(names) > 0, "names without repetition")


def _joint_label(cohort: Cohort) -> np.ndarray:
    """One code a row from all class tasks; rare combinations share one."""
    labels = [task.labels.numpy() for task in cohort.tasks.values() if task.kind == "classes"]
    if not labels:
        return np.zeros(len(cohort), dtype=np.int64)
    _, codes = np.unique(np.stack(labels, 1), axis=0, return_inverse=True)
    codes = codes.reshape(-1)
    rare = np.bincount(codes) < RARE
    return np.where(rare[codes], len(rare), codes)
