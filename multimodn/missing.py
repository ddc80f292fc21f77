"""How training treats missing modalities, so that their absence says nothing about the label.

Skipping a modality leaves a trace in the state. When a label decides what is missing (MNAR), training reads that trace
as the label; when the pattern differs at inference, predictions are wrong with confidence. A `Rule` says what training
does about it:

    sample    nothing: each sample skips what it lacks.
    batch     a whole batch skips what one of its samples lacks (the official code), in training and inference.
    robust    each sample skips what it lacks, and training hides a modality from further samples until the share that
              has it is the same for every label (`equalising`). Inference is as in `sample`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import check
from multimodn.decoders import MISSING
from multimodn.network import MISSING_RULES

SHRINKAGE = 5.0  # rows' worth of the overall share that a stratum's share is drawn towards
MIN_STRATUM = 20  # rows; labels rarer than this share one stratum
BINS = 4  # quantile bins of a real-valued target


@dataclass(frozen=True)
class Rule:
    """What training and inference do where modalities are missing."""

    train: str = "sample"
    """Who skips in training: `sample` or `batch`."""
    infer: str = "sample"
    """Who skips at inference: `sample` or `batch`."""
    equalise: bool = False
    """Hide each modality from further training samples until all labels have it equally often."""
    dropout: float = 0.0
    """Probability that training hides a modality from a sample that has it."""
    shuffle: bool = False
    """Training draws the encoders' order anew for every batch."""
    leak_weight: float = 0.0
    """Weight of the squared covariance between what is present and the last state (`leak`)."""

    def __post_init__(self) -> None:
        for key in ("train", "infer"):
            value = getattr(self, key)
            check(f"missing.{key}", value, value in MISSING_RULES, f"one of {', '.join(MISSING_RULES)}")
        check("missing.dropout", self.dropout, 0 <= self.dropout < 1, "in [0, 1)")
        check("missing.leak_weight", self.leak_weight, self.leak_weight >= 0, ">= 0")


RULES = {"sample": Rule(), "batch": Rule("batch", "batch"), "robust": Rule(equalise=True)}
"""By name, as `fit(missing=…)` takes them."""


def rule(name: str | Rule) -> Rule:
    """A rule by its name; a rule itself is given back (ValueError for an unknown name)."""
    if isinstance(name, Rule):
        return name
    check("missing", name, name in RULES, f"one of {', '.join(RULES)}, or a Rule")
    return RULES[name]


def equalising(masks: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Probabilities of keeping each modality such that its presence tells nothing about the labels.

    With m(y) the share of training rows of label y that have a modality, a row that has it keeps it with probability
    min m / m(y); then every label has it with probability min m. With several tasks y is the joint label. Where
    nothing is missing, or what is missing has nothing to do with the labels, (almost) everything is kept.

    Args:
        masks: modality -> (n,) bool, True where present, of the training rows.
        targets: task -> (n,) int64 classes (-100 missing) or (n,) float (NaN missing, cut into quartiles).

    Returns: modality -> (n,) float32 in [0, 1]; draw uniform numbers below it, anew in every epoch.
    """
    strata = _strata(targets)
    count = torch.bincount(strata).float()
    kept = {}
    for name, mask in masks.items():
        overall = mask.float().mean()
        share = (torch.bincount(strata[mask], minlength=len(count)) + SHRINKAGE * overall) / (count + SHRINKAGE)
        kept[name] = (share.min() / share.clamp_min(1e-12))[strata]
    return kept


def _strata(targets: Mapping[str, Tensor]) -> Tensor:
    """Number of the joint label of every row, (n,) int64 in 0 … k-1; rare ones share a number."""
    codes = []
    for values in targets.values():
        if values.is_floating_point():
            known = values[~values.isnan()]
            edges = known.quantile(torch.linspace(0, 1, BINS + 1)[1:-1].to(known)) if known.numel() else known
            levels = known.unique()
            if len(levels) > 1:  # the largest value may fill several bins; an edge at it would part it from nothing
                edges = edges.clamp_max(levels[-2])
            codes.append(torch.where(values.isnan(), MISSING, torch.bucketize(values, edges)))
        else:
            codes.append(values)
    columns = torch.cat([code.reshape(len(code), -1).long() for code in codes], 1)  # a task may have several labels
    joint = columns.unique(dim=0, return_inverse=True)[1]
    count = torch.bincount(joint)
    rare = count < MIN_STRATUM
    joint = torch.where(rare[joint], len(count), joint)
    return joint.unique(return_inverse=True)[1]


def leak(states: Tensor, present: Tensor) -> Tensor:
    """Squared covariance between the presence of each step and the last state, summed over steps and state: (...).

    Args:
        states: (..., K+1, B, S).
        present: (..., K, B) bool.
    """
    last = states[..., -1, :, :]
    here = present.to(last.dtype)
    centred = here - here.mean(-1, keepdim=True)  # (..., K, B)
    return (centred @ last / here.shape[-1]).square().sum((-2, -1))
