"""How far from its current guess Threshold-Clustering still believes a point: the radius tau of every round.

The theory asks for tau of the order of sqrt(sigma * Delta); in practice it is taken from the distances themselves.
A rule sees the distances of one round, (..., N), ascending or not, infinite where a point is not finite, and gives
tau (...). Distances that differ by rounding only count as equal, so that neither the order of the points nor the way
distances are computed decides a tie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

TIE_ULPS = 16
"""Distances closer than this many units in the last place are a tie."""


class Radius(Protocol):
    """A rule for tau; the three below, or your own."""

    @property
    def strict(self) -> bool:
        """Whether a point at distance tau itself is outside."""
        ...

    def __call__(self, distances: Tensor) -> Tensor:
        """Give tau (...) for distances (..., N)."""
        ...


@dataclass(frozen=True)
class Quantile:
    """tau = factor * the distance of rank floor(q N), counted from 0 in ascending order: every experiment of the paper.

    Args:
        q: in [0, 1); a little below the share of a cluster, 1/K.
        strict: a point at distance tau is outside. The paper's conventions: CIFAR `Quantile(q)`, MNIST
            `Quantile(q, factor=0.99)`, synthetic data `Quantile(1 / K, strict=True)`.
        factor: > 0.

    Raises:
        ValueError: q or factor out of range.
    """

    q: float
    strict: bool = False
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.q < 1:
            raise ValueError(f"q={self.q}: must be in [0, 1)")
        if not (self.factor > 0 and math.isfinite(self.factor)):
            raise ValueError(f"factor={self.factor}: must be > 0 and finite")

    def rank(self, n: int) -> int:
        """floor(q n), at most n - 1, with q n rounded first: 0.29 * 100 is 29, not 28."""
        return min(math.floor(round(self.q * n, 9)), n - 1)

    def __call__(self, distances: Tensor) -> Tensor:
        """Give tau (...) for distances (..., N)."""
        return self.factor * distances.kthvalue(self.rank(distances.shape[-1]) + 1, dim=-1).values


@dataclass(frozen=True)
class Fixed:
    """The same tau in every round (theory: proportional to sqrt(sigma * Delta)).

    Args:
        tau: >= 0, in the unit of the points; math.inf averages all of them.

    Raises:
        ValueError: tau is negative or NaN.
    """

    tau: float
    strict: bool = False

    def __post_init__(self) -> None:
        if not self.tau >= 0:
            raise ValueError(f"tau={self.tau}: must be >= 0")

    def __call__(self, distances: Tensor) -> Tensor:
        """Give tau (...) for distances (..., N)."""
        return distances.new_full(distances.shape[:-1], self.tau)


@dataclass(frozen=True)
class TwoMeans:
    """tau halfway between the two outer centres of a 1-D 3-means of the distances (the official code's "cd" rule).

    The three groups are the start itself, its cluster and the others: with centres c0 <= c1 <= c2, tau = (c1 + c2) / 2.
    Found exactly, over all cuts of the sorted distances, in O(N^2). One far attacker can claim the third group for
    itself, which lets every honest cluster in: no rule for hostile company. Fewer than three finite distances give inf.
    """

    strict: bool = False

    def __call__(self, distances: Tensor) -> Tensor:
        """Give tau (...) for distances (..., N)."""
        ordered = distances.double().sort(dim=-1).values
        finite = ordered.isfinite()
        count = finite.sum(-1)  # (...)
        ordered = torch.where(finite, ordered, 0)
        n = ordered.shape[-1]
        if n < 3:
            return torch.full_like(distances[..., 0], math.inf)
        zero = ordered.new_zeros(*ordered.shape[:-1], 1)
        total = torch.cat([zero, ordered.cumsum(-1)], -1)  # (..., N+1): sums of the first k
        first, second = torch.triu_indices(n - 1, n - 1, 1, device=distances.device) + 1  # cuts 1 <= i < j <= N-1
        last = total.gather(-1, count[..., None])
        # least squares = largest sum of (group sum)^2 / (group size)
        tail = (count[..., None] - second).clamp_min(1)
        score = (
            total[..., first].square() / first
            + (total[..., second] - total[..., first]).square() / (second - first)
            + (last - total[..., second]).square() / tail
        )
        score = torch.where(second < count[..., None], score, -math.inf)
        # of cuts that are equally good but for rounding, the first
        least = score.amax(-1, keepdim=True) * (1 - TIE_ULPS * torch.finfo(score.dtype).eps)
        best = (score >= least).byte().argmax(-1, keepdim=True)
        i, j = first[best], second[best]
        middle = (total.gather(-1, j) - total.gather(-1, i)) / (j - i)
        outer = (last - total.gather(-1, j)) / (count[..., None] - j).clamp_min(1)
        tau = ((middle + outer) / 2)[..., 0].to(distances.dtype)
        return torch.where(count >= 3, tau, math.inf)


def inside(distances: Tensor, radius: Radius) -> tuple[Tensor, Tensor]:
    """Which points lie within the rule's radius, and that radius.

    Args:
        distances: (..., N), >= 0; infinite or NaN where a point or the guess is not finite: never inside.
        radius: the rule.

    Returns:
        members (..., N) bool and tau (...).
    """
    sound = distances.isfinite()
    distances = torch.where(sound, distances, math.inf)
    tau = radius(distances)
    slack = TIE_ULPS * torch.finfo(distances.dtype).eps
    if radius.strict:
        members = distances < tau[..., None] * (1 - slack)
    else:
        members = distances <= tau[..., None] * (1 + slack)
    return members & sound, tau
