"""What to look at in a clustered federation: who clusters with whom, and whether the paper's assumptions hold."""

from __future__ import annotations

import torch
from torch import Tensor


def membership(members: Tensor, clusters: Tensor) -> Tensor:
    """Share of each true cluster's clients that the clients of each true cluster average over.

    Args:
        members: (..., N, N) bool, as in `Round.members` (columns of attackers left out).
        clusters: (N,) integers 0 to K - 1.

    Returns: (..., K, K), 1 on the diagonal and 0 elsewhere for a perfect clustering.
    """
    hot = torch.nn.functional.one_hot(clusters, int(clusters.max()) + 1).double()  # (N, K)
    mean = hot / hot.sum(0)
    return mean.T @ members.double() @ mean


def precision_recall(members: Tensor, clusters: Tensor) -> tuple[Tensor, Tensor]:
    """Of those client i averages over, the share from its own cluster; and of its cluster, the share it found.

    Args:
        members: (..., N, N + b) bool; attackers, in the last b columns, belong to no cluster.
        clusters: (N,) integers.

    Returns: precision and recall (..., N); the precision of an empty set is 1.
    """
    same = clusters[:, None] == clusters[None, :]  # (N, N)
    hits = (members[..., : len(clusters)] & same).sum(-1).double()
    found = members.sum(-1)
    return torch.where(found > 0, hits / found.clamp_min(1), 1.0), hits / same.sum(-1)


def pair_accuracy(members: Tensor, clusters: Tensor) -> Tensor:
    """Share of ordered pairs of different clients (i, j) that are classified right as together or apart, (...)."""
    n = len(clusters)
    right = members[..., :n] == (clusters[:, None] == clusters[None, :])
    others = ~torch.eye(n, dtype=torch.bool, device=members.device)
    return (right & others).sum((-2, -1)).double() / (n * (n - 1))


def intra_ratio(gradients: Tensor, clusters: Tensor) -> Tensor:
    """A_i^2 = |g_i - mean of its cluster|^2 / |mean of its cluster|^2 of every client (assumption on clusters).

    Args:
        gradients: (..., N, D), all at the same model.
        clusters: (N,) integers.

    Returns: (..., N).
    """
    mean = _cluster_means(gradients, clusters)
    return (gradients - mean).square().sum(-1) / mean.square().sum(-1)


def intra_distance(gradients: Tensor, clusters: Tensor) -> Tensor:
    """Squared distance of every client's gradient (..., N, D) to the mean of its cluster, (..., N)."""
    return (gradients - _cluster_means(gradients, clusters)).square().sum(-1)


def inter_distance(gradients: Tensor, clusters: Tensor) -> Tensor:
    """Delta_i^2: squared distance of every gradient (..., N, D) to the nearest one of another cluster, (..., N)."""
    distances = torch.cdist(gradients, gradients, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.where(clusters[:, None] == clusters[None, :], torch.inf, distances).amin(-1)


def _cluster_means(gradients: Tensor, clusters: Tensor) -> Tensor:
    """The mean of each client's cluster, (..., N, D)."""
    hot = torch.nn.functional.one_hot(clusters, int(clusters.max()) + 1).to(gradients.dtype)
    return hot @ ((hot / hot.sum(0)).T @ gradients)
