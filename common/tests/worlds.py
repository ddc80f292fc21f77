"""Records without any training: a scale's plans with made-up metrics, for the tests of a paper's claims and figures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from common.records import flatten
from common.sweeps import Job, Planner
from common.tests.report_fakes import FakeRecords

Plans = Mapping[str, list[Job]]
Change = Callable[[pd.DataFrame], pd.DataFrame]


@functools.cache
def planned(main: Any, scale: str) -> dict[str, list[Job]]:
    """All trials of a paper at a scale by experiment, planned once a process: composing takes seconds."""
    planner = Planner(main, None, scale)
    return {experiment: planner.plan(experiment) for experiment in planner.composer.experiments()}


def recorded(plans: Plans, metrics: Callable[[Mapping[str, Any], int], dict[str, Any]]) -> FakeRecords:
    """A frame an experiment: every seed of every planned trial with the metrics that a (config, seed) has."""
    frames = {}
    for experiment, jobs in plans.items():
        found = []
        for job in jobs:
            base = flatten(job.config) | {"key": job.key}
            seeds = range(job.config["seed"], job.config["seed"] + job.config["n_seeds"])
            found += [base | metrics(job.config, seed) for seed in seeds]
        frames[experiment] = pd.DataFrame(found)
    return FakeRecords(frames)


def changed(world: FakeRecords, experiment: str, *changes: Change) -> FakeRecords:
    """The world with another table for one experiment."""
    frame = world[experiment].copy()
    for change in changes:
        frame = change(frame)
    return world.replace(experiment, frame)
