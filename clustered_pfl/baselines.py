"""What the method is compared with, all with the same `step`.

Momentum is the clients' (each keeps the momentum of its own gradients) in IFCA and Ditto; in Local, Global and
GroundTruth clients' and server's momentum are the same numbers, because the mean is linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from clustered_pfl.attacks import Attack, Exchange
from clustered_pfl.federation import Federation, Loss, check, mean_by, take, whole
from clustered_pfl.radius import Fixed

Aggregator = Callable[[Tensor], Tensor]
"""Messages (N, D) -> their aggregate (D,)."""


class Local(Federation):
    """Every client trains alone: x_i <- x_i - eta * momentum(g_i(x_i)). Arguments: see `Federation`."""

    def step(self, batches: Any) -> None:
        """One gradient step of every client."""
        self.steps += 1
        self.descend(self.gradients(self.models, self.lift(batches)))


class GroundTruth(Federation):
    """One model for each true cluster, trained on the mean gradient of its clients: what clustering can hope for.

    Args:
        loss, params, lr and the other arguments: see `Federation`; a cluster starts at its clients' mean.
        clusters: (N,) integers in [0, K), the true cluster of each client; no cluster may be empty.

    Raises:
        ValueError: clusters are not (N,), not from 0 on, or one is empty.
    """

    def __init__(self, loss: Loss, params: Mapping[str, Tensor], *, clusters: Any, lr: float, **shared: Any) -> None:
        super().__init__(loss, params, lr=lr, **shared)
        replicas, n, _ = self.models.shape
        chosen = torch.as_tensor(clusters, device=self.models.device).long()
        whole = chosen.shape == (n,) and torch.equal(chosen.unique(), torch.arange(int(chosen.max()) + 1).to(chosen))
        check("clusters", list(chosen.shape), whole, f"({n},) integers 0 to K - 1, each of them used")
        self.chosen, self.count = chosen.expand(replicas, n), int(chosen.max()) + 1
        self.models = mean_by(self.models, self.chosen, self.count)  # (R, K, D)

    def assignment(self) -> Tensor:
        """(R, N)."""
        return self.chosen

    def step(self, batches: Any) -> None:
        """One step of every cluster's model."""
        self.steps += 1
        gradients = self.gradients(self.client_models(), self.lift(batches))
        self.descend(mean_by(gradients, self.chosen, self.count))


class Global(Federation):
    """One model for all, trained on the mean gradient (FedAvg with one local step), or on a robust aggregate of it.

    Args:
        loss, params, lr and the other arguments: see `Federation`; the model starts at the clients' mean.
        aggregate: messages (N + b, D) -> (D,), e.g. a rule of the package byzfl; None: their mean.
        n_byzantine, attack: as in `FederatedClustering`.
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        lr: float,
        aggregate: Aggregator | None = None,
        n_byzantine: int = 0,
        attack: Attack | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(loss, params, lr=lr, **shared)
        replicas, n, _ = self.models.shape
        check("n_byzantine", n_byzantine, whole(n_byzantine, 0), "an integer >= 0")
        self.aggregate, self.n_byzantine, self.attack = aggregate, n_byzantine, attack
        self.chosen = torch.zeros(replicas, n, dtype=torch.long, device=self.models.device)
        self.models = self.models.mean(1, keepdim=True)  # (R, 1, D)

    def assignment(self) -> Tensor:
        """(R, N)."""
        return self.chosen

    def step(self, batches: Any) -> None:
        """One step of the model; batches as in `FederatedClustering.step`."""
        self.steps += 1
        poisoned = self.n_byzantine if self.attack is None else 0
        n = self.chosen.shape[1] + poisoned
        messages = self.gradients(self.models.expand(-1, n, -1), self.lift(batches))  # (R, N (+ b), D)
        if self.attack is not None and self.n_byzantine:
            sent = [
                self.attack(Exchange(m, m[0], self.n_byzantine, Fixed(0.0), g))
                for m, g in zip(messages, self.generators, strict=True)
            ]
            messages = torch.cat([messages, torch.stack(sent).to(messages)], 1)
        if self.aggregate is None:
            self.descend(messages.mean(1, keepdim=True))
        else:
            self.descend(torch.stack([self.aggregate(m) for m in messages])[:, None])


class IFCA(Federation):
    """IFCA (Ghosh et al. 2020): K models; every round each client trains the one with the least loss on its data.

    Args:
        loss, lr and the other arguments: see `Federation`.
        models: stacked different starts of the K models, name -> (K, ...).
        variant: "gradient": model k steps along the sum of its clients' momenta over N; "model": over its clients, the
            mean of their models after `local_steps` steps.
        local_steps: of the model variant; clients choose a model in the first of them.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        loss: Loss,
        models: Mapping[str, Tensor],
        *,
        lr: float,
        variant: Literal["gradient", "model"] = "gradient",
        local_steps: int = 1,
        **shared: Any,
    ) -> None:
        super().__init__(loss, models, lr=lr, **shared)
        check("variant", repr(variant), variant in ("gradient", "model"), "'gradient' or 'model'")
        allowed = whole(local_steps, 1) and (variant == "model" or local_steps == 1)
        check("local_steps", local_steps, allowed, "an integer >= 1, and 1 for variant='gradient'")
        self.variant, self.local_steps = variant, local_steps
        self.chosen: Tensor | None = None
        self.working: Tensor | None = None

    def assignment(self) -> Tensor:
        """(R, N)."""
        if self.chosen is None:
            raise ValueError("params: no client has chosen a model yet; make a step first")
        return self.chosen

    def choose(self, batches: Any) -> Tensor:
        """The model with the least loss for each client, (R, N); a loss that is not finite is the worst."""
        losses = self.losses(batches)  # (R, K, N)
        return torch.where(losses.isfinite(), losses, torch.inf).argmin(1)

    def step(self, batches: Any, selection: Any = None) -> Tensor:
        """One step; clients choose by the loss on `selection` (batches like the others; default: the same).

        Returns: the model of each client, (N,), or (R, N) with replicas.
        """
        batches = self.lift(batches)
        if self.steps % self.local_steps == 0:
            self.chosen = self.choose(batches if selection is None else self.lift(selection))
            self.working = take(self.models, self.chosen)  # (R, N, D)
        assert self.chosen is not None and self.working is not None
        self.steps += 1
        self.velocity = self.accelerate(self.velocity, self.gradients(self.working, batches))
        count = self.models.shape[1]
        if self.variant == "gradient":
            self.models.sub_(self.lr * mean_by(self.velocity, self.chosen, count, "all"))
        else:
            self.working.sub_(self.lr * self.velocity)
            if self.steps % self.local_steps == 0:
                used = torch.nn.functional.one_hot(self.chosen, count).any(1)[..., None]  # (R, K, 1)
                self.models = torch.where(used, mean_by(self.working, self.chosen, count), self.models)
        return self.lower(self.chosen)


class HypCluster(IFCA):
    """HypCluster (Mansour et al. 2020): choose the best of K models on all local data, then train it for many steps.

    As a federated loop it is IFCA's model variant with long rounds; arguments as there.
    """

    def __init__(
        self, loss: Loss, models: Mapping[str, Tensor], *, lr: float, local_steps: int = 10, **kw: Any
    ) -> None:
        super().__init__(loss, models, lr=lr, variant="model", local_steps=local_steps, **kw)


class Ditto(Federation):
    """Ditto (Li et al. 2021): x_i <- x_i - eta (m_i + lambda (x_i - w)) beside a global model w trained as in `Global`.

    Args:
        loss, params, lr and the other arguments: see `Federation`.
        pull: lambda >= 0.
    """

    def __init__(
        self, loss: Loss, params: Mapping[str, Tensor], *, lr: float, pull: float = 1.0, **shared: Any
    ) -> None:
        super().__init__(loss, params, lr=lr, **shared)
        check("pull", pull, pull >= 0, ">= 0")
        self.pull = pull
        self.shared = self.models.mean(1, keepdim=True)  # (R, 1, D)
        self.shared_velocity: Tensor | None = None

    def step(self, batches: Any) -> None:
        """One step of the global and of every personal model."""
        batches = self.lift(batches)
        self.steps += 1
        before = self.shared.clone()
        mean = self.gradients(before.expand_as(self.models), batches).mean(1, keepdim=True)
        self.shared_velocity = self.accelerate(self.shared_velocity, mean)
        self.shared.sub_(self.lr * self.shared_velocity)
        self.velocity = self.accelerate(self.velocity, self.gradients(self.models, batches))
        self.models.sub_(self.lr * (self.velocity + self.pull * (self.models - before)))


class KNNPer(Global):
    """kNN-Per (Marfoq et al. 2022): the global model's prediction mixed with that of nearest neighbours in local data.

    Training is that of `Global`; `predict` mixes. Each client's weight is chosen on held-out data.
    """

    @staticmethod
    def predict(
        features: Tensor, memory: Tensor, memory_labels: Tensor, logits: Tensor, mix: Tensor, *, neighbours: int = 10
    ) -> Tensor:
        """Class probabilities mix * kNN + (1 - mix) * softmax(logits).

        Args:
            features: (..., Q, F) representation of the queries by the global model.
            memory: (..., S, F) of the client's stored samples, with labels (..., S).
            logits: (..., Q, C) of the global model at the queries.
            mix: weight of the neighbours, broadcast to (...).
            neighbours: k, at most S; each weighs exp(-distance^2).

        Returns: (..., Q, C).
        """
        check("neighbours", neighbours, 1 <= neighbours <= memory.shape[-2], f"in [1, {memory.shape[-2]}]")
        distances = torch.cdist(features, memory, compute_mode="donot_use_mm_for_euclid_dist")
        distances, nearest = distances.topk(neighbours, largest=False)  # (..., Q, k)
        weight = torch.softmax(-distances.square(), -1)
        labels = memory_labels[..., None, :].expand(*distances.shape[:-1], -1).gather(-1, nearest)
        near = torch.zeros_like(logits).scatter_add(-1, labels, weight)
        mix = mix[..., None, None]
        return mix * near + (1 - mix) * logits.softmax(-1)
