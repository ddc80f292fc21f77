"""RotationalWrapper: any optimizer of torch as the base of a rotational one.

Kosson, Messmer, Jaggi, "Rotational Equilibrium" (ICML 2024), section 4. For rotational tensors the base optimizer runs
at lr = 1 and weight_decay = 0 on a shadow weight of zero; what it subtracts there is its direction d, free of
cancellation, and the weight gets the update of `rotational_optimizers.update`. All other tensors get the base's own
step. Cost: the base's step, a copy of the rotational weights for its length, and the plain form of the update.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rotational_optimizers.base import Group, RowOptimizer
from rotational_optimizers.update import rotational_update_, row_dims

# optimizers of torch (and Lion) whose rotation has a formula: name of the rule, keys it reads from a group
RULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "SGD": ("sgd", ("momentum", "nesterov", "dampening")),
    "AdamW": ("adamw", ("betas",)),
    "Adam": ("adamw", ("betas",)),
    "NAdam": ("nadam", ("betas",)),
    "RAdam": ("radam", ("betas",)),
    "Lion": ("lion", ("betas",)),
}


class _Place(NamedTuple):
    """One rotational tensor in one step."""

    group: Group
    number: int  # in its group
    param: Tensor
    grad: Tensor
    rows: Group  # norm, update_norm_sq: (K,)
    alive: Tensor  # rows whose gradient is finite, bool


class RotationalWrapper(RowOptimizer):
    """Rotational variant of any `torch.optim.Optimizer`.

    It takes over the base's parameter groups and state: learning rate schedulers, `zero_grad`, hooks, `state_dict` and
    `load_state_dict` work on the wrapper. With SGD, AdamW and Lion it equals the native classes to rounding; rows with
    non-finite gradients stay as they are, and the base sees a gradient of zero there.

    Args:
        base: an optimizer, or a class of one, built from `params` and `base_options`. Directions must not depend on
            the weights or the learning rate.
        rotation: None: "equilibrium" by the base's class (SGD, AdamW, Adam, NAdam, RAdam, Lion; Adam counts as AdamW,
            since no L2 enters the gradient); else as in `RotationalAdamW`. Needs weight_decay > 0 or a number.
        params: parameters or groups for a class given as `base`.
        update_norm_decay, per_neuron, zero_mean, rotational, neuron_dim, neuron_speed: as in `RotationalAdamW`; groups
            may carry keys of their own.
        shadow: False lets the base see the true weights, for bases that read them (LARS, LAMB); the direction then
            carries the rounding of a subtraction.
        **base_options: keyword arguments of the class given as `base`.

    Raises:
        ValueError: no formula for the base and no rotation given; nothing would rotate; a value out of range; the base
            reads the weights and `shadow` is True.
        TypeError: `base` is no optimizer, or one that needs a closure (LBFGS).

    Source: paper, section 4 (its code wraps a fixed list of optimizers).
    """

    def __init__(
        self, base: Optimizer | type[Optimizer], rotation: float | str | Callable[[Group], Any] | None = None, *,
        params: Iterable[Any] | None = None, update_norm_decay: float = 0.9, per_neuron: bool = True,
        zero_mean: bool = True, rotational: bool | None = None, neuron_dim: int = 0,
        neuron_speed: Callable[[Tensor], Tensor] | None = None, shadow: bool = True, **base_options: Any,
    ) -> None:  # fmt: skip
        self.base = _instance(base, params, base_options)
        self.shadow = shadow
        names = [cls.__name__ for cls in type(self.base).__mro__ if cls.__name__ in RULES]
        if rotation is None and not names:
            known = ", ".join(RULES)
            raise ValueError(f"rotation=None: {type(self.base).__name__} has no formula ({known} have); must be given")
        if shadow and reads_weights(self.base):
            raise ValueError(f"shadow=True: {type(self.base).__name__} reads the weights; must be False to show them")
        self._formula = RULES[names[0]] if names else ("", ())
        keys = {
            "rotation": "equilibrium" if rotation is None else rotation, "update_norm_decay": update_norm_decay,
            "per_neuron": per_neuron, "zero_mean": zero_mean, "rotational": rotational, "neuron_dim": neuron_dim,
            "neuron_speed": neuron_speed,
        }  # fmt: skip
        super().__init__(self.base.param_groups, {"weight_decay": 0.0, **self.base.defaults, **keys})
        self._share()
        if not any(self._wanted(group, p, i) for group in self.param_groups for i, p in enumerate(group["params"])):
            raise ValueError(
                "no tensor rotates: must have weight_decay > 0 and two dimensions, or rotational=True and a rotation"
            )

    def __getstate__(self) -> Group:
        kept = {key: self.__dict__[key] for key in ("base", "shadow", "_formula")}
        return {**super().__getstate__(), **kept}

    def load_state_dict(self, state_dict: Group) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, for the base's state and the rows' together."""
        super().load_state_dict(state_dict)
        self.base.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The loss if there is a closure, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        turning, stuck = self._turning()
        weights = [place.param.detach().clone() for place in turning]
        for place in turning:
            if self.shadow:
                place.param.zero_()
            if not bool(place.alive.all()):
                place.param.grad = torch.where(place.alive, place.grad, 0)
        self._base_step({id(place.param) for place in turning})
        for place, weight in zip(turning, weights, strict=True):
            direction = -place.param if self.shadow else weight - place.param
            place.param.copy_(weight)
            place.param.grad = place.grad
            self._turn(place, direction)
        for param in stuck:
            self.state[param]["rotates"] = False
        return loss

    def _turning(self) -> tuple[list["_Place"], list[Tensor]]:
        """Tensors with a gradient that rotate, and those at their first step that should and cannot."""
        turning, stuck = [], []
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                state = self.state.get(param) or {}
                if param.grad is None or not state.get("rotates", True):
                    continue
                rows = state if "norm" in state else self._start_rows(group, param, index)
                if rows is None:
                    stuck += [param] if self._wanted(group, param, index) else []
                    continue
                if param.grad.is_sparse:
                    raise RuntimeError(f"{self._name(group, index)} has a sparse gradient: not supported")
                dims = row_dims(param.ndim, group["neuron_dim"], group["per_neuron"])
                alive = torch.isfinite(param.grad).all(dim=dims, keepdim=True)
                turning.append(_Place(group, index, param, param.grad, rows, alive))
        return turning, stuck

    def _base_step(self, turning: set[int]) -> None:
        """One step of the base, its groups split into tensors that turn (lr 1, no decay) and others."""
        groups, parts = self.param_groups, []
        for group in groups:
            shared = {key: value for key, value in group.items() if key != "param_names"}
            for turns in (True, False):
                params = [param for param in group["params"] if (id(param) in turning) == turns]
                bare = {"lr": _one(group["lr"]), "weight_decay": 0.0} if turns else {}
                parts.append((group, {**shared, "params": params, **bare}))
        self.base.param_groups = [part for _, part in parts if part["params"]]
        try:
            self.base.step()
        finally:
            self.base.param_groups = groups
        for group, part in parts:
            # some optimizers keep counters in their groups
            kept = {key: value for key, value in part.items() if key not in ("params", "lr", "weight_decay")}
            group.update(kept if part["params"] else {})

    def _turn(self, place: "_Place", direction: Tensor) -> None:
        group, state = place.group, self.state[place.param]
        if "norm" not in state:
            state.update(place.rows, rotation_step=torch.zeros(()))
        rotational_update_(
            place.param, direction, state["norm"], state["update_norm_sq"], int(state["rotation_step"].add_(1)),
            rotation=self._rotation(group), update_norm_decay=group["update_norm_decay"], alive=place.alive,
            zero_mean=group["zero_mean"], neuron_dim=group["neuron_dim"], per_neuron=group["per_neuron"],
            speed=self._speed(group, place.param, place.number), lr=group["lr"], weight_decay=group["weight_decay"],
        )  # fmt: skip

    def _rule(self, group: Group) -> tuple[str, Group]:
        name, keys = self._formula
        if not name:
            base = type(self.base).__name__
            raise ValueError(f"rotation={group['rotation']!r}: {base} has no formula; must be radians")
        return name, {key: group[key] for key in keys}

    def _share(self) -> None:
        """One list of groups and one state for both optimizers."""
        self.base.param_groups = self.param_groups
        self.state = self.base.state


def reads_weights(optimizer: Optimizer) -> bool:
    """Does a step of this optimizer depend on the weights, decay aside? Tried on a twin; False if that cannot be."""
    accepted = inspect.signature(type(optimizer).__init__).parameters
    options = {key: value for key, value in optimizer.defaults.items() if key in accepted}
    options |= {"lr": 1.0} | ({"weight_decay": 0.0} if "weight_decay" in accepted else {})
    weight = torch.linspace(-1, 2, 16, dtype=torch.float64).view(4, 4)
    changes: list[Tensor] = []
    try:
        for start in (weight, 3 * weight + 1):
            param = torch.nn.Parameter(start.clone())
            twin = type(optimizer)([param], **options)
            for grad in (weight.flip(0), weight.t() ** 2):
                param.grad = grad.clone()
                twin.step()
            changes.append(start - param.detach())
    except Exception:  # whatever an unknown constructor or step may raise, the twin then says nothing
        return False
    return not torch.allclose(changes[0], changes[1], rtol=1e-6, atol=1e-9)


def _instance(base: Optimizer | type[Optimizer], params: Iterable[Any] | None, options: Group) -> Optimizer:
    """The base optimizer, built if `base` is a class."""
    if isinstance(base, type) and issubclass(base, Optimizer):
        if params is None:
            raise ValueError(f"params=None: must be given with the class {base.__name__}")
        base = base(params, **options)
    elif params is not None or options:
        raise ValueError(f"params and {sorted(options)}: must go to the base, which is an instance already")
    if not isinstance(base, Optimizer):
        raise TypeError(f"base={base!r}: must be a torch.optim.Optimizer or a class of one")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(f"base={type(base).__name__}: must not need a closure")
    return base


def _one(lr: float | Tensor) -> float | Tensor:
    return torch.ones_like(lr) if isinstance(lr, Tensor) else 1.0
