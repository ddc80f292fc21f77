"""Trials that are run in this process, their logs kept in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from clustered_pfl.config import MethodConfig, RadiusConfig, TrialConfig
from common.data import DataConfig
from common.records import flatten

DIGITS = {"name": "digits", "validation": 0.15, "test": 0.2, "classes": 10}


class Log:
    """The part of `Trial` that tasks without checkpoints use."""

    def __init__(self, seeds: list[int]) -> None:
        self.seeds = seeds
        self.rows: dict[int, dict[str, list[float]]] = {}
        self.shown: list[tuple[int, int]] = []

    def log(self, metrics: dict[str, torch.Tensor], step: int) -> None:
        self.rows[step] = {name: value.tolist() for name, value in metrics.items()}

    def progress(self, done: int, total: int) -> None:
        self.shown.append((done, total))


def method(name: str = "federated_clustering", *, q: float = 0.2, strict: bool = False, **values: Any) -> MethodConfig:
    return MethodConfig(name=name, radius=RadiusConfig(quantile=q, strict=strict), **values)


def config(task: Any, *, seed: int = 0, n_seeds: int = 1, **groups: Any) -> TrialConfig:
    groups.setdefault("data", DataConfig(**DIGITS))
    return TrialConfig(task=task, seed=seed, n_seeds=n_seeds, device="cpu", threads=1, **groups)


def run(module: Any, trial: TrialConfig) -> tuple[list[dict[str, Any]], Log]:
    """The rows and the log of a trial."""
    log = Log(list(range(trial.seed, trial.seed + trial.n_seeds)))
    return without_clash(module.run(trial, log), trial), log


def without_clash(rows: list[dict[str, Any]], trial: TrialConfig) -> list[dict[str, Any]]:
    """The rows, none of whose metrics has the name of a config key: records put both side by side."""
    keys = set(flatten(dataclasses.asdict(trial))) - {"seed"}
    assert all(not keys & set(row) for row in rows), keys & set(rows[0])
    return rows


def scratch(path: Path, name: str) -> Path:
    """A new empty folder."""
    folder = path / name
    folder.mkdir()
    return folder
