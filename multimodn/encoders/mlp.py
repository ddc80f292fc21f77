"""Perceptron encoders for tables: where the state joins the features decides which of the two official forms it is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from common.config import check

JOINS = ("input", "output", "none")


class MLPEncoder(nn.Module):
    """State and features -> next state, by a perceptron (Linear layers, ReLU).

    Args:
        features: F, columns of the modality.
        state_size: S.
        hidden: widths of the hidden layers.
        dropout: probability at the input.
        joins: where the state enters. `input` (the paper's MIMIC encoder): dropout of [x, s], then Linear and ReLU in
            every layer, the last included, so that new states are >= 0. `output` (its generic encoder): hidden layers
            see x alone, the last layer is linear on [h, s]. `none`: as `input`, without the state, for P-Fusion.

    Shapes: state (..., B, S), x (..., B, F) -> (..., B, S).

    Raises:
        ValueError: a size is not positive, or x has another width.
    """

    stackable = True

    def __init__(
        self,
        features: int,
        state_size: int,
        hidden: Sequence[int] = (32, 32),
        dropout: float = 0.0,
        joins: str = "input",
    ) -> None:
        super().__init__()
        check("features", features, features >= 1, ">= 1")
        check("state_size", state_size, state_size >= 1, ">= 1")
        check("hidden", list(hidden), all(width >= 1 for width in hidden), "a list of integers >= 1")
        check("joins", joins, joins in JOINS, f"one of {', '.join(JOINS)}")
        self.features, self.state_size, self.hidden, self.joins = features, state_size, tuple(hidden), joins
        first = features + (state_size if joins == "input" else 0)
        widths = [first, *hidden]
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.last = nn.Linear(widths[-1] + (state_size if joins == "output" else 0), state_size)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            "features": self.features,
            "state_size": self.state_size,
            "hidden": list(self.hidden),
            "dropout": self.dropout.p,
            "joins": self.joins,
        }

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """Next state."""
        if x.shape[-1] != self.features:
            raise ValueError(f"x.shape={tuple(x.shape)}: must be (..., B, {self.features})")
        h = self.dropout(torch.cat([x, state], -1) if self.joins == "input" else x)
        for layer in self.layers:
            h = layer(h).relu()
        if self.joins == "output":
            return self.last(torch.cat([h, state], -1))
        return self.last(h).relu()


class RawEncoder(nn.Module):
    """The modality itself, as P-Fusion's released form concatenates it: (..., B, F) -> (..., B, F), no parameters."""

    stackable = True

    def __init__(self, features: int) -> None:
        super().__init__()
        check("features", features, features >= 1, ">= 1")
        self.features = self.state_size = features

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"features": self.features}

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """Give x."""
        if x.shape[-1] != self.features:
            raise ValueError(f"x.shape={tuple(x.shape)}: must be (..., B, {self.features})")
        return x
