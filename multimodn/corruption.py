"""Simulated missingness, after Rubin's (1976) mechanisms; a mask is True where a value stays visible.

`mcar` hides at random; `mar` depending on something that is observed; `mnar` depending on the label, as the paper's
experiment does; `mnar_values` depending on the hidden values themselves. All draws come from an explicit seed, and no
input is changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from common.config import check
from common.streams import key

ORDERS = ("random", "file")
MODALITY = 30  # random stream


def mcar(n: int, share: float, seed: int) -> Tensor:
    """Hide exactly round(share · n) of n rows, chosen at random: (n,) bool.

    Raises:
        ValueError: a share outside [0, 1].
    """
    _check_share(share)
    visible = torch.ones(n, dtype=torch.bool)
    visible[torch.randperm(n, generator=_generator(seed))[: round(share * n)]] = False
    return visible


def mcar_masks(masks: Mapping[str, Tensor], share: float, seed: int) -> dict[str, Tensor]:
    """Hide round(share · n) of the n rows of every modality, drawn for each on its own; what was missing stays missing.

    Args:
        masks: modality -> (n,) bool, True = present.

    Raises:
        ValueError: a share outside [0, 1].
    """
    return {
        name: mask & mcar(len(mask), share, key(seed, MODALITY, i)).to(mask.device)
        for i, (name, mask) in enumerate(masks.items())
    }


def mar(driver: Tensor, share: float, seed: int, *, strength: float = 2.0) -> Tensor:
    """Hide rows with a probability that rises with an observed driver: (n,) bool.

    Args:
        driver: (n,) or (n, F) of another modality, whose columns are standardised and averaged; NaN counts as mean.
        share: expected share of hidden rows.
        seed: of the draws.
        strength: log-odds of being hidden per standard deviation of the driver; negative hides low values.

    Raises:
        ValueError: a share outside [0, 1], or a driver without columns or with infinite values.
    """
    _check_share(share)
    shaped = driver.ndim >= 1 and 0 not in driver.shape[1:]
    check("driver.shape", tuple(driver.shape), shaped, "(n,) or (n, F) with F >= 1")
    check("driver", "inf", not bool(driver.isinf().any()), "finite, or NaN for missing")
    score = _score(driver)
    if share in (0.0, 1.0):
        return torch.full(score.shape, share == 0.0, device=driver.device)
    probability = torch.sigmoid(strength * score + _intercept(strength * score, share))
    draws = torch.rand(len(score), generator=_generator(seed), dtype=torch.float64)
    return draws.to(driver.device) >= probability


def mnar_values(x: Tensor, share: float, seed: int, *, strength: float = 2.0) -> Tensor:
    """Hide a modality depending on its own values, (n, F) -> (n,) bool: `mar` with the modality as its own driver."""
    return mar(x, share, seed, strength=strength)


def mnar(labels: Tensor, share: float, seed: int = 0, *, hide: int = 1, order: str = "random") -> Tensor:
    """The paper's MNAR: of the n_c rows of one class, exactly round(share · n_c) are hidden: (n,) bool.

    Args:
        labels: (n,) int64.
        share: p; Python's rounding, half to even, as in the official code.
        seed: of the draws.
        hide: the class.
        order: `random` rows of the class, or the first ones (`file`), as the official code, whose folds are shuffled.

    Raises:
        ValueError: a share outside [0, 1], or an unknown order.
    """
    _check_share(share)
    check("order", order, order in ORDERS, f"one of {', '.join(ORDERS)}")
    rows = (labels == hide).nonzero()[:, 0]
    if order == "random":
        rows = rows[torch.randperm(len(rows), generator=_generator(seed)).to(rows.device)]
    visible = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    visible[rows[: round(share * len(rows))]] = False
    return visible


def hide(modalities: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New tensors (n, ...) with NaN in all of a modality's values where its mask (n,) is False; others as they are.

    Raises:
        KeyError: a mask of an unknown modality.
    """
    for name in masks:
        if name not in modalities:
            raise KeyError(f"masks: {name!r} is not one of {', '.join(modalities)}")
    return {
        name: torch.where(masks[name].view(-1, *[1] * (x.ndim - 1)), x, torch.nan) if name in masks else x.clone()
        for name, x in modalities.items()
    }


def _check_share(share: float) -> None:
    check("share", share, 0 <= share <= 1, "in [0, 1]")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _score(driver: Tensor) -> Tensor:
    """Mean of the standardised columns, standardised, (n,) float64."""
    columns = driver.double().view(len(driver), math.prod(driver.shape[1:]))
    score = _standard(_standard(columns).mean(1, keepdim=True))
    return score[:, 0]


def _standard(columns: Tensor) -> Tensor:
    known = ~columns.isnan()
    count = known.sum(0).clamp_min(1)
    filled = columns.nan_to_num()
    centred = torch.where(known, filled - filled.sum(0) / count, 0.0)
    deviation = (centred.square().sum(0) / count).sqrt()
    return torch.where(deviation > 0, centred / deviation.clamp_min(1e-12), 0.0)


def _intercept(scores: Tensor, share: float) -> Tensor:
    """The constant that makes the mean of sigmoid(scores + constant) equal `share`, by bisection."""
    # far enough for any strength: beyond, all probabilities would be 0 or 1
    high = 60.0 + (scores.abs().max() if len(scores) else scores.sum())
    low = -high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.sigmoid(scores + middle).mean() < share else (low, middle)
    return (low + high) / 2
