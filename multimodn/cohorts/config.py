"""Which cohort a trial uses."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

import torch

from common.config import check
from multimodn.cohorts.base import Cohort

EMBEDDED = {
    "star": "star",
    "weather": "weather",
    "weather_sequence": "weather",
    "nhefs": "nhefs",
    "pbc": "pbc",
    "digits": "digits",
    "digits_rows": "digits",
    "digits_images": "digits",
    "titanic": "titanic",
    "planted": "planted",
}
FILES = {"haim": "haim", "weather2k": "weather2k", "weather2k_sequence": "weather2k", "edu": "edu"}


@dataclass
class CohortConfig:
    """A data set as modalities and tasks, and its splits."""

    name: str = "star"
    """An embedded cohort (`star`, `weather`, `nhefs`, `pbc`, `digits`, `planted` …) or one read from `path`."""
    path: str = ""
    """File of the cohorts that cannot be embedded (`haim`, `weather2k`, `edu`)."""
    tasks: list[str] = field(default_factory=list)
    """Tasks to train on, in order; empty: the cohort's own."""
    order: list[str] = field(default_factory=list)
    """Modalities in the chain's order; empty: the cohort's own."""
    natural: bool = False
    """Keep rows with missing modalities; false: complete rows only."""
    folds: int = 5
    """Folds of the cross-validation; seed s tests on fold s mod folds of partition s // folds."""
    validation: float = 0.1
    """Share of all rows held out for validation."""
    leaky_scaler: bool = False
    """Standardise on all rows, as the official code does, instead of the training rows."""
    rows: int | None = None
    """Use the first rows only, to try something out; null: all."""
    generator_seed: int = 0
    """Seed of a generated cohort."""
    columns: list[str] = field(default_factory=list)
    """Names of a file's variables where it does not carry them (`weather2k`)."""
    stride: int = 1
    """Use every so-manyth station of `weather2k`."""

    def __post_init__(self) -> None:
        known = {**EMBEDDED, **FILES}
        check("cohort.name", self.name, self.name in known, f"one of {', '.join(known)}")
        check("cohort.folds", self.folds, self.folds >= 2, ">= 2")
        top = 1 - 1 / max(self.folds, 2)
        check("cohort.validation", self.validation, 0 <= self.validation < top, f"in [0, {top:g})")
        check("cohort.rows", self.rows, self.rows is None or self.rows >= 50, ">= 50, or null")
        check("cohort.generator_seed", self.generator_seed, self.generator_seed >= 0, ">= 0")
        check("cohort.stride", self.stride, self.stride >= 1, ">= 1")


def read(config: CohortConfig) -> Cohort:
    """Load the cohort.

    Raises:
        ValueError: a path that is needed and not given, or a file without what must be in it.
        FileNotFoundError: no such file.
        KeyError: unknown tasks or modalities.
    """
    module = importlib.import_module(f"multimodn.cohorts.{({**EMBEDDED, **FILES})[config.name]}")
    cohort: Cohort = module.load(config)
    cohort = cohort.with_tasks(config.tasks or list(cohort.tasks)[: module.DEFAULT_TASKS])
    if config.order:
        cohort = cohort.with_order(config.order)
    return cohort if config.rows is None else cohort.select(torch.arange(min(config.rows, len(cohort))))
