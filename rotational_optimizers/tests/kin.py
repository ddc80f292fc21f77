"""The kin of the rotational optimizers by name, and what drives them in tests."""

import torch
from torch import nn

from rotational_optimizers.relatives import LAMB, AdamP, Hyperball, Lion, Nero, UpdateFloor

F64 = torch.float64
ADAM = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6}
OPTIMIZERS = {
    "lion": lambda p, **k: Lion(p, **{"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1, **k}),
    "hyperball": lambda p, **k: Hyperball(p, **{**ADAM, "weight_decay": 0.1, **k}),
    "hyperball_rows": lambda p, **k: Hyperball(p, **{**ADAM, "weight_decay": 0.1, "per_neuron": True, **k}),
    "update_floor": lambda p, **k: UpdateFloor(p, **{**ADAM, "weight_decay": 0.1, **k}),
    "adamp": lambda p, **k: AdamP(p, **{**ADAM, "weight_decay": 0.1, **k}),
    "lamb": lambda p, **k: LAMB(p, **{**ADAM, "weight_decay": 0.1, **k}),
    "nero": lambda p, **k: Nero(p, **{"lr": 0.01, "beta": 0.9, **k}),
}
ADAM_KIN = ("hyperball", "hyperball_rows", "update_floor", "adamp", "lamb")


def gradients(shape, steps=6, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(shape, generator=generator, dtype=F64) for _ in range(steps)]


def start(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)


def drive(build, shape, grads, group=None):
    """The parameter after the given gradients."""
    p = nn.Parameter(start(shape))
    optimizer = build([{"params": [p], **(group or {})}])
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def adam_directions(grads, beta1=0.8, beta2=0.9, eps=1e-6):
    m = v = torch.zeros_like(grads[0])
    for t, g in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        yield m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)


def rows(x):
    return x.flatten(1)


def unit(x):
    return x / x.norm(dim=1, keepdim=True)
