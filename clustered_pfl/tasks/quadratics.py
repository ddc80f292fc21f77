"""Clients with losses |x - theta_k|^2 / 2 and Gaussian gradient noise: rates, assignments and failures in closed form.

The K optima lie at equal distance Delta from each other. A client's stochastic gradient is x - theta_k + noise, so that
at a fixed learning rate eta the error of a model trained on the mean of n_i clients settles at
eta / (2 - eta) * sigma^2 / n_i without momentum (C9, C10, C11).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clustered_pfl import diagnostics
from clustered_pfl.baselines import IFCA
from clustered_pfl.clustering import Round
from clustered_pfl.federation import Params
from clustered_pfl.tasks.methods import CLUSTERED, build
from common.streams import generator
from common.training import setup

if TYPE_CHECKING:
    from clustered_pfl.config import QuadraticsConfig, TrialConfig
    from common.trials import Trial

START, NOISE = 20, 21  # random streams
BLOCK = 64  # steps whose noise is drawn at once


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed: `error`, the mean over clients and late steps of |x_i - theta_k|^2, and its `expected` value
        under perfect clustering without momentum; `final_error` after the last step; `pairs`, the share of pairs of
        clients rightly clustered together or apart in the late steps; `exact`, 1 when the last clustering or assignment
        is the true one; `occupied`, the models that clients use (IFCA, HypCluster), else the number of true clusters.
    """
    run_ = setup(config.threads, config.device, config.precision, seed=config.seed)
    task, seeds = config.task, trial.seeds
    optima = simplex(task).to(run_.device)  # (K, d)
    clusters = torch.arange(task.clusters, device=run_.device).repeat_interleave(task.clients)
    targets = optima[clusters].expand(len(seeds), -1, -1)  # (R, N, d)
    first = torch.stack([_starts(config, optima.cpu(), seed) for seed in seeds]).to(run_.device)
    federation = build(config, loss, {"x": first}, clusters, seeds)
    burn_in = int(task.burn_in * task.steps)
    error, pairs = torch.zeros(2, len(seeds), dtype=torch.float64, device=run_.device)
    report: Any = None
    noise = torch.empty(0)
    for step in range(task.steps):
        if step % BLOCK == 0:
            noise = _noise(task, seeds, step // BLOCK, targets.shape[1:]).to(run_.device)
        report = federation.step((targets, noise[step % BLOCK]))
        if step >= burn_in:
            error += (federation.client_models() - targets).square().sum(-1).mean(-1)
            pairs += _pairs(report, clusters, len(seeds))
        if (step + 1) % 50 == 0 or step + 1 == task.steps:
            now = (federation.client_models() - targets).square().sum(-1).mean(-1)
            trial.log({"error": now}, step=step + 1)
            trial.progress(step + 1, task.steps)
    late = task.steps - burn_in
    final = (federation.client_models() - targets).square().sum(-1).mean(-1)
    occupied = torch.full((len(seeds),), task.clusters)
    if isinstance(federation, IFCA):
        chosen = torch.nn.functional.one_hot(federation.assignment(), federation.models.shape[1])
        occupied = chosen.any(1).sum(-1)
    lr = config.method.lr
    expected = lr / (2 - lr) * task.noise**2 / task.clients
    exact = _pairs(report, clusters, len(seeds)) == 1
    return [
        {"seed": seed, "error": (error[i] / late).item(), "expected": expected, "final_error": final[i].item()}
        | {"pairs": (pairs[i] / late).item(), "exact": float(exact[i]), "occupied": float(occupied[i])}
        for i, seed in enumerate(seeds)
    ]


def loss(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """|x - theta|^2 / 2 + <noise, x>, whose gradient is x - theta + noise."""
    target, noise = batch
    return (params["x"] - target).square().sum() / 2 + params["x"] @ noise


def simplex(task: QuadraticsConfig) -> Tensor:
    """Optima (K, d), every two at distance Delta, their mean at the origin."""
    corners = torch.eye(task.clusters, task.dim, dtype=torch.float64) * task.separation / math.sqrt(2)
    return corners - corners.mean(0)


def _starts(config: TrialConfig, optima: Tensor, seed: int) -> Tensor:
    """First models: one random point for all clients (N, d), or IFCA's (K, d)."""
    task, c = config.task, config.method
    rng = generator(seed, START)
    if c.name not in CLUSTERED:
        point = task.start_std * torch.randn(task.dim, generator=rng, dtype=torch.float64)
        return point.expand(task.clusters * task.clients, -1)
    count = c.models or task.clusters
    points = torch.randn(count, task.dim, generator=rng, dtype=torch.float64)
    if c.start == "crowded":  # one amid the optima, the others far away on all sides
        away = points / points.norm(dim=1, keepdim=True)
        return torch.cat([torch.zeros_like(points[:1]), 10 * task.separation * away[1:]])
    if c.start == "oracle":
        if count != task.clusters:
            raise ValueError(f"method.models={count}: must be task.clusters={task.clusters} for method.start=oracle")
        return optima + 0.1 * points
    if c.start != "random":
        raise ValueError(f"method.start={c.start}: must be random, crowded or oracle for quadratics")
    return task.start_std * points


def _noise(task: QuadraticsConfig, seeds: list[int], block: int, shape: torch.Size) -> Tensor:
    """(BLOCK, R, N, d), of mean squared norm sigma^2."""
    draws = [torch.randn(BLOCK, *shape, generator=generator(s, NOISE, block), dtype=torch.float64) for s in seeds]
    return torch.stack(draws, 1) * task.noise / math.sqrt(task.dim)


def _pairs(report: Any, clusters: Tensor, replicas: int) -> Tensor:
    """Share of pairs rightly together or apart in a step's report, (R,); 1 for methods that are told the clusters."""
    if isinstance(report, Round) and report.members is not None:
        return diagnostics.pair_accuracy(report.members, clusters)
    if isinstance(report, Tensor):  # IFCA's choices
        return diagnostics.pair_accuracy(report[:, :, None] == report[:, None, :], clusters)
    return torch.ones(replicas, dtype=torch.float64, device=clusters.device)
