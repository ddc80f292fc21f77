"""A small convolutional encoder for images (batch, channels, height, width)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.config import check
from multimodn.encoders.recurrent import check_state


class ConvEncoder(nn.Module):
    """State and an image -> next state: 3×3 convolutions, GroupNorm, ReLU; mean over positions; linear on [h, s].

    GroupNorm and not BatchNorm, because rows of a batch must not mix.

    Args:
        channels: of the image.
        state_size: S.
        widths: channels of the convolutions; all but the first halve the image.

    Shapes: state (B, S), x (B, C, H, W) -> (B, S).

    Raises:
        ValueError: an argument out of range, or state or x of another shape.
    """

    def __init__(self, channels: int, state_size: int, widths: Sequence[int] = (16, 32)) -> None:
        super().__init__()
        check("channels", channels, channels >= 1, ">= 1")
        check("state_size", state_size, state_size >= 1, ">= 1")
        good = len(widths) > 0 and all(width >= 4 and width % 4 == 0 for width in widths)
        check("widths", list(widths), good, "multiples of 4")
        self.channels, self.state_size, self.widths = channels, state_size, tuple(widths)
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip((channels, *widths), widths, strict=False)):
            layers += [nn.Conv2d(a, b, 3, stride=2 if i else 1, padding=1), nn.GroupNorm(4, b), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.last = nn.Linear(widths[-1] + state_size, state_size)

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments."""
        return {"channels": self.channels, "state_size": self.state_size, "widths": list(self.widths)}

    def forward(self, state: Tensor, x: Tensor) -> Tensor:
        """Next state."""
        fits = x.ndim == 4 and x.shape[1] == self.channels
        check("x.shape", tuple(x.shape), fits, f"(B, {self.channels}, H, W)")
        check_state(state, x, self.state_size)
        h = self.body(x).mean((-2, -1))
        return self.last(torch.cat([h, state], -1))
