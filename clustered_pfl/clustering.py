"""The paper's two training algorithms on top of Threshold-Clustering.

Federated-Clustering (FC): every client's model is sent to all clients, who answer with their gradients at it; the
client steps along the Threshold-Clustering of the answers, started from its own. No number of clusters, no initial
centres; N^2 gradients a round. Momentum-Clustering (MC): one gradient a client; the clients' momenta are clustered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from clustered_pfl.attacks import Attack, Exchange
from clustered_pfl.federation import Federation, Loss, check, whole
from clustered_pfl.radius import Quantile, Radius
from clustered_pfl.threshold import threshold_clustering


@dataclass(frozen=True)
class Round:
    """What happened in one round; with replicas every field has a leading axis R (radii: after the rounds)."""

    members: Tensor | None
    """(N, N + b) bool: whose last answer client i averaged over; None in a local step."""
    radii: Tensor | None
    """(rounds, N): tau of every client."""


class FederatedClustering(Federation):
    """Federated-Clustering: x_i <- x_i - eta * momentum( Threshold-Clustering of { g_j(x_i) }_j from g_i(x_i) ).

    Args:
        loss, params, lr and the other arguments: see `Federation`; params (N, ...) of the honest clients.
        radius: rule for tau; a quantile is taken over all N + b points.
        rounds: M, Threshold-Clustering rounds a step.
        groups: clients are split at random into this many groups each step, and clustered inside them: N^2 / G
            gradients. N (and n_byzantine) must be multiples of it.
        local_steps: of this many steps the last one clusters, the others are local.
        n_byzantine: b, attackers that answer every exchange; they have no model.
        attack: what they send (`attacks`). None: they follow the protocol on their own data, the last b rows of every
            batch (data poisoning, e.g. `attacks.label_flip`).
        memory_mb: answers held at once, in 10^6 bytes; models are streamed to stay below.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        lr: float,
        radius: Radius = Quantile(0.2),  # noqa: B008  (frozen)
        rounds: int = 10,
        groups: int = 1,
        local_steps: int = 1,
        n_byzantine: int = 0,
        attack: Attack | None = None,
        memory_mb: float = 8.0,
        **shared: Any,
    ) -> None:
        super().__init__(loss, params, lr=lr, **shared)
        n = self.models.shape[1]
        check("rounds", rounds, whole(rounds, 0), "an integer >= 0")
        check("local_steps", local_steps, whole(local_steps, 1), "an integer >= 1")
        check("n_byzantine", n_byzantine, whole(n_byzantine, 0), "an integer >= 0")
        divides = whole(groups, 1) and n % groups == 0 and n_byzantine % groups == 0
        check("groups", groups, divides, f">= 1, a divisor of {n} clients and of n_byzantine={n_byzantine}")
        check("memory_mb", memory_mb, memory_mb > 0, "> 0")
        self.radius, self.rounds, self.groups, self.local_steps = radius, rounds, groups, local_steps
        self.n_byzantine, self.attack, self.memory_mb = n_byzantine, attack, memory_mb

    def step(self, batches: Any) -> Round:
        """One gradient step of every client; every `local_steps`-th clusters.

        Args:
            batches: one batch a client, leaves (N, ...), or (N + b, ...) when Byzantine clients poison their data.
        """
        n = self.models.shape[1]
        answering = n + self.n_byzantine if self.attack is None else n
        batches = self.lift(batches)
        for leaf in pytree.tree_leaves(batches):
            fits = leaf.shape[:2] == (len(self.models), answering)
            check("batches", f"{list(self.lower(leaf).shape)}", fits, f"({answering}, ...), one row a client")
        self.steps += 1
        if self.steps % self.local_steps:
            self.descend(self.gradients(self.models, pytree.tree_map(lambda x: x[:, :n], batches)))
            return Round(None, None)
        estimates, members, radii = self.estimate(batches)
        self.descend(estimates)
        return Round(self.lower(members), self.lower(radii, 1))

    def estimate(self, batches: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The cluster gradient of every client, (R, N, D), with members (R, N, N + b) and radii (rounds, R, N)."""
        replicas, n, _ = self.models.shape
        poisoned = self.n_byzantine if self.attack is None else 0
        honest, hostile = self._deal(n), self._deal(self.n_byzantine)  # (R, G, n/G), (R, G, b/G)
        seats = torch.cat([honest, hostile + n], -1) if poisoned else honest
        estimates = torch.zeros_like(self.models)
        members = torch.zeros(replicas, n, n + self.n_byzantine, dtype=torch.bool, device=self.models.device)
        radii = self.models.new_zeros(self.rounds, replicas, n)
        for r, g, c in self._slices(seats.shape[-1]):
            rows = torch.arange(replicas, device=self.models.device)[r, None, None]
            mine = honest[r, g, c]  # (r, g, c) clients whose models are sent
            models = self.models[rows, mine]
            data = pytree.tree_map(lambda x, rows=rows, s=seats[r, g]: x[rows, s].flatten(0, 1), batches)
            answers = self._pairs(models.flatten(0, 1), data)  # (r*g, c, n, D)
            own = torch.arange(answers.shape[1], device=answers.device)
            starts = answers[:, own, own + (c.start or 0)]  # (r*g, c, D)
            answers = self._joined(answers, starts, r)
            found = threshold_clustering(answers, starts, radius=self.radius, rounds=self.rounds)
            estimates[rows, mine] = found.centers[..., 0, :].view_as(models)
            everyone = torch.cat([honest, hostile + n], -1)[r, g][..., None, :].expand(-1, -1, mine.shape[-1], -1)
            members[rows[..., None], mine[..., None], everyone] = found.members[..., 0, :].view_as(everyone)
            radii[:, rows, mine] = found.radii[..., 0].view(self.rounds, *mine.shape)
        return estimates, members, radii

    def _deal(self, count: int) -> Tensor:
        """Clients of every group, (R, G, count / G)."""
        if self.groups == 1:
            dealt = torch.arange(count).expand(len(self.generators), count)
        else:
            dealt = torch.stack([torch.randperm(count, generator=g) for g in self.generators])
        return dealt.to(self.models.device).unflatten(1, (self.groups, count // self.groups))

    def _slices(self, answering: int) -> Iterator[tuple[slice, slice, slice]]:
        """Replicas, groups and models to work on at once within the memory.

        Under attack one group of one replica at a time: attackers draw the same numbers whoever else is simulated.
        """
        replicas, n, d = self.models.shape
        size = n // self.groups
        row = max(1, answering) * d * self.models.element_size()
        most = max(1, int(self.memory_mb * 1e6 / row))  # models at once
        if replicas * n <= most and (self.attack is None or replicas * self.groups == 1):
            yield slice(None), slice(None), slice(None)
            return
        for r in range(replicas):
            for g in range(self.groups):
                for begin in range(0, size, most):
                    yield slice(r, r + 1), slice(g, g + 1), slice(begin, min(begin + most, size))

    def _joined(self, answers: Tensor, starts: Tensor, replica: slice) -> Tensor:
        """The honest answers (B, c, n, D) and, under attack, the attackers' (B, c, b, D)."""
        if self.attack is None or self.n_byzantine == 0:
            return answers
        generator = self.generators[replica.start or 0]
        count = self.n_byzantine // self.groups
        sent = self.attack(Exchange(answers, starts, count, self.radius, generator))
        return torch.cat([answers, sent.to(answers)], -2)


class MomentumClustering(Federation):
    """Momentum-Clustering: clients send m_i <- alpha g_i(x_i) + (1 - alpha) m_i, the server clusters them.

    The source of this form is second-hand; first momenta and starts are our choice: m_i starts as the first gradient,
    and the clustering starts from each client's own momentum, or, with `clusters`, from last round's centres.

    Args:
        loss, params, lr, replicas, seed: see `Federation`; all clients should start equal. There is no other momentum.
        alpha: weight of the new gradient, in (0, 1]; it divides the noise variance of the points by about 2 / alpha.
        radius, rounds: of Threshold-Clustering.
        clusters: number of centres K kept by the server; each client steps along the centre nearest to its momentum.
            The first centres are momenta far from each other. None: one start a client, no K needed.
        n_byzantine, attack: as in `FederatedClustering`; attackers send one message a round.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        lr: float,
        alpha: float = 0.1,
        radius: Radius = Quantile(0.2),  # noqa: B008  (frozen)
        rounds: int = 10,
        clusters: int | None = None,
        n_byzantine: int = 0,
        attack: Attack | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(loss, params, lr=lr, momentum=0.0, **shared)
        n = self.models.shape[1]
        check("alpha", alpha, 0 < alpha <= 1, "in (0, 1]")
        check("rounds", rounds, whole(rounds, 0), "an integer >= 0")
        few = clusters is None or (whole(clusters, 1) and clusters <= n)
        check("clusters", clusters, few, f"an integer in [1, {n}], or None")
        check("n_byzantine", n_byzantine, whole(n_byzantine, 0), "an integer >= 0")
        self.alpha, self.radius, self.rounds, self.clusters = alpha, radius, rounds, clusters
        self.n_byzantine, self.attack = n_byzantine, attack
        self.momenta: Tensor | None = None
        self.centers: Tensor | None = None

    def step(self, batches: Any) -> Round:
        """One round; batches as in `FederatedClustering.step`."""
        batches = self.lift(batches)
        poisoned = self.n_byzantine if self.attack is None else 0
        n = self.models.shape[1]
        at = torch.cat([self.models, self.models[:, :1].expand(-1, poisoned, -1)], 1) if poisoned else self.models
        fresh = self.gradients(at, batches)  # (R, N (+ b), D)
        self.momenta = fresh if self.momenta is None else self.momenta.lerp_(fresh, self.alpha)
        points = self._joined(self.momenta)
        starts = self._starts(self.momenta[:, :n])
        found = threshold_clustering(points, starts, radius=self.radius, rounds=self.rounds)
        estimates, members, radii = found.centers, found.members, found.radii
        if self.clusters is not None:
            self.centers = found.centers
            own = _distances(self.momenta[:, :n], found.centers).argmin(-1)  # (R, N)
            estimates = found.centers.gather(1, own[..., None].expand(-1, -1, estimates.shape[-1]))
            members = members.gather(1, own[..., None].expand(-1, -1, members.shape[-1]))
            radii = radii.gather(2, own.expand(self.rounds, *own.shape))
        self.steps += 1
        self.descend(estimates)
        return Round(self.lower(members), self.lower(radii, 1))

    def _joined(self, momenta: Tensor) -> Tensor:
        if self.attack is None or self.n_byzantine == 0:
            return momenta
        sent = [
            self.attack(Exchange(m, m[0], self.n_byzantine, self.radius, g))
            for m, g in zip(momenta, self.generators, strict=True)
        ]
        return torch.cat([momenta, torch.stack(sent).to(momenta)], 1)

    def _starts(self, momenta: Tensor) -> Tensor:
        """(R, K, D)."""
        if self.clusters is None:
            return momenta
        return spread(momenta, self.clusters) if self.centers is None else self.centers


def spread(points: Tensor, count: int) -> Tensor:
    """Farthest-first traversal: `count` of the points (R, N, D), each as far as possible from those before it.

    The first finite point comes first; points that are not finite come last.
    """
    gap = torch.where(points.isfinite().all(-1), torch.inf, -1.0)  # (R, N) distance to the nearest one chosen
    chosen: list[Tensor] = []
    for _ in range(count):
        chosen.append(points.gather(1, gap.argmax(1)[:, None, None].expand(-1, 1, points.shape[-1])))
        gap = torch.minimum(gap, _distances(points, chosen[-1])[..., 0])
    return torch.cat(chosen, 1)


def _distances(points: Tensor, centers: Tensor) -> Tensor:
    """(R, N, D) to (R, K, D) -> (R, N, K), infinite where one is not finite."""
    found = torch.cdist(points, centers, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.where(found.isnan(), torch.inf, found)
