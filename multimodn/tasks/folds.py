"""The rows of every seed's split, hidden as the trial says, standardised and side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.config import check
from common.streams import key
from multimodn import corruption
from multimodn.batch import observed
from multimodn.cohorts.base import Cohort, split, standardise
from multimodn.training import Rows

if TYPE_CHECKING:
    from multimodn.config import CorruptionConfig, TrialConfig

HIDE_TRAIN, HIDE_TEST, HIDE_FLIP = 30, 31, 32  # random streams

Hide = Callable[[Tensor, bool, int], dict[str, Tensor]]
"""Rows, whether flipped, seed -> modality -> (rows,) bool, True = left visible."""


@dataclass(frozen=True)
class Folds:
    """N seeds' rows. Modalities are standardised on each seed's visible training rows."""

    train: Rows
    """(N, n, ...)."""
    inputs: dict[str, Tensor]
    """Modality -> (N, n', ...) of the evaluated split, 0 where not recorded."""
    targets: dict[str, Tensor]
    """Task -> (N, n')."""
    patterns: dict[str, dict[str, Tensor]]
    """What is visible at inference: `full` (all that was recorded), `same` (hidden as in training) and `flip` (the
    other way round) -> modality -> (N, n') bool."""


def folds(config: TrialConfig, cohort: Cohort, seeds: list[int], device: torch.device) -> Folds:
    """Split, hide, standardise and stack.

    Raises:
        ValueError: the corruption does not fit the cohort.
    """
    each = [_fold(config, cohort, seed) for seed in seeds]

    def stacked(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([part[name] for part in parts]).to(device) for name in parts[0]}

    train = [fold.train for fold in each]
    rows = Rows(*(stacked([getattr(r, part) for r in train]) for part in ("inputs", "masks", "targets")))
    patterns = {name: stacked([fold.patterns[name] for fold in each]) for name in each[0].patterns}
    return Folds(rows, stacked([f.inputs for f in each]), stacked([f.targets for f in each]), patterns)


def _fold(config: TrialConfig, cohort: Cohort, seed: int) -> Folds:
    """One seed's fold, without the leading axis."""
    c = config.cohort
    parts = split(cohort, seed, folds=c.folds, validation=c.validation)
    rows = parts.test if config.task.evaluate == "test" else parts.validation
    recorded = {name: observed(x) for name, x in cohort.modalities.items()}
    hide = _hiding(config.corruption, cohort)
    kept = hide(parts.train, False, key(seed, HIDE_TRAIN))
    visible = {name: mask.clone() for name, mask in recorded.items()}
    for name, mask in kept.items():
        visible[name][parts.train] &= mask
    hidden = corruption.hide(cohort.modalities, visible)
    # the scale is that of what training sees; the statistics of NaN rows are not counted
    fitted = None if c.leaky_scaler else parts.train
    scaled = standardise(cohort.modalities, hidden, fitted)
    full = {name: mask[rows] for name, mask in recorded.items()}
    patterns = {"full": full}
    if config.corruption.mechanism != "none":
        patterns["same"] = _and(full, hide(rows, False, key(seed, HIDE_TEST)))
        if config.corruption.mechanism != "mcar":
            patterns["flip"] = _and(full, hide(rows, True, key(seed, HIDE_FLIP)))
    return Folds(
        Rows.of(
            {name: x[parts.train] for name, x in scaled.items()},
            {name: task.labels[parts.train] for name, task in cohort.tasks.items()},
            {name: mask[parts.train] for name, mask in visible.items()},
        ),
        {name: x[rows].nan_to_num(0.0) for name, x in scaled.items()},
        {name: task.labels[rows] for name, task in cohort.tasks.items()},
        patterns,
    )


def _and(full: dict[str, Tensor], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask & kept[name] if name in kept else mask for name, mask in full.items()}


def _hiding(c: CorruptionConfig, cohort: Cohort) -> Hide:
    """What the mechanism leaves visible of some rows."""
    names = list(cohort.modalities)
    if c.mechanism == "none":
        return lambda rows, flipped, seed: {}
    if c.mechanism == "mcar":
        return lambda rows, flipped, seed: {
            name: corruption.mcar(len(rows), c.share, key(seed, i)) for i, name in enumerate(names)
        }
    check("corruption.modality", c.modality, c.modality < len(names), f"in [0, {len(names) - 1}], of {names}")
    name = names[c.modality]
    if c.mechanism == "mnar":
        task_name, task = next(iter(cohort.tasks.items()))
        check("corruption.mechanism", c.mechanism, task.classes == 2, f"another: task {task_name} is not binary")
        return lambda rows, flipped, seed: {
            name: corruption.mnar(task.labels[rows], c.share, seed, hide=1 - c.hide if flipped else c.hide)
        }
    if c.mechanism == "mar":
        check("corruption.mechanism", c.mechanism, len(names) > 1, "another: the cohort has one modality")
        driver = cohort.modalities[names[0 if c.modality else 1]].flatten(1)
        return lambda rows, flipped, seed: {
            name: corruption.mar(driver[rows], c.share, seed, strength=-2.0 if flipped else 2.0)
        }
    own = cohort.modalities[name].flatten(1)
    return lambda rows, flipped, seed: {
        name: corruption.mnar_values(own[rows], c.share, seed, strength=-2.0 if flipped else 2.0)
    }
