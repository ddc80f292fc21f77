"""From records to samples: ratios of times and shares of pairs, one value a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.claims import Control
from common.pairing import rows
from common.statistics import Outcome, ratio_mean_greater

if TYPE_CHECKING:
    from common.records import Records

Array = NDArray[np.float64]
Test = Callable[["Records"], Outcome]
UNKNOWN = "not established"
BANDS = "Bands: 95 % t interval of the mean over seeds."
TIMED = "A seed is a repetition with inputs, masks and buckets of its own."
TIMES = "×"
LONG = 8192
"""Length at which speeds and coverage are judged."""


def names_of(frame: pd.DataFrame, prefix: str) -> list[str]:
    """The columns with times of one kind: `keep_`, `buckets_`, `naive_`, `hash_` or `drop_`."""
    return [str(c) for c in frame.columns if str(c).startswith(prefix) and str(c).endswith("_ms")]


def at_length(records: Records, experiment: str, length: int) -> pd.DataFrame:
    """The rows of one length, by seed."""
    return rows(records[experiment], task__length=length).sort_values("seed")


def speedups(records: Records, experiment: str, length: int, name: str) -> Array:
    """Dense time over the time of `name` (`keep_0.5`, `buckets_16`, `hash_16`, …), a value a seed."""
    frame = at_length(records, experiment, length)
    return times_of(frame, "dense") / times_of(frame, name)


def times_of(frame: pd.DataFrame, name: str) -> Array:
    """Milliseconds of a contender, a value a row.

    Raises:
        ValueError: it was not timed in every row.
    """
    found = frame[f"{name}_ms"].to_numpy(dtype=np.float64) if f"{name}_ms" in frame else np.array([np.nan])
    if not np.isfinite(found).all():
        raise ValueError(f"{name} was not timed at task.length={sorted(frame['task.length'].unique().tolist())}")
    return found


def faster(experiment: str, name: str, bound: float, length: int = LONG) -> Test:
    """Geometric mean of dense time over sparse time exceeds the bound."""
    return lambda records: ratio_mean_greater(speedups(records, experiment, length, name), bound, unit=TIMES)


def lengths(records: Records, experiment: str, name: str) -> list[int]:
    """The lengths at which `name` was timed, ascending."""
    frame = records[experiment]
    if f"{name}_ms" not in frame:
        raise ValueError(f"{name} was not timed")
    timed = frame[f"{name}_ms"].notna()
    return sorted(int(x) for x in frame.loc[timed, "task.length"].unique())


def swap_times(experiment: str, names: tuple[str, ...]) -> Control:
    """Dense and sparse attention exchange their times."""

    def apply(records: Records) -> Records:
        frame = records[experiment]
        dense = frame["dense_ms"]
        swapped = {f"{name}_ms": dense.where(frame[f"{name}_ms"].notna()) for name in names}
        return records.replace(experiment, frame.assign(**swapped, dense_ms=frame[f"{names[0]}_ms"].fillna(dense)))

    return Control(
        f"dense attention is given the time of {names[0].replace('_', ' ')}, and the sparse ones dense time", apply
    )
