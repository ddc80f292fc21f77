"""Monte Carlo of Threshold-Clustering's error (C8): two clusters at distance Delta, radius sqrt(sigma * Delta).

The theory bounds E|v - mu|^2 by a constant times sigma^2 / n_i + sigma^3 / Delta + beta sigma Delta. Every draw is a
data set of its own; all draws of a set-up run as one batch. The same seed gives the same honest points with and without
attackers, whose excess error is therefore a paired difference.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch

from clustered_pfl.radius import Fixed
from clustered_pfl.threshold import threshold_clustering
from common.streams import generator
from common.training import setup

if TYPE_CHECKING:
    from clustered_pfl.config import EstimationConfig, TrialConfig
    from common.trials import Trial

POINTS = 40  # random stream


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed, lists over the product of `task.members`, `separation`, `byzantine` and `distance` (the last
        fastest): `setups` as [n_i, Delta, beta, distance], `errors` E|v - mu|^2, `excess` over the same points without
        attackers, and `bound` beta sigma Delta with the beta that whole points allow.
    """
    setup(config.threads, config.device, config.precision, seed=config.seed)
    task: EstimationConfig = config.task
    setups = list(itertools.product(task.members, task.separation, task.byzantine, task.distance))
    rows = []
    for i, seed in enumerate(trial.seeds):
        found = [_error(task, seed, *setup_) for setup_ in setups]
        clean = {(n, delta): _error(task, seed, n, delta, 0.0, 1.0)[0] for n, delta, *_ in setups}
        errors = [error for error, _ in found]
        excess = [error - clean[n, delta] for error, (n, delta, *_) in zip(errors, setups, strict=True)]
        bound = [share * task.noise * delta for (_, share), (_, delta, *_) in zip(found, setups, strict=True)]
        rows.append(
            {"seed": seed, "setups": [list(s) for s in setups], "errors": errors} | {"excess": excess, "bound": bound}
        )
        trial.progress(i + 1, len(trial.seeds))
    return rows


def _error(
    task: EstimationConfig, seed: int, members: int, delta: float, byzantine: float, distance: float
) -> tuple[float, float]:
    """Mean squared error of the estimate of cluster 0 over the draws, and the attackers' share."""
    z = torch.randn(task.draws, 2 * members, task.dim, generator=generator(seed, POINTS, members), dtype=torch.float64)
    z *= task.noise / math.sqrt(task.dim)
    z[:, members:, 0] += delta
    tau = math.sqrt(task.noise * delta)
    count = round(byzantine / (1 - byzantine) * 2 * members)
    # attackers side by side on the far side from the other cluster, which would pull the other way
    hostile = torch.zeros(task.draws, count, task.dim, dtype=z.dtype)
    hostile[..., 0] = -distance * tau
    points = torch.cat([z, hostile], 1)
    found = threshold_clustering(points, z[:, 0], radius=Fixed(tau), rounds=task.rounds)
    error = found.centers[:, 0].square().sum(-1).mean().item()
    return error, count / points.shape[1]
