"""From a config to an optimizer: the rotational variants, the base optimizers and their kin behind one function.

Every arm gets the same parameter groups: weights (rows of linear layers, filters, embeddings) decay and rotate,
everything else (biases, gains, norm parameters) does neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rotational_optimizers.adamw import RotationalAdamW
from rotational_optimizers.equilibrium import equilibrium_rotation
from rotational_optimizers.groups import rotational_param_groups
from rotational_optimizers.lion import RotationalLion
from rotational_optimizers.relatives import LAMB, AdamP, Hyperball, Lion, Nero, UpdateFloor
from rotational_optimizers.sgd import RotationalSGD

if TYPE_CHECKING:
    from rotational_optimizers.config import ImbalanceConfig, OptimizerConfig


def imbalanced_speed(config: ImbalanceConfig, n_models: int) -> Callable[[Tensor], Tensor] | None:
    """Per-row factors on the rotation, (K,), repeated for every stacked model (appendix J.6); None without imbalance.

    `double`: the first floor(q K) rows turn s times slower. `triple`: the first floor(q K / 2) rows turn s times
    slower, the next floor(q K / 2) rows s times faster.
    """
    if config.kind == "none":
        return None

    def speed(parameter: Tensor) -> Tensor:
        rows = parameter.shape[0] // n_models
        factor = torch.ones(rows, device=parameter.device)
        if config.kind == "double":
            factor[: int(config.fraction * rows)] = 1 / config.factor
        else:
            half = int(config.fraction * rows / 2)
            factor[:half] = 1 / config.factor
            factor[half : 2 * half] = config.factor
        return factor.repeat(n_models)  # (K,)

    return speed


def _forced_rotation(config: OptimizerConfig) -> Callable[[dict[str, Any]], float]:
    """AdamW's equilibrium rotation at the group's current learning rate and the config's own lambda (section 5.3)."""
    decay = config.rotation_weight_decay if config.rotation_weight_decay is not None else config.weight_decay
    betas = (config.beta1, config.beta2)

    def rotation(group: dict[str, Any]) -> float:
        return float(equilibrium_rotation("adamw", lr=group["lr"], weight_decay=decay, betas=betas))

    return rotation


def _groups(config: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    """The parameter groups of every arm; what `config.exclude` names neither decays nor rotates."""
    head, decay = ("head",) if config.exclude_head else (), config.weight_decay
    groups = rotational_param_groups(model, decay, exclude=(*head, *config.exclude))
    if not config.exclude:
        return groups
    still = rotational_param_groups(model, decay, exclude=config.exclude)
    plain = {id(p) for group in still if not group["rotational"] for p in group["params"]}
    last: dict[str, Any] = {"params": [], "rotational": False, "weight_decay": 0.0, "neuron_dim": 0}
    for group in groups:
        last["params"] += [p for p in group["params"] if id(p) in plain]
        group["params"] = [p for p in group["params"] if id(p) not in plain]
    return [group for group in (*groups, last) if group["params"]]


def build_optimizer(config: OptimizerConfig, model: nn.Module, n_models: int = 1) -> torch.optim.Optimizer:
    """The optimizer of `config` over `model`.

    Args:
        config: name and hyper-parameters.
        model: the network; with `n_models` > 1 its rows are those of several networks side by side.
        n_models: how many networks are stacked (needed for `imbalance`).

    Returns:
        A `torch.optim.Optimizer` whose groups start at `config.lr`.
    """
    c = config
    groups = _groups(c, model)
    betas = (c.beta1, c.beta2)
    adam: dict[str, Any] = {"lr": c.lr, "betas": betas, "eps": c.eps}
    keys = ("update_norm_decay", "per_neuron", "zero_mean")
    turn: dict[str, Any] = {key: getattr(c, key) for key in keys}
    if c.name in ("rv_sgdm", "rv_adamw", "rv_lion", "forced_adam_l2"):
        speed = imbalanced_speed(c.imbalance, n_models)
        for group in groups:
            group["neuron_speed"] = speed if group["rotational"] else None
        if c.name == "rv_sgdm":
            sgd: dict[str, Any] = {"momentum": c.momentum, "nesterov": c.nesterov, "decoupled": c.decoupled}
            return RotationalSGD(groups, c.lr, **sgd, **turn)
        if c.name == "rv_lion":
            return RotationalLion(groups, c.lr, betas=betas, **turn)
        if c.name == "rv_adamw":
            return RotationalAdamW(groups, **adam, **turn)
        for group in groups:
            if group["rotational"]:
                group["second_moment_l2"] = c.weight_decay
                group["rotation"] = _forced_rotation(c)
        return RotationalAdamW(groups, **adam, **turn)
    plain: list[dict[str, Any]] = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups]
    if c.name == "sgdm":
        return torch.optim.SGD(plain, c.lr, momentum=c.momentum, nesterov=c.nesterov, foreach=True)
    if c.name == "adamw":
        return torch.optim.AdamW(plain, **adam, fused=True)
    if c.name == "adam_l2":
        return torch.optim.Adam(plain, **adam, fused=True)
    if c.name == "lion":
        return Lion(plain, c.lr, betas=betas)
    for group, described in zip(plain, groups, strict=True):
        group |= {"rotational": described["rotational"], "n_models": n_models}
    if c.name == "nero":
        return Nero(plain, c.lr, beta=c.beta2)
    kin: dict[str, Any] = {"hyperball": Hyperball, "update_floor": UpdateFloor, "adamp": AdamP, "lamb": LAMB}
    return kin[c.name](plain, **adam)


def predicted_rotation(config: OptimizerConfig, lr: float) -> float:
    """Equilibrium rotation (rad per step, RMS) that the theory predicts for this arm at learning rate `lr`.

    NaN where no closed form exists without the gradient's size (adam_l2) or for optimizers outside the theory.
    """
    c = config
    name = c.name.removeprefix("rv_")
    if name in ("sgdm", "adamw", "lion"):
        hyper: dict[str, Any] = (
            {"momentum": c.momentum, "nesterov": c.nesterov, "decoupled": c.decoupled}
            if name == "sgdm"
            else {"betas": (c.beta1, c.beta2)}
        )
        return float(equilibrium_rotation(name, lr=lr, weight_decay=c.weight_decay, **hyper))
    return math.nan
