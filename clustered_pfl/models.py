"""The clients' networks, each small enough that hundreds of them are trained side by side by `torch.func`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)
VGG8 = (16, 0, 32, 0, 64, 0, 128, 0, 512, 0)
"""Channels of 3x3 convolutions; 0 is 2x2 max pooling."""
HEAD = 512


def mlp(shape: Sequence[int], classes: int, hidden: Sequence[int]) -> nn.Sequential:
    """Perceptron with ReLU on flattened images (C, H, W); (B, C, H, W) -> logits (B, classes)."""
    widths = [math.prod(shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for width, out in itertools.pairwise(widths):
        layers += [nn.Linear(width, out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], classes))


def vgg(plan: Sequence[int], shape: Sequence[int], classes: int, dropout: float = 0.0) -> nn.Sequential:
    """VGG without normalisation (Simonyan and Zisserman 2015), head of two hidden layers of 512.

    Convolutions start at N(0, 2 / (9 * channels out)) with zero bias. Images need H and W divisible by 2**poolings.
    """
    layers: list[nn.Module] = []
    channels, (height, width) = shape[0], shape[1:]
    for out in plan:
        if out == 0:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
            continue
        conv = nn.Conv2d(channels, out, 3, padding=1)
        nn.init.normal_(conv.weight, 0.0, math.sqrt(2 / (9 * out)))
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        layers += [conv, nn.ReLU()]
        channels = out
    layers.append(nn.Flatten())
    features = channels * height * width
    for _ in range(2):
        layers += [*([nn.Dropout(dropout)] if dropout else []), nn.Linear(features, HEAD), nn.ReLU()]
        features = HEAD
    return nn.Sequential(*layers, nn.Linear(features, classes))


def build(
    name: str, shape: Sequence[int], classes: int, *, hidden: Sequence[int] = (32,), dropout: float = 0.0, seed: int = 0
) -> nn.Sequential:
    """A network of the registry `mlp`, `vgg16`, `vgg8`, its weights drawn from `seed`; global random state is kept.

    Args:
        name: which one.
        shape: (C, H, W) of the images.
        classes: outputs.
        hidden: widths of the hidden layers (mlp).
        dropout: probability before the hidden layers of the head (vgg).
        seed: of the initial weights.

    Raises:
        ValueError: unknown name.
    """
    if name not in ("mlp", "vgg16", "vgg8"):
        raise ValueError(f"name={name!r}: must be one of mlp, vgg16, vgg8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mlp":
            return mlp(shape, classes, hidden)
        return vgg(VGG16 if name == "vgg16" else VGG8, shape, classes, dropout)


def count_parameters(network: nn.Module) -> int:
    """Number of entries of all parameters."""
    return sum(p.numel() for p in network.parameters())


def neg_prob(logits: Tensor, target: Tensor) -> Tensor:
    """Mean of minus the probability of the label: what a softmax output under torch's NLL loss minimises."""
    return -logits.softmax(-1).gather(-1, target[:, None]).mean()
