"""The paper's synthetic problem (C1, C2): linear regression with fewer samples than coordinates, clients in clusters.

Cluster k has an optimum in {0, R}^d and inputs around (k, ..., k); a client's n < d samples do not determine it, so
that only clients that find their cluster reach the optimum. Draws follow the official order on NumPy's generator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clustered_pfl import diagnostics
from clustered_pfl.baselines import IFCA
from clustered_pfl.federation import Federation, Params
from clustered_pfl.tasks.methods import CLUSTERED, build
from common.training import setup

if TYPE_CHECKING:
    from clustered_pfl.config import RegressionConfig, TrialConfig
    from common.trials import Trial


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed: `distance`, the mean over clients of |x_i - optimum of its cluster|, and `log10_distance`. With
        `task.assumptions`, over clients and epochs: `intra_max` (largest A^2), `intra_slope` (of the mean log A^2 of
        a cluster over the last half, worst cluster, an epoch), `inter_min` (least Delta^2), `intra_distance_max`.
        In the history: `distance`, and `intra_mean`, `intra_max`, `inter_mean`, `inter_min` of the epoch.
    """
    run_ = setup(config.threads, config.device, config.precision, seed=config.seed)
    task, seeds = config.task, trial.seeds
    data = [draw(task, seed) for seed in seeds]
    dtype = getattr(torch, task.dtype)
    x, y, optima, first = (torch.from_numpy(np.stack(part)).to(run_.device, dtype) for part in zip(*data, strict=True))
    clusters = torch.arange(task.clusters, device=run_.device).repeat_interleave(task.clients)
    params = {"w": first[:, clusters]}
    if config.method.name in CLUSTERED:
        params = {"w": _model_starts(config, first)}
    federation = build(config, loss, params, clusters, seeds)
    assumptions = _Assumptions(task, clusters)
    for step in range(task.steps):
        if task.assumptions:
            assumptions.measure(federation, (x, y))
        federation.step((x, y))
        if config.method.start == "official" and isinstance(federation, IFCA):
            federation.models[:, task.clusters :] = params["w"][:, task.clusters :]  # the code updates the first K
        done = step + 1
        if done % task.log_every == 0 or done == task.steps:
            found = {"distance": distance(federation, optima[:, clusters])}
            trial.log(found | assumptions.last(), step=done)
            trial.progress(done, task.steps)
    final = distance(federation, optima[:, clusters])
    return [
        {"seed": seed, "distance": final[i].item(), "log10_distance": final[i].clamp_min(1e-30).log10().item()}
        | assumptions.row(i)
        for i, seed in enumerate(seeds)
    ]


def draw(task: RegressionConfig, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Inputs (N, n, d), targets (N, n), optima (K, d) and the clusters' common starts (K, d) of one seed, float64."""
    rng = np.random.default_rng(seed)
    xs, ys, optima = [], [], []
    for k in range(task.clusters):
        optimum = task.scale * rng.integers(0, 2, task.dim)
        optima.append(optimum)
        for _ in range(task.clients):
            x = rng.normal(k, 1.0, (task.samples, task.dim))
            xs.append(x)
            ys.append(x @ optimum + 0.0 * rng.normal(size=task.samples))  # noise of size zero, but it is drawn
    first = np.stack(optima) + task.start_std * rng.normal(size=(task.clusters, task.dim))
    return np.stack(xs), np.stack(ys), np.stack(optima).astype(float), first


def loss(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """|X w - y|^2 / (2 n)."""
    x, y = batch
    return (x @ params["w"] - y).square().mean() / 2


def distance(federation: Federation, optima: Tensor) -> Tensor:
    """Mean over clients of the distance to their own optimum, (R,)."""
    return (federation.client_models() - optima).norm(dim=-1).mean(-1).double()


def _model_starts(config: TrialConfig, first: Tensor) -> Tensor:
    """IFCA's first models (R, K, d) from the clusters' starts (R, K, d).

    Raises:
        ValueError: a start that this problem does not have.
    """
    task, start = config.task, config.method.start
    if start == "oracle":
        return first
    if start != "official":
        raise ValueError(f"method.start={start}: must be oracle or official for regression")
    clients = first.repeat_interleave(task.clients, 1)  # (R, N, d)
    return clients[:, :: task.clusters]  # every K-th client: the clusters' starts only where n_i = K


class _Assumptions:
    """Gradient distances within and between clusters, all at the model of client 0."""

    def __init__(self, task: RegressionConfig, clusters: Tensor) -> None:
        self.task, self.clusters = task, clusters
        self.ratios: list[Tensor] = []
        self.inter: list[Tensor] = []
        self.intra: list[Tensor] = []

    def measure(self, federation: Federation, batch: tuple[Tensor, Tensor]) -> None:
        """Add one epoch."""
        flat = federation.client_models()[:, :1].expand(-1, len(self.clusters), -1)
        gradients = federation.gradients(flat, batch)
        self.ratios.append(diagnostics.intra_ratio(gradients, self.clusters))
        self.inter.append(diagnostics.inter_distance(gradients, self.clusters))
        self.intra.append(diagnostics.intra_distance(gradients, self.clusters))

    def last(self) -> dict[str, Tensor]:
        """The last epoch's values, (R,) each."""
        if not self.ratios:
            return {}
        ratio, inter = self.ratios[-1], self.inter[-1]
        return {"intra_mean": ratio.mean(-1), "intra_max": ratio.amax(-1)} | {
            "inter_mean": inter.mean(-1),
            "inter_min": inter.amin(-1),
        }

    def row(self, i: int) -> dict[str, Any]:
        """The metrics of seed number i."""
        if not self.ratios:
            return {}
        ratios, inter, intra = (torch.stack(parts)[:, i] for parts in (self.ratios, self.inter, self.intra))  # (E, N)
        late = ratios[len(ratios) // 2 :].double()
        logs = torch.stack([late[:, self.clusters == k].mean(1).log() for k in range(self.task.clusters)])  # (K, E/2)
        epochs = torch.arange(logs.shape[1], device=logs.device, dtype=logs.dtype)
        epochs = epochs - epochs.mean()
        slopes = (logs @ epochs) / epochs.square().sum().clamp_min(0.5)  # two epochs: .5; one has no slope
        by_cluster = ratios.unflatten(1, (self.task.clusters, -1)).mean(-1)  # clusters are contiguous
        return {
            "intra_max": ratios.max().item(),
            "intra_cluster_max": by_cluster.max().item(),
            "intra_slope": slopes.max().item(),
            "inter_min": inter.min().item(),
            "intra_distance_max": intra.max().item(),
        }
