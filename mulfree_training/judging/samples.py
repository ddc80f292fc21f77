"""From records to samples, and the controls that the claims on trainings share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.claims import Control
from common.pairing import both, rows
from common.statistics import Outcome, equivalence, noninferior, paired_greater
from mulfree_training.names import name

if TYPE_CHECKING:
    from common.records import Records

Array = NDArray[np.float64]
Test = Callable[["Records"], Outcome]
UNKNOWN = "not established"
BANDS = "Bars: 95 % t interval of the mean over seeds; dots: seeds."
ACCURACY, NLL = "test_accuracy", "test_nll"
UNITS = {ACCURACY: "points", NLL: "nats"}


def better_by(frame: pd.DataFrame, arm: str, other: str, metric: str) -> tuple[Array, Array]:
    """`metric` of two arms, signed so that more is better, over the seeds that both have."""
    own, theirs = both(frame, arm, other, metric, mode="max" if metric == ACCURACY else "min")
    return (own, theirs) if metric == ACCURACY else (-own, -theirs)


def levels(frame: pd.DataFrame, *arms: str, metric: str) -> str:
    """Means in words."""
    found = [f"{name(arm)} {rows(frame, arm=arm)[metric].mean():.4g}" for arm in arms]
    return f"{metric.replace('_', ' ')}: {'; '.join(found)}"


def keeps(experiment: str, arm: str, metric: str, margin: float, baseline: str = "standard") -> Test:
    """`arm` is not worse than the baseline by `margin` or more, paired over seeds."""

    def test(records: Records) -> Outcome:
        frame = records[experiment]
        outcome = noninferior(*better_by(frame, arm, baseline, metric), margin, unit=UNITS.get(metric, "nats"))
        return replace(outcome, detail=levels(frame, arm, baseline, metric=metric))

    return test


def beats(experiment: str, arm: str, other: str, metric: str, margin: float = 0.0) -> Test:
    """`arm` is better than `other` by more than `margin`, paired over seeds."""

    def test(records: Records) -> Outcome:
        frame = records[experiment]
        outcome = paired_greater(*better_by(frame, arm, other, metric), margin, unit=UNITS.get(metric, "nats"))
        return replace(outcome, detail=levels(frame, arm, other, metric=metric))

    return test


def equals(experiment: str, arm: str, other: str, metric: str, margin: float) -> Test:
    """The difference of two arms lies within `margin` on either side (TOST), paired over seeds."""

    def test(records: Records) -> Outcome:
        frame = records[experiment]
        own, theirs = better_by(frame, arm, other, metric)
        outcome = equivalence(own - theirs, -margin, margin, unit=UNITS.get(metric, "nats"))
        return replace(outcome, detail=levels(frame, arm, other, metric=metric))

    return test


def worsened(experiment: str, arms: tuple[str, ...], points: float = 8.0, nats: float = 1.0) -> Control:
    """The arms lose accuracy, and their losses rise."""

    def apply(records: Records) -> Records:
        frame = records[experiment]
        hit = frame["arm"].isin(arms)
        if not hit.any():
            raise ValueError(f"worsened: none of the arms {', '.join(arms)} is in experiment {experiment!r}")
        changed = {}
        for column in frame.columns:
            if column == ACCURACY:
                changed[column] = frame[column] - hit * points
            elif str(column).startswith(NLL):
                changed[column] = frame[column] + hit * nats
        return records.replace(experiment, frame.assign(**changed))

    return Control(f"{', '.join(arms)} of {experiment} lose {points:g} points and {nats:g} nats", apply)
