"""Small records and claims for the tests of claims, report and summary."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from common import figures
from common.claims import Claim, roll, swap_arms
from common.statistics import equivalence, paired, paired_greater, values

LEVELS = {"method": 2.0, "base": 0.0, "twin": 0.0}


@dataclass
class FakeSelection:
    experiment: str = "table1"
    arm: str = "method"
    metric: str = "val_accuracy"
    mode: str = "max"
    chosen: dict = field(default_factory=lambda: {"optimizer.lr": "0.03"})
    value: float = 0.91
    n: int = 2
    grid: dict = field(default_factory=lambda: {"optimizer.lr": ["0.003", "0.01", "0.03"]})
    on_border: list = field(default_factory=lambda: ["optimizer.lr"])


class FakeRecords:
    """The documented protocol of `Records` over frames in memory."""

    def __init__(self, frames, commit="0123456789abcdef", dirty=False):
        self.frames, self.commit, self.dirty = frames, commit, dirty

    def __getitem__(self, experiment):
        return self.frames[experiment]

    def history(self, experiment):
        return self.frames[experiment]

    def selections(self, experiment):
        return [FakeSelection(experiment=experiment)]

    def replace(self, experiment, frame):
        return FakeRecords({**self.frames, experiment: frame}, self.commit, self.dirty)

    def provenance(self):
        return {
            "commit": self.commit,
            "dirty": self.dirty,
            "fingerprint": "fedcba9876543210",
            "versions": {"python": "3.11.7", "torch": "2.13.0"},
            "device": "cpu",
            "threads": 1,
            "started": "2026-01-02T03:04:05+00:00",
            "wall_s": 321.0,
        }


def frame(levels=None, seeds=range(5, 13), noise=0.5, lr=(0.01,), seed=0):
    """One row per (arm, lr, seed); accuracy = level of the arm + seed effect + noise."""
    generator = np.random.default_rng(seed)
    shared = {s: generator.normal() for s in seeds}
    rows = [
        {
            "arm": arm,
            "optimizer.lr": rate,
            "optimizer.name": arm,
            "seed": s,
            "n_seeds": len(seeds),
            "threads": 1,
            "key": hashlib.sha256(f"{arm}{rate}".encode()).hexdigest()[:16],
            "diverged": False,
            "accuracy": 90 + level + shared[s] + noise * generator.normal(),
            "curve": [0.0, 1.0],
        }
        for arm, level in (levels or LEVELS).items()
        for rate in lr
        for s in seeds
    ]
    return pd.DataFrame(rows)


def arm_rows(arm, seeds, generator, noise, exact, /, **means):
    """One arm: every number with a little seed noise, lists element by element; where `exact` says so, as it is."""
    drawn = []
    for seed in seeds:
        jitter = {
            name: value
            if exact(name)
            else (np.asarray(value) * (1 + noise * generator.standard_normal(np.shape(value)))).tolist()
            for name, value in means.items()
        }
        drawn.append({"arm": arm, "seed": seed, "diverged": False, **jitter})
    return pd.DataFrame(drawn)


def records(**kwargs):
    return FakeRecords({"table1": frame(**kwargs)})


def method_beats_base(r):
    return paired_greater(*paired(r["table1"], "method", "base", "accuracy"), unit="points")


def base_beats_method(r):
    return paired_greater(*paired(r["table1"], "base", "method", "accuracy"), unit="points")


def twin_beats_base(r):
    return paired_greater(*paired(r["table1"], "twin", "base", "accuracy"), unit="points")


def method_is_near_92(r):
    return equivalence(values(r["table1"], "method", "accuracy"), 90, 94, unit="%")


def draw(r):
    fig, ax = figures.new()
    samples = [values(r["table1"], arm, "accuracy") for arm in ("method", "base")]
    figures.bars_with_ci(ax, ["method", "base"], samples, "accuracy (%)")
    return fig


def claim(id="C1", parts=None, **kwargs):
    defaults = {
        "id": id,
        "statement": "The method is more accurate than the base on every seed that anyone has looked at so far.",
        "source": "Table 1",
        "paper_value": "+2.0 points",
        "experiments": ("table1",),
        "parts": parts or {"method > base": method_beats_base},
        "control": swap_arms("table1", "method", "base"),
        "title": "Method beats base",
    }
    return Claim(**{**defaults, **kwargs})


def four_claims():
    """One claim of each verdict."""
    near = {"method > base": method_beats_base, "method is near 92 %": method_is_near_92}
    return [
        claim(
            "C1", near, figure=draw, caption="Bars: mean; whiskers: 95 % interval.", control=roll("table1", "accuracy")
        ),
        claim("C2", {"base > method": base_beats_method}, title="Base beats method", note="We tried <b>two</b> rates."),
        claim("C3", {"twin > base": twin_beats_base}, title="", control=swap_arms("table1", "twin", "base")),
        claim("C4", title="Holds on a GPU", scale_needed="gpu", experiments=("table2",)),
    ]
