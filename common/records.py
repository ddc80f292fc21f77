"""All records of a paper as tables: what claims are judged on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from common.provenance import git_state
from common.sweeps import Job, Selection
from common.trials import TrialRecord


@dataclass(frozen=True)
class Records:
    """Tables by experiment; `records["table2"]` has one row per (trial, seed).

    Columns: the trial's config with dotted names (`optimizer.lr`), `arm`, `seed`, `key`, `diverged`, and all metrics.
    An experiment without a grid at this scale gives an empty table.
    """

    scale: str
    jobs: Mapping[str, list[Job]]
    found: Mapping[str, TrialRecord]
    """Trial key -> record."""
    _frames: dict[str, pd.DataFrame] = field(default_factory=dict)

    def __getitem__(self, experiment: str) -> pd.DataFrame:
        """The experiment's table (a copy).

        Raises:
            KeyError: no such experiment.
            ValueError: a metric has the name of a config key.
        """
        if experiment not in self._frames:
            rows = [row for job in self._jobs(experiment) for row in self._rows(job)]
            self._frames[experiment] = pd.DataFrame(rows)
        return self._frames[experiment].copy()

    def __contains__(self, experiment: object) -> bool:
        return experiment in self.jobs

    def __iter__(self) -> Any:
        return iter(self.jobs)

    def _jobs(self, experiment: str) -> list[Job]:
        if experiment not in self.jobs:
            raise KeyError(f"experiment={experiment}: must be one of {', '.join(self.jobs)}")
        return self.jobs[experiment]

    def _rows(self, job: Job) -> list[dict[str, Any]]:
        base = flatten(job.config) | {"key": job.key}
        rows = self.found[job.key].rows
        clash = sorted((set(base) & set(rows[0])) - {"seed"})
        if clash:
            raise ValueError(f"{job.entry}: metric {clash[0]} has the name of a config key")
        return [base | row for row in rows]

    def history(self, experiment: str) -> pd.DataFrame:
        """Logged metrics over steps, long: the columns of the experiment's config, `step`, `seed` and the metrics."""
        frames = []
        for job in self._jobs(experiment):
            history = self.found[job.key].history
            config = {k: v for k, v in (flatten(job.config) | {"key": job.key}).items() if k not in history}
            constant = pd.DataFrame([list(config.values())] * len(history), columns=list(config), index=history.index)
            frames.append(pd.concat([constant, history], axis=1))
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def selections(self, experiment: str) -> list[Selection]:
        """What the experiment's grids selected, without repeats."""
        unique: list[Selection] = []
        for job in self._jobs(experiment):
            if job.selected is not None and job.selected not in unique:
                unique.append(job.selected)
        return unique

    def replace(self, experiment: str, frame: pd.DataFrame) -> Records:
        """The same records with another table for one experiment (for controls)."""
        self._jobs(experiment)
        return Records(self.scale, self.jobs, self.found, self._frames | {experiment: frame.copy()})

    def provenance(self) -> dict[str, Any]:
        """Where the numbers come from, the same bytes whenever the records are the same.

        `started`: the earliest trial; `wall_s`: seconds during which at least one trial ran; `fingerprint`: hash over
        the trial keys; `commit` and `dirty`: of the sources now, `results/` aside.
        """
        keys = sorted({job.key for jobs in self.jobs.values() for job in jobs})
        found = [self.found[key].provenance for key in keys]
        first = found[0] if found else {}
        return {
            **git_state(),
            "fingerprint": hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16],
            "scale": self.scale,
            "trials": len(keys),
            "versions": first.get("versions", {}),
            "machine": first.get("machine", {}),
            "device": ", ".join(sorted({f["device"] for f in found})),
            "threads": max((f["threads"] for f in found), default=1),
            "started": min((f["started"] for f in found), default=""),
            "wall_s": round(_union([(f["start_unix"], f["end_unix"]) for f in found]), 1),
            "cpu_s": round(sum(f["wall_s"] for f in found), 1),
            "peak_memory_mb": max((f["peak_memory_mb"] for f in found), default=0.0),
        }


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested config -> dotted columns; lists stay lists."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _union(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
