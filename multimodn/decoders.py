"""Decoders: one a task, read every state of the chain; each knows its loss, its probabilities and missing labels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import check

MISSING = -100
"""Class of a label that is not known."""
LINKS = ("softmax", "sigmoid")


class Decoder(nn.Module):
    """Perceptron from the state to a task's outputs: Linear and ReLU for every hidden layer, then Linear.

    Args:
        state_size: S.
        outputs: C.
        hidden: widths of the hidden layers; none gives a linear decoder.

    Shapes: state (..., S) -> outputs (..., C).
    """

    stackable = True

    def __init__(self, state_size: int, outputs: int, hidden: Sequence[int] = (32, 32)) -> None:
        super().__init__()
        check("state_size", state_size, state_size >= 1, ">= 1")
        check("hidden", list(hidden), all(width >= 1 for width in hidden), "a list of integers >= 1")
        self.state_size, self.outputs, self.hidden = state_size, outputs, tuple(hidden)
        widths = [state_size, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.last = nn.Linear(widths[-1], outputs)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"state_size": self.state_size, "hidden": list(self.hidden)}

    def forward(self, state: Tensor) -> Tensor:
        """Outputs of every state."""
        for layer in self.layers:
            state = layer(state).relu()
        return self.last(state)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Loss of every sample, 0 where the label is missing."""
        raise NotImplementedError

    def labelled(self, target: Tensor) -> Tensor:
        """Whether a sample has a label, bool of the samples' shape."""
        raise NotImplementedError

    def probabilities(self, outputs: Tensor) -> Tensor:
        """What the outputs say: probabilities of the classes, or the predicted value."""
        raise NotImplementedError

    def check_target(self, target: Tensor) -> None:
        """Refuse labels that the task does not have (ValueError)."""
        raise NotImplementedError


class ClassDecoder(Decoder):
    """One of C classes; targets (...) int64 in [0, C), `MISSING` = -100 where not known.

    Args:
        state_size: S.
        classes: C >= 2.
        hidden: widths of the hidden layers.
        link: `softmax`: cross-entropy of the outputs as logits. `sigmoid`: as the official code has it, cross-entropy
            of sigmoid(outputs) *as if they were logits* (binary: a loss in [ln(1 + 1/e), ln(1 + e)]), probabilities
            sigmoid(outputs) / sum.
    """

    def __init__(
        self, state_size: int, classes: int = 2, hidden: Sequence[int] = (32, 32), link: str = "softmax"
    ) -> None:
        check("classes", classes, classes >= 2, ">= 2")
        check("link", link, link in LINKS, f"one of {', '.join(LINKS)}")
        super().__init__(state_size, classes, hidden)
        self.classes, self.link = classes, link

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return super().config | {"classes": self.classes, "link": self.link}

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (nats): outputs (..., C), target (...) -> (...), 0 where the label is missing."""
        logits = outputs.sigmoid() if self.link == "sigmoid" else outputs
        flat = F.cross_entropy(
            logits.reshape(-1, self.classes), target.reshape(-1), reduction="none", ignore_index=MISSING
        )
        return flat.view(target.shape)

    def labelled(self, target: Tensor) -> Tensor:
        """(...) bool."""
        return target != MISSING

    def probabilities(self, outputs: Tensor) -> Tensor:
        """(..., C), each row sums to 1."""
        if self.link == "sigmoid":
            squashed = outputs.sigmoid()
            return squashed / squashed.sum(-1, keepdim=True)
        return outputs.softmax(-1)

    def check_target(self, target: Tensor) -> None:
        """Refuse classes outside [0, C) other than -100."""
        wrong = target[((target < 0) & (target != MISSING)) | (target >= self.classes)]
        if wrong.numel():
            raise ValueError(f"target={wrong[0].item()}: must be in [0, {self.classes - 1}], or {MISSING} for missing")


class MultiLabelDecoder(Decoder):
    """L yes-no labels at once; targets (..., L) float of 0 and 1, NaN where not known.

    Args:
        state_size: S.
        labels: L >= 1.
        hidden: widths of the hidden layers.
    """

    def __init__(self, state_size: int, labels: int, hidden: Sequence[int] = (32, 32)) -> None:
        check("labels", labels, labels >= 1, ">= 1")
        super().__init__(state_size, labels, hidden)
        self.labels = labels

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return super().config | {"labels": self.labels}

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Binary cross-entropy (nats), mean over the known labels of a sample: (..., L), (..., L) -> (...)."""
        known = ~target.isnan()
        each = F.binary_cross_entropy_with_logits(outputs, target.nan_to_num().to(outputs.dtype), reduction="none")
        return (each * known).sum(-1) / known.sum(-1).clamp_min(1)

    def labelled(self, target: Tensor) -> Tensor:
        """(...) bool: at least one label is known."""
        return (~target.isnan()).any(-1)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """(..., L), of each label."""
        return outputs.sigmoid()

    def check_target(self, target: Tensor) -> None:
        """Refuse numbers other than 0, 1 and NaN, and another width."""
        if target.shape[-1] != self.labels:
            raise ValueError(f"target.shape={tuple(target.shape)}: must be (..., B, {self.labels})")
        wrong = target[~(target.isnan() | (target == 0) | (target == 1))]
        if wrong.numel():
            raise ValueError(f"target={wrong[0].item()}: must be 0, 1, or NaN for missing")


class RegressionDecoder(Decoder):
    """A real number; targets (...) float, NaN where not known, best standardised.

    Args:
        state_size: S.
        hidden: widths of the hidden layers.
    """

    def __init__(self, state_size: int, hidden: Sequence[int] = (32, 32)) -> None:
        super().__init__(state_size, 1, hidden)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Squared error: outputs (..., 1), target (...) -> (...), 0 where the label is missing."""
        error = outputs[..., 0] - target.nan_to_num().to(outputs.dtype)
        return torch.where(target.isnan(), 0.0, error.square())

    def labelled(self, target: Tensor) -> Tensor:
        """(...) bool."""
        return ~target.isnan()

    def probabilities(self, outputs: Tensor) -> Tensor:
        """(..., 1): the prediction itself."""
        return outputs

    def check_target(self, target: Tensor) -> None:
        """Refuse infinite numbers."""
        if target.isinf().any():
            raise ValueError("target=inf: must be finite, or NaN for missing")
