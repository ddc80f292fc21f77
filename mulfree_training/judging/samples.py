"""From records to samples, and the controls that the claims on trainings share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import pandas as pd

from common.claims import Control
from common.pairing import Array, both
from common.statistics import Outcome, equivalence, paired_greater
from mulfree_training.names import name

if TYPE_CHECKING:
    from common.records import Records

Test = Callable[["Records"], Outcome]
UNKNOWN = "not established"
BANDS = "Bars: 95 % t interval of the mean over seeds; dots: seeds."
ACCURACY, NLL, BLEU = "test_accuracy", "test_nll", "test_bleu"
POINTS, NATS = 1.5, 0.05
"""Loss of accuracy and of likelihood that does not count; fixed before any run."""
FULL_POINTS, FULL_NATS = 2.0, 0.08
"""The same where nothing multiplies."""
POINTS_OF_BLEU = 0.5
"""Loss of a translation's score that does not count."""


def unit(metric: str) -> str:
    """Of a metric's differences."""
    return {ACCURACY: "points", BLEU: "BLEU"}.get(metric, "nats")


def table(records: Records, experiment: str) -> pd.DataFrame:
    """The records of an experiment.

    Raises:
        ValueError: it has none at this scale.
    """
    frame = records[experiment]
    if frame.empty:
        raise ValueError(f"experiment={experiment}: has no records at this scale")
    return frame


def pair(frame: pd.DataFrame, arm: str, other: str, metric: str) -> tuple[Array, Array]:
    """`metric` of two arms by seed, over the seeds that both have; a diverged run counts as the worst."""
    mode: Literal["max", "min"] = "max" if metric in (ACCURACY, BLEU) else "min"
    return both(frame, arm, other, metric, mode=mode)


def gaps(frame: pd.DataFrame, arm: str, other: str, metric: str) -> pd.Series:
    """`metric` of an arm less that of another, seed -> number, over the seeds that both have."""
    own, theirs = pair(frame, arm, other, metric)
    seeds = set(frame["seed"][frame["arm"] == arm]) & set(frame["seed"][frame["arm"] == other])
    return pd.Series(own - theirs, index=sorted(seeds))


def _better(experiment: str, arm: str, other: str, metric: str, allowed: float, word: str) -> Test:
    """Accuracy of `arm` less that of `other` is above -allowed, or its loss less the other's is below allowed."""

    def test(records: Records) -> Outcome:
        frame = table(records, experiment)
        own, theirs = pair(frame, arm, other, metric)
        if metric in (ACCURACY, BLEU):
            outcome = paired_greater(own, theirs, -allowed)
            words = f"difference > {-allowed if allowed else 0:g}"
        else:
            # the effect is arm less other here too, as in the figures, so that a positive one is a loss
            outcome = paired_greater(theirs, own, -allowed)
            low, high = -outcome.ci_high, -outcome.ci_low
            outcome = replace(outcome, effect=-outcome.effect, ci_low=low, ci_high=high)
            words = f"difference < {allowed:g}"
        words = f"{word}paired one-sided t: {words}"
        # a mean of differences that cancel is 0, not a rounding
        outcome = replace(outcome, effect=round(outcome.effect, 12))
        return replace(outcome, test=words, unit=unit(metric), detail=_levels(frame, arm, other, metric))

    return test


def _levels(frame: pd.DataFrame, arm: str, other: str, metric: str) -> str:
    """Means of what was compared, in words; beside an accuracy the loss, beside a loss that at the best temperature."""
    words = []
    for shown in (metric, {ACCURACY: NLL, NLL: f"{NLL}_tempered"}.get(metric, "")):
        if shown in frame:
            own, theirs = pair(frame, arm, other, shown)
            means = f"{name(arm)} {own.mean():.4g}, {name(other)} {theirs.mean():.4g}"
            words.append(f"{shown.replace('_', ' ')}: {means}")
    return "; ".join(words)


def keeps(experiment: str, arm: str, metric: str, margin: float, baseline: str = "standard") -> Test:
    """`arm` is not worse than the baseline by `margin` or more, paired over seeds; effect: arm less baseline."""
    return _better(experiment, arm, baseline, metric, margin, "non-inferiority, ")


def beats(experiment: str, arm: str, other: str, metric: str) -> Test:
    """`arm` is better than `other`, paired over seeds; effect: arm less other."""
    return _better(experiment, arm, other, metric, 0.0, "")


def equals(experiment: str, arm: str, other: str, metric: str, margin: float) -> Test:
    """The difference arm less other lies within `margin` on either side (TOST), paired over seeds."""

    def test(records: Records) -> Outcome:
        frame = table(records, experiment)
        own, theirs = pair(frame, arm, other, metric)
        outcome = equivalence(own - theirs, -margin, margin, unit=unit(metric))
        return replace(outcome, detail=_levels(frame, arm, other, metric))

    return test


def worsened(experiment: str, arms: tuple[str, ...], points: float = 4.0, nats: float = 0.2) -> Control:
    """The arms lose accuracy, and their losses rise, by at least twice the margins."""

    def apply(records: Records) -> Records:
        frame = records[experiment]
        missing = [arm for arm in arms if not (frame["arm"] == arm).any()]
        if missing:
            raise ValueError(f"worsened: arm {missing[0]!r} is not in experiment {experiment!r}")
        hit, changed = frame["arm"].isin(arms), {}
        for column in map(str, frame.columns):
            if column in (ACCURACY, BLEU):
                changed[column] = frame[column] - hit * points
            elif column.startswith(NLL):
                changed[column] = frame[column] + hit * nats
        return records.replace(experiment, frame.assign(**changed))

    return Control(f"{', '.join(arms)} of {experiment} lose {points:g} points and {nats:g} nats", apply)
