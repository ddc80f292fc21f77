"""The training loss: errors of every task on every state, and how far the state moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from common.config import check

if TYPE_CHECKING:
    from torch import nn

    from multimodn.decoders import Decoder

Targets = Mapping[str, Tensor]
"""Task -> (..., B) int64, or (..., B) or (..., B, L) float; -100 or NaN where a label is missing."""
NORMALISE = ("constant", "present")


def grid_loss(
    decoders: nn.ModuleDict,
    outputs: Mapping[str, Tensor],
    targets: Targets,
    present: Tensor,
    states: Tensor | None = None,
    *,
    error_weight: float = 1.0,
    state_change_weight: float = 0.0,
    normalise: str = "constant",
    validate: bool = True,
) -> Tensor:
    """Loss of a batch: error_weight · ΣE / (D (K+1)) + 0.01 · state_change_weight · ΣV / K.

    E[k, d] is the mean loss of task d after encoder k over the samples that took the step, V[k] the mean squared
    change of their state; row 0 (the initial state) counts every sample.

    Args:
        decoders: task -> decoder.
        outputs: task -> (..., K+1, B, C).
        targets: see `Targets`; must hold every task that `outputs` has.
        present: (..., K, B) bool, steps that were taken.
        states: (..., K+1, B, S); needed for the state change only.
        error_weight: the official err_penalty.
        state_change_weight: the official state_change_penalty; the factor 0.01 is part of the formula.
        normalise: `constant` (official): E and V divide by B, so that a batch with missing data weighs less.
            `present`: by the samples that took the step and have a label.
        validate: look at every label; not under `torch.compile`.

    Returns: a scalar, or (...) for stacked models.

    Raises:
        KeyError: a task without targets.
        ValueError: labels that a task does not have.
    """
    check("normalise", normalise, normalise in NORMALISE, f"one of {', '.join(NORMALISE)}")
    weight = with_first_row(present)  # (..., K+1, B)
    rows, batch = weight.shape[-2:]
    total = weight.new_zeros((), dtype=next(iter(outputs.values())).dtype)
    for name, module in decoders.items():
        decoder = cast("Decoder", module)
        if name not in targets:
            raise KeyError(f"targets: no labels of task {name!r}; labels that are not known are -100 or NaN")
        target = targets[name]
        extra = target.ndim - (weight.ndim - 1)  # 1 for multi-label targets
        repeated = target.unsqueeze(-2 - extra)
        repeated = repeated.expand(*repeated.shape[: -2 - extra], rows, *repeated.shape[-1 - extra :])
        if validate and not torch.compiler.is_compiling():
            decoder.check_target(target)
        each = decoder.loss(outputs[name], repeated) * weight  # (..., K+1, B)
        if normalise == "constant":
            total = total + each.sum((-2, -1)) / batch
        else:
            counted = weight & decoder.labelled(repeated)
            total = total + (each.sum(-1) / counted.sum(-1).clamp_min(1)).sum(-1)
    loss = error_weight * total / (len(decoders) * rows)
    if state_change_weight and rows > 1:
        if states is None:
            raise ValueError("states=None: state_change_weight needs the states")
        moved = states.diff(dim=-3).square().mean(-1)  # (..., K, B), 0 where skipped
        count = present.sum(-1).clamp_min(1) if normalise == "present" else batch
        loss = loss + 0.01 * state_change_weight * (moved.sum(-1) / count).sum(-1) / (rows - 1)
    return loss


def with_first_row(present: Tensor) -> Tensor:
    """(..., K, B) -> (..., K+1, B): the initial state counts for every sample."""
    return torch.cat([torch.ones_like(present[..., :1, :]), present], -2) if present.shape[-2] else _only_first(present)


def _only_first(present: Tensor) -> Tensor:
    return present.new_ones(*present.shape[:-2], 1, present.shape[-1])
