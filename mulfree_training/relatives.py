"""Baselines beside the method: weights rounded to powers of two, AdderNet's layers, and a change of one rounding unit.

None of them is the paper's; they say what else could replace multiplications, and how much of a difference is chaos.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

BLOCK = 32
"""Rows of a chunk in the gradient of `AdderLinear`, which compares every input with every weight."""


class PowerOfTwo(nn.Module):
    """Rounds a weight to a power of two in the forward pass, the nearest by logarithm; the gradient goes through.

    DeepShift (Elhoushi et al. 2019).
    """

    def forward(self, weight: Tensor) -> Tensor:
        """Any shape; 0 stays 0."""
        with torch.no_grad():
            rounded = weight.sign() * torch.exp2(weight.abs().log2().round())
            rounded = torch.where(weight == 0, weight, rounded)
        return weight + (rounded - weight).detach()


class _Adder(torch.autograd.Function):
    """y = -sum |x - w|; AdderNet's gradients: x - w for the weight, clipped w - x for the input (Chen et al. 2020)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return -torch.cdist(x, weight, p=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        g_weight = grad.mT @ x - grad.sum(0)[:, None] * weight
        g_x = torch.empty_like(x)
        for own, rows, part in zip(g_x.split(BLOCK), x.split(BLOCK), grad.split(BLOCK), strict=True):
            difference = (weight - rows[:, None]).clamp_(-1, 1)  # (rows, outputs, inputs)
            own.copy_((part[:, None] @ difference)[:, 0])
        return g_x, g_weight


class AdderLinear(nn.Module):
    """Compares by L1 distance instead of multiplying, with a batch norm behind, as AdderNet's layers have one.

    Takes over a linear layer's weights, scaled to variance 1 as AdderNet draws them: distances to weights much smaller
    than the inputs hardly see more of an input than its sign.

    Args:
        layer: whose weights (P, K) are taken; its bias is that of the batch norm now, 0.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        with torch.no_grad():
            self.weight.div_(self.weight.std())
        self.norm = nn.BatchNorm1d(layer.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) -> (…, P); in training the norm is over all rows of the batch, at least two."""
        return self.norm(_Adder.apply(x.flatten(0, -2), self.weight)).unflatten(0, x.shape[:-1])


def use_powers_of_two(model: nn.Module) -> None:
    """Parametrise the weights of all linear, convolutional and attention layers in place."""
    for part in list(model.modules()):
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            parametrize.register_parametrization(part, "weight", PowerOfTwo())
        if isinstance(part, nn.MultiheadAttention):
            parametrize.register_parametrization(part, "in_proj_weight", PowerOfTwo())


def use_adders(model: nn.Module) -> None:
    """Replace the two layers of every hidden layer (`hidden` and `out` of a block) by `AdderLinear`, in place.

    Raises:
        ValueError: there is none.
    """
    found = [
        (part, name, layer)
        for part in model.modules()
        for name in ("hidden", "out")
        if isinstance(layer := getattr(part, name, None), nn.Linear)
    ]
    if not found:
        raise ValueError("arithmetic.kind=adder: must have a network with hidden layers, a transformer")
    for part, name, layer in found:
        setattr(part, name, AdderLinear(layer))


@torch.no_grad()
def perturb(model: nn.Module) -> None:
    """Move every parameter to the next larger float, in place: the smallest change that rounding could make."""
    for parameter in model.parameters():
        parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, float("inf"))))
