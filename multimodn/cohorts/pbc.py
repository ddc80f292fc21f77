"""Mayo Clinic primary biliary cholangitis (`survival/pbc`): 312 patients of a trial and 106 others; a medical cohort.

Modalities: demographics, signs, blood values of every patient, special laboratory values of the trial's patients.
Task: died within five years (1,826 days) of registration. Patients who were transplanted or lost before then have no
label and are left out. Also left out: treatment, follow-up time and status (they are the label).

Natural: the 106 patients outside the trial lack signs and special laboratory values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from multimodn.cohorts.tables import binary, cohort, table

if TYPE_CHECKING:
    from multimodn.cohorts.base import Cohort
    from multimodn.cohorts.config import CohortConfig

DEFAULT_TASKS = 1
DAYS = 1826
DIED = 2
MODALITIES = {
    "demographics": ["age", "sex"],
    "signs": ["ascites", "hepato", "spiders", "edema"],
    "blood": ["bili", "albumin", "protime", "platelet"],
    "special": ["copper", "alk.phos", "ast"],
}


def load(config: CohortConfig) -> Cohort:
    """Task `death5`."""
    frame = table("survival/pbc")
    died = ((frame["status"] == DIED) & (frame["time"] <= DAYS)).astype(float)
    known = (frame["time"] > DAYS) | (frame["status"] == DIED)
    frame = frame[known].reset_index(drop=True)
    died = died[known].reset_index(drop=True)
    tasks = {"death5": binary(died, "died within five years")}
    return cohort("pbc", frame, MODALITIES, tasks, config.natural)
