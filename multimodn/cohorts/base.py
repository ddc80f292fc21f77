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
DEALS = 100  # deals of whole groups to choose from


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

    Independent rows are stratified by the joint label of the class tasks. Where groups have several rows, whole groups
    are dealt at random; of a few deals the one with the labels most alike is taken. The three sizes are the same for
    every seed of a cohort (surplus rows are left out at random), so that models of several seeds train side by side.

    Args:
        cohort: its rows.
        seed: an integer >= 0.
        folds: number of folds.
        validation: share of all rows that is held out of the training folds.

    Raises:
        ValueError: too few or too large groups, or a share that leaves no training rows.
    """
    check("seed", seed, seed >= 0, ">= 0")
    check("folds", folds, folds >= 2, ">= 2")
    check("validation", validation, 0 <= validation < 1 - 1 / folds, f"in [0, {1 - 1 / folds:g})")
    n, (repeat, fold) = len(cohort), divmod(seed, folds)
    names, groups, size = np.unique(cohort.groups.numpy(), return_inverse=True, return_counts=True)
    check("cohort", f"{len(names)} groups", len(names) >= 2 * folds, f"at least {2 * folds} groups")
    # whole groups miss a share of the rows by less than the largest group: every seed can give these sizes
    slack = int(size.max()) if len(names) < n else 0
    wanted = round(validation * n)
    spare = slack if wanted else 0
    sizes = (n - -(-n // folds) - wanted - slack - spare, wanted - spare, n // folds - slack)
    fits = min(sizes[0], sizes[2]) >= 1 and sizes[1] >= min(wanted, 1)
    check("cohort", f"{n} rows in {len(names)} groups", fits, "more rows, or smaller groups")
    across = np.random.Generator(np.random.PCG64(key(repeat, SPLIT)))
    within = np.random.Generator(np.random.PCG64(key(seed, SPLIT, 1)))
    if slack:
        labels = _indicators(cohort)
        fold_of = _alike([_deal_groups(groups, folds, across) for _ in range(DEALS)], labels)
        rest = np.flatnonzero(fold_of != fold)
        held = _alike([_hold_groups(groups[rest], wanted, within) for _ in range(DEALS)], labels[rest])
    else:
        codes = _joint_label(cohort)
        fold_of = _deal_rows(codes, folds, across)
        rest = np.flatnonzero(fold_of != fold)
        held = _stratified_ranks(codes[rest], within) < wanted
    parts = (rest[~held], rest[held], np.flatnonzero(fold_of == fold))
    kept = [np.sort(within.permutation(part)[:rows]) for part, rows in zip(parts, sizes, strict=True)]
    return Split(*(torch.from_numpy(part) for part in kept))


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


def _indicators(cohort: Cohort) -> np.ndarray:
    """One column of 0 and 1 for each label of each class task, (n, L) float64."""
    labels = [task.labels.numpy()[:, None] for task in cohort.tasks.values() if task.kind == "classes"]
    return np.concatenate([y == np.unique(y) for y in labels] or [np.ones((len(cohort), 1))], 1).astype(np.float64)


def _deal_rows(codes: np.ndarray, folds: int, generator: np.random.Generator) -> np.ndarray:
    """The fold of every row, dealt in turn code by code: of each code, and in all, folds differ by at most one row."""
    shuffled = generator.permutation(len(codes))
    fold_of = np.empty(len(codes), dtype=np.int64)
    fold_of[shuffled[np.argsort(codes[shuffled], kind="stable")]] = np.arange(len(codes)) % folds
    return fold_of


def _stratified_ranks(codes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A rank for every row such that the first ranks, however many, have all codes in proportion."""
    shuffled = generator.permutation(len(codes))
    position = np.empty(len(codes))
    for code in np.unique(codes):
        members = shuffled[codes[shuffled] == code]
        position[members] = (np.arange(len(members)) + generator.random()) / len(members)
    ranks = np.empty(len(codes), dtype=np.int64)
    ranks[np.argsort(position, kind="stable")] = np.arange(len(codes))
    return ranks


def _deal_groups(groups: np.ndarray, folds: int, generator: np.random.Generator) -> np.ndarray:
    """The fold of every row: groups in random order, each to the fold with the fewest rows.

    Not scikit-learn's StratifiedGroupKFold: it sorts the groups, so that every seed gets the same folds.
    """
    sizes, filled = np.bincount(groups), np.zeros(folds, dtype=np.int64)
    fold_of = np.empty(len(sizes), dtype=np.int64)
    for group in generator.permutation(len(sizes)):
        fold_of[group] = filled.argmin()
        filled[fold_of[group]] += sizes[group]
    return fold_of[groups]


def _hold_groups(groups: np.ndarray, wanted: int, generator: np.random.Generator) -> np.ndarray:
    """Mask of the rows held out: whole groups in random order until `wanted` rows are reached."""
    sizes = np.bincount(groups)
    order = generator.permutation(len(sizes))
    before = np.cumsum(sizes[order]) - sizes[order]
    return np.isin(groups, order[before < wanted])


def _alike(deals: list[np.ndarray], indicators: np.ndarray) -> np.ndarray:
    """Of several ways to part the rows, (rows,) each, the one whose parts have the labels, (rows, L), most alike."""
    whole = indicators.mean(0)

    def distance(part_of: np.ndarray) -> float:
        means = [indicators[part_of == part].mean(0) for part in np.unique(part_of)]
        return float(np.square(np.stack(means) - whole).sum())

    return min(deals, key=distance)
