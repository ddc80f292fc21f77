"""Held-out accuracy and negative log-likelihood, always with the standard softmax, and with a refitted temperature."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from common.training import Run

RANGE = (-2.0, 2.0)
"""Natural logarithm of the temperatures to search."""


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Tensor, size: int, run: Run) -> Tensor:
    """Outputs in evaluation mode, float32 on the CPU; `size` rows a pass."""
    parts = ((part, part.new_empty(0)) for part in inputs.split(size))
    return logits_and_labels([model], parts, run)[0][0]


@torch.no_grad()
def logits_and_labels(
    models: Sequence[nn.Module], parts: Iterable[tuple[Tensor, Tensor]], run: Run
) -> tuple[list[Tensor], Tensor]:
    """Outputs of several models for the same inputs, as in `logits_of`, and the labels; read once, part by part."""
    for model in models:
        model.eval()
    found: list[list[Tensor]] = [[] for _ in models]
    labels = []
    with run.autocast():
        for inputs, label in parts:
            there = inputs.to(run.device)
            labels.append(label.cpu())
            for own, model in zip(found, models, strict=True):
                own.append(model(there).float().cpu())
    for model in models:
        model.train()
    return [torch.cat(own) for own in found], torch.cat(labels)


def accuracy(logits: Tensor, target: Tensor) -> float:
    """Share of right predictions in percent."""
    return 100 * float((logits.argmax(-1) == target).double().mean())


def nll(logits: Tensor, target: Tensor, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood in nats of logits over a temperature; (…, V) and (…)."""
    flat = logits.flatten(0, -2).double() / temperature
    return float(F.cross_entropy(flat, target.flatten()))


def temperature(logits: Tensor, target: Tensor) -> float:
    """The temperature with the lowest negative log-likelihood, to be applied to other data."""
    if not torch.isfinite(logits).all():
        return 1.0
    found = minimize_scalar(lambda t: nll(logits, target, math.exp(t)), bounds=RANGE, method="bounded")
    return math.exp(found.x)
