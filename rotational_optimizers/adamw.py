"""RotationalAdamW: AdamW whose weight rows turn by AdamW's equilibrium rotation from the first step on.

Kosson, Messmer, Jaggi, "Rotational Equilibrium" (ICML 2024), section 4, with

    m ← β1·m + (1 − β1)·g,   v ← β2·v + (1 − β2)·g²,   d = (m/(1 − β1^t)) / (√(v/(1 − β2^t)) + ε)
    η_r = √(2ηλ(1 − β1)/(1 + β1))

and the update of `rotational_optimizers.update`. Weight decay λ acts through η_r only; norms never change.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from rotational_optimizers.base import Group, require, require_betas
from rotational_optimizers.kernels import native
from rotational_optimizers.stepping import Moments, RotationalOptimizer, Turn, new_step


class RotationalAdamW(RotationalOptimizer):
    """Rotational variant of AdamW.

    Rotational tensors keep the norm of every row and turn each row by η_r a step (RMS); all others follow
    `torch.optim.AdamW` bit for bit. State: `exp_avg`, `exp_avg_sq`, `step`, and for rotational tensors two values a
    row, `norm` (K,) and `update_norm_sq` (K,). Every argument but `params` is also a key of param groups.

    A row without gradient (a token that is absent) turns on while its momentum lasts, as with AdamW; since the running
    mean of update sizes fades more slowly (f > β1²), it comes to rest.

    Args:
        params: parameters, named parameters, or groups (`rotational_param_groups(model, weight_decay)`).
        lr: η ≥ 0, float or 0-dim tensor. Schedules act through η_r ∝ √η.
        betas: (β1, β2) in [0, 1).
        eps: ε ≥ 0.
        weight_decay: λ ≥ 0.
        rotation: "equilibrium": η_r from lr, λ and betas; "exact": the same without ηλ ≪ 1; "paper": as the paper's
            code; a number: radians per step, whatever the lr; a function of the param group: called every step.
        update_norm_decay: f in [0, 1), running mean of squared update sizes.
        per_neuron: False turns each tensor as one row.
        zero_mean: rows are centred at construction (keeping their norm) and stay so.
        rotational: True or False; None: where weight_decay is not 0 and the tensor has two or more axes.
        neuron_dim: axis that counts neurons (1 for ConvTranspose and Hugging Face's Conv1D).
        neuron_speed: function of a parameter, (K,) factors on the rotation of its rows; called every step.
        second_moment_l2: λ₂ ≥ 0; v then averages (g + λ₂·x)², as in Adam with L2, while m averages g (section 5.3).
        master_copy: keep a float32 copy of bfloat16 and float16 weights that rotate (and float32 moments); without
            it small rotations are lost to rounding.
        foreach, fused: form of the step, see `rotational_optimizers.stepping`.
        maximize: ascend.
        capturable: no look at device values in a step.

    Raises:
        ValueError: a value out of range; a tensor that cannot rotate in a group with rotational=True.
        RuntimeError: foreach and fused both True; a sparse gradient.

    Source: paper, section 4.
    """

    _moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, *,
        rotation: float | str | Callable[[Group], float | Tensor] = "equilibrium", update_norm_decay: float = 0.9,
        per_neuron: bool = True, zero_mean: bool = True, rotational: bool | None = None, neuron_dim: int = 0,
        neuron_speed: Callable[[Tensor], Tensor] | None = None, second_moment_l2: float = 0.0,
        master_copy: bool = False, foreach: bool | None = None, fused: bool | None = None, maximize: bool = False,
        capturable: bool = False,
    ) -> None:  # fmt: skip
        keys = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        super().__init__(params, keys)

    def _check(self, group: Group) -> None:
        super()._check(group)
        require_betas(group)
        require(group, "eps", lambda eps: eps >= 0, ">= 0")
        require(group, "second_moment_l2", lambda l2: l2 >= 0, ">= 0")

    def _rule(self, group: Group) -> tuple[str, Group]:
        return "adamw", {"betas": group["betas"]}

    def _direction(
        self, group: Group, grad: Tensor, weight: Tensor, moments: Moments, step: int | Tensor
    ) -> tuple[Tensor, Moments]:
        beta1, beta2 = group["betas"]
        m, v = moments
        h = grad + group["second_moment_l2"] * weight
        m = beta1 * m + (1 - beta1) * grad
        v = beta2 * v + (1 - beta2) * h * h
        d = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + group["eps"])
        return d, (m, v)

    def _direction_into(self, group: Group, turn: Turn, grad: Tensor, step: int, out: Tensor) -> float:
        beta1, beta2 = group["betas"]
        m, v = turn.moments
        h = grad.add(turn.weight, alpha=group["second_moment_l2"]) if group["second_moment_l2"] else grad
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(h, h, value=1 - beta2)
        correction = (1 - beta2**step) ** 0.5
        # d = factor · m / (√v + ε·√(1 − β2^t)): the bias corrections are taken out of the passes
        torch.sqrt(v, out=out).add_(group["eps"] * correction)
        torch.div(m, out, out=out)
        return correction / (1 - beta1**step)

    def _native_constants(self, group: Group, step: int) -> tuple[int, float, tuple[float, ...]]:
        beta1, beta2 = group["betas"]
        correction = (1 - beta2**step) ** 0.5
        constants = (1 - beta1, beta2, 1 - beta2, group["eps"] * correction, group["second_moment_l2"])
        return native.ADAMW, correction / (1 - beta1**step), constants

    def _plain_step(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        for param in params:
            state = self.state[param]
            if "step" not in state:
                state["step"] = new_step(group, param)
                for name in self._moments:
                    state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        exp_avgs, exp_avg_sqs, steps = (
            [self.state[param][name] for param in params] for name in (*self._moments, "step")
        )
        beta1, beta2 = group["betas"]
        adamw(
            params, grads, exp_avgs, exp_avg_sqs, [], steps, foreach=group["foreach"], capturable=group["capturable"],
            fused=group["fused"], has_complex=any(param.is_complex() for param in params), amsgrad=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=group["maximize"],
        )  # fmt: skip
