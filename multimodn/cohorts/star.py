"""Project STAR (Tennessee 1985-1989, `AER/STAR`): a pupil's grades from kindergarten on; stands in for EDU.

Modalities: background (gender, ethnicity, free lunch and school type in kindergarten), then reading and mathematics
scores with that year's class type of kindergarten, grade 1 and grade 2. Tasks: reading and mathematics in grade 3 above
the median of all pupils who took the test. Left out: everything of grade 3 (school, teacher, class), which comes after
the inputs, and school numbers, which would let a network memorise schools.

Complete: the pupils with all four years (n about 2,600). Natural: all with a grade-3 score; half of them lack early
years, because they moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from multimodn.cohorts.tables import above_median, cohort, table

if TYPE_CHECKING:
    from multimodn.cohorts.base import Cohort
    from multimodn.cohorts.config import CohortConfig

DEFAULT_TASKS = 2
MODALITIES = {
    "background": ["gender", "ethnicity", "lunchk", "schoolk"],
    "kindergarten": ["readk", "mathk", "stark"],
    "grade1": ["read1", "math1", "star1"],
    "grade2": ["read2", "math2", "star2"],
}


def load(config: CohortConfig) -> Cohort:
    """Tasks `reading` and `math`."""
    frame = table("AER/STAR")
    frame = frame[frame["read3"].notna() | frame["math3"].notna()].reset_index(drop=True)
    ethnicity = frame["ethnicity"]
    frame["ethnicity"] = ethnicity.where(ethnicity.isin(["cauc", "afam"]) | ethnicity.isna(), "other")
    tasks = {
        "reading": above_median(frame["read3"], "grade-3 reading above the median"),
        "math": above_median(frame["math3"], "grade-3 mathematics above the median"),
    }
    return cohort("star", frame, MODALITIES, tasks, config.natural)
