"""Along a line through the inputs and all weights of a network at once: is it piecewise affine? (C7)

A small network in float64, linear, layer norm, attention, sum, is evaluated at many points of a line together. A
function that is affine between t - h and t + h has no second difference there; a smooth one has one that shrinks with
h.
"""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.streams import generator
from common.training import setup
from mulfree_training.arguments import Rule
from mulfree_training.functional import pam_layer_norm, pam_softmax
from mulfree_training.primitives import pam_mul
from mulfree_training.products import pam_matmul

if TYPE_CHECKING:
    from common.trials import Trial
    from mulfree_training.config import AffineConfig, TrialConfig

LINES = 71  # random stream
AFFINE = 1e-7
"""Second over first difference below which a step counts as affine."""
CLOSE = 1e-6
"""Relative distance of a gradient from the central difference that counts as equal."""
SMALL = 20


@dataclass(frozen=True)
class Line:
    """Inputs and weights at t = 0, and their directions; names -> tensors."""

    origin: dict[str, Tensor]
    direction: dict[str, Tensor]

    def at(self, t: Tensor) -> dict[str, Tensor]:
        """All of them at positions t (P,): tensors with a leading dimension P."""
        return {name: x + t.view(-1, *[1] * x.dim()) * self.direction[name] for name, x in self.origin.items()}


def draw(seed: int, task: AffineConfig) -> Line:
    """A network of width d and an input of some rows, Gaussian with the usual sizes, and a direction of their kind."""
    rng, d = generator(seed, LINES), task.d_model
    shapes: dict[str, tuple[int, ...]] = {"x": (task.tokens, d), "weight": (d, d), "gain": (1, d), "bias": (1, d)}
    shapes |= {name: (d, d) for name in ("query", "key", "value")}

    def sample(name: str) -> Tensor:
        scale = d**-0.5 if len(shapes[name]) == 2 and shapes[name][0] == d else 1.0
        return torch.randn(shapes[name], generator=rng, dtype=torch.float64) * scale

    return Line({name: sample(name) for name in shapes}, {name: sample(name) for name in shapes})


def standard(w: dict[str, Tensor]) -> Tensor:
    """The network in ordinary float64: (P, …) tensors -> (P,)."""
    y = F.layer_norm(w["x"] @ w["weight"], w["x"].shape[-1:]) * w["gain"] + w["bias"]
    query, key, value = (y @ w[name] for name in ("query", "key", "value"))
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    return (scores.softmax(-1) @ value).sum((1, 2))


def piecewise(w: dict[str, Tensor], derivative: Rule) -> Tensor:
    """The same of piecewise affine operations, with either rule."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return pam_matmul(a, b, derivative=derivative)

    y = pam_layer_norm(product(w["x"], w["weight"]), w["x"].shape[-1:], derivative=derivative)
    y = pam_mul(y, w["gain"], derivative=derivative) + w["bias"]
    query, key, value = (product(y, w[name]) for name in ("query", "key", "value"))
    scores = product(pam_mul(query, query.shape[-1] ** -0.5, derivative=derivative), key.mT)
    return product(pam_softmax(scores, derivative=derivative), value).sum((1, 2))


def curvature(network: Any, line: Line, t: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """|f(t - h) - 2 f(t) + f(t + h)| over |f(t + h) - f(t - h)|, and the central difference, both (P,)."""
    left, middle, right = network(line.at(torch.cat([t - h, t, t + h]))).chunk(3)
    return (left - 2 * middle + right).abs() / (right - left).abs(), (right - left) / (2 * h)


def slopes(network: Any, line: Line, t: Tensor) -> Tensor:
    """df/dt (P,) by backpropagation to inputs and weights, then along the line."""
    parts = {name: x.requires_grad_() for name, x in line.at(t).items()}
    gradients = torch.autograd.grad(network(parts).sum(), list(parts.values()))
    along = [(g * line.direction[name]).flatten(1).sum(1) for name, g in zip(parts, gradients, strict=True)]
    return torch.stack(along).sum(0)


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed with, for each distance h (`_1e-06`), `curvature` (median of second over first difference) and
        `affine` (share of points where it is below `AFFINE`), and `gradient_right`, the share of points whose
        backpropagated slope is the central difference at the second distance.
    """
    setup(config.threads, config.device, seed=config.seed)
    task = config.task
    points = task.points if config.max_steps is None else min(task.points, SMALL)
    rule = typing.cast(Rule, config.arithmetic.derivative)
    network = functools.partial(piecewise, derivative=rule) if config.arithmetic.kind == "pam" else standard
    t = torch.linspace(-1, 1, points, dtype=torch.float64)
    middle = task.steps[len(task.steps) // 2]
    rows = []
    for seed in trial.seeds:
        line = draw(seed, task)
        row: dict[str, Any] = {"seed": seed}
        for h in task.steps:
            ratio, difference = curvature(network, line, t, h)
            row |= {f"curvature_{h:g}": float(ratio.median()), f"affine_{h:g}": float((ratio < AFFINE).double().mean())}
            if h == middle:
                right = (slopes(network, line, t) - difference).abs() < CLOSE * difference.abs()
                row["gradient_right"] = float(right.double().mean())
        rows.append(row)
    return rows
