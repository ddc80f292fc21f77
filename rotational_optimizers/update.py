"""The rotational update: every row of a weight turns by a set angle and keeps its norm.

Kosson, Messmer, Jaggi, "Rotational Equilibrium" (ICML 2024, arXiv 2305.17212), section 4. A row is the weight vector
x ∈ R^n of one neuron, N its norm at the start, d the direction of a base optimizer without learning rate and without
weight decay, f the decay of a running mean, η_r the rotation in radians per step:

    d ← d − mean(d)                               rows are centred
    d ← d − x·⟨d, x⟩/⟨x, x⟩                       drop the radial part
    u ← f·u + (1 − f)·‖d‖²,   a = √(u/(1 − f^t))  RMS size of the update, bias-corrected
    x ← x − η_r·N·d/a,        x ← x·N/‖x‖

so that the angle really turned is atan(η_r·‖d‖/a). A step costs O(numel). This file is the plain form that the faster
ones in `kernels/` are tested against; it takes any layout, device and floating dtype, and runs under `torch.compile`.
"""

import torch
from torch import Tensor

# what the projections leave of a direction counts as rounding noise, not as an update, below this many roundings of it
NOISE = 16
# a row counts as centred if its mean is below this many roundings of its root mean square
CENTRED = 4


def row_dims(ndim: int, neuron_dim: int = 0, per_neuron: bool = True) -> tuple[int, ...]:
    """The dimensions that make up a row: all but `neuron_dim`, or all with `per_neuron=False`."""
    return tuple(dim for dim in range(ndim) if not per_neuron or dim != neuron_dim % ndim)


def row_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of all arithmetic on rows: float32, or float64 for float64 weights."""
    return torch.promote_types(weight.dtype, torch.float32)


@torch.no_grad()
def prepare_rows_(weight: Tensor, *, zero_mean: bool = True, neuron_dim: int = 0, per_neuron: bool = True) -> Tensor:
    """Centre every row in place, x ← (x − mean x)·‖x‖/‖x − mean x‖, and measure the norms N.

    Rows that are centred to rounding stay as they are, bit by bit: preparing twice is preparing once. So do rows that
    cannot rotate: zero rows and, with `zero_mean`, rows that are constant.

    Args:
        weight: (…, K, …), floating point.
        zero_mean: centre; otherwise only measure.
        neuron_dim: axis of the K neurons.
        per_neuron: False takes the whole tensor as one row.

    Returns:
        Norms (K,), or (1,) with `per_neuron=False`, float32 (float64 for float64 weights); 0 where a row cannot rotate.

    Source: paper, section 4; the paper's code centres at construction of the optimizer.
    """
    dims = row_dims(weight.ndim, neuron_dim, per_neuron)
    x = weight.double()
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    if zero_mean:
        rounding = torch.finfo(weight.dtype).eps
        mean = x.mean(dims, keepdim=True)
        centred = x - mean
        # what is left of a mean far larger than the spread goes in a second pass
        centred -= centred.mean(dims, keepdim=True)
        spread = torch.linalg.vector_norm(centred, dim=dims, keepdim=True)
        flat = spread <= CENTRED * rounding * norm
        rms = norm * (norm.numel() / weight.numel()) ** 0.5
        stays = flat | (mean.abs() <= CENTRED * rounding * rms)
        if not bool(stays.all()):
            weight.copy_(torch.where(stays, x, centred * (norm / spread)))
        norm = torch.linalg.vector_norm(weight.double(), dim=dims, keepdim=True).masked_fill(flat, 0)
    return norm.flatten().to(row_dtype(weight))


def rotational_update_(
    weight: Tensor, direction: Tensor, norm: Tensor, update_norm_sq: Tensor, step: int | Tensor, *,
    rotation: float | Tensor, update_norm_decay: float = 0.9, zero_mean: bool = True, neuron_dim: int = 0,
    per_neuron: bool = True, speed: Tensor | None = None, alive: Tensor | None = None,
    lr: float | Tensor = 0.0, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    """Turn every row of `weight` by about `rotation` away from `direction` and keep its norm, in place.

    A row stays as it is, bit by bit, if it is not `alive`, if its direction is not finite or if its rotation is 0. A
    row of norm 0 has no angle: it takes the plain step x ← (1 − lr·weight_decay)·x − lr·direction.

    Args:
        weight: (…, K, …), floating point, any layout.
        direction: same shape: what the base optimizer subtracts at lr = 1 and weight_decay = 0.
        norm: N, (K,) or (1,), dtype `row_dtype(weight)`; 0 marks rows that do not rotate.
        update_norm_sq: u, running mean of the squared update sizes, shape and dtype of `norm`; updated in place.
        step: t ≥ 1, counting this step.
        rotation: η_r ≥ 0 in radians per step.
        update_norm_decay: f in [0, 1); with 0 every row turns by exactly atan(η_r) in every step.
        zero_mean: rows have mean zero and keep it.
        neuron_dim: axis of the K neurons.
        per_neuron: False takes the whole tensor as one row.
        speed: (K,) factor on the rotation of each row.
        alive: rows that take part in this step, bool, shape of the rows with reduced dimensions kept; default all.
        lr, weight_decay: of the plain step of rows of norm 0.

    Source: paper, section 4 (algorithm of the rotational variants).
    """
    dims = row_dims(weight.ndim, neuron_dim, per_neuron)
    shape = [1 if dim in dims else size for dim, size in enumerate(weight.shape)]
    N, u = norm.view(shape), update_norm_sq.view(shape)  # (1, K, 1, …)
    x, d = weight.to(norm.dtype), direction.to(norm.dtype)  # (…, K, …)
    plain = (1 - lr * weight_decay) * x - lr * d
    raw = _dot(d, d, dims)
    if zero_mean:
        x = x - x.mean(dims, keepdim=True)  # the rounding of earlier steps
        d = d - d.mean(dims, keepdim=True)
    d = d - x * (_dot(d, x, dims) / _dot(x, x, dims))
    size_sq = _dot(d, d, dims)
    size_sq = torch.where(size_sq > (NOISE * torch.finfo(d.dtype).eps) ** 2 * raw, size_sq, 0)
    moves = torch.isfinite(raw) if alive is None else alive & torch.isfinite(raw)
    u.copy_(torch.where(moves & (N > 0), update_norm_decay * u + (1 - update_norm_decay) * size_sq, u))
    a = (u / (1 - update_norm_decay**step)).sqrt()
    turn = torch.where(a > 0, rotation / a, 0)
    if speed is not None:
        turn = turn * speed.view(shape)
    x = x - turn * N * d
    x = x * (N / _dot(x, x, dims).sqrt())
    x = torch.where(moves & (turn != 0), x, weight)
    weight.copy_(torch.where(moves & (N == 0), plain, x))


def _dot(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (a * b).sum(dims, keepdim=True)
