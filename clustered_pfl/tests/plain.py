"""The paper's algorithms as plain loops in float64, one point, one client, one gradient at a time: the reference."""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clustered_pfl.radius import Fixed, Quantile

F64 = torch.float64


def tau_of(rule, d: np.ndarray) -> float:
    """tau for distances (N,)."""
    if isinstance(rule, Fixed):
        return rule.tau
    if isinstance(rule, Quantile):
        return rule.factor * np.sort(d)[math.floor(rule.q * len(d))]
    x = np.sort(d)
    cost = {
        (i, j): sum(((p - p.mean()) ** 2).sum() for p in (x[:i], x[i:j], x[j:]))
        for i, j in itertools.combinations(range(1, len(x)), 2)
    }
    i, j = min(cost, key=cost.get)
    return (x[i:j].mean() + x[j:].mean()) / 2


def equation(points, start, rule, rounds, normalize="all", weights=None, absent=0):
    """v <- sum_j w_j (z_j if inside else v) / sum_j w_j, point by point.

    absent: so many more points are counted in the divisor, and never inside.
    Returns v, the members of the last round and tau of every round.
    """
    z, v = np.asarray(points, np.float64), np.asarray(start, np.float64)
    w = np.ones(len(z)) if weights is None else np.asarray(weights, np.float64)
    taus, close = [], np.zeros(len(z), bool)
    for _ in range(rounds):
        d = np.array([np.sqrt(((p - v) ** 2).sum()) for p in z])
        taus.append(tau_of(rule, d))
        close = d < taus[-1] if rule.strict else d <= taus[-1]
        if normalize == "all":
            v = (sum(w[j] * (z[j] if close[j] else v) for j in range(len(z))) + absent * v) / (w.sum() + absent)
        elif w[close].sum() > 0:
            v = sum(w[j] * z[j] for j in range(len(z)) if close[j]) / w[close].sum()
    return v, close, taus


# -- a federation of small networks: eight clients in two clusters with different labels


def network() -> nn.Module:
    """Two layers, 21 parameters, float64."""
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def networks(n: int = 8, same: bool = False) -> list[nn.Module]:
    """Different starts, or n times the same."""
    torch.manual_seed(0)
    first = network()
    found = [network() for _ in range(n)]
    for module in found if same else []:
        module.load_state_dict(first.state_dict())
    return found


def batch(step: int, n: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs (n, 5, 2) and labels (n, 5); odd clients' labels are shifted by one."""
    rng = torch.Generator().manual_seed(step)
    x = torch.randn(n, 5, 2, generator=rng, dtype=F64)
    y = (x[..., 0] > 0).long() + (x[..., 1] > 0).long()
    return x, (y + torch.arange(n)[:, None] % 2) % 3


def gradient(module: nn.Module, x: Tensor, y: Tensor) -> np.ndarray:
    """Flat gradient of one network on one batch."""
    grads = torch.autograd.grad(nn.functional.cross_entropy(module(x), y), tuple(module.parameters()))
    return torch.cat([g.flatten() for g in grads]).numpy()


def flat(module: nn.Module) -> Tensor:
    """Flat parameters."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def set_flat(module: nn.Module, values: np.ndarray) -> None:
    """Put flat parameters back."""
    with torch.no_grad():
        nn.utils.vector_to_parameters(torch.from_numpy(values), module.parameters())


def federated_clustering(
    modules: list[nn.Module],
    batches: list[tuple[Tensor, Tensor]],
    rule,
    rounds: int,
    *,
    lr: float = 0.5,
    momentum: float = 0.9,
    style: str = "heavy_ball",
    dealt: Sequence[Sequence[Sequence[int]]] | None = None,
    hostile: Callable[[list[np.ndarray]], list[np.ndarray]] | None = None,
    absent: int = 0,
    local_steps: int = 1,
) -> Tensor:
    """Federated-Clustering the way the official code does it; models (N, D) after the last of the batches.

    Args:
        modules: one a client, trained in place; batches may hold more clients (they answer but have no model).
        batches: one tuple a step.
        rule, rounds: of the clustering.
        lr, momentum, style: of the step.
        dealt: per step, the clients of every group; None: all in one.
        hostile: what attackers send beside the group's answers.
        absent: of `equation`.
        local_steps: steps whose last one clusters.
    """
    velocity: list[np.ndarray | None] = [None] * len(modules)
    for t, (x, y) in enumerate(batches):
        steps: dict[int, np.ndarray] = {}
        for group in dealt[t] if dealt else [range(len(x))]:
            for i in group:
                if i >= len(modules):
                    continue
                own = gradient(modules[i], x[i], y[i])
                if (t + 1) % local_steps:
                    steps[i] = own
                    continue
                answers = [gradient(modules[i], x[j], y[j]) for j in group]
                sent = hostile(answers) if hostile else []
                steps[i], _, _ = equation(answers + sent, own, rule, rounds, absent=absent)
        for i, v in steps.items():
            m = velocity[i]
            velocity[i] = v if m is None else momentum * m + (v if style == "heavy_ball" else (1 - momentum) * v)
        for i, module in enumerate(modules):
            set_flat(module, flat(module).numpy() - lr * velocity[i])
    return torch.stack([flat(m) for m in modules])
