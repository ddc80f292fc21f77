"""The rows that a trial returns, one a seed: made plain, marked when they diverged, written to JSON and read back."""

from __future__ import annotations

import math
from typing import Any

Row = dict[str, Any]


def checked(rows: Any, seeds: list[int], entry: str) -> list[Row]:
    """Make rows plain (arrays and scalars of numpy or torch become Python's) and mark the diverged ones.

    A row is diverged when it says so or when one of its scalar metrics is NaN or infinite.

    Raises:
        ValueError: when there is not exactly one row a seed, in the order of `seeds`.
    """
    if not isinstance(rows, list) or [row.get("seed") for row in rows] != seeds:
        raise ValueError(f"{entry}.run: must return one dict a seed, for seeds {seeds} in this order")
    plain = [{name: v.tolist() if hasattr(v, "tolist") else v for name, v in row.items()} for row in rows]
    for row in plain:
        lost = any(isinstance(value, float) and not math.isfinite(value) for value in row.values())
        row["diverged"] = bool(row.get("diverged", False)) or lost
    return plain


def means(rows: list[Row]) -> dict[str, float]:
    """Mean over seeds of every scalar metric."""
    numbers = [k for k, v in rows[0].items() if isinstance(v, int | float) and k != "seed"]
    return {k: sum(row.get(k, math.nan) for row in rows) / len(rows) for k in numbers}


def to_json(value: Any) -> Any:
    """JSON has no NaN: a non-finite number is written as null."""
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(value: Any) -> Any:
    """Undo `to_json`: null is NaN."""
    if isinstance(value, dict):
        return {k: from_json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [from_json(v) for v in value]
    return math.nan if value is None else value
