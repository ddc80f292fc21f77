"""RotationalLion: Lion whose weight rows turn by Lion's equilibrium rotation from the first step on.

Kosson, Messmer, Jaggi, "Rotational Equilibrium" (ICML 2024), section 4, with

    d = sign(β1·m + (1 − β1)·g),   m ← β2·m + (1 − β2)·g,   η_r = √(πηλ((1 − β1)² + β1²(1 − β2)/(1 + β2)))

and the update of `rotational_optimizers.update`. The paper's η_r linearises the sign's autocorrelation: 2 % too fast at
(.9, .99), 20 % too slow without momentum; `rotation="exact"` does not (derivation).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from rotational_optimizers.base import Group, require_betas
from rotational_optimizers.kernels import native
from rotational_optimizers.stepping import Moments, RotationalOptimizer, Turn


class RotationalLion(RotationalOptimizer):
    """Rotational variant of Lion.

    Rotational tensors keep the norm of every row and turn each row by η_r a step (RMS), whatever the size of the
    gradient; all others follow Lion (Chen et al. 2023, arXiv 2302.06675). State: `exp_avg`, and for rotational tensors
    `step`, `norm` (K,) and `update_norm_sq` (K,). Every argument but `params` is also a key of param groups.

    Args:
        params: parameters, named parameters, or groups (`rotational_param_groups(model, weight_decay)`).
        lr: η ≥ 0, float or 0-dim tensor. Schedules act through η_r ∝ √η.
        betas: (β1, β2) in [0, 1).
        weight_decay: λ ≥ 0, decoupled where a tensor does not rotate.
        rotation: "equilibrium" and "paper": η_r as above; "exact": without its two approximations; a number: radians
            per step, whatever the lr; a function of the group.
        update_norm_decay, per_neuron, zero_mean, rotational, neuron_dim, neuron_speed, master_copy, foreach, fused,
            maximize, capturable: as in `RotationalAdamW`.

    Raises:
        ValueError: a value out of range; a tensor that cannot rotate in a group with rotational=True.
        RuntimeError: foreach and fused both True; a sparse gradient.

    Source: paper, section 4.
    """

    _moments = ("exp_avg",)

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0, *,
        rotation: float | str | Callable[[Group], float | Tensor] = "equilibrium", update_norm_decay: float = 0.9,
        per_neuron: bool = True, zero_mean: bool = True, rotational: bool | None = None, neuron_dim: int = 0,
        neuron_speed: Callable[[Tensor], Tensor] | None = None, master_copy: bool = False,
        foreach: bool | None = None, fused: bool | None = None, maximize: bool = False, capturable: bool = False,
    ) -> None:  # fmt: skip
        keys = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        super().__init__(params, keys)

    def _check(self, group: Group) -> None:
        super()._check(group)
        require_betas(group)

    def _rule(self, group: Group) -> tuple[str, Group]:
        return "lion", {"betas": group["betas"]}

    def _direction(
        self, group: Group, grad: Tensor, weight: Tensor, moments: Moments, step: int | Tensor
    ) -> tuple[Tensor, Moments]:
        beta1, beta2 = group["betas"]
        (m,) = moments
        d = torch.sign(beta1 * m + (1 - beta1) * grad)  # with the old m
        return d, (beta2 * m + (1 - beta2) * grad,)

    def _direction_into(self, group: Group, turn: Turn, grad: Tensor, step: int, out: Tensor) -> float:
        beta1, beta2 = group["betas"]
        (m,) = turn.moments
        torch.lerp(m, grad, 1 - beta1, out=out).sign_()
        m.lerp_(grad, 1 - beta2)
        return 1.0

    def _native_constants(self, group: Group, step: int) -> tuple[int, float, tuple[float, ...]]:
        beta1, beta2 = group["betas"]
        return native.LION, 1.0, (1 - beta1, 1 - beta2)

    def _plain_step(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """Lion: x ← (1 − ηλ)·x − η·d."""
        beta1, beta2 = group["betas"]
        lr, decay = group["lr"], group["weight_decay"]
        for param in params:
            state = self.state[param]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        moments = [self.state[param]["exp_avg"] for param in params]
        if group["maximize"]:
            grads = [-grad for grad in grads]
        directions = torch._foreach_lerp(moments, grads, 1 - beta1)
        torch._foreach_sign_(directions)
        torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_mul_(directions, -lr)
        torch._foreach_add_(params, directions)
        torch._foreach_lerp_(moments, grads, 1 - beta2)
