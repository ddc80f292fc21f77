"""Which tensors of a group rotate, their row state, and state dicts that keep it: shared by all rotational optimizers.

A parameter is rotational, or it follows the base optimizer bit for bit. The group's key `rotational` decides; None
means every tensor of two or more axes whose group has weight decay. A tensor that has no angle (fan-in 1, all zero,
constant rows under zero mean) falls back to the base optimizer with a warning, and is refused where the group says
`rotational=True`. The decision falls at a tensor's first step and stays.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rotational_optimizers.equilibrium import equilibrium_rotation
from rotational_optimizers.update import prepare_rows_, row_dtype

Group = dict[str, Any]
MODES = ("equilibrium", "exact", "paper")
ROW_STATE = ("norm", "update_norm_sq")
LOW_PRECISION = (torch.bfloat16, torch.float16)


class RowOptimizer(Optimizer):
    """An optimizer whose groups carry the rotation's keys and whose rotational tensors have row state."""

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        self._reported: set[int] = set()
        super().__init__(params, defaults)

    def __setstate__(self, state: Group) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_reported", set())

    def add_param_group(self, param_group: Group) -> None:
        """Add a group of parameters; its rotational tensors are centred at once.

        Args:
            param_group: "params" and any of the constructor's keys.

        Raises:
            ValueError: a value out of range, or a tensor that cannot rotate although the group says `rotational=True`.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
            for index, param in enumerate(group["params"]):
                if self._wanted(group, param, index) and not param.is_meta:
                    self._prepare(group, param, index)
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> Group:
        """As `torch.optim.Optimizer.state_dict`; values that are functions (`rotation`, `neuron_speed`) stay out."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            for key in [key for key, value in group.items() if callable(value)]:
                del group[key]
        return packed

    def load_state_dict(self, state_dict: Group) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, bit for bit; group keys it lacks keep their present values.

        Raises:
            ValueError: groups or tensors do not match this optimizer's; nothing is loaded then.
        """
        present = [dict(group) for group in self.param_groups]
        saved = dict(self._saved_states(state_dict))
        for param, (group, state) in saved.items():
            self._check_state(param, group, state)
        super().load_state_dict(state_dict)
        for group, before in zip(self.param_groups, present, strict=True):
            for key, value in before.items():
                group.setdefault(key, value)
        # torch casts state to the parameter's dtype; rows and masters of low-precision weights are float32
        for param, (_, state) in saved.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and key != "step":
                    self.state[param][key] = value.to(param.device, copy=True)

    def _saved_states(self, state_dict: Group) -> Iterator[tuple[Tensor, tuple[Group, Group]]]:
        """(parameter, (its saved group, its saved state)), where the groups match; torch refuses the rest."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for param, number in zip(group["params"], saved["params"], strict=False):
                if number in state_dict["state"]:
                    yield param, ({**group, **saved}, state_dict["state"][number])

    def _check_state(self, param: Tensor, saved: Group, state: Group) -> None:
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            expected = (self._row_count(saved, param),) if key in ROW_STATE else tuple(param.shape)
            if tuple(value.shape) != expected:
                name = self._name(*self._place(param))
                raise ValueError(f"state_dict: {key} of {name} has shape {tuple(value.shape)}, must be {expected}")

    def _check(self, group: Group) -> None:
        """Ranges of the keys that every rotational optimizer has."""
        require(group, "lr", lambda lr: lr >= 0, ">= 0")
        require(group, "weight_decay", lambda decay: decay >= 0, ">= 0")
        require(group, "update_norm_decay", lambda f: 0 <= f < 1, "in [0, 1)")
        require(group, "rotational", lambda flag: flag is None or isinstance(flag, bool), "True, False or None")
        rotation = group["rotation"]
        if isinstance(rotation, str):
            require(group, "rotation", lambda mode: mode in MODES, f"one of {MODES}, radians or a function")
        elif rotation is not None and not callable(rotation):
            require(group, "rotation", lambda angle: 0 <= angle < math.inf, "finite and >= 0")
        if group["neuron_speed"] is not None and not callable(group["neuron_speed"]):
            raise TypeError(f"neuron_speed={group['neuron_speed']!r}: must be a function of the parameter, or None")
        if group["rotational"] and group["weight_decay"] == 0 and (rotation is None or isinstance(rotation, str)):
            raise ValueError(
                "weight_decay=0 with rotational=True: the equilibrium rotation is 0; must be > 0, or rotation be given"
            )

    def _wanted(self, group: Group, param: Tensor, index: int) -> bool:
        """Do the keys say that this parameter rotates?"""
        asked = group["rotational"]
        fits = param.is_floating_point() and param.ndim > (1 if group["per_neuron"] else 0)
        if asked and not fits:
            raise ValueError(
                f"{self._name(group, index)} with rotational=True: shape {tuple(param.shape)}, {param.dtype} has no "
                "rows to rotate; must be floating point with at least two dimensions"
            )
        wanted = asked if asked is not None else fits and param.ndim > 1 and group["weight_decay"] != 0
        if wanted and not -param.ndim <= group["neuron_dim"] < param.ndim:
            raise ValueError(
                f"neuron_dim={group['neuron_dim']}: must be in [{-param.ndim}, {param.ndim}) for "
                f"{self._name(group, index)} of shape {tuple(param.shape)}"
            )
        return wanted and param.numel() > 0

    def _prepare(self, group: Group, param: Tensor, index: int) -> Tensor:
        """Centre the rows in place and return their norms (K,), 0 where a row cannot rotate, which is reported."""
        layout = {key: group[key] for key in ("zero_mean", "neuron_dim", "per_neuron")}
        rows = self._row_count(group, param)
        # one coordinate has no direction, and of two centred ones only the length is free
        if param.numel() // rows <= (2 if group["zero_mean"] else 1):
            norm = torch.zeros(rows, dtype=row_dtype(param), device=param.device)
        else:
            norm = prepare_rows_(param, **layout)
        if not bool(norm.all()):
            self._report(group, param, index, norm)
        return norm

    def _report(self, group: Group, param: Tensor, index: int, norm: Tensor) -> None:
        """A tensor without any row that can rotate is an error if rotation was asked for; else warn, once a tensor."""
        stuck = (norm == 0).nonzero().flatten().tolist()
        which = "no row" if len(stuck) == norm.numel() else f"{len(stuck)} of {norm.numel()} rows, {stuck[:5]},"
        reason = f"fan-in {param.numel() // norm.numel()}, or all zero, or constant under zero_mean=True"
        text = f"{self._name(group, index)} of shape {tuple(param.shape)}: {which} can rotate ({reason})"
        if len(stuck) < norm.numel():
            text = text.replace("can rotate", "cannot rotate")
        elif group["rotational"]:
            raise ValueError(f"{text}; must be rotational=None or False")
        if id(param) not in self._reported:
            self._reported.add(id(param))
            warnings.warn(f"{text}; the base optimizer's step is taken there", stacklevel=6)

    def _start_rows(self, group: Group, param: Tensor, index: int) -> Group | None:
        """Row state of a tensor at its first step, or None if it follows the base optimizer."""
        if not self._wanted(group, param, index):
            return None
        norm = self._prepare(group, param, index)
        return {"norm": norm, "update_norm_sq": torch.zeros_like(norm)} if bool(norm.any()) else None

    def _rule(self, group: Group) -> tuple[str, Group]:
        """Name of the equilibrium formula and the hyper-parameters it takes beside lr and weight decay."""
        raise ValueError(f"rotation={group['rotation']!r}: no formula for {type(self).__name__}; must be radians")

    def _rotation(self, group: Group) -> float | Tensor:
        """η_r of this step, from the group's present lr."""
        rotation = group["rotation"]
        if callable(rotation):
            angle = rotation(group)
            if not isinstance(angle, Tensor) and not 0 <= angle < math.inf:
                raise ValueError(f"rotation(group)={angle}: must be finite and >= 0")
            return angle
        if not isinstance(rotation, str):
            return rotation
        name, values = self._rule(group)
        if rotation == "paper":
            # the paper's code takes the formula without look-ahead for Nesterov's momentum too
            name, values = {"nadam": "adamw"}.get(name, name), {**values, "nesterov": False}
        values |= {"lr": group["lr"], "weight_decay": group["weight_decay"]}
        return equilibrium_rotation(name, exact=rotation == "exact", **values)

    def _speed(self, group: Group, param: Tensor, index: int) -> Tensor | None:
        """Factors on the rows' rotation, (K,)."""
        if group["neuron_speed"] is None:
            return None
        speed = group["neuron_speed"](param)
        if speed.shape != (self._row_count(group, param),):
            rows, name = self._row_count(group, param), self._name(group, index)
            raise ValueError(f"neuron_speed of {name}: shape {tuple(speed.shape)}, must be ({rows},)")
        return speed

    def _row_count(self, group: Group, param: Tensor) -> int:
        return param.shape[group["neuron_dim"]] if group["per_neuron"] else 1

    def _place(self, param: Tensor) -> tuple[Group, int]:
        for group in self.param_groups:
            for index, other in enumerate(group["params"]):
                if other is param:
                    return group, index
        raise KeyError("parameter is in no group")

    def _name(self, group: Group, index: int) -> str:
        """What to call a parameter in a message."""
        if "param_names" in group:
            return f"parameter {group['param_names'][index]!r}"
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        return f"parameter {index} of group {number}"


def require(group: Group, key: str, holds: Callable[[Any], Any], allowed: str) -> None:
    """Check one key of a group.

    Raises:
        ValueError: `holds(group[key])` is false.
        TypeError: the value is of a type that cannot be compared.
    """
    try:
        good = bool(holds(group[key]))
    except TypeError as error:
        raise TypeError(f"{key}={group[key]!r}: must be {allowed}") from error
    if not good:
        raise ValueError(f"{key}={group[key]!r}: must be {allowed}")


def require_betas(group: Group) -> None:
    """Two numbers in [0, 1), else ValueError."""
    require(group, "betas", lambda betas: len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers in [0, 1)")
