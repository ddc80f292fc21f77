"""NHEFS (`causaldata/nhefs`): smokers examined in 1971 and followed up to 1992; a medical cohort beside MIMIC.

Modalities: demographics, habits, examination and history, all of the first visit. Tasks: death by 1992; weight gain
from 1971 to 1982 above the median. Left out: what was recorded after the first visit (date of death, weight of 1982,
quitting, later smoking, later prices and taxes, being censored), columns that are half missing, or that half of the
people were not asked about (high blood pressure and its drugs, diabetes, bowel trouble, where the code 2 says so), and
identifiers. Codes for "unknown" (alcoholpy 2, alcoholfreq 5) are missing values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from multimodn.cohorts.tables import above_median, binary, cohort, table

if TYPE_CHECKING:
    from multimodn.cohorts.base import Cohort
    from multimodn.cohorts.config import CohortConfig

DEFAULT_TASKS = 2
MARRIED = 2
UNKNOWN = {"alcoholpy": 2, "alcoholfreq": 5}
MODALITIES = {
    "demographics": ["sex", "age", "race", "married", "school"],
    "habits": ["smokeintensity", "smokeyrs", "alcoholpy", "alcoholfreq", "active", "exercise"],
    "exam": ["sbp", "dbp", "ht", "wt71", "cholesterol"],
    "history": [
        *("asthma", "bronch", "tb", "hf", "pepticulcer", "colitis", "hepatitis", "chroniccough", "hayfever", "tumor"),
        *(
            "nervousbreak",
            "headache",
            "otherpain",
            "weakheart",
            "allergies",
            "nerves",
            "lackpep",
            "wtloss",
            "infection",
        ),
    ],
}


def load(config: CohortConfig) -> Cohort:
    """Tasks `death` and `weight_gain`."""
    frame = table("causaldata/nhefs")
    frame["married"] = (frame["marital"] == MARRIED).astype(float)
    for name, code in UNKNOWN.items():
        frame[name] = frame[name].where(frame[name] != code)
    tasks = {
        "death": binary(frame["death"].astype(float), "died by 1992"),
        "weight_gain": above_median(frame["wt82_71"], "weight gain from 1971 to 1982 above the median"),
    }
    return cohort("nhefs", frame, MODALITIES, tasks, config.natural)
