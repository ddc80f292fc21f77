"""RotationalSGD: SGD with momentum whose weight rows turn by SGD's equilibrium rotation from the first step on.

Kosson, Messmer, Jaggi, "Rotational Equilibrium" (ICML 2024), section 4, with

    b ← α·b + g (first step b = g),   d = b, or g + α·b with Nesterov,   η_r = √(2ηλ/(1 + α))

and the update of `rotational_optimizers.update`; decoupled decay: η_r = √(2ηλ(1 − α)/(1 + α)), Nesterov:
η_r = √(2ηλ(1 − α)·(1 + 2α + α²/(1 − α²))) (derivation; the paper's code takes the heavy-ball value for it).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from rotational_optimizers.base import Group, require
from rotational_optimizers.kernels import native
from rotational_optimizers.stepping import Moments, RotationalOptimizer, Turn


class RotationalSGD(RotationalOptimizer):
    """Rotational variant of SGD with momentum.

    Rotational tensors keep the norm of every row and turn each row by η_r a step (RMS), whatever the size of the
    gradient; all others follow `torch.optim.SGD` bit for bit. State: `momentum_buffer`, and for rotational tensors
    `step`, `norm` (K,) and `update_norm_sq` (K,). Every argument but `params` is also a key of param groups.

    Args:
        params: parameters, named parameters, or groups (`rotational_param_groups(model, weight_decay)`).
        lr: η ≥ 0, float or 0-dim tensor. Schedules act through η_r ∝ √η.
        momentum: α in [0, 1).
        weight_decay: λ ≥ 0.
        nesterov: Nesterov's look-ahead; needs momentum and no dampening.
        dampening: in [0, 1); gradients after the first enter the buffer with weight 1 − dampening.
        decoupled: decay outside the gradient, x ← (1 − ηλ)x, for η_r and for tensors that decay but do not rotate.
        rotation: "equilibrium": η_r from lr, λ and momentum; "exact": the same without ηλ ≪ 1; "paper": as the paper's
            code (heavy ball also for Nesterov); a number: radians per step, whatever the lr; a function of the group.
        update_norm_decay, per_neuron, zero_mean, rotational, neuron_dim, neuron_speed, master_copy, foreach, fused,
            maximize, capturable: as in `RotationalAdamW`.

    Raises:
        ValueError: a value out of range; a tensor that cannot rotate in a group with rotational=True.
        RuntimeError: foreach and fused both True; a sparse gradient.

    Source: paper, section 4.
    """

    _moments = ("momentum_buffer",)

    def __init__(
        self, params: Iterable[Any], lr: float | Tensor = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0,
        nesterov: bool = False, dampening: float = 0.0, *, decoupled: bool = False,
        rotation: float | str | Callable[[Group], float | Tensor] = "equilibrium", update_norm_decay: float = 0.9,
        per_neuron: bool = True, zero_mean: bool = True, rotational: bool | None = None, neuron_dim: int = 0,
        neuron_speed: Callable[[Tensor], Tensor] | None = None, master_copy: bool = False,
        foreach: bool | None = None, fused: bool | None = None, maximize: bool = False, capturable: bool = False,
    ) -> None:  # fmt: skip
        keys = {key: value for key, value in locals().items() if key not in ("self", "params", "__class__")}
        super().__init__(params, keys)

    def _check(self, group: Group) -> None:
        super()._check(group)
        require(group, "momentum", lambda a: 0 <= a < 1, "in [0, 1)")
        require(group, "dampening", lambda a: 0 <= a < 1, "in [0, 1)")
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov=True with momentum={group['momentum']}, dampening={group['dampening']}: "
                "must have momentum > 0 and dampening 0"
            )

    def _moments_of(self, group: Group) -> tuple[str, ...]:
        return self._moments if group["momentum"] else ()

    def _rule(self, group: Group) -> tuple[str, Group]:
        return "sgd", {key: group[key] for key in ("momentum", "nesterov", "decoupled", "dampening")}

    def _direction(
        self, group: Group, grad: Tensor, weight: Tensor, moments: Moments, step: int | Tensor
    ) -> tuple[Tensor, Moments]:
        if not moments:
            return grad, ()
        (b,) = moments
        b = group["momentum"] * b + self._share(group, step) * grad
        return (grad + group["momentum"] * b if group["nesterov"] else b), (b,)

    def _direction_into(self, group: Group, turn: Turn, grad: Tensor, step: int, out: Tensor) -> float:
        if not turn.moments:
            out.copy_(grad)
            return 1.0
        (b,) = turn.moments
        b.mul_(group["momentum"]).add_(grad, alpha=self._share(group, step))
        if group["nesterov"]:
            torch.add(grad, b, alpha=group["momentum"], out=out)
        else:
            out.copy_(b)
        return 1.0

    def _native_constants(self, group: Group, step: int) -> tuple[int, float, tuple[float, ...]]:
        alpha = group["momentum"]
        if alpha == 0:
            return native.GRADIENT, 1.0, ()
        look_ahead = (1.0, alpha) if group["nesterov"] else (0.0, 1.0)
        return native.SGD, 1.0, (alpha, self._share(group, step), *look_ahead)

    def _share(self, group: Group, step: int | Tensor) -> Any:
        """Weight of the gradient in the buffer: 1 in the first step, then 1 − dampening."""
        return 1 - group["dampening"] * (step > 1)

    def _plain_step(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        decay = group["weight_decay"]
        if group["decoupled"] and decay:
            torch._foreach_mul_(params, 1 - group["lr"] * decay)
            decay = 0.0
        buffers = [self.state[param].get("momentum_buffer") if group["momentum"] else None for param in params]
        sgd(
            params, grads, buffers, foreach=group["foreach"], fused=group["fused"],
            weight_decay=decay, momentum=group["momentum"], lr=group["lr"], dampening=group["dampening"],
            nesterov=group["nesterov"], maximize=group["maximize"],
        )  # fmt: skip
        if group["momentum"]:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer
