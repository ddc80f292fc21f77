"""Small parameters and steps on fixed random gradients, for the tests of the rotational optimizers."""

import torch
from torch import nn

from rotational_optimizers.adamw import RotationalAdamW
from rotational_optimizers.lion import RotationalLion
from rotational_optimizers.sgd import RotationalSGD

CLASSES = [RotationalAdamW, RotationalSGD, RotationalLion]
FORMS = [{"foreach": False}, {"foreach": True}, {"fused": True}, {"capturable": True}]
SHAPES = ((6, 20), (5, 2, 3), (4, 70), (6,))


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(shapes=SHAPES, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(tensor(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]


def walk(optimizer, params, steps: int, first: int = 1, scale: float = 1.0) -> None:
    """Steps on fixed random gradients; step number t always sees the same ones."""
    for t in range(first, first + steps):
        for i, param in enumerate(params):
            param.grad = scale * tensor(*param.shape, seed=1000 * t + i, dtype=param.dtype)
        optimizer.step()


def options(cls) -> dict:
    return {"lr": 1e-2, "weight_decay": 0.1} | ({"momentum": 0.9} if cls is RotationalSGD else {})
