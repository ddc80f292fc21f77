"""Threshold-Clustering on Gaussian blobs, round by round: how many rounds does it take (C7)?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sklearn.datasets import make_blobs
from torch import Tensor

from clustered_pfl.tasks.methods import radius
from clustered_pfl.threshold import threshold_clustering
from common.streams import generator
from common.training import setup

if TYPE_CHECKING:
    from clustered_pfl.config import BlobsConfig, TrialConfig
    from common.trials import Trial

START = 30  # random stream


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed: `curve`, for M = 0 ... rounds the mean over blobs and starts of the RMS distance from the
        blob's points to the estimate; `plateau`, its last value; `largest_rise` between rounds (negative: it only
        falls).
        In the history: `distance` over M.
    """
    run_ = setup(config.threads, config.device, config.precision, seed=config.seed)
    curves = torch.stack([_curve(config, seed).to(run_.device) for seed in trial.seeds])  # (R, M + 1)
    for m, column in enumerate(curves.T):
        trial.log({"distance": column}, step=m)
    return [
        {"seed": seed, "curve": c.tolist(), "plateau": c[-1].item(), "largest_rise": c.diff().max().item()}
        for seed, c in zip(trial.seeds, curves, strict=True)
    ]


def _curve(config: TrialConfig, seed: int) -> Tensor:
    """(rounds + 1,) of one data set."""
    task: BlobsConfig = config.task
    points, labels = make_blobs(task.points, task.dim, centers=task.centers, cluster_std=task.std, random_state=seed)
    z, y = torch.from_numpy(points), torch.from_numpy(labels).long()
    rng = generator(seed, START)
    blobs = [z[y == k] for k in range(task.centers)]
    chosen = [blob[torch.randint(len(blob), (task.starts,), generator=rng)] for blob in blobs]
    centers, owner = torch.cat(chosen), torch.arange(task.centers).repeat_interleave(task.starts)
    curve = [_rms(centers, owner, blobs)]
    for _ in range(config.method.rounds):  # the quantile rule forgets: M rounds at once are the same
        centers = threshold_clustering(z, centers, radius=radius(config.method.radius), rounds=1).centers
        curve.append(_rms(centers, owner, blobs))
    return torch.stack(curve)


def _rms(centers: Tensor, owner: Tensor, blobs: list[Tensor]) -> Tensor:
    """Mean over estimates (E, d) of the RMS distance to the points of their blob."""
    return torch.stack(
        [(blobs[k] - v).square().sum(1).mean().sqrt() for v, k in zip(centers, owner, strict=True)]
    ).mean()
