"""Held-out accuracy and negative log-likelihood, always with the standard softmax, and with a refitted temperature."""

from __future__ import annotations

import math

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
    model.eval()
    with run.autocast():
        found = [model(part.to(run.device)).float().cpu() for part in inputs.split(size)]
    model.train()
    return torch.cat(found)


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
