"""Planners that shorten a paper's grids, so that every experiment is composed and checked in seconds."""

from typing import Any

from common.sweeps import Planner

MANY = 5  # of a longer axis the two ends are enough to check types and ranges


class Diagonal(Planner):
    """Plans along the diagonal of every grid: each value of an axis once, instead of their product."""

    def entries(self, experiment: str) -> list[dict[str, Any]]:
        entries = [self._diagonal(entry) for entry in super().entries(experiment)]
        return entries[:1] if self.scale == "smoke" else entries  # the laptop's entries, made short

    @staticmethod
    def _diagonal(entry: dict[str, Any]) -> dict[str, Any]:
        axes = {k: v if len(v) <= MANY else [v[0], v[-1]] for k, v in entry.items() if isinstance(v, list)}
        length = max(map(len, axes.values()), default=0)
        steps = [[v[min(i, len(v) - 1)] for v in axes.values()] for i in range(length)]
        flat = [[x for k, v in zip(axes, step, strict=True) for x in (v if "," in k else [v])] for step in steps]
        key = ",".join(axes)
        joined = {key: flat if "," in key else [x for (x,) in flat]} if axes else {}
        return {k: v for k, v in entry.items() if k not in axes} | joined


class Ends(Planner):
    """Plans the grids with the two ends of every long axis, and seeds left out: enough to check every setting."""

    def entries(self, experiment: str) -> list[dict[str, Any]]:
        return [{k: self._ends(k, v) for k, v in entry.items()} for entry in super().entries(experiment)]

    @staticmethod
    def _ends(key: str, value: Any) -> Any:
        if not isinstance(value, list) or (len(value) <= MANY and key != "seed"):
            return value
        return value[:1] if key == "seed" else [value[0], value[-1]]


def seeds_of(planner: Planner, experiment: str, arm: str) -> list[int]:
    """Seeds of an arm, those of all its entries."""
    found: list[int] = []
    for entry in Planner.entries(planner, experiment):
        if entry["arm"] == arm:
            first = entry.get("seed", 0)
            for seed in first if isinstance(first, list) else [first]:
                found += range(seed, seed + entry.get("n_seeds", 1))
    return found
