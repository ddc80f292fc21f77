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

import functools
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor
from torch.nn import functional

from clustered_pfl.radius import Quantile, Radius, inside

Method = Literal["auto", "gram", "direct"]
BLOCK_BYTES = 1 << 20
"""Differences held at once by either path, so that they stay in the cache until they are used."""
SHORT = 128
"""Below this dimension `torch.cdist` is faster than blocks of differences."""
GRAM_DIMENSION = 1024
"""Starts times dimension; below it the direct path is faster."""
NOISE = 16 * torch.finfo(torch.float64).eps
"""Of the Gram path's squared distances, in units of the squares they are the difference of."""
TINY = 1e-30
"""Divisor where nobody is inside."""


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
            coordinates are never members, nor are those so long that a distance could overflow (`longest`).
        starts: first guesses (..., K, D), or (..., D) for a single one. Such a start stays as it is.
        radius: `Quantile(q)`, `Fixed(tau)`, `TwoMeans()` or any rule of that form, asked anew in every round.
        rounds: M >= 0.
        normalize: "all" divides by N as in the paper; "members" by the number inside (mean shift with a flat kernel,
            an extension: it converges in one round once the members stay, and is as robust to far points).
        weights: (N,) tensor, >= 0, for clients with unequal amounts of data; they count in the mean, not in the
            quantile.
        method: "direct", "gram", or "auto" by size. Equal to rounding; with several starts "gram" resolves distances
            to 1e-8 of those between the starts, so float64 points that tie exactly may be told apart.

    Returns:
        Centres, members and radii; K = 1 when `starts` has no axis K.

    Raises:
        TypeError: points or starts are not float32 or float64 tensors, or of different dtypes; weights no tensor.
        ValueError: shapes that do not fit, no points or starts, rounds < 0, unknown normalize or method, bad weights.
    """
    starts = _checked(points, starts, rounds, normalize, weights, method)
    weight = points.new_ones(points.shape[-2]) if weights is None else weights.to(points)
    if normalize == "all":
        weight = weight / weight.sum()
    rows, guesses, never = _sound(points, starts)
    if method == "auto":
        (n, d), k = points.shape[-2:], starts.shape[-2]
        method = "gram" if _gram_pays(n, d, k, rounds) else "direct"
    path = _Gram(rows, guesses) if method == "gram" else _Direct(rows, guesses)
    members = torch.zeros(*starts.shape[:-1], points.shape[-2], dtype=torch.bool, device=points.device)
    radii = points.new_zeros((rounds, *starts.shape[:-1]))
    for i in range(rounds):
        distances = path.distances()  # (..., K, N)
        if never is not None:
            distances = torch.where(never, torch.inf, distances)
        members, radii[i] = inside(distances, radius)
        share = members * weight
        path.move(share if normalize == "all" else share / share.sum(-1, keepdim=True).clamp_min(TINY))
    centers = path.centers()
    if never is not None:
        centers = torch.where(never.all(-1, keepdim=True), starts, centers)
    return Clustering(centers, members, radii)


def _gram_pays(n: int, d: int, starts: int, rounds: int) -> bool:
    """Whether the Gram matrix of N points costs less than the rounds it saves, as measured on a core with AVX2."""
    return starts * d >= GRAM_DIMENSION and d >= 4 * n and starts * (rounds - 1) >= 2 + n / 12


class _Direct:
    """The estimates themselves; distances by differences of coordinates."""

    def __init__(self, points: Tensor, starts: Tensor) -> None:
        self.points, self.v = points, starts

    def distances(self) -> Tensor:
        """(..., K, N)."""
        n, d = self.points.shape[-2:]
        found = pair_distances(self.v.reshape(-1, self.v.shape[-2], d), self.points.reshape(-1, n, d))
        return found.view(*self.v.shape[:-1], n)

    def move(self, share: Tensor) -> None:
        """v += sum_j share_j (z_j - v); share: (..., K, N)."""
        self.v = self.v + (share @ self.points - share.sum(-1, keepdim=True) * self.v)

    def centers(self) -> Tensor:
        """(..., K, D)."""
        return self.v


class _Gram:
    """The estimates as coefficients (..., K, P), of sum one, of P rows: the N points, then the K starts.

    Where the starts are the first K points, as when every client starts from its own, they are not repeated.
    """

    def __init__(self, points: Tensor, starts: Tensor) -> None:
        n, k = points.shape[-2], starts.shape[-2]
        known = k <= n and torch.equal(starts, points[..., :k, :])
        self.parts = (points,) if known else (points, starts)
        # the origin is a start of middling length: one far away would cost all the others their digits
        middle = starts.norm(dim=-1).median(-1).indices[..., None, None]
        self.origin = starts.gather(-2, middle.expand(*middle.shape[:-1], starts.shape[-1]))  # (..., 1, D)
        if k == 1 and not known:
            # the start is the origin, whose products are zero
            self.gram = functional.pad(gram_matrix(points, self.origin), (0, 1, 0, 1))
        else:
            self.gram = gram_matrix(points, self.origin, *self.parts[1:])  # (..., P, P) float64
        self.square = self.gram.diagonal(dim1=-2, dim2=-1)[..., None, :n]
        self.a = self.gram.new_zeros((*starts.shape[:-1], self.gram.shape[-1]))
        self.a[..., torch.arange(k), torch.arange(k) + (0 if known else n)] = 1

    def distances(self) -> Tensor:
        """(..., K, N)."""
        ga = self.a @ self.gram  # (..., K, P)
        own = (self.a * ga).sum(-1, keepdim=True)
        square = self.square - 2 * ga[..., : self.square.shape[-1]] + own
        # what is left of a difference of squares that is nothing but rounding: the point is where v is
        square = torch.where(square > NOISE * (self.square + own), square, 0)
        return square.sqrt_().to(self.origin.dtype)

    def move(self, share: Tensor) -> None:
        """v += sum_j share_j (z_j - v); share: (..., K, N)."""
        share = share.double()
        self.a = self.a * (1 - share.sum(-1, keepdim=True))
        self.a[..., : share.shape[-1]] += share

    def centers(self) -> Tensor:
        """(..., K, D)."""
        shares = self.a.to(self.origin.dtype).split([part.shape[-2] for part in self.parts], -1)
        centers = shares[0] @ self.parts[0]
        for share, part in zip(shares[1:], self.parts[1:], strict=True):
            centers += share @ part
        return centers


def pair_distances(v: Tensor, rows: Tensor) -> Tensor:
    """Distances (B, K, N) of v (B, K, D) from rows (B, N, D), by differences of coordinates.

    In blocks, because `torch.cdist` takes twice as long, and because it adds up float32 so plainly that the distance
    of vectors of a million numbers is wrong by 1e-4.
    """
    if rows.shape[-1] < SHORT or rows.device.type != "cpu":
        return torch.cdist(v, rows, compute_mode="donot_use_mm_for_euclid_dist")
    parts = math.ceil(v.shape[1] * rows.nbytes / BLOCK_BYTES)
    if parts > 1 and len(rows) > 1:
        pairs = zip(v.chunk(parts), rows.chunk(parts), strict=True)
        return torch.cat([pair_distances(one, other) for one, other in pairs])
    if parts > 1 and v.shape[1] > 1:
        return torch.cat([pair_distances(one, rows) for one in v.chunk(parts, 1)], 1)
    if parts > 1 and rows.shape[1] > 1:
        return torch.cat([pair_distances(v, other) for other in rows.chunk(parts, 1)], 2)
    return (rows[:, None] - v[:, :, None]).square_().sum(-1).sqrt_()


def gram_matrix(rows: Tensor, origin: Tensor, *more: Tensor) -> Tensor:
    """Inner products (..., P, P) of rows, and more rows, (..., *, D) less origin (..., 1, D), in float64."""
    lead, d = origin.shape[:-2], origin.shape[-1]
    flat, zero = [part.reshape(-1, part.shape[-2], d) for part in (rows, *more)], origin.reshape(-1, 1, d).double()
    sizes = [part.shape[1] for part in flat]
    p = sum(sizes)
    gram = zero.new_zeros(len(zero), p, p)
    buffer = zero.new_empty(p, min(d, max(64, BLOCK_BYTES // (8 * p))))
    with _numpy_on_one_thread():
        for i in range(len(zero)):
            for begin in range(0, d, buffer.shape[1]):
                block = buffer[:, : d - begin]
                columns = slice(begin, begin + buffer.shape[1])
                for target, part in zip(block.split(sizes), flat, strict=True):
                    target.copy_(part[i, :, columns])
                block.sub_(zero[i, :, columns])
                if block.device.type == "cpu":
                    x = block.numpy()
                    gram[i] += torch.from_numpy(x @ x.T)  # NumPy sees the symmetry and does half the work
                else:
                    gram[i].addmm_(block, block.T)
    return gram.view(*lead, p, p)


def _numpy_on_one_thread() -> AbstractContextManager[object]:
    """NumPy's threads and torch's would wait for each other with both cores busy: 25 times slower than one."""
    return _pools().limit(limits=1, user_api="blas")


@functools.cache
def _pools() -> ThreadpoolController:
    return ThreadpoolController()


def longest(dtype: torch.dtype) -> float:
    """The longest vector that is used, 5e18 in float32: the square of a distance between two such cannot overflow."""
    return math.sqrt(torch.finfo(dtype).max) / 4


def _sound(points: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Points and starts with zeros for those that are not finite or too long, and which pairs never meet.

    Returns: points (..., N, D), starts (..., K, D), and (..., K, N) bool, or None where all is well.
    """
    most = longest(points.dtype)
    # one quick pass over everything; only if there may be something to hide, look where
    if torch.linalg.vector_norm(points) <= most and torch.linalg.vector_norm(starts) <= most:
        return points, starts, None
    near = torch.linalg.vector_norm(points, dim=-1) <= most  # (..., N), false for NaN
    free = torch.linalg.vector_norm(starts, dim=-1) <= most  # (..., K)
    never = ~(free[..., :, None] & near[..., None, :])
    return torch.where(near[..., None], points, 0), torch.where(free[..., None], starts, 0), never


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
    fits = starts.ndim == points.ndim and starts.shape[:-2] == points.shape[:-2] and starts.shape[-2] > 0
    if not fits or starts.shape[-1] != points.shape[-1]:
        raise ValueError(
            f"starts.shape={tuple(given.shape)}: must be (..., K, D) or (..., D) beside points {tuple(points.shape)}, "
            "with K >= 1"
        )
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"rounds={rounds}: must be an integer >= 0")
    if normalize not in ("all", "members"):
        raise ValueError(f"normalize={normalize!r}: must be 'all' or 'members'")
    if method not in ("auto", "gram", "direct"):
        raise ValueError(f"method={method!r}: must be 'auto', 'gram' or 'direct'")
    if weights is not None:
        if not isinstance(weights, Tensor):
            raise TypeError(f"weights: {type(weights).__name__}, must be a tensor")
        if weights.shape != points.shape[-2:-1]:
            raise ValueError(f"weights.shape={tuple(weights.shape)}: must be ({points.shape[-2]},), one a point")
        if not (weights.isfinite().all() and (weights >= 0).all() and weights.sum() > 0):
            raise ValueError("weights: must be finite, >= 0 and not all zero")
    return starts
