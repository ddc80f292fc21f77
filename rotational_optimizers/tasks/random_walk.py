"""The random walk behind the equilibrium formulas: real optimizers on pure, scale-invariant gradient noise.

The paper's model (random-walk appendix): the batch gradient is noise, orthogonal to the weight vector ω of C
coordinates and inversely proportional to its length,

    g = s·(z − ω̂⟨ω̂, z⟩)/‖ω‖,   z ~ N(0, I),   s the gradient scale.

Every row of one float64 matrix is such a vector: seeds, scales and neurons walk side by side under one optimizer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rotational_optimizers.adamw import RotationalAdamW
from rotational_optimizers.equilibrium import equilibrium_norm, equilibrium_rotation, norm_trajectory
from rotational_optimizers.lion import RotationalLion
from rotational_optimizers.relatives import Lion
from rotational_optimizers.sgd import RotationalSGD

if TYPE_CHECKING:
    from common.trials import Trial
    from rotational_optimizers.config import OptimizerConfig, RandomWalkConfig, TrialConfig

CURVE_POINTS = 80
NOISE_STEPS = 64


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial: every seed's RMS angle and norm after the burn-in, beside the predictions.

    Returns:
        One dict a seed. For the first gradient scale: `angle` (RMS, rad per step), `norm` (RMS), `angle_predicted` and
        `norm_predicted` (first order in lr·λ), the same with `_exact`, and measured over predicted as `angle_ratio`,
        `norm_ratio`, `angle_ratio_exact`, `norm_ratio_exact`. For all scales, as lists: `scales`, `scale_angles`,
        `scale_norms`, `scale_angles_predicted`; from them `slope` (least squares of log angle over log scale; 0 with
        one scale) and `spread` (largest over smallest angle). With `task.start_norm`: `curve_steps`, `curve_norm_sq`
        (mean over the rows of the first scale), `curve_predicted`, and `max_deviation` (largest relative deviation of
        the two).
    """
    task, seeds = config.task, range(config.seed, config.seed + config.n_seeds)
    predictions = [_predict(config.optimizer, task.dim, scale) for scale in task.gradient_scales]
    walk = _Walk(config.optimizer, task, list(seeds), [_start_norm(p) for p in predictions])
    angle_sq, norm_sq, curve = walk.run(trial)
    return [
        {"seed": seed, **_row(task, predictions, angle_sq[i].sqrt(), norm_sq[i].sqrt())}
        | _transient(config, predictions[0]["norm_predicted_exact"], walk.curve_steps, curve[:, i])
        for i, seed in enumerate(seeds)
    ]


class _Walk:
    """State of the walk; rows of `weight` (S·G·K, C) are ordered by seed, gradient scale, neuron."""

    def __init__(
        self, optimizer: OptimizerConfig, task: RandomWalkConfig, seeds: list[int], norms: list[float]
    ) -> None:
        self.task, self.seeds = task, seeds
        self.block = (len(task.gradient_scales) * task.neurons, task.dim)
        # a generator a seed: its walk is the same whoever walks beside it
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draws = [torch.randn(self.block, generator=g, dtype=torch.float64) for g in self.generators]
        start = torch.tensor(norms, dtype=torch.float64) * (task.start_norm or 1.0)
        direction = torch.stack(draws)  # (S, G*K, C)
        direction *= (start.repeat_interleave(task.neurons) / direction.norm(dim=2))[..., None]
        self.weight = torch.nn.Parameter(direction.flatten(0, 1))  # (S*G*K, C)
        self.weight.grad = torch.zeros_like(self.weight)
        scales = torch.tensor(task.gradient_scales, dtype=torch.float64)
        self.scale = scales.repeat_interleave(task.neurons).repeat(len(seeds))  # (S*G*K,)
        self.optimizer, self.shrink = _optimizer(optimizer, self.weight)
        self.burn_in = int(task.burn_in * task.steps)
        self.curve_every = max(1, task.steps // CURVE_POINTS)
        self.curve_steps = list(range(0, task.steps + 1, self.curve_every))

    @torch.no_grad()
    def run(self, trial: Trial) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squared angle and norm after the burn-in, (S, G) each, and the curve of squared norms, (points, S)."""
        task = self.task
        shape = len(self.seeds), len(task.gradient_scales), task.neurons
        angle_sq, norm_sq = torch.zeros(2, len(self.weight), dtype=torch.float64)
        square = torch.linalg.vecdot(self.weight, self.weight)
        curve = [square.view(shape)[:, 0].mean(1)]
        for first in range(0, task.steps, NOISE_STEPS):
            noise = self._noise(min(NOISE_STEPS, task.steps - first))
            inner, squares = torch.empty(2, len(noise), len(self.weight), dtype=torch.float64)
            begin = square
            for k, z in enumerate(noise):
                square = self._step(z, square, inner[k])
                squares[k] = square
            before = torch.cat([begin[None], squares[:-1]])
            late = slice(max(0, self.burn_in - first), None)
            angle = torch.acos((inner / (before * squares).sqrt()).clamp(-1, 1))[late]
            angle_sq += angle.square().sum(0)
            norm_sq += squares[late].sum(0)
            marks = [k for k in range(len(noise)) if (first + k + 1) % self.curve_every == 0]
            curve += [squares[k].view(shape)[:, 0].mean(1) for k in marks]
            trial.progress(first + len(noise), task.steps)
        count = task.steps - self.burn_in
        return angle_sq.view(shape).mean(2) / count, norm_sq.view(shape).mean(2) / count, torch.stack(curve)

    def _noise(self, steps: int) -> Tensor:
        """(steps, S*G*K, C) standard normal; drawn in float32, ten times faster than float64."""
        draws = torch.empty(len(self.seeds), steps, *self.block)
        for generator, part in zip(self.generators, draws, strict=True):
            part.normal_(generator=generator)
        return draws.transpose(0, 1).to(torch.float64).flatten(1, 2)

    def _step(self, z: Tensor, square: Tensor, inner: Tensor) -> Tensor:
        """One optimizer step on the gradient of noise z; writes ⟨ω_t, ω_{t+1}⟩ and returns ‖ω_{t+1}‖², (rows,)."""
        w, grad = self.weight.detach(), self.weight.grad
        length = self.scale / square.sqrt()
        radial = torch.linalg.vecdot(w, z) * length / square
        torch.mul(z, length[:, None], out=grad).addcmul_(w, radial[:, None], value=-1)
        before = w.clone()
        if self.shrink != 1:
            w *= self.shrink
        self.optimizer.step()
        torch.linalg.vecdot(before, w, out=inner)
        return torch.linalg.vecdot(w, w)


def _optimizer(c: OptimizerConfig, weight: torch.nn.Parameter) -> tuple[torch.optim.Optimizer, float]:
    """The arm's optimizer, and the factor by which decoupled SGD shrinks weights before its step (1 for the others)."""
    betas = (c.beta1, c.beta2)
    if c.name == "sgdm":
        decay, shrink = (0.0, 1 - c.lr * c.weight_decay) if c.decoupled else (c.weight_decay, 1.0)
        sgd = torch.optim.SGD([weight], c.lr, momentum=c.momentum, nesterov=c.nesterov, weight_decay=decay, fused=True)
        return sgd, shrink
    if c.name in ("adamw", "adam_l2"):
        adam = torch.optim.AdamW if c.name == "adamw" else torch.optim.Adam
        return adam([weight], c.lr, betas=betas, eps=c.eps, weight_decay=c.weight_decay, fused=True), 1.0
    if c.name == "lion":
        return Lion([weight], c.lr, betas=betas, weight_decay=c.weight_decay), 1.0
    return _rotational(c, weight), 1.0


def _rotational(c: OptimizerConfig, weight: torch.nn.Parameter) -> torch.optim.Optimizer:
    turn: dict[str, Any] = {"update_norm_decay": c.update_norm_decay, "zero_mean": c.zero_mean}
    turn["weight_decay"] = c.weight_decay
    betas = (c.beta1, c.beta2)
    if c.name == "rv_sgdm":
        return RotationalSGD([weight], c.lr, c.momentum, nesterov=c.nesterov, decoupled=c.decoupled, **turn)
    if c.name == "rv_adamw":
        return RotationalAdamW([weight], c.lr, betas=betas, eps=c.eps, **turn)
    if c.name == "rv_lion":
        return RotationalLion([weight], c.lr, betas=betas, **turn)
    raise ValueError(f"optimizer.name={c.name!r}: the walk knows sgdm, adamw, adam_l2, lion and their rv_ forms")


def _hyper(c: OptimizerConfig, dim: int, scale: float) -> dict[str, Any]:
    """Arguments of the equilibrium formulas; a projected normal gradient at unit norm has RMS norm s·√(C − 1)."""
    name = c.name.removeprefix("rv_")
    values = {"lr": c.lr, "weight_decay": c.weight_decay, "numel": dim, "grad_norm": scale * math.sqrt(dim - 1)}
    if name == "sgdm":
        return values | {"optimizer": name, "momentum": c.momentum, "nesterov": c.nesterov, "decoupled": c.decoupled}
    return values | {"optimizer": name, "betas": (c.beta1, c.beta2)}


def _predict(c: OptimizerConfig, dim: int, scale: float) -> dict[str, float]:
    """Angle and norm, to first order and exact; NaN for the latter where decay is so large that the walk diverges."""
    values = _hyper(c, dim, scale)
    found = {"angle_predicted": equilibrium_rotation(**values), "norm_predicted": equilibrium_norm(**values)}
    try:
        found["angle_predicted_exact"] = equilibrium_rotation(**values, exact=True)
        found["norm_predicted_exact"] = equilibrium_norm(**values, exact=True)
    except ValueError:
        found |= {"angle_predicted_exact": math.nan, "norm_predicted_exact": math.nan}
    return {key: float(value) for key, value in found.items()}


def _start_norm(prediction: dict[str, float]) -> float:
    exact = prediction["norm_predicted_exact"]
    return exact if math.isfinite(exact) else prediction["norm_predicted"]


def _row(task: RandomWalkConfig, predictions: list[dict[str, float]], angles: Tensor, norms: Tensor) -> dict[str, Any]:
    """One seed's metrics from its RMS angles and norms, (G,) each."""
    first, angle, norm = predictions[0], angles[0].item(), norms[0].item()
    x = torch.tensor(task.gradient_scales, dtype=torch.float64).log()
    x = x - x.mean()
    slope = (x @ angles.log() / x.square().sum()).item() if len(x) > 1 else 0.0
    return {
        "diverged": not bool(torch.isfinite(angles).all() and torch.isfinite(norms).all()),
        "angle": angle,
        "norm": norm,
        **first,
        "angle_ratio": angle / first["angle_predicted"],
        "norm_ratio": norm / first["norm_predicted"],
        "angle_ratio_exact": angle / first["angle_predicted_exact"],
        "norm_ratio_exact": norm / first["norm_predicted_exact"],
        "scales": list(task.gradient_scales),
        "scale_angles": angles.tolist(),
        "scale_norms": norms.tolist(),
        "scale_angles_predicted": [p["angle_predicted"] for p in predictions],
        "slope": slope,
        "spread": (angles.max() / angles.min()).item(),
    }


def _transient(config: TrialConfig, settled: float, steps: list[int], curve: Tensor) -> dict[str, Any]:
    """The curve of mean squared norms, (points,), against the exponential; empty for a walk from equilibrium."""
    task, c = config.task, config.optimizer
    if task.start_norm is None or c.name == "adam_l2" or not math.isfinite(settled):
        return {}
    values = _hyper(c, task.dim, task.gradient_scales[0])
    x0, t = (task.start_norm * settled) ** 2, torch.tensor(steps, dtype=torch.float64)
    expected = torch.as_tensor(norm_trajectory(values.pop("optimizer"), x0, t, exact=True, **values))
    return {
        "curve_steps": steps,
        "curve_norm_sq": curve.tolist(),
        "curve_predicted": expected.tolist(),
        "max_deviation": (curve / expected - 1).abs().max().item(),
    }
