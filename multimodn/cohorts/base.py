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

    Folds are stratified by the joint label of the class tasks; where groups have several rows, whole groups are dealt.
    The three sizes are the same for every seed of a cohort (a few surplus rows are left out at random), so that models
    of several seeds can train side by side.

    Args:
        cohort: its rows.
        seed: >= 0.
        folds: number of folds.
        validation: share of all rows that is held out of the training folds.

    Raises:
        ValueError: fewer groups than folds, or a share that leaves no training rows.
    """
    check("folds", folds, folds >= 2, ">= 2")
    check("validation", validation, 0 <= validation < 1 - 1 / folds, f"in [0, {1 - 1 / folds:g})")
    n, (repeat, fold) = len(cohort), divmod(seed, folds)
    groups, first = np.unique(cohort.groups.numpy(), return_inverse=True)
    check("cohort", f"{len(groups)} groups", len(groups) >= 2 * folds, f"at least {2 * folds} groups")
    generator = np.random.Generator(np.random.PCG64(key(repeat, SPLIT)))
    plain = len(groups) == n
    if plain:
        ranks = _stratified_order(_joint_label(cohort), generator)
        fold_of = ranks % folds
    else:
        fold_of = _deal_groups(first, len(groups), folds, generator)[first]
    within = np.random.Generator(np.random.PCG64(key(seed, SPLIT, 1)))
    test = np.flatnonzero(fold_of == fold)
    rest = np.flatnonzero(fold_of != fold)
    if plain:
        order = _stratified_order(_joint_label(cohort)[rest], within)
        held = order < round(validation * n)
    else:
        held = _hold_groups(first[rest], round(validation * n), within)
    # what the least lucky fold has: whole groups make sizes uneven
    slack = 0 if plain else int(np.bincount(first).max())
    sizes = (n - -(-n // folds) - round(validation * n) - 2 * slack, round(validation * n) - slack, n // folds - slack)
    check("cohort", f"{n} rows", min(sizes[0], sizes[2]) >= 1 and sizes[1] >= 0, "more rows")
    parts = (rest[~held], rest[held], test)
    trimmed = [np.sort(within.permutation(part)[:size]) for part, size in zip(parts, sizes, strict=True)]
    return Split(*(torch.from_numpy(part) for part in trimmed))


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


def _stratified_order(codes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A rank for every row such that any slice of ranks, and any residue class, has all codes in proportion."""
    shuffled = generator.permutation(len(codes))
    position = np.empty(len(codes))
    for code in np.unique(codes):
        members = shuffled[codes[shuffled] == code]
        position[members] = (np.arange(len(members)) + generator.random()) / len(members)
    ranks = np.empty(len(codes), dtype=np.int64)
    ranks[np.argsort(position, kind="stable")] = np.arange(len(codes))
    return ranks


def _deal_groups(first: np.ndarray, count: int, folds: int, generator: np.random.Generator) -> np.ndarray:
    """The fold of every group: in random order, each to the fold with the fewest rows."""
    sizes, filled = np.bincount(first, minlength=count), np.zeros(folds, dtype=np.int64)
    fold_of = np.empty(count, dtype=np.int64)
    for group in generator.permutation(count):
        fold_of[group] = filled.argmin()
        filled[fold_of[group]] += sizes[group]
    return fold_of


def _hold_groups(first: np.ndarray, wanted: int, generator: np.random.Generator) -> np.ndarray:
    """Mask of rows whose groups are held out: random groups until `wanted` rows are reached."""
    held = np.zeros(len(first), dtype=bool)
    for group in generator.permutation(np.unique(first)):
        if held.sum() >= wanted:
            break
        held |= first == group
    return held
