"""Records without any training: a world in which the paper is right, and the plans of a scale with made-up metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from clustered_pfl.judging.samples import PANELS, PLATEAUS
from common.records import flatten
from common.sweeps import Job
from common.tests.report_fakes import FakeRecords, arm_rows

SEEDS = np.arange(10, 18)
RNG = np.random.default_rng(0)
MEASURED = (
    "test_accuracy", "log10_distance", "intra_max", "intra_slope", "inter_min", "intra_distance_max", "curve",
    "plateau", "errors", "excess", "error", "pairs", "final_error",
)  # fmt: skip
DISTANCES = {  # log10 of the final distance in the three panels of figure 3
    "fc": (-12.0, -12.7, -1.75),
    "ground_truth": (-12.1, -12.7, -2.0),
    "local": (-1.0, -1.1, -0.9),
    "global": (2.2, 2.1, 2.2),
    "ifca": (-2.0, -5.0, -0.7),
    "ifca_official": (-2.0, -0.6, 2.0),
}
TABLE1 = {  # accuracy with private labels, with rotation
    "fc": (0.93, 0.92),
    "ground_truth": (0.94, 0.94),
    "local": (0.75, 0.75),
    "global": (0.24, 0.87),
    "hypcluster": (0.9, 0.88),
    "ditto": (0.76, 0.83),
    "knn_per": (0.6, 0.8),
    "ifca": (0.9, 0.86),
}
OFFICIAL = {
    "fc_neg_prob": 0.8,
    "local_neg_prob": 0.6,
    "ground_truth_neg_prob": 0.8,
    "local_redraw": 0.9,
    "ifca_shared": 0.24,
    "ifca_equal": 0.8,
}
QUANTILES = {0.025: 0.8, 0.05: 0.85, 0.1: 0.9, 0.2: 0.93, 0.25: 0.93, 0.4: 0.6}
CLIFF = {0.05: -0.9, 0.1: -0.9, 0.15: -2.3, 0.2: -4.0, 0.25: -9.0, 0.3: -9.0, 0.4: 2.0, 0.5: 2.1}
ATTACKED = ("large_gradient", "bit_flip", "label_flip", "inside_radius", "non_finite")
SETUPS = {  # arm of `theory` -> set-ups [n, Delta, beta, distance]
    "members": [[n, 100.0, 0.0, 0.7] for n in (4, 8, 16, 32, 64)],
    "separation": [[16, delta, 0.0, 0.7] for delta in (2.0, 3.0, 4.0, 6.0, 8.0, 16.0)],
    "byzantine": [[36, delta, beta, 0.7] for delta in (10.0, 40.0, 160.0) for beta in (0.05, 0.1, 0.2)],
    "far": [[36, 40.0, 0.1, distance] for distance in (2.0, 10.0, 1e3, 1e6, 1e9, 1e12)],
}


def rows(arm: str, seeds: Iterable[int] = SEEDS, **means: Any) -> pd.DataFrame:
    """One arm with a little seed noise in everything that is measured."""
    return arm_rows(arm, seeds, RNG, 1e-4, lambda name: name not in MEASURED, **means)


def _fig3() -> pd.DataFrame:
    parts = []
    for i, (k, n) in enumerate(PANELS):
        where = {"task.clusters": k, "task.clients": n}
        for arm, levels in DISTANCES.items():
            parts.append(rows(arm, log10_distance=levels[i], **where, **{"task.dtype": "float64"}))
            if arm in ("fc", "ground_truth") and k == 4:
                parts.append(rows(arm, log10_distance=-4.2, **where, **{"task.dtype": "float32"}))
    return pd.concat(parts, ignore_index=True)


def _table1() -> pd.DataFrame:
    parts = []
    for i, kind in enumerate(("private_label", "rotation")):
        for arm, levels in TABLE1.items():
            twenty = kind == "private_label" and arm in ("fc", "ground_truth", "ifca")
            seeds = range(10, 30) if twenty else SEEDS
            parts.append(rows(arm, seeds, test_accuracy=levels[i], **{"partition.kind": kind}))
    frame = pd.concat(parts, ignore_index=True)
    lost = (frame["arm"] == "ifca") & (frame["partition.kind"] == "private_label") & (frame["seed"] % 3 == 0)
    return frame.assign(test_accuracy=frame["test_accuracy"] - 0.23 * lost)


def _fig4() -> pd.DataFrame:
    parts = [
        rows("radius", test_accuracy=level, **{"method.radius.quantile": q, "method.local_steps": 1})
        for q, level in QUANTILES.items()
    ]
    for steps, level in ((5, 0.92), (10, 0.915), (20, 0.9), (40, 0.89)):
        where = {"method.radius.quantile": 0.2, "method.local_steps": steps}
        parts.append(rows("local_steps", test_accuracy=level, **where))
    for arm, level in (("local", 0.4), ("global", 0.3), ("ground_truth", 0.93), ("ifca", 0.6), ("ditto", 0.5)):
        parts.append(rows(arm, test_accuracy=level, **{"method.radius.quantile": 0.2, "method.local_steps": 1}))
    return pd.concat(parts, ignore_index=True)


def _fig6() -> pd.DataFrame:
    parts = [rows("fc", test_accuracy=0.93, **{"attack.name": "none"})]
    parts.append(rows("global", test_accuracy=0.24, **{"attack.name": "none"}))
    for attack in ATTACKED:
        low = 0.1 if attack == "large_gradient" else 0.2
        parts.append(rows("fc", test_accuracy=0.92, **{"attack.name": attack}))
        parts.append(rows("global", test_accuracy=low, **{"attack.name": attack}))
    return pd.concat(parts, ignore_index=True)


def _theory() -> pd.DataFrame:
    near = {2.0: 1.7, 3.0: 1.2, 4.0: 1.05}
    errors = {
        "members": [1 / n for n, *_ in SETUPS["members"]],
        "separation": [near.get(delta, 1.0) / n for n, delta, *_ in SETUPS["separation"]],
        "byzantine": [1 / n + 0.2 * beta * delta for n, delta, beta, _ in SETUPS["byzantine"]],
        "far": [1.5 / 36, *[1.01 / 36] * 5],
    }
    excess = {
        "members": [0.0] * 5,
        "separation": [0.0] * 6,
        "byzantine": [0.2 * beta * delta for _, delta, beta, _ in SETUPS["byzantine"]],
        "far": [0.5 / 36, *[0.01 / 36] * 5],
    }
    bounds = {arm: [beta * delta for _, delta, beta, _ in setups] for arm, setups in SETUPS.items()}
    parts = [rows(arm, errors=errors[arm], excess=excess[arm], bound=bounds[arm], setups=SETUPS[arm]) for arm in SETUPS]
    return pd.concat(parts, ignore_index=True)


def _quadratics() -> dict[str, pd.DataFrame]:
    rate = [
        rows(arm, error=size / n, **{"task.clients": n})
        for arm, size in (("fc", 1.05), ("ground_truth", 1.0))
        for n in (2, 4, 8, 16, 32)
    ]
    many = range(10, 40)
    found = [rows("fc", many, exact=1.0), rows("ifca", many, exact=0.0)]
    found[1]["exact"] = (found[1]["seed"] % 3 == 0).astype(float)
    momentum = [rows("mc", pairs=level, final_error=1.0, **{"method.alpha": a}) for a, level in MOMENTUM.items()]
    momentum += [rows("mc_long", pairs=0.8, final_error=e, **{"method.alpha": a}) for a, e in ((0.1, 0.2), (1.0, 9.0))]
    used = {"fc": 4.0, "ifca": 1.0, "ifca_gradient": 1.0, "hypcluster": 2.0}
    motivation = [
        rows(arm, occupied=count, pairs=1.0 if arm == "fc" else 0.3, **{"task.clusters": 4})
        for arm, count in used.items()
    ]
    parts = {"rate": rate, "assignment": found, "momentum": momentum, "motivation": motivation}
    return {name: pd.concat(part, ignore_index=True) for name, part in parts.items()}


MOMENTUM = {0.03: 0.95, 0.1: 0.9, 0.3: 0.8, 1.0: 0.6}  # weight of the new gradient -> pairs right


def right() -> FakeRecords:
    """Records in which every claim of the paper holds."""
    assumptions = {"intra_max": 10.0, "intra_slope": 1e-3, "inter_min": 2e5, "intra_distance_max": 100.0}
    cliff = [rows("fc", log10_distance=level, **{"method.radius.quantile": q}) for q, level in CLIFF.items()]
    groups = {"fc": 0.95, "ground_truth": 0.97, "local": 0.9, "global": 0.85}
    fig7 = [
        rows("fc", plateau=level, curve=[level * (1 + 2.0**-m) for m in range(51)], **{"task.std": std})
        for std, level in PLATEAUS.items()
    ]
    for frame in fig7:  # noise on a plateau would be a rise
        frame["curve"] = [frame["curve"].iloc[0]] * len(frame)
    return FakeRecords(
        {
            "fig2": rows("ground_truth", **assumptions),
            "fig3": _fig3(),
            "cliff": pd.concat(cliff, ignore_index=True),
            "table1": _table1(),
            "official": pd.concat(
                [rows(a, test_accuracy=v, **{"partition.kind": "private_label"}) for a, v in OFFICIAL.items()],
                ignore_index=True,
            ),
            "fig4": _fig4(),
            "fig5": pd.concat(
                [rows(a, test_accuracy=v, **{"partition.kind": "label_groups"}) for a, v in groups.items()],
                ignore_index=True,
            ),
            "fig6": _fig6(),
            "fig7": pd.concat(fig7, ignore_index=True),
            "theory": _theory(),
            **_quadratics(),
        }
    )


def changed(
    records: FakeRecords, experiment: str, metric: str, change: Callable[[pd.Series], Any], **where: Any
) -> FakeRecords:
    """The records with `metric` replaced by change(metric) in the rows with the given values (`a__b` is column a.b)."""
    frame = records[experiment].copy()
    chosen = np.ones(len(frame), dtype=bool)
    for key, value in where.items():
        chosen &= (frame[key.replace("__", ".")] == value).to_numpy()
    assert chosen.any(), where
    new = frame[metric].tolist()
    for i in np.flatnonzero(chosen):
        new[i] = change(new[i])
    return records.replace(experiment, frame.assign(**{metric: pd.Series(new, index=frame.index)}))


class Planned(FakeRecords):
    """Records of planned trials, every metric a random number: what claims and figures can read at a scale."""

    def __init__(self, plans: Mapping[str, list[Job]]) -> None:
        super().__init__(
            {name: pd.DataFrame([r for job in jobs for r in _planned(job)]) for name, jobs in plans.items()}
        )

    def history(self, experiment: str) -> pd.DataFrame:
        """Two logged steps of every row."""
        frame = self.frames[experiment]
        logged = {m: RNG.uniform(0.2, 0.8, len(frame)) for m in LOGGED}
        return pd.concat([frame.assign(step=step, **logged) for step in (10, 20)], ignore_index=True)


LOGGED = ("distance", "intra_mean", "intra_max", "inter_mean", "inter_min")


def _planned(job: Job) -> list[dict[str, Any]]:
    """The rows of one trial, one a seed."""
    config, base = job.config, flatten(job.config)
    task = config["task"]
    if task["name"] == "estimation":
        axes = [task[k] for k in ("members", "separation", "byzantine", "distance")]
        setups = [[n, d, b, far] for n in axes[0] for d in axes[1] for b in axes[2] for far in axes[3]]
        metrics = {
            "setups": setups,
            **{k: RNG.uniform(1, 2, len(setups)).tolist() for k in ("errors", "excess", "bound")},
        }
    elif task["name"] == "blobs":
        metrics = {"curve": RNG.uniform(1, 2, config["method"]["rounds"] + 1).tolist(), "plateau": 1.0}
    else:
        metrics = {m: RNG.uniform(0.2, 0.8) for m in MEASURED if m not in ("curve", "errors", "excess")}
        metrics |= {"occupied": 2.0, "exact": float(RNG.integers(2)), "expected": 0.5}
        metrics["label_counts"] = np.full((config["partition"]["n_clients"], 10), 3).tolist()
    return [
        base | {"key": job.key, "diverged": False} | metrics | {"seed": seed}
        for seed in range(config["seed"], config["seed"] + config["n_seeds"])
    ]
