"""A transformer encoder over real sequences (batch, time, features)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.config import check
from multimodn.encoders.recurrent import check_state, real_steps


class TransformerEncoder(nn.Module):
    """State and a sequence -> next state: the state is the first token, attention mixes it with the steps.

    Pre-norm transformer layers over [W s, steps] with learned positions; the last layer is linear on [first token, s],
    without activation. Steps from the first NaN on are padding, as in `GRUEncoder`.

    Args:
        features: F, numbers of a step.
        state_size: S.
        width: of the tokens.
        heads: attention heads; divides `width`.
        layers: transformer layers.
        feedforward: width inside the layers; None: twice `width`.
        dropout: probability inside the layers.
        max_length: longest sequence.

    Shapes: state (B, S), x (B, T, F), T <= max_length -> (B, S).

    Raises:
        ValueError: an argument out of range, or state or x of another shape.
    """

    def __init__(
        self,
        features: int,
        state_size: int,
        width: int = 32,
        heads: int = 4,
        layers: int = 1,
        feedforward: int | None = None,
        dropout: float = 0.0,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        for name, value in (("features", features), ("state_size", state_size), ("layers", layers), ("heads", heads)):
            check(name, value, value >= 1, ">= 1")
        check("max_length", max_length, max_length >= 1, ">= 1")
        inner = 2 * width if feedforward is None else feedforward
        check("feedforward", inner, inner >= 1, ">= 1")
        check("width", width, width >= 1 and width % heads == 0, f"a multiple of heads={heads}")
        self.features, self.state_size, self.max_length = features, state_size, max_length
        self.arguments = {
            "width": width,
            "heads": heads,
            "layers": layers,
            "feedforward": inner,
            "dropout": dropout,
        }
        self.steps = nn.Linear(features, width)
        self.start = nn.Linear(state_size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(max_length, width))
        layer = nn.TransformerEncoderLayer(width, heads, inner, dropout, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.last = nn.Linear(width + state_size, state_size)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        sizes = {"features": self.features, "state_size": self.state_size, "max_length": self.max_length}
        return sizes | self.arguments

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """Next state."""
        real = real_steps(x, self.features)
        check_state(state, x, self.state_size)
        check("x.shape", tuple(x.shape), x.shape[1] <= self.max_length, f"at most max_length={self.max_length} steps")
        steps = x.masked_fill(~real.unsqueeze(-1), 0.0)
        tokens = self.steps(steps) + self.positions[: x.shape[1]]  # (B, T, width)
        tokens = torch.cat([self.start(state).unsqueeze(1), tokens], 1)
        padding = torch.cat([torch.zeros_like(real[:, :1]), ~real], 1)
        mixed = self.body(tokens, src_key_padding_mask=padding)
        return self.last(torch.cat([mixed[:, 0], state], -1))
