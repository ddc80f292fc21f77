"""Tables of the HTML report that come from records: arms with their settings, tuning, and every trial."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from common.wording import number_text

if TYPE_CHECKING:
    from common.records import Records

Table = dict[str, Any]
IDENTITY = ("arm", "seed", "key", "diverged")
SHARED = ("experiment", "scale", "seed", "n_seeds", "threads", "device", "precision", "results_dir", "cost")
MAX_VALUES = 4  # of a varied setting listed by value; longer lists are given as a range
MAX_METRICS = 6


def experiment_tables(records: Records, experiment: str) -> Table | None:
    """Give arms (settings, seeds, diverged, trial keys) and tuning of one experiment; None without records."""
    try:
        frame = records[experiment]
    except (KeyError, FileNotFoundError):
        return None
    if frame.empty:
        return None
    axes = _axes(frame)
    arms = []
    for arm, rows in frame.groupby("arm", sort=True):
        settings = {axis: _listed(rows[axis]) for axis in axes if not _blank(rows[axis])}
        arms.append(
            {
                "arm": arm,
                "settings": settings,
                "n": int(rows["seed"].nunique()),
                "diverged": int(rows["diverged"].sum()) if "diverged" in rows else 0,
                "keys": sorted(set(rows["key"])),
            }
        )
    seeds = _listed(frame["seed"])
    return {"name": experiment, "seeds": seeds, "arms": arms, "tuning": _tuning(records, experiment)}


def trial_table(records: Records, experiment: str) -> Table:
    """Give one row a trial of an experiment: arm, varied settings, seeds, diverged, mean of the metrics over seeds."""
    frame = records[experiment]
    axes, metrics = _axes(frame), _metrics(frame)
    rows = []
    for (arm, key), group in frame.groupby(["arm", "key"], sort=True):
        means = [number_text(float(group[m].astype(float).mean())) for m in metrics]
        settings = [number_text(group[axis].iloc[0]) for axis in axes]
        diverged = int(group["diverged"].sum()) if "diverged" in group else 0
        rows.append({"key": key, "cells": [arm, *settings, _listed(group["seed"]), str(diverged), *means]})
    return {"name": experiment, "columns": ["arm", *axes, "seeds", "diverged", *metrics], "rows": rows}


def _tuning(records: Records, experiment: str) -> list[Table]:
    """Give what each arm's tuning chose, and from which grid."""
    return [
        {
            "arm": s.arm,
            "experiment": s.experiment,
            "goal": f"{s.mode} {s.metric}",
            "value": number_text(float(s.value)),
            "n": s.n,
            "axes": [
                {"name": a, "value": v, "grid": ", ".join(map(str, s.grid.get(a, []))), "border": a in s.on_border}
                for a, v in s.chosen.items()
            ],
        }
        for s in records.selections(experiment)
    ]


def _axes(frame: pd.DataFrame) -> list[str]:
    """Give the config columns that vary in an experiment (dotted names), in the order of the frame."""
    return [c for c in frame.columns if "." in c and c not in SHARED and len(set(map(repr, frame[c]))) > 1]


def _metrics(frame: pd.DataFrame) -> list[str]:
    """Give the first few columns that hold one number a run."""
    plain = [c for c in frame.columns if "." not in c and c not in IDENTITY and c not in SHARED]
    numeric = [c for c in plain if pd.api.types.is_numeric_dtype(frame[c])]
    return [c for c in numeric if not pd.api.types.is_bool_dtype(frame[c])][:MAX_METRICS]


def _blank(values: pd.Series) -> bool:
    return bool(values.map(lambda v: v is None or (isinstance(v, float) and np.isnan(v))).all())


def _listed(values: pd.Series) -> str:
    """Give the distinct values: a list, `first … last (count)` when they are many, `a–b` for a run of integers."""
    distinct = sorted({_native(v) for v in values}, key=lambda v: (isinstance(v, str), v))
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in distinct)
    if whole and len(distinct) > 2 and distinct[-1] - distinct[0] == len(distinct) - 1:
        return f"{distinct[0]}–{distinct[-1]}"
    if len(distinct) <= MAX_VALUES:
        return ", ".join(number_text(v) for v in distinct)
    return f"{number_text(distinct[0])} … {number_text(distinct[-1])} ({len(distinct)} values)"


def _native(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int | float | str) else repr(value)
