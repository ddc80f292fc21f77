"""Generated rows where it is known which modality carries which task: the truth that contributions must recover."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from common.streams import generator
from multimodn.cohorts.base import Cohort, Task

if TYPE_CHECKING:
    from multimodn.cohorts.config import CohortConfig

DEFAULT_TASKS = 4
GENERATED = 50  # random stream


def load(config: CohortConfig) -> Cohort:
    """1,500 rows, four modalities of four columns, four tasks."""
    return planted(1500, config.generator_seed)


def planted(
    n: int, seed: int, *, n_modalities: int = 4, n_tasks: int = 4, features: int = 4, noise: float = 0.5
) -> Cohort:
    """Task j is carried by modality j alone (j mod n_modalities): the sign of a linear score of its columns plus noise.

    Args:
        n: rows.
        seed: of everything.
        n_modalities: modalities `m0`, `m1`, …, of independent standard normal columns.
        n_tasks: tasks `t0`, `t1`, ….
        features: columns of a modality.
        noise: standard deviation of the noise, in standard deviations of the score.
    """
    draw = generator(seed, GENERATED)
    modalities = {f"m{i}": torch.randn(n, features, generator=draw) for i in range(n_modalities)}
    tasks = {}
    for j in range(n_tasks):
        weights = torch.randn(features, generator=draw)
        score = modalities[f"m{j % n_modalities}"] @ (weights / weights.norm())
        score = score + noise * torch.randn(n, generator=draw)
        tasks[f"t{j}"] = Task("classes", (score > 0).long(), 2, f"a high score of m{j % n_modalities}")
    names = tuple(f"x{i}" for i in range(features))
    return Cohort("planted", modalities, dict.fromkeys(modalities, names), tasks, torch.arange(n))
