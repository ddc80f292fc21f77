"""How every neuron of every stacked network turns during a run, reduced to one dict of numbers a seed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rotational_optimizers.optimizers import predicted_rotation

if TYPE_CHECKING:
    from rotational_optimizers.config import TrialConfig


def _unit_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows (K, n) and norms (K,) of a weight."""
    rows = weight.detach().flatten(1)
    norm = rows.norm(dim=1)
    return rows / norm.clamp_min(torch.finfo(rows.dtype).tiny)[:, None], norm


class RotationRecorder:
    """Sums squared angles per row over two windows and keeps a coarse curve of angle and norm per layer.

    Angles are chord angles 2 asin(|u - v| / 2) of unit rows in the parameter's own precision with float64 sums, so
    that rotations of 1e-4 rad keep five digits.

    Args:
        model: network whose weights with `ndim > 1` are tracked.
        optimizer: its step is hooked.
        config: windows in `config.task`, optimizer for the prediction.
        steps: length of the run.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrialConfig, steps: int) -> None:
        task = config.task
        self.config, self.n_models = config, config.n_seeds
        self.weights = {name: p for name, p in model.named_parameters() if p.ndim > 1 and p.requires_grad}
        self.start_end, self.tail_begin = task.track_start, steps - int(task.track_tail * steps)
        self.every, self.curve_every = task.track_every, max(1, steps // 80)
        self.step = self.start_count = self.tail_count = self.window_count = 0
        zeros = {n: torch.zeros(len(p), dtype=torch.float64, device=p.device) for n, p in self.weights.items()}
        self.start_sum = zeros
        self.tail_sum = {name: total.clone() for name, total in zeros.items()}
        self.window_sum = {name: total.clone() for name, total in zeros.items()}
        self.tail_norm = {name: total.clone() for name, total in zeros.items()}
        self.curve_steps: list[int] = []
        self.angle_curve: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        self.norm_curve: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        self._before: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(self._remember)
        optimizer.register_step_post_hook(self._measure)

    def _remember(self, *_: Any) -> None:
        if self.step % self.every == 0 and not self._before:
            self._before = {name: _unit_rows(p)[0] for name, p in self.weights.items()}

    @torch.no_grad()
    def _measure(self, *_: Any) -> None:
        if self._before:
            self._add()
        self.step += 1
        if self.step % self.curve_every == 0 and self.window_count:
            self.curve_steps.append(self.step)
            for name, weight in self.weights.items():
                self.angle_curve[name].append(self._per_seed(self.window_sum[name] / self.window_count))
                self.norm_curve[name].append(self._per_seed(_unit_rows(weight)[1].double().square_()))
                self.window_sum[name].zero_()
            self.window_count = 0

    def _add(self) -> None:
        """Add the squared angles of the step just taken to the windows it lies in."""
        start, tail = self.step < self.start_end, self.step >= self.tail_begin
        before, self._before = self._before, {}
        for name, weight in self.weights.items():
            after, norm = _unit_rows(weight)
            chord = (after - before[name]).norm(dim=1).clamp_max_(2.0)
            square = (2 * torch.asin(chord / 2)).double().square_()
            if self.every == 1:
                self._before[name] = after  # the next step starts here
            if start:
                self.start_sum[name] += square
            if tail:
                self.tail_sum[name] += square
                self.tail_norm[name] += norm.double().square_()
            self.window_sum[name] += square
        self.start_count += start
        self.tail_count += tail
        self.window_count += 1

    def _per_seed(self, square: Tensor) -> Tensor:
        """Root of the mean over a layer's neurons, (S,), from row values (S*K,)."""
        return square.view(self.n_models, -1).mean(1).sqrt()

    def rows(self) -> list[dict[str, Any]]:
        """One dict a seed.

        Keys: `layers` (names), `angle` and `norm` (RMS over neurons and the equilibrium window, rad and 1),
        `predicted` (rad), `ratio` (angle / predicted), `start_ratio` (RMS angle of the first steps over the
        prediction at the peak learning rate), `neuron_log_std` (std of log RMS angle over all neurons of hidden
        layers), `neuron_angle` (their RMS angles), `curve_steps`, `angle_curve`, `norm_curve` (per layer).
        """
        tail, start = max(1, self.tail_count), max(1, self.start_count)
        predicted = predicted_rotation(self.config.optimizer, self.config.optimizer.lr)
        hidden = [name for name in self.weights if not name.startswith("head")]
        angle = {name: self._per_seed(total / tail) for name, total in self.tail_sum.items()}
        norm = {name: self._per_seed(total / tail) for name, total in self.tail_norm.items()}
        begin = {name: self._per_seed(total / start) for name, total in self.start_sum.items()}
        neurons = torch.cat([(self.tail_sum[n] / tail).sqrt().view(self.n_models, -1) for n in hidden], 1)  # (S, sum K)
        log_std = neurons.clamp_min(1e-300).log().std(1)
        result = []
        for i in range(self.n_models):
            angles = [angle[name][i].item() for name in self.weights]
            starts = [begin[name][i].item() for name in self.weights]
            row: dict[str, Any] = {
                "layers": list(self.weights),
                "angle": angles,
                "norm": [norm[name][i].item() for name in self.weights],
                "mean_angle": neurons[i].square().mean().sqrt().item(),
                "neuron_log_std": log_std[i].item(),
                "neuron_angle": neurons[i].tolist(),
                "curve_steps": self.curve_steps,
                "angle_curve": [[v[i].item() for v in self.angle_curve[name]] for name in self.weights],
                "norm_curve": [[v[i].item() for v in self.norm_curve[name]] for name in self.weights],
            }
            if math.isfinite(predicted):  # a number that is not finite would say that the run diverged
                row["predicted"] = predicted
                row["ratio"] = [a / predicted for a in angles]
                row["start_ratio"] = [a / predicted for a in starts]
            result.append(row)
        return result
