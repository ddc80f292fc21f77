"""What Byzantine clients send. They see everything: the honest answers of the exchange, the start, the radius rule.

An attack gets an `Exchange` and gives (..., b, D) messages. Attacks on the data rather than on the messages
(`label_flip`) change the attackers' batches; their gradients are then computed like everybody's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clustered_pfl.radius import Radius


@dataclass(frozen=True)
class Exchange:
    """One exchange as the attackers see it; leading dimensions are models whose gradients are asked for."""

    honest: Tensor
    """(..., n, D) what the honest clients answer."""
    starts: Tensor
    """(..., D) the answer of the client that asks, from which the clustering starts."""
    count: int
    """b, the attackers."""
    radius: Radius
    """The rule that will be applied."""
    generator: torch.Generator
    """Random numbers of this replica."""


Attack = Callable[[Exchange], Tensor]


def large_gradient(exchange: Exchange, mean: float = 1e6, std: float = 200.0) -> Tensor:
    """N(mean, std^2) in every coordinate (official code: 1e6, 200), anew for every message."""
    shape = (*exchange.honest.shape[:-2], exchange.count, exchange.honest.shape[-1])
    noise = torch.randn(shape, generator=exchange.generator, dtype=torch.float32, device=exchange.generator.device)
    return (noise * std + mean).to(exchange.honest)


def bit_flip(exchange: Exchange) -> Tensor:
    """Minus the first honest client's gradient, the same vector from all attackers."""
    return -exchange.honest[..., :1, :].expand(*exchange.honest.shape[:-2], exchange.count, -1)


def inside_radius(exchange: Exchange, fraction: float = 0.7) -> Tensor:
    """Adaptive: all attackers at `fraction` of the first round's radius from the asking client's answer, against it.

    They count as members and pull the estimate towards zero gradient, the worst direction for the asking client.
    """
    distances = (exchange.honest - exchange.starts[..., None, :]).norm(dim=-1)  # (..., n)
    tau = exchange.radius(torch.cat([distances, distances.new_zeros(*distances.shape[:-1], exchange.count)], -1))
    norm = exchange.starts.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(exchange.starts.dtype).tiny)
    message = exchange.starts - fraction * tau[..., None] * exchange.starts / norm
    return message[..., None, :].expand(*message.shape[:-1], exchange.count, -1)


def non_finite(exchange: Exchange) -> Tensor:
    """NaN, inf, -inf and 1e38 in turn."""
    values = torch.tensor([float("nan"), float("inf"), float("-inf"), 1e38])[torch.arange(exchange.count) % 4]
    shape = (*exchange.honest.shape[:-2], exchange.count, exchange.honest.shape[-1])
    return values.to(exchange.honest)[:, None].expand(shape)


def label_flip(labels: Tensor, classes: int) -> Tensor:
    """Poisoned labels of the attackers' own data: y becomes classes - 1 - y."""
    if labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise ValueError(f"labels span [{int(labels.min())}, {int(labels.max())}]: must lie in [0, {classes})")
    return classes - 1 - labels


ATTACKS: dict[str, Attack] = {
    "large_gradient": large_gradient,
    "bit_flip": bit_flip,
    "inside_radius": inside_radius,
    "non_finite": non_finite,
}
