"""Passengers of the Titanic (`vcdExtra/Titanicp`), one modality a feature: the official code's toy example.

Task: survived. Natural: 263 passengers of unknown age lack that modality.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from multimodn.cohorts.tables import binary, cohort, table

if TYPE_CHECKING:
    from multimodn.cohorts.base import Cohort
    from multimodn.cohorts.config import CohortConfig

DEFAULT_TASKS = 1
FEATURES = ("pclass", "sex", "age", "sibsp", "parch")


def load(config: CohortConfig) -> Cohort:
    """Task `survived`."""
    frame = table("vcdExtra/Titanicp")
    tasks = {"survived": binary((frame["survived"] == "survived").astype(float), "survived")}
    return cohort("titanic", frame, {name: [name] for name in FEATURES}, tasks, config.natural)
