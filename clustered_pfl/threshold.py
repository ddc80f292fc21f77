"""Threshold-Clustering (section 3 of the paper): the mean of one cluster, found from a guess inside it.

    repeat:  v <- (1/N) sum_j ( z_j if |z_j - v| <= tau else v )

A point beyond tau is replaced by the guess itself, so it moves the estimate by nothing, however far it lies: that is
what makes the average of a cluster robust to the other clusters and to Byzantine points. The sum is divided by *all* N
points, not by those inside: with fixed members S the estimate contracts to their mean by 1 - |S|/N a round.

Two ways to the same numbers. "direct" reads all points twice a round. "gram" reads them twice in all: the estimate
stays in the affine span, v = v_0 + sum_j a_j (z_j - v_0), so that with G_jk = <z_j - v_0, z_k - v_0> the distances

    |z_j - v|^2 = G_jj - 2 (G a)_j + a' G a

cost O(N^2) a round without touching the points. Points are centred on v_0 and products accumulated in float64, block
by block, so that cancellation costs nothing that float32 could have kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clustered_pfl.radius import Quantile, Radius, inside

Method = Literal["auto", "gram", "direct"]
BLOCK_BYTES = 1 << 20
"""Float64 block of the Gram path: points of one set, centred, kept in the cache while they are multiplied."""
GRAM_DIMENSION = 4096
"""Points shorter than this are faster by the direct path."""
TINY = 1e-30
"""Divisor where nobody is inside."""
GRAM_ROUNDS = 3
"""Fewer rounds than this do not pay for the Gram matrix."""


@dataclass(frozen=True)
class Clustering:
    """What `threshold_clustering` found; leading batch dimensions of the points come first in every field."""

    centers: Tensor
    """(..., K, D), dtype of the points: the estimates v_M."""
    members: Tensor
    """(..., K, N) bool: the points inside the radius in the last round (none after zero rounds)."""
    radii: Tensor
    """(rounds, ..., K): tau of every round."""


def threshold_clustering(
    points: Tensor,
    starts: Tensor,
    *,
    radius: Radius = Quantile(0.2),  # noqa: B008  (frozen)
    rounds: int = 10,
    normalize: Literal["all", "members"] = "all",
    weights: Tensor | None = None,
    method: Method = "auto",
) -> Clustering:
    """Estimate the mean of the cluster around each start.

    Args:
        points: (N, D), or a batch (..., N, D) of independent sets; float32 or float64. Points with NaN or infinite
            coordinates are never members.
        starts: first guesses (..., K, D), or (..., D) for a single one. A start that is not finite stays as it is.
        radius: `Quantile(q)`, `Fixed(tau)`, `TwoMeans()` or any rule of that form, asked anew in every round.
        rounds: M >= 0.
        normalize: "all" divides by N as in the paper; "members" by the number inside (mean shift with a flat kernel,
            an extension: it converges in one round once the members stay, and is as robust to far points).
        weights: (N,), >= 0, for clients with unequal amounts of data; they count in the mean, not in the quantile.
        method: "direct", "gram", or "auto" by size. Equal to rounding.

    Returns:
        Centres, members and radii; K = 1 when `starts` has no axis K.

    Raises:
        TypeError: points or starts are not float32 or float64 tensors, or of different dtypes.
        ValueError: shapes that do not fit, no points, rounds < 0, unknown normalize or method, bad weights.
    """
    starts = _checked(points, starts, rounds, normalize, weights, method)
    weight = points.new_ones(points.shape[-2]) if weights is None else weights.to(points)
    total = weight.sum() if normalize == "all" else None
    # one quick pass; only if there may be something to hide, look where
    known = Points(points) if points.sum().isfinite() else _without_infinite(points)
    if method == "auto":
        long = points.shape[-1] >= GRAM_DIMENSION and points.shape[-2] <= points.shape[-1] // 4
        method = "gram" if long and rounds >= GRAM_ROUNDS else "direct"
    path = _Gram(known, starts) if method == "gram" else _Direct(known, starts)
    members = torch.zeros(*starts.shape[:-1], points.shape[-2], dtype=torch.bool, device=points.device)
    radii = points.new_zeros((rounds, *starts.shape[:-1]))
    for i in range(rounds):
        members, radii[i] = inside(path.distances(), radius)  # (..., K, N), (..., K)
        share = members.to(points.dtype) * weight
        path.move(share / (share.sum(-1, keepdim=True).clamp_min(TINY) if total is None else total))
    return Clustering(path.centers(), members, radii)


@dataclass(frozen=True)
class Points:
    """Points (..., N, D), all finite; those that were not are zeros and `lost`."""

    rows: Tensor
    lost: Tensor | None = None
    """(..., 1, N) bool."""

    def hide(self, distances: Tensor) -> Tensor:
        """Distances (..., K, N) with lost points infinitely far away."""
        return distances if self.lost is None else torch.where(self.lost, torch.inf, distances)


class _Direct:
    """The estimates themselves; distances by differences of coordinates."""

    def __init__(self, points: Points, starts: Tensor) -> None:
        self.points, self.v = points, starts

    def distances(self) -> Tensor:
        """(..., K, N)."""
        found = torch.cdist(self.v, self.points.rows, compute_mode="donot_use_mm_for_euclid_dist")
        return self.points.hide(found)

    def move(self, share: Tensor) -> None:
        """v += sum_j share_j (z_j - v); share: (..., K, N)."""
        self.v = self.v + (share @ self.points.rows - share.sum(-1, keepdim=True) * self.v)

    def centers(self) -> Tensor:
        """(..., K, D)."""
        return self.v


class _Gram:
    """The estimates as coefficients (..., K, P) over P centred rows: the N points and, for K > 1, the K starts."""

    def __init__(self, points: Points, starts: Tensor) -> None:
        self.points, self.starts = points, starts
        self.lost = ~starts.isfinite().all(-1, keepdim=True)  # (..., K, 1): a start that must stay where it is
        starts = torch.where(self.lost, 0, starts)
        n, k = points.rows.shape[-2], starts.shape[-2]
        self.rows = points.rows if k == 1 else torch.cat([points.rows, starts], -2)  # (..., P, D)
        self.origin = starts[..., :1, :]
        self.gram = gram_matrix(self.rows, self.origin)  # (..., P, P) float64
        self.square = self.gram.diagonal(dim1=-2, dim2=-1)[..., None, :n]
        self.a = self.gram.new_zeros((*starts.shape[:-1], self.rows.shape[-2]))
        if k > 1:
            self.a[..., torch.arange(k), n + torch.arange(k)] = 1

    def distances(self) -> Tensor:
        """(..., K, N)."""
        ga = self.a @ self.gram  # (..., K, P)
        own = (self.a * ga).sum(-1, keepdim=True)
        square = self.square - 2 * ga[..., : self.square.shape[-1]] + own
        found = square.clamp_min_(0).sqrt_().to(self.rows.dtype)
        return torch.where(self.lost, torch.inf, self.points.hide(found))

    def move(self, share: Tensor) -> None:
        """v += sum_j share_j (z_j - v); share: (..., K, N)."""
        share = share.double()
        self.a = self.a * (1 - share.sum(-1, keepdim=True))
        self.a[..., : share.shape[-1]] += share

    def centers(self) -> Tensor:
        """(..., K, D)."""
        rest = 1 - self.a.sum(-1, keepdim=True)  # what is left of the origin
        kind = self.rows.dtype
        centers = self.a.to(kind) @ self.rows + rest.to(kind) * self.origin
        return torch.where(self.lost, self.starts, centers)


def gram_matrix(rows: Tensor, origin: Tensor) -> Tensor:
    """Inner products (..., P, P) of rows (..., P, D) less origin (..., 1, D), in float64 whatever their dtype."""
    p, d = rows.shape[-2:]
    flat, zero = rows.reshape(-1, p, d), origin.reshape(-1, 1, d)
    gram = torch.zeros(len(flat), p, p, dtype=torch.float64, device=rows.device)
    step = max(64, BLOCK_BYTES // (8 * p))
    for i in range(len(flat)):
        for begin in range(0, d, step):
            block = flat[i, :, begin : begin + step].double() - zero[i, :, begin : begin + step]
            if block.device.type == "cpu":
                x = block.numpy()
                gram[i] += torch.from_numpy(x @ x.T)  # NumPy sees the symmetry and does half the work
            else:
                gram[i].addmm_(block, block.T)
    return gram.view(*rows.shape[:-2], p, p)


def _without_infinite(points: Tensor) -> Points:
    """Zeros in place of points with NaN or infinite coordinates, which are remembered."""
    lost = ~points.isfinite().all(-1)  # (..., N)
    return Points(torch.where(lost[..., None], 0, points), lost[..., None, :])


def _checked(
    points: Tensor, starts: Tensor, rounds: int, normalize: str, weights: Tensor | None, method: str
) -> Tensor:
    """Refuse what does not fit; returns starts as (..., K, D)."""
    for name, value in (("points", points), ("starts", starts)):
        if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: {kind}, must be a float32 or float64 tensor")
    if points.dtype != starts.dtype:
        raise TypeError(f"starts.dtype={starts.dtype}: must be that of points, {points.dtype}")
    if points.ndim < 2 or 0 in points.shape[-2:]:
        raise ValueError(f"points.shape={tuple(points.shape)}: must be (..., N, D) with N >= 1 and D >= 1")
    given = starts
    if starts.ndim == points.ndim - 1:
        starts = starts[..., None, :]
    if starts.ndim != points.ndim or starts.shape[:-2] != points.shape[:-2] or starts.shape[-1] != points.shape[-1]:
        raise ValueError(
            f"starts.shape={tuple(given.shape)}: must be (..., K, D) or (..., D) beside points {tuple(points.shape)}"
        )
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"rounds={rounds}: must be an integer >= 0")
    if normalize not in ("all", "members"):
        raise ValueError(f"normalize={normalize!r}: must be 'all' or 'members'")
    if method not in ("auto", "gram", "direct"):
        raise ValueError(f"method={method!r}: must be 'auto', 'gram' or 'direct'")
    if weights is not None:
        if weights.shape != points.shape[-2:-1]:
            raise ValueError(f"weights.shape={tuple(weights.shape)}: must be ({points.shape[-2]},), one a point")
        if not (weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
            raise ValueError("weights: must be finite, >= 0 and not all zero")
    return starts
