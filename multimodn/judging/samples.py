"""From records to samples and tests that several claims share. Seeds from 20 on judge, seeds below 10 tuned."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.claims import Control
from common.pairing import rows
from common.statistics import Outcome, equivalence, noninferior, paired_greater

if TYPE_CHECKING:
    from common.records import Records

Test = Callable[["Records"], Outcome]
Array = NDArray[np.float64]
UNKNOWN = "not established"
UNIT = "AUROC"
OVERLAP = 0.2 / 0.7
"""Test rows over training rows of a fold: how much the seeds, twice five folds of the same rows, share."""
BANDS = "Bands and bars: 95 % confidence interval over seeds (folds)."
SINGLE = {
    "star": ("reading", "math"),
    "weather": ("warmer", "rain", "low_visibility"),
    "nhefs": ("death", "weight_gain"),
    "pbc": ("death5",),
    "digits": ("at_least_five", "loop"),
}
"""The ten tasks."""
MNAR = ("star", "digits", "nhefs", "weather")
"""Cohorts of the experiments with hidden modalities."""
PAPER = ("haim", "weather2k", "edu")


def of(frame: pd.DataFrame, arm: str, metric: str = "auroc_full", **where: Any) -> pd.Series:
    """A metric of an arm by seed; where the arm has several cohorts or tasks, their mean. Diverged runs count as 0.

    Raises:
        ValueError: no such rows, or a seed that lacks some of them.
    """
    found = rows(frame, arm=arm, **where)
    good = found[metric].where(~found["diverged"].astype(bool), 0.0)
    groups = good.astype(float).groupby(found["seed"])
    if groups.size().nunique() > 1:
        raise ValueError(f"arm {arm!r} has {groups.size().to_dict()} rows a seed: every seed needs all of them")
    return groups.mean()


def cell(frame: pd.DataFrame, column: str, *index: int) -> pd.DataFrame:
    """The frame with `column` (nested lists) replaced by one of their numbers."""

    def pick(value: Any) -> float:
        for i in index:
            value = value[i]
        return float(value)

    return frame.assign(**{column: frame[column].map(pick)})


def both_on_seeds(a: pd.Series, b: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Two samples on the seeds that both have."""
    seeds = a.index.intersection(b.index)
    if seeds.empty:
        raise ValueError(f"seeds {list(a.index)} and {list(b.index)}: must share some")
    return a[seeds], b[seeds]


def beats(a: pd.Series, b: pd.Series, margin: float = 0.0) -> Outcome:
    """a − b > margin over shared folds."""
    return paired_greater(*both_on_seeds(a, b), margin, unit=UNIT, overlap=OVERLAP)


def holds(a: pd.Series, b: pd.Series, margin: float) -> Outcome:
    """a − b > −margin over shared folds."""
    return noninferior(*both_on_seeds(a, b), margin, unit=UNIT, overlap=OVERLAP)


def alike(a: pd.Series, b: pd.Series, margin: float) -> Outcome:
    """|a − b| < margin over shared folds."""
    first, second = both_on_seeds(a, b)
    return equivalence(first - second, -margin, margin, unit=UNIT, overlap=OVERLAP)


def lowered(experiment: str, arms: tuple[str, ...], by: float, *metrics: str) -> Control:
    """Control: an arm's metrics are lower by so much."""

    def apply(records: Records) -> Records:
        frame = records[experiment]
        worse = frame["arm"].isin(arms)
        columns = {m: frame[m] - by * worse for m in metrics or ("auroc_full",)}
        return records.replace(experiment, frame.assign(**columns))

    return Control(f"{', '.join(arms)} of {experiment} lower by {by:g}", apply)
