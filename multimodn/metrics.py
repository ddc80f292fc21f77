"""Metrics of many models at once: every function takes leading axes (models, rows of the grid), samples come last."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from multimodn.decoders import MISSING


def auroc(scores: Tensor, labels: Tensor) -> Tensor:
    """Area under the ROC curve, ties counted as one half: (..., B), (..., B) -> (...) float64.

    Args:
        scores: larger means class 1.
        labels: 0, 1, or -100 for samples that do not count.

    Returns: NaN, with a warning, where a class is absent; NaN where a score that counts is NaN.
    """
    labels = labels.expand(scores.shape)
    positive, known = labels == 1, labels != MISSING
    # unknown samples sort behind all others, where they change no rank
    values = torch.where(known, scores.double(), torch.inf)
    ordered = values.sort(-1).values.contiguous()
    below = torch.searchsorted(ordered, values.contiguous())
    # scores of +inf tie with each other, not with the unknown samples behind them
    upto = torch.searchsorted(ordered, values.contiguous(), right=True).minimum(known.sum(-1, keepdim=True))
    ranks = (below + upto + 1).double() / 2  # average ranks from 1 (Mann and Whitney 1947)
    n_pos, n_neg = positive.sum(-1).double(), (known & ~positive).sum(-1).double()
    u = (ranks * positive).sum(-1) - n_pos * (n_pos + 1) / 2
    broken = (known & scores.isnan()).any(-1)  # a diverged model has no rank
    return torch.where(broken, torch.nan, _defined(u, n_pos * n_neg, "AUROC"))


def auroc_ovr(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Mean over classes of the AUROC of each class against the others: (..., B, C), (..., B) -> (...)."""
    labels = labels.expand(probabilities.shape[:-1])
    one = [
        auroc(probabilities[..., c], torch.where(labels == MISSING, MISSING, (labels == c).long()))
        for c in range(probabilities.shape[-1])
    ]
    return torch.stack(one, -1).mean(-1)


def confusion(probability: Tensor, labels: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """True positives, false positives, true negatives and false negatives, (...) float64 each.

    Args:
        probability: of class 1, (..., B); above `threshold` the prediction is 1.
        labels: 0, 1, or -100 for samples that do not count.
    """
    labels = labels.expand(probability.shape)
    said = probability > threshold
    yes, no = labels == 1, labels == 0
    counts = (said & yes, said & no, ~said & no, ~said & yes)
    tp, fp, tn, fn = (count.sum(-1).double() for count in counts)
    return tp, fp, tn, fn


def sensitivity(probability: Tensor, labels: Tensor) -> Tensor:
    """Share of class 1 that is found, (...)."""
    tp, _, _, fn = confusion(probability, labels)
    return _defined(tp, tp + fn, "sensitivity")


def specificity(probability: Tensor, labels: Tensor) -> Tensor:
    """Share of class 0 that is found, (...)."""
    _, fp, tn, _ = confusion(probability, labels)
    return _defined(tn, tn + fp, "specificity")


def balanced_accuracy(probability: Tensor, labels: Tensor) -> Tensor:
    """Mean of sensitivity and specificity, (...)."""
    return (sensitivity(probability, labels) + specificity(probability, labels)) / 2


def accuracy(probability: Tensor, labels: Tensor) -> Tensor:
    """Share of right predictions among the samples that have a label, (...)."""
    tp, fp, tn, fn = confusion(probability, labels)
    return _defined(tp + tn, tp + fp + tn + fn, "accuracy")


def f1(probability: Tensor, labels: Tensor) -> Tensor:
    """Harmonic mean of precision and sensitivity of class 1, (...); NaN when class 1 is neither there nor predicted."""
    tp, fp, _, fn = confusion(probability, labels)
    return _defined(2 * tp, 2 * tp + fp + fn, "F1")


def log_loss(probability: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy (nats) over the samples that have a label, (..., B), (..., B) -> (...).

    Probabilities of class 1 are kept one float64 epsilon away from 0 and 1, so that a sure mistake stays finite.
    """
    labels = labels.expand(probability.shape)
    eps = torch.finfo(torch.float64).eps
    p = probability.double().clamp(eps, 1 - eps)
    each = torch.where(labels == 1, -p.log(), -(-p).log1p())
    known = labels != MISSING
    return _defined(torch.where(known, each, 0.0).sum(-1), known.sum(-1).double(), "log loss")


def rmse(predictions: Tensor, targets: Tensor) -> Tensor:
    """Root of the mean squared error, in the target's unit, (..., B), (..., B) -> (...); NaN targets do not count."""
    targets = targets.double().expand(predictions.shape)
    known = ~targets.isnan()
    squares = torch.where(known, (predictions.double() - targets).square(), 0.0).sum(-1)
    return _defined(squares, known.sum(-1).double(), "RMSE").sqrt()


def r2(predictions: Tensor, targets: Tensor) -> Tensor:
    """Coefficient of determination, (..., B), (..., B) -> (...); samples with a NaN target do not count."""
    targets = targets.double().expand(predictions.shape)
    known = ~targets.isnan()
    y = targets.nan_to_num()
    mean = (y * known).sum(-1, keepdim=True) / known.sum(-1, keepdim=True)
    residual = ((predictions.double() - y).square() * known).sum(-1)
    return 1 - _defined(residual, ((y - mean).square() * known).sum(-1), "R²")


def _defined(above: Tensor, below: Tensor, name: str) -> Tensor:
    if (below == 0).any():
        warnings.warn(f"{name} is not defined without samples of both kinds: NaN", stacklevel=3)
    return torch.where(below == 0, torch.nan, above / below)
