"""From a frame of runs to samples for a test: one value a seed, arms aligned on seeds, diverged runs as the worst."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]


def values(
    frame: pd.DataFrame, arm: str, metric: str, *, mode: Literal["max", "min"] = "max", worst: float | None = None
) -> Array:
    """Give one arm's metric, (n,), ordered by seed; see `paired` for how diverged runs count."""
    return _by_seed(frame, arm, metric, mode, worst).to_numpy()


def paired(
    frame: pd.DataFrame,
    arm_a: str,
    arm_b: str,
    metric: str,
    *,
    mode: Literal["max", "min"] = "max",
    worst: float | None = None,
) -> tuple[Array, Array]:
    """Give the metric of two arms, (n,) each, aligned on seed.

    frame: rows with columns `arm`, `seed`, `metric` and optionally `diverged`. A diverged or non-finite row counts as
    `worst`; None means the worst finite value of the frame in the direction that `mode` calls bad. Raises ValueError
    when a column or arm is missing, a seed lacks its twin, or an arm has several rows a seed (select a setting first).
    """
    a, b = (_by_seed(frame, arm, metric, mode, worst) for arm in (arm_a, arm_b))
    if list(a.index) != list(b.index):
        lone = sorted(set(a.index) ^ set(b.index))
        raise ValueError(
            f"seeds {lone} are in only one of {arm_a!r} and {arm_b!r}: a paired test needs every seed in both"
        )
    return a.to_numpy(), b.to_numpy()


def both(
    frame: pd.DataFrame,
    arm_a: str,
    arm_b: str,
    metric: str,
    *,
    mode: Literal["max", "min"] = "max",
    worst: float | None = None,
) -> tuple[Array, Array]:
    """`paired` over the seeds that both arms have; one that only one arm has is left out."""
    common = set(frame["seed"][frame["arm"] == arm_a]) & set(frame["seed"][frame["arm"] == arm_b])
    # without a common seed `paired` says what is missing
    shared = frame[frame["seed"].isin(common)] if common else frame
    return paired(shared, arm_a, arm_b, metric, mode=mode, worst=worst)


def rows(frame: pd.DataFrame, **where: Any) -> pd.DataFrame:
    """The rows with the given values; `task__clients=4` reads the column `task.clients`.

    Raises:
        ValueError: there are none.
    """
    found = frame
    for key, value in where.items():
        column = key.replace("__", ".")
        if column not in found:
            raise ValueError(f"column {column!r} is not recorded: the frame has {', '.join(map(str, frame.columns))}")
        same = np.isclose(found[column], value) if isinstance(value, float) else found[column] == value
        found = found[same]
    if found.empty:
        raise ValueError(f"no record with {where}")
    return found


def _by_seed(frame: pd.DataFrame, arm: str, metric: str, mode: str, worst: float | None) -> pd.Series:
    if mode not in ("max", "min"):
        raise ValueError(f"mode={mode!r}: must be 'max' or 'min'")
    missing = [column for column in ("arm", "seed", metric) if column not in frame]
    if missing:
        raise ValueError(f"column {missing[0]!r} is not recorded: the frame has {', '.join(map(str, frame.columns))}")
    rows = frame[frame["arm"] == arm]
    if rows.empty:
        raise ValueError(f"arm={arm!r}: must be one of {', '.join(sorted(map(str, frame['arm'].unique())))}")
    repeated = rows["seed"][rows["seed"].duplicated()]
    if len(repeated):
        raise ValueError(f"arm {arm!r} has several rows for seed {repeated.iloc[0]}: select one setting first")
    numbers = _replace_diverged(frame, rows, metric, mode, worst)
    return pd.Series(numbers, index=rows["seed"].to_numpy(), name=metric).sort_index()


def _replace_diverged(frame: pd.DataFrame, rows: pd.DataFrame, metric: str, mode: str, worst: float | None) -> Array:
    def good(part: pd.DataFrame) -> tuple[Array, NDArray[np.bool_]]:
        numbers = part[metric].to_numpy(dtype=np.float64, na_value=np.nan)
        sound = np.isfinite(numbers)
        if "diverged" in part:
            sound &= ~part["diverged"].to_numpy(dtype=bool)
        return numbers, sound

    numbers, sound = good(rows)
    if sound.all():
        return numbers
    if worst is None:
        everything, finite = good(frame)
        if not finite.any():
            raise ValueError(f"every run of the frame diverged in {metric!r}: give `worst`")
        worst = float(everything[finite].min() if mode == "max" else everything[finite].max())
    return np.where(sound, numbers, worst)
