"""The error law of the operations: extremes on a grid of mantissas, means over random numbers (C6, C9)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.kernels.dispatch import forced
from common.streams import generator
from common.training import setup
from mulfree_training.bits import offset
from mulfree_training.operators import ops

if TYPE_CHECKING:
    from common.trials import Trial
    from mulfree_training.config import TrialConfig

UNIFORM, LOGARITHMIC, NORMAL = 61, 62, 63  # random streams
BINS = 48
MAP = 48
"""Side of the map of errors over two mantissas."""
FINE = 2**20
"""Points of a one-dimensional grid."""
SMALL = 4096


def relative(found: Tensor, exact: Tensor) -> Tensor:
    """(found - exact) / exact of float32 results and float64 truths."""
    return found.double() / exact - 1


def extremes(name: str, error: Tensor) -> dict[str, float]:
    """`<name>_min` and `<name>_max`."""
    return {f"{name}_min": float(error.min()), f"{name}_max": float(error.max())}


def pair_errors(a: Tensor, b: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Relative errors of product and quotient of float32 numbers."""
    exact = a.double(), b.double()
    return relative(ops.mul(a, b, shift), exact[0] * exact[1]), relative(ops.div(a, b, shift), exact[0] / exact[1])


def on_grid(bits: int, shift: int) -> dict[str, float]:
    """Extremes over all mantissas of `bits` bits, and over fine grids for functions of one number."""
    mantissas = 1 + torch.arange(2**bits) / 2**bits
    found = {"mul_min": 0.0, "mul_max": -1.0, "div_min": 1.0, "div_max": -1.0}
    for part in mantissas.split(256):  # a slice of the square at a time
        a, b = torch.broadcast_tensors(part[:, None], mantissas[None])
        for name, error in zip(("mul", "div"), pair_errors(a, b, shift), strict=True):
            found[f"{name}_min"] = min(found[f"{name}_min"], float(error.min()))
            found[f"{name}_max"] = max(found[f"{name}_max"], float(error.max()))
    x = 1 + torch.arange(FINE) / FINE  # [1, 2)
    fraction, octaves = x - 1, torch.cat([x, 2 * x])  # square roots repeat every two octaves
    found |= extremes("square", relative(ops.mul(x, x, shift), x.double() ** 2))
    found |= extremes("exp2", relative(ops.exp2(fraction), torch.exp2(fraction.double())))
    log_error = ops.log2(x).double() - x.double().log2()
    found |= extremes("log2", log_error)
    found |= extremes("sqrt", relative(ops.sqrt(octaves), octaves.double().sqrt()))
    exp_mean = float(relative(ops.exp2(fraction), torch.exp2(fraction.double())).mean())
    return found | {"exp2_mean": exp_mean, "log2_mean": float(log_error.mean())}


def on_random(seed: int, count: int, shift: int) -> dict[str, float]:
    """Means over random mantissas, and how a product of two normal variables shrinks and scatters."""
    uniform = 1 + torch.rand(2, count, generator=generator(seed, UNIFORM))
    powers = torch.exp2(torch.rand(2, count, generator=generator(seed, LOGARITHMIC)))
    found: dict[str, float] = {}
    for kind, (a, b) in (("uniform", uniform), ("logarithmic", powers)):
        product, quotient = pair_errors(a, b, shift)
        found |= {f"mul_mean_{kind}": float(product.mean()), f"div_mean_{kind}": float(quotient.mean())}
        square = relative(ops.mul(a, a, shift), a.double() ** 2)
        found[f"square_mean_{kind}"] = float(square.mean())
    a, b = torch.randn(2, count, generator=generator(seed, NORMAL))
    exact, product = a.double() * b.double(), ops.mul(a, b, shift).double()
    gain = float((product * exact).sum() / (exact * exact).sum())
    residual = float((product - gain * exact).square().mean().sqrt() / exact.square().mean().sqrt())
    return found | {"gain": gain, "residual": residual}


def pictures(shift: int) -> dict[str, Any]:
    """What the figure of the error law shows: a map over two mantissas, and distributions over uniform mantissas."""
    x = 1 + (torch.arange(MAP) + 0.5) / MAP
    a, b = torch.broadcast_tensors(x[:, None], x[None])
    product, _ = pair_errors(a, b, shift)
    fine = 1 + (torch.arange(1024) + 0.5) / 1024
    left, right = torch.broadcast_tensors(fine[:, None], fine[None])
    errors = pair_errors(left, right, shift)
    found: dict[str, Any] = {"map": product.tolist()}
    for name, error in zip(("mul", "div"), errors, strict=True):
        edges = torch.linspace(float(error.min()), float(error.max()), BINS + 1, dtype=torch.float64)
        counts = torch.histogram(error.flatten(), edges, density=True)[0]
        found |= {f"{name}_edges": edges.tolist(), f"{name}_density": counts.tolist()}
    return found


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed: `<operation>_min` and `_max`, errors on the grid (relative, for log2 absolute), means over
        random numbers, `gain` and `residual` of a product of normal variables, and the figure's numbers.
    """
    setup(config.threads, config.device, seed=config.seed)
    task, shift = config.task, offset(config.arithmetic.alpha)
    count, bits = task.pairs, task.mantissa_bits
    if config.max_steps is not None:
        count, bits = min(count, SMALL), min(bits, 6)
    with forced(config.arithmetic.backend or None):
        shared = on_grid(bits, shift) | pictures(shift)
        return [{"seed": seed} | shared | on_random(seed, count, shift) for seed in trial.seeds]
