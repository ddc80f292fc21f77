"""Recurrent encoders over real sequences (batch, time, features), of different lengths if need be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.config import check

CELLS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


class GRUEncoder(nn.Module):
    """State and a sequence -> next state: a recurrent network reads the sequence, its last output h joins the state.

    The last layer is linear on [h, s], as in the official recurrent encoders, without activation. From the first
    step with a NaN on, all is padding: the last output before it counts (zeros, if there is none), so rows may have
    sequences of different lengths, padded with NaN at the end; give the mask of such a modality explicitly.

    Args:
        features: F, numbers of a step.
        state_size: S.
        hidden: width of the recurrent network.
        layers: recurrent layers.
        dropout: probability at the input.
        cell: `gru`, `lstm` or `rnn`.

    Shapes: state (B, S), x (B, T, F) -> (B, S).

    Raises:
        ValueError: an argument out of range, or state or x of another shape.
    """

    def __init__(
        self,
        features: int,
        state_size: int,
        hidden: int = 32,
        layers: int = 1,
        dropout: float = 0.0,
        cell: str = "gru",
    ) -> None:
        super().__init__()
        for name, value in (("features", features), ("state_size", state_size), ("hidden", hidden), ("layers", layers)):
            check(name, value, value >= 1, ">= 1")
        check("cell", cell, cell in CELLS, f"one of {', '.join(CELLS)}")
        self.features, self.state_size, self.cell = features, state_size, cell
        self.dropout = nn.Dropout(dropout)
        self.recurrent = CELLS[cell](features, hidden, layers, batch_first=True)
        self.last = nn.Linear(hidden + state_size, state_size)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {
            "features": self.features,
            "state_size": self.state_size,
            "hidden": self.recurrent.hidden_size,
            "layers": self.recurrent.num_layers,
            "dropout": self.dropout.p,
            "cell": self.cell,
        }

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """Next state."""
        real = real_steps(x, self.features)
        check_state(state, x, self.state_size)
        steps = x.masked_fill(~real.unsqueeze(-1), 0.0)  # numbers beside a NaN are padding too
        outputs, _ = self.recurrent(self.dropout(steps))  # (B, T, hidden)
        final = (real.sum(1) - 1).clamp_min(0)
        h = outputs[torch.arange(len(x), device=x.device), final]
        h = h.masked_fill(~real[:, :1], 0.0)  # a sequence without steps
        return self.last(torch.cat([h, state], -1))


def real_steps(x: Tensor, features: int) -> Tensor:
    """Which steps of (B, T, F) are not padding, (B, T) bool: those before the first NaN.

    Raises:
        ValueError: x is not (B, T, features) with T >= 1.
    """
    fits = x.ndim == 3 and x.shape[1] >= 1 and x.shape[2] == features
    check("x.shape", tuple(x.shape), fits, f"(B, T, {features}) with T >= 1")
    return (~x.isnan().any(-1)).cumprod(1).bool()


def check_state(state: Tensor, x: Tensor, state_size: int) -> None:
    """Check the shape of a state.

    Raises:
        ValueError: it is not (B, state_size), B being the rows of x.
    """
    fits = state.ndim == 2 and state.shape[:1] == x.shape[:1] and state.shape[1] == state_size
    check("state.shape", tuple(state.shape), fits, f"(B, {state_size}), with as many rows as x")
