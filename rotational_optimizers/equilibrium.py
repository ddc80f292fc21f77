"""Rotational equilibrium: the norm a weight vector settles at, and the angle it then turns per step.

Kosson, Messmer, Jaggi, "Rotational Equilibrium" (ICML 2024, arXiv 2305.17212), table of equilibrium norms and
rotations. The weight vector ω of a neuron (C coordinates) is lengthened by gradient noise and shortened by weight
decay. Momentum correlates the updates, so length balances the *total* contribution u of one gradient,
E‖u‖² = 2·rate·‖ω̂‖², while the angle is that of a single step, η̂_r² = E‖Δω‖²/‖ω̂‖²:

    AdamW 2ηλ(1−β1)/(1+β1)      SGDM 2ηλ/(1+α)      Lion πηλ((1−β1)² + β1²(1−β2)/(1+β2))

That is first order in ηλ. `exact=True` gives the stationary law of the same random walk without the limit
(derivation): each linear rule is an ARMA(2,1) process, and Lion's sign has autocovariance (2/π)·arcsin ρ_k.
Symbols: η lr, λ weight decay, α or β1 momentum, g̃ the gradient at unit norm, g = g̃/‖ω‖ (scale-invariant loss).
Every function costs O(1).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Number = float | Tensor

# rule -> (family, weight decay apart from the gradient?, Nesterov's look-ahead?)
_RULES = {
    "sgd": ("sgd", False, False),
    "sgdm": ("sgd", False, False),
    "sgdw": ("sgd", True, False),
    "nesterov": ("sgd", False, True),
    "adamw": ("adam", True, False),
    "radam": ("adam", True, False),
    "nadam": ("adam", True, True),
    "adam": ("adam", False, False),
    "adam_l2": ("adam", False, False),
    "lion": ("lion", True, False),
}
_NAMES = tuple(_RULES)
# torch classes and what they mean; a group's `decoupled_weight_decay` overrules
_CLASSES = {"SGD": "sgd", "AdamW": "adamw", "Adam": "adam_l2", "NAdam": "nadam", "RAdam": "radam", "Lion": "lion"}
_CLASSES |= {"RotationalSGD": "sgd", "RotationalAdamW": "adamw", "RotationalLion": "lion"}


@dataclass(frozen=True)
class _Rule:
    """What decides an optimizer's equilibrium. Adam is SGD on gradients of unit variance with dampening β1."""

    family: str
    decoupled: bool
    nesterov: bool
    lr: Number
    weight_decay: Number
    momentum: Number  # α or β1
    beta2: Number
    gain: Number  # weight of a new gradient in the momentum buffer: 1 − dampening or 1 − β1

    @property
    def adam_l2(self) -> bool:
        return self.family == "adam" and not self.decoupled

    def rate(self) -> Number:
        """Decay of the norm per step: ηλ, or what coupled L2 adds up to through the momentum, ηλ/(1−α)."""
        return self.lr * self.weight_decay * (1 if self.decoupled else self.gain / (1 - self.momentum))

    def share(self) -> Number:
        """E‖Δω‖²/E‖u‖², one step against the total contribution: (1−α)/(1+α); Nesterov (1−α)²(1 + 2α + α²/(1−α²))."""
        a = self.momentum
        return (1 - a) ** 2 * (1 + 2 * a + a**2 / (1 - a**2)) if self.nesterov else (1 - a) / (1 + a)

    def sign_variance(self) -> Number:
        """Lion's s²: variance of β1·m + (1−β1)·g at unit-variance g."""
        return (1 - self.momentum) ** 2 + self.momentum**2 * (1 - self.beta2) / (1 + self.beta2)


def equilibrium_rotation(
    optimizer: Any, *, lr: Number | None = None, weight_decay: Number | None = None,
    betas: tuple[Number, Number] | None = None, momentum: Number | None = None, nesterov: bool | None = None,
    decoupled: bool | None = None, dampening: Number | None = None, exact: bool = False,
    numel: int | None = None, grad_norm: Number | None = None,
) -> Number:  # fmt: skip
    """Expected rotation η̂_r in equilibrium: RMS angle per step in radians; 0 where lr or weight decay is 0.

    Args:
        optimizer: "sgdm", "sgdw", "nesterov", "adamw", "nadam", "radam", "adam_l2" or "lion"; or a torch optimizer
            (whose groups must agree), or one of its `param_groups`: the values below are then read from it, and
            those given here win.
        lr: learning rate η ≥ 0. This and every other number: float, or tensor of any shape (results broadcast).
        weight_decay: λ ≥ 0.
        betas: (β1, β2) in [0, 1), default (.9, .999), for Lion (.9, .99).
        momentum: α in [0, 1) of SGD, default 0.
        nesterov: Nesterov's form of the momentum, default by `optimizer`.
        decoupled: weight decay outside the gradient, ω ← (1 − ηλ)ω − …, default by `optimizer`.
        dampening: SGD weighs new gradients by 1 − dampening; in [0, 1), default 0.
        exact: the stationary law, not its first order in ηλ; the angle is then the RMS chord √(2(1 − cos)).
        numel: coordinates C of one neuron; needed by Adam with coupled L2 only.
        grad_norm: √E‖g̃‖², RMS norm of the gradient at ‖ω‖ = 1; needed by Adam with coupled L2 only.

    Raises:
        ValueError: unknown optimizer, value out of range, or a needed value missing; with `exact`, lr·weight_decay so
            large that the walk diverges (≥ 2 decoupled, ≥ 2(1 + α) coupled).

    Source: paper, table of expected rotations. Adam+L2, Nesterov and exact forms: derivation.
    """
    rule = _resolve(optimizer, lr, weight_decay, betas, momentum, nesterov, decoupled, dampening)
    if rule.adam_l2 and _any(rule.lr * rule.weight_decay > 0):
        rule = _per_coordinate(rule, numel, grad_norm, exact)
    if rule.family == "lion":
        return (2 * _lion_walk(rule)[1]) ** 0.5 if exact else (math.pi * rule.rate() * rule.sign_variance()) ** 0.5
    return (2 * _linear_walk(rule)[1]) ** 0.5 if exact else (2 * rule.rate() * rule.share()) ** 0.5


def equilibrium_norm(
    optimizer: Any, *, lr: Number | None = None, weight_decay: Number | None = None,
    betas: tuple[Number, Number] | None = None, momentum: Number | None = None, nesterov: bool | None = None,
    decoupled: bool | None = None, dampening: Number | None = None, exact: bool = False,
    numel: int | None = None, grad_norm: Number | None = None,
) -> Number:  # fmt: skip
    """Norm ‖ω̂‖ at which noise and decay balance: √E‖ω‖², in the units of the weights.

    Arguments as in `equilibrium_rotation`. `numel` (the C coordinates of one neuron) is needed for Adam and Lion,
    `grad_norm` (√E‖g̃‖²) for SGD and for Adam with coupled L2.

    Raises:
        ValueError: as `equilibrium_rotation`; lr or weight_decay of 0 (there is no equilibrium).

    Source: paper, table of equilibrium norms. Adam+L2, decoupled SGD, Nesterov and exact forms: derivation.
    """
    rule = _resolve(optimizer, lr, weight_decay, betas, momentum, nesterov, decoupled, dampening)
    _require_balance(rule)
    if rule.family == "lion":
        if exact:
            return (_need("numel", numel) * _lion_walk(rule)[0]) ** 0.5
        return (rule.lr * _need("numel", numel) / (math.pi * rule.weight_decay * rule.sign_variance())) ** 0.5
    if rule.adam_l2:
        return _adam_l2_norm(rule, _need("numel", numel), _need("grad_norm", grad_norm), exact)
    contribution = (rule.lr * rule.gain / (1 - rule.momentum)) ** 2  # E‖u‖² at E‖g‖² = 1
    variance = _linear_walk(rule)[0] if exact else contribution / (2 * rule.rate())
    if rule.family == "adam":
        return (_need("numel", numel) * variance) ** 0.5
    # E‖g‖² = E‖g̃‖²/‖ω‖² makes it a fourth power
    return (_need("grad_norm", grad_norm) ** 2 * variance) ** 0.25


def equilibrium_time(
    optimizer: Any, *, lr: Number | None = None, weight_decay: Number | None = None,
    betas: tuple[Number, Number] | None = None, momentum: Number | None = None, nesterov: bool | None = None,
    decoupled: bool | None = None, dampening: Number | None = None,
    numel: int | None = None, grad_norm: Number | None = None,
) -> Number:  # fmt: skip
    """Steps in which the distance to equilibrium falls by a factor e: 1/(2ηλ) for AdamW and Lion, (1−α)/(4ηλ) for SGDM.

    The distance is that of E‖ω‖² for AdamW and Lion, of (E‖ω‖²)² for SGD; for Adam with coupled L2 it is that of
    E‖ω‖² near its end, σ̃/(3ηλ‖ω̂‖) steps, which needs `numel` and `grad_norm`. Arguments and errors as in
    `equilibrium_norm`.

    Source: derivation (the paper's transient phase).
    """
    rule = _resolve(optimizer, lr, weight_decay, betas, momentum, nesterov, decoupled, dampening)
    _require_balance(rule)
    if rule.adam_l2:
        return 1 / (3 * _per_coordinate(rule, numel, grad_norm, exact=False).rate())
    return 1 / ((4 if rule.family == "sgd" else 2) * rule.rate())


def norm_trajectory(optimizer: Any, x0: Number, t: Number, *, exact: bool = False, **values: Any) -> Number:
    """Mean squared norm x_t = E‖ω_t‖² after t steps from x0 under constant hyper-parameters.

    AdamW, Lion: x_t = x̂ + (x_0 − x̂)e^{−2ηλt}.  SGD on a scale-invariant loss: x_t² = x̂² + (x_0² − x̂²)e^{−4ηλt/(1−α)}.
    Momentum and Adam's second moment count as instantaneous: holds where 1/(1−α) and 1/(1−β2) are ≪ `equilibrium_time`.

    Args:
        optimizer: as in `equilibrium_rotation`, but Adam with coupled L2, which has no closed form.
        x0: squared norm at t = 0.
        t: steps ≥ 0; a tensor gives the whole trajectory.
        exact: settle at the exact x̂.
        **values: lr, weight_decay, …, numel, grad_norm as in `equilibrium_norm`.

    Raises:
        ValueError: as `equilibrium_norm`; Adam with coupled L2.

    Source: derivation (the paper's transient phase).
    """
    rule = _resolve(optimizer, **{key: value for key, value in values.items() if key not in ("numel", "grad_norm")})
    if rule.adam_l2:
        raise ValueError(f"optimizer={optimizer!r}: no closed form for Adam with coupled L2; allowed: SGD, AdamW, Lion")
    settled = equilibrium_norm(optimizer, exact=exact, **values) ** 2
    rest = _exp(-t / equilibrium_time(optimizer, **values))
    if rule.family == "sgd":
        return (settled**2 + (x0**2 - settled**2) * rest) ** 0.5
    return settled + (x0 - settled) * rest


def _linear_walk(rule: _Rule) -> tuple[Number, Number]:
    """(E‖ω‖² at E‖g‖² = 1, 1 − cos(ω_t, ω_{t+1})) of an SGD-like rule, exactly.

    Momentum eliminated, ω_{t+1} = φ1·ω_t + φ2·ω_{t−1} − c(g_t + θ·g_{t−1}); written in δ = 1 − φ1 − φ2 nothing cancels.
    """
    a, step = rule.momentum, rule.lr * rule.gain
    decay = rule.lr * rule.weight_decay * (1 if rule.decoupled else rule.gain)
    delta = decay * (1 - a) if rule.decoupled else decay
    phi2 = -a * (1 - decay) if rule.decoupled or rule.nesterov else -a
    theta = -a / (1 + a) if rule.nesterov else 0.0
    c = step * (1 + a) if rule.nesterov else step
    phi1 = 1 - phi2 - delta
    noise = (1 + theta**2) * (1 - phi2) + 2 * theta * phi1
    if not _all(1 - phi2 + phi1 > 0) or not _all(1 + phi2 > 0):
        raise ValueError(f"lr*weight_decay={rule.lr * rule.weight_decay}: so much decay makes the walk diverge")
    spread = (1 + phi2) * (1 - phi2 + phi1)
    # at δ = 0 (no decay) the walk has no stationary law: infinite norm, no rotation
    variance = c**2 * noise / (delta * spread) if _all(delta > 0) else delta + math.inf
    return variance, delta / (1 - phi2) * (1 - theta * spread / noise)


def _lion_walk(rule: _Rule) -> tuple[Number, Number]:
    """(E‖ω‖² of one coordinate, 1 − cos(ω_t, ω_{t+1})) for sign updates with autocovariance γ_k = (2/π)·arcsin ρ_k.

    ρ_k = c·β2^(k−1) for k ≥ 1, so with the power series Σ_j a_j x^(2j+1) of arcsin
    Σ_k γ_k d^(k−1) = (2/π) Σ_j a_j c^(2j+1)/(1 − d·β2^(2j+1)).
    """
    b1, b2, decay = rule.momentum, rule.beta2, rule.lr * rule.weight_decay
    if not _all(decay < 2):
        raise ValueError(f"lr*weight_decay={decay}: must be < 2, or the walk diverges")
    d = 1 - decay
    c = (b1**2 * b2 * (1 - b2) / (1 + b2) + b1 * (1 - b1) * (1 - b2)) / rule.sign_variance()
    lead, ratio = _column(c), _column(b2)
    terms = _ARCSIN * lead**_ODD / (1 - _column(d) * ratio**_ODD)
    later = 2 / math.pi * (terms.sum(-1) if isinstance(d * c, Tensor) else float(terms.sum()))  # Σ_k γ_k d^(k−1)
    total = 1 + 2 * d * later  # (γ_0 + 2 Σ_k γ_k d^k)
    variance = rule.lr**2 * total / (decay * (1 + d)) if _all(decay > 0) else decay + math.inf
    return variance, decay * (1 - (1 + d) * later / total)


# 512 odd powers of arcsin: relative error < 1e-5 for betas up to .999, < 1e-9 for those in use
_ODD = 2 * torch.arange(512, dtype=torch.float64) + 1
_ARCSIN = torch.exp(torch.lgamma(_ODD) - 2 * torch.lgamma((_ODD + 1) / 2) - (_ODD - 1) * math.log(2)) / _ODD


def _adam_l2_norm(rule: _Rule, numel: int, grad_norm: Number, exact: bool) -> Number:
    """‖ω̂‖ = (η·C·σ̃/(2λ))^⅓ with σ̃ = √(E‖g̃‖²/C); exact: as the coupled walk, and with the L2 term in v."""
    sigma = grad_norm / numel**0.5
    norm = (rule.lr * numel * sigma / (2 * rule.weight_decay)) ** (1 / 3)
    # the map has slope −½ at its fixed point: 60 halvings reach rounding
    for _ in range(60 if exact else 0):
        root = ((sigma / norm) ** 2 + (rule.weight_decay * norm) ** 2 / numel) ** 0.5
        norm = (_linear_walk(replace(rule, lr=rule.lr / root))[0] * grad_norm**2) ** 0.5 / norm
    return norm


def _per_coordinate(rule: _Rule, numel: int | None, grad_norm: Number | None, exact: bool) -> _Rule:
    """Adam with coupled L2 as the SGD it is in equilibrium: learning rate η/√v, √v = σ̃/‖ω̂‖."""
    count, size = _need("numel", numel), _need("grad_norm", grad_norm)
    norm = _adam_l2_norm(rule, count, size, exact)
    root = size / (norm * count**0.5)
    if exact:
        root = (root**2 + (rule.weight_decay * norm) ** 2 / count) ** 0.5
    return replace(rule, lr=rule.lr / root)


def _resolve(
    optimizer: Any, lr: Number | None = None, weight_decay: Number | None = None,
    betas: tuple[Number, Number] | None = None, momentum: Number | None = None, nesterov: bool | None = None,
    decoupled: bool | None = None, dampening: Number | None = None,
) -> _Rule:  # fmt: skip
    """Names, optimizers and groups to a checked `_Rule`."""
    name, group = _identify(optimizer)
    family, apart, ahead = _RULES[name]
    if family == "adam" and "decoupled_weight_decay" in group:
        apart = group["decoupled_weight_decay"]
    default = {"betas": (0.9, 0.99) if family == "lion" else (0.9, 0.999), "momentum": 0.0, "dampening": 0.0}
    default |= {"nesterov": ahead, "decoupled": apart}
    given = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "momentum": momentum, "nesterov": nesterov}
    given |= {"decoupled": decoupled, "dampening": dampening}
    value = {**default, **group, **{key: item for key, item in given.items() if item is not None}}
    for key in ("lr", "weight_decay"):
        if key not in value:
            raise ValueError(f"{key}: not given, and optimizer={name!r} does not carry it; allowed: a number >= 0")
        _check(key, value[key], math.inf)
    alpha, beta2 = (value["momentum"], 0.0) if family == "sgd" else value["betas"]
    _check("momentum" if family == "sgd" else "betas[0]", alpha, 1.0)
    _check("betas[1]", beta2, 1.0)
    _check("dampening", value["dampening"], 1.0)
    gain = 1 - (value["dampening"] if family == "sgd" else alpha)
    # Lion's decay is always apart from its sign
    apart = True if family == "lion" else bool(value["decoupled"])
    return _Rule(family, apart, bool(value["nesterov"]), value["lr"], value["weight_decay"], alpha, beta2, gain)


def rule_of(optimizer: torch.optim.Optimizer | Mapping[str, Any]) -> str:
    """Name of the rule that a torch optimizer (by its class) or a param group (by its keys) follows: "sgd", "adamw", ….

    Adam's groups are "adamw"; what their `decoupled_weight_decay` says is read beside the other values.

    Raises:
        ValueError: no formula for it.
    """
    if isinstance(optimizer, Mapping):
        if "betas" in optimizer:
            return "lion" if "eps" not in optimizer else "nadam" if "momentum_decay" in optimizer else "adamw"
        if "momentum" in optimizer and "nesterov" in optimizer:
            return "sgd"
        raise ValueError(f"optimizer: a group with keys {sorted(optimizer)} is none of {', '.join(_NAMES)}")
    # a subclass of a known optimizer counts as it, hence the whole line of ancestors
    known = [base.__name__ for base in type(optimizer).__mro__ if base.__name__ in _CLASSES]
    if not known:
        allowed = f"{', '.join(_CLASSES)}, a name or a param group"
        raise ValueError(f"optimizer={type(optimizer).__name__}: no formula; allowed: {allowed}")
    return _CLASSES[known[0]]


def _identify(optimizer: Any) -> tuple[str, Mapping[str, Any]]:
    """(name of the rule, values it carries)."""
    if not isinstance(optimizer, str):
        values = optimizer if isinstance(optimizer, Mapping) else _common_values(optimizer.param_groups)
        return rule_of(optimizer), values
    if optimizer not in _RULES:
        raise ValueError(f"optimizer={optimizer!r}: allowed are {', '.join(_NAMES)}")
    return optimizer, {}


def _common_values(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The hyper-parameters of one optimizer, refused where its groups disagree."""
    keys = ("lr", "weight_decay", "betas", "momentum", "nesterov", "decoupled", "dampening", "decoupled_weight_decay")
    common = {key: groups[0][key] for key in keys if key in groups[0]}
    for key, value in common.items():
        if any(group.get(key) != value for group in groups):
            seen = sorted({str(group.get(key)) for group in groups})
            raise ValueError(f"optimizer: groups differ in {key} ({', '.join(seen)}); pass one of its param_groups")
    return common


def _check(key: str, value: Number, below: float) -> None:
    """Range [0, below); tensors off the CPU pass unseen, a look would stall the device."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return
    if not _all((value >= 0) & (value < below) if isinstance(value, Tensor) else 0 <= value < below):
        raise ValueError(f"{key}={value}: must be >= 0 and {'finite' if below == math.inf else f'< {below:g}'}")


def _require_balance(rule: _Rule) -> None:
    for key, value in (("lr", rule.lr), ("weight_decay", rule.weight_decay)):
        if not _all(value > 0):
            raise ValueError(f"{key}={value}: must be > 0, without it the norm has no equilibrium")


def _need(key: str, value: Any) -> Any:
    if value is None or not _all(value > 0):
        raise ValueError(f"{key}={value}: this optimizer's equilibrium depends on it; must be > 0")
    return value


def _all(condition: Any) -> bool:
    return bool(condition.all()) if isinstance(condition, Tensor) else bool(condition)


def _any(condition: Any) -> bool:
    return bool(condition.any()) if isinstance(condition, Tensor) else bool(condition)


def _exp(x: Number) -> Number:
    return torch.exp(x) if isinstance(x, Tensor) else math.exp(x)


def _column(x: Number) -> Tensor:
    """Float64 with a last axis for the series."""
    return torch.as_tensor(x, dtype=torch.float64).unsqueeze(-1)
