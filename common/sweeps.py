"""From an experiment file to its list of trials.

An experiment (conf/experiment/<name>.yaml) holds, for every scale, a list of grids as in scikit-learn's ParameterGrid:

    hydra:
      mode: MULTIRUN
      sweeper:
        grids:
          laptop:
            - {arm: adamw, optimizer: adamw, optimizer.lr: [0.01, 0.03], optimizer.weight_decay: [0.1, 1], seed: 5}
            - {arm: rv, select: {experiment: tune, arm: rv, metric: val_accuracy, mode: max}, seed: 10, n_seeds: 8}

A list is an axis, the product of an entry's axes gives its trials; `"a,b": [[1, 2], [3, 4]]` moves two keys together.
An entry that is a list stands for its entries, so that one scale can take over another's (`paper: [*laptop, …]`).
`select` starts from the overrides of the best trial of an arm in another experiment (mean over seeds of `metric`; a
diverged seed makes a setting the worst), optionally only among those with the values in `where`; the entry's own
overrides come on top. `hydra.sweeper.overrides` (how scale=smoke shrinks everything) and the command line's follow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from common.compose import Composer, merge, parse, target
from common.fingerprint import fingerprint
from common.plancache import PlanCache, plans_path
from common.planned import as_values, config_name
from common.trials import LABELS, TrialStore, trial_key

FALLBACKS = {"smoke": ("laptop", "gpu", "paper"), "gpu": ("laptop",)}
"""Whose grids a scale uses when it has none of its own."""
SELECT_KEYS = {"experiment", "arm", "metric", "mode", "where"}
SEED_KEYS = {"seed", "n_seeds"}


@dataclass(frozen=True)
class Selection:
    """Which setting a tuning experiment chose, and whether its grid was wide enough."""

    experiment: str
    arm: str
    metric: str
    mode: str
    chosen: dict[str, str]
    """Axis -> chosen value, for the axes that the arm's grid varies."""
    value: float
    """Mean over seeds of the metric at the chosen setting; NaN when every setting diverged."""
    n: int
    """Seeds behind that mean."""
    grid: dict[str, list[str]]
    """Axis -> all its values in the grid, in order of first use."""
    on_border: list[str]
    """Numeric axes of at least 3 values whose optimum is the smallest or largest."""


@dataclass(frozen=True)
class Job:
    """One trial of a sweep."""

    overrides: list[str]
    config: dict[str, Any]
    key: str
    entry: str
    selected: Selection | None = None
    """What its `select` chose."""


@dataclass
class Planner:
    """Plans the experiments of one paper; composes and selects once each.

    Args:
        cli: the paper's entry point, which knows its schema and its entry modules.
        store: the records to select from; None plans with the first setting of each grid instead (to check configs).
        overrides: the command line's, appended to every job.
        scale: smoke, laptop, gpu or paper.
    """

    cli: Any
    store: TrialStore | None
    scale: str
    overrides: list[str] = field(default_factory=list)
    _plans: dict[str, list[Job]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.composer = Composer(self.cli.paper, self.cli.schema)
        self.cache = PlanCache(self.cli.paper, plans_path(self.store.root) if self.store else None)
        self.overrides = [o for o in self.overrides if target(o) not in ("experiment", "scale")]

    def sweeper(self, experiment: str) -> dict[str, Any]:
        """The experiment's `hydra.sweeper` node at this scale."""
        groups = [o for o in self.overrides if self.composer.is_group(o)]
        overrides = merge(groups, [f"experiment={experiment}", f"scale={self.scale}"])
        name = f"sweeper {overrides}"
        if name not in self.cache.values:
            sweeper = self.composer.full(overrides).hydra.sweeper
            self.cache.values[name] = OmegaConf.to_container(sweeper, resolve=False)
        return self.cache.values[name]

    def entries(self, experiment: str) -> list[dict[str, Any]]:
        """The experiment's grids at this scale; empty when it has none there."""
        grids = self.sweeper(experiment).get("grids") or {}
        for scale in (self.scale, *FALLBACKS.get(self.scale, ())):
            if scale in grids:
                return [entry for part in grids[scale] for entry in (part if isinstance(part, list) else [part])]
        return []

    def needs(self, experiment: str) -> set[str]:
        """The experiments that this one selects from."""
        return {entry["select"]["experiment"] for entry in self.entries(experiment) if "select" in entry}

    def waves(self, experiments: Iterable[str]) -> list[list[str]]:
        """Order experiments so that each comes after those it selects from.

        Raises:
            ValueError: when they select from each other in a circle.
        """
        left, waves = list(experiments), []
        while left:
            wave = [e for e in left if not self.needs(e) & set(left)]
            if not wave:
                raise ValueError(f"experiment={left[0]}: selects in a circle ({', '.join(left)})")
            waves.append(wave)
            left = [e for e in left if e not in wave]
        return waves

    def plan(self, experiment: str) -> list[Job]:
        """All trials of an experiment, in the order of its file.

        Raises:
            ValueError: a bad grid, a bad value, or a selection from an experiment that has not been run.
        """
        if experiment not in self._plans:
            always = [str(o) for o in self.sweeper(experiment).get("overrides") or []]
            head = [f"experiment={experiment}", f"scale={self.scale}"]
            jobs = []
            for entry in self.entries(experiment):
                base, selected = self._selected(experiment, entry)
                for own in product(entry):
                    jobs.append(self.job(merge(head, base, own, always, self.overrides), selected))
            self._plans[experiment] = jobs
            self.cache.save()
        return self._plans[experiment]

    def job(self, overrides: list[str], selected: Selection | None = None) -> Job:
        """Check one list of overrides and find its key."""
        name = config_name(overrides)
        if name not in self.cache.values:
            config = self.composer.config([o for o in overrides if not target(o).startswith("hydra")])
            self.cache.values[name] = {**as_values(config), "entry": self.cli.entry(config)}
        found = self.cache.values[name]
        return Job(
            overrides,
            found["values"],
            trial_key(found["values"], fingerprint(found["entry"])),
            found["entry"],
            selected,
        )

    def _selected(self, experiment: str, entry: dict[str, Any]) -> tuple[list[str], Selection | None]:
        """The overrides an entry starts from, and what was selected."""
        if "select" not in entry:
            return [], None
        select = {"arm": entry.get("arm"), "mode": "max", **entry["select"]}
        unknown = sorted(set(select) - SELECT_KEYS)
        if unknown or not {"experiment", "metric", "arm"} <= set(select) or select["mode"] not in ("max", "min"):
            allowed = "experiment, arm, metric, mode (max or min) and where"
            raise ValueError(f"experiment={experiment}: select={entry['select']}: must be of {allowed}")
        where = {k: text(v) for k, v in (select.get("where") or {}).items()}
        arm = [j for j in self.plan(select["experiment"]) if j.config["arm"] == select["arm"]]
        arm = [j for j in arm if where.items() <= settings(j).items()]
        if not arm:
            raise ValueError(f"experiment={experiment}: select={entry['select']}: no such arm or setting there")
        best, selected = self._best(experiment, arm, select)
        skip = {*LABELS, *SEED_KEYS}
        return [o for o in best.overrides if target(o) not in skip], selected

    def _best(self, experiment: str, jobs: list[Job], select: dict[str, Any]) -> tuple[Job, Selection | None]:
        if self.store is None:
            return jobs[0], None
        scores: dict[tuple[tuple[str, str], ...], list[float]] = {}
        for job in jobs:
            record = self.store.load(job.key)
            if record is None:
                where = f"{select['experiment']}, which has no record at scale={self.scale}"
                raise ValueError(f"experiment={experiment}: selects from {where}: run that experiment first")
            scores.setdefault(tuple(settings(job).items()), []).extend(_scores(record.rows, select, experiment))
        sign = 1 if select["mode"] == "max" else -1
        means = {setting: _mean(values, sign) for setting, values in scores.items()}
        best = max(means, key=lambda setting: sign * means[setting])
        job = next(j for j in jobs if tuple(settings(j).items()) == best)
        value = means[best] if math.isfinite(means[best]) else math.nan
        grid = axes(settings(j) for j in jobs)
        chosen = {axis: dict(best)[axis] for axis in grid}
        border = [axis for axis, values in grid.items() if on_border(chosen[axis], values)]
        return job, Selection(
            select["experiment"],
            select["arm"],
            select["metric"],
            select["mode"],
            chosen,
            value,
            len(scores[best]),
            grid,
            border,
        )


def plan(
    paper: str,
    experiment: str,
    scale: str = "laptop",
    overrides: Sequence[str] = (),
    results: str | Path | None = "results",
) -> list[Job]:
    """All trials of one experiment.

    Args:
        paper: package name.
        experiment: name of a file in its conf/experiment.
        scale: smoke, laptop, gpu or paper.
        overrides: appended to every job, as on the command line.
        results: folder of records, for selections; None takes the first setting of a grid instead.

    Raises:
        ValueError: a bad grid or value, or a selection from an experiment that has not been run.
    """
    import importlib

    cli = importlib.import_module(f"{paper}.train").main
    store = None if results is None else TrialStore(Path(results) / paper)
    return Planner(cli, store, scale, list(overrides)).plan(experiment)


def product(entry: dict[str, Any]) -> list[list[str]]:
    """Expand one grid into override lists, the last axis fastest.

    Raises:
        ValueError: keys that move together (`"a,b": [[1, 2], [3, 4]]`) without one value each.
    """
    axes_ = [_axis(str(key), value) for key, value in entry.items() if key != "select"]
    return [[o for part in combination for o in part] for combination in itertools.product(*axes_)]


def _axis(key: str, value: Any) -> list[list[str]]:
    """The steps of one axis, each a list of overrides."""
    keys, steps = key.split(","), value if isinstance(value, list) else [value]
    if len(keys) == 1:
        return [[f"{key}={text(step)}"] for step in steps]
    if not all(isinstance(step, list) and len(step) == len(keys) for step in steps):
        raise ValueError(f"{key}={text(value)}: must be a list of lists of {len(keys)} values, one a key")
    return [[f"{k.strip()}={text(v)}" for k, v in zip(keys, step, strict=True)] for step in steps]


def text(value: Any) -> str:
    """Write a YAML value as the right side of a Hydra override; strings pass as they are."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(text(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{text(v)}" for k, v in value.items()) + "}"
    return str(value)


def settings(job: Job) -> dict[str, str]:
    """What a job sets, apart from labels and seeds."""
    pairs = (o.partition("=")[::2] for o in job.overrides if target(o) not in {*LABELS, *SEED_KEYS})
    return dict(pairs)


def axes(found: Iterable[dict[str, str]]) -> dict[str, list[str]]:
    """The keys that differ between settings, with their values in order of first use."""
    values: dict[str, list[str]] = {}
    for setting in found:
        for key, value in setting.items():
            if value not in values.setdefault(key, []):
                values[key].append(value)
    return {key: several for key, several in values.items() if len(several) > 1}


def on_border(chosen: str, values: list[str]) -> bool:
    """Whether the chosen value is the smallest or largest of at least 3 numbers."""
    numbers = [parse(f"x={v}").value() for v in values]
    if len(numbers) < 3 or not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        return False
    return parse(f"x={chosen}").value() in (min(numbers), max(numbers))  # type: ignore[type-var]


def _scores(rows: list[dict[str, Any]], select: dict[str, Any], experiment: str) -> list[float]:
    """The metric of every seed, NaN where it diverged."""
    metric = select["metric"]
    live = [row for row in rows if not row["diverged"]]
    if any(metric not in row for row in live):
        known = sorted(k for k, v in live[0].items() if isinstance(v, float))
        raise ValueError(f"experiment={experiment}: select.metric={metric}: must be one of {', '.join(known)}")
    return [math.nan if row["diverged"] else float(row[metric]) for row in rows]


def _mean(values: list[float], sign: int) -> float:
    """Mean over seeds; a seed that diverged makes it the worst value there is."""
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else -sign * math.inf
