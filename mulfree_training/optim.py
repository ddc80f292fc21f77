"""AdamW and SGD whose steps multiply nothing: every product is PAM, the quotient PAD, the root a shift of the pattern.

Parameters are float32, or float64 (on the reference face, slow). bfloat16 is refused: its moments would lose the small
terms that decay adds; keep float32 parameters and cast the weights where they are used. Parameters may be sharded
(`fully_shard`): a step works on the entries that a process holds, and the states are sharded as their parameters.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from mulfree_training.bits import FLOAT32, pattern
from mulfree_training.formulas import AdamWNumbers
from mulfree_training.operators import ops

Group = dict[str, Any]
Scalars = Literal["exact", "pam"]


class _Optimizer(Optimizer):
    """What both share: groups are checked when they are added or loaded, and a step takes a closure."""

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with their own settings.

        Raises:
            TypeError: a parameter that is neither float32 nor float64.
            ValueError: a setting outside its range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
            for param in group["params"]:
                if param.dtype not in (torch.float32, torch.float64):
                    raise TypeError(f"parameter of dtype {param.dtype}: must be float32 or float64")
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: Group) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; settings that it lacks keep their present values.

        Raises:
            ValueError: groups that do not match, or a setting outside its range; nothing is loaded then.
        """
        present = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        for own, loaded in zip(present, state_dict["param_groups"], strict=False):
            self._check({**own, **loaded})
        super().load_state_dict(state_dict)
        for group, before in zip(self.param_groups, present, strict=True):
            for key, value in before.items():
                group.setdefault(key, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: computes the loss anew, with gradients, and returns it.

        Returns: the closure's loss, or None.

        Raises:
            TypeError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if any(param.grad.is_sparse for param in params):
                raise TypeError("gradient with a sparse layout: must be dense")
            if params:
                grads = [_placed(-param.grad if group["maximize"] else param.grad, param) for param in params]
                self._update(group, params, grads)
        return loss

    def __setstate__(self, state: Group) -> None:
        """Restore a state; a step that is a Python number, as old checkpoints have it, becomes a tensor."""
        super().__setstate__(state)
        for own in self.state.values():
            if "step" in own and not isinstance(own["step"], Tensor):
                own["step"] = _single(float(own["step"]))

    def _check(self, group: Group) -> None:
        """Refuse settings outside their range with a ValueError."""
        for key in ("lr", "weight_decay"):
            _require(key, group[key], 0 <= float(group[key]) < math.inf, "finite and >= 0")

    def _update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        raise NotImplementedError


def _local(x: Tensor) -> Tensor:
    """The entries of a DTensor that this process holds; other tensors as they are."""
    return x.to_local() if hasattr(x, "to_local") else x


def _placed(grad: Tensor, param: Any) -> Tensor:
    """A gradient, distributed as its parameter is if that is a DTensor."""
    same = not hasattr(param, "to_local") or grad.placements == param.placements  # type: ignore[attr-defined]
    return grad if same else grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]


def _require(key: str, value: Any, good: bool, allowed: str) -> None:
    if not good:
        raise ValueError(f"{key}={value!r}: must be {allowed}")


class PAMAdamW(_Optimizer):
    """AdamW of piecewise affine operations; state dicts load to and from `torch.optim.AdamW`.

    m <- PAM(m, b1) + PAM(g, 1 - b1); v <- PAM(v, b2) + PAM(PAM(g, g), 1 - b2); p <- p - PAM(p, wd lr); then
    p <- p - PAM(PAD(m, sqrt v + eps), lr sqrt(1 - b2^t) / (1 - b1^t)). In contrast to `torch.optim.AdamW`, eps is added
    to the root before the bias is corrected, as the official code does.

    Args:
        params: tensors, or groups of them; float32 or float64.
        lr: learning rate, a number or a tensor with one element; schedulers may change it.
        betas: decay of the two moments, in [0, 1).
        eps: added to the uncorrected root.
        weight_decay: decoupled, times lr.
        foreach: one call for all tensors of a group, or one a tensor: the same bits.
        scalars: how the few numbers of a step (wd lr, and the bias-corrected step size) are computed: `exact` in
            float64 on the host, as the official code does, or `pam`, with no multiplication either: powers of the betas
            are repeated PAM, and the rest PAM, PAD and the piecewise affine root.
        maximize: ascend.

    Raises:
        TypeError: parameters of another dtype.
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        foreach: bool = True,
        scalars: Scalars = "exact",
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "foreach": foreach, "scalars": scalars, "maximize": maximize})

    def _check(self, group: Group) -> None:
        super()._check(group)
        _require("eps", group["eps"], 0 <= group["eps"] < math.inf, "finite and >= 0")
        betas = tuple(group["betas"])
        _require("betas", betas, len(betas) == 2 and all(0 <= b < 1 for b in betas), "two numbers in [0, 1)")
        _require("scalars", group["scalars"], group["scalars"] in ("exact", "pam"), "exact or pam")
        _require("amsgrad", True, not group.get("amsgrad"), "False, there is no such variant here")

    def _update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        # one call takes tensors of one dtype on one device that are at the same step
        calls: dict[tuple[Any, ...], list[tuple[Tensor, ...]]] = defaultdict(list)
        for param, grad in zip(params, grads, strict=True):
            state = self.state[param]
            if not state:
                state["step"] = _single(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
            state["step"] += 1
            key = (param.dtype, param.device, int(state["step"].item()))
            alone = () if group["foreach"] in (True, None) else (len(calls),)
            calls[(*key, *alone)].append((param, grad, state["exp_avg"], state["exp_avg_sq"]))
        for (_, _, step, *_), tensors in calls.items():
            columns = [list(column) for column in zip(*tensors, strict=True)]
            ops.adamw_(*([_local(x) for x in column] for column in columns), *adamw_numbers(group, step))
            for written in (columns[0], columns[2], columns[3]):
                torch.autograd.graph.increment_version(written)


def adamw_numbers(group: Group, step: int) -> AdamWNumbers:
    """The numbers of one step, counted from 1, by the group's `lr`, `betas`, `eps`, `weight_decay` and `scalars`."""
    (beta1, beta2), lr, decay, eps = group["betas"], float(group["lr"]), group["weight_decay"], group["eps"]
    beta1, beta2 = float(beta1), float(beta2)
    if group["scalars"] == "exact":
        size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
        return AdamWNumbers(beta1, 1 - beta1, beta2, 1 - beta2, eps, decay * lr, size)
    one, rate, on = _single(1.0), _single(lr), "reference"
    root = ops.sqrt(one - _power(beta2, step), on)
    size = ops.div(ops.mul(rate, root, 0, on), one - _power(beta1, step), 0, on)
    rests = [(one - _single(beta)).item() for beta in (beta1, beta2)]
    shrink = ops.mul(_single(float(decay)), rate, 0, on)
    return AdamWNumbers(beta1, rests[0], beta2, rests[1], eps, shrink.item(), size.item())


def _single(x: float) -> Tensor:
    """A number in float32 on the host, whatever PyTorch's defaults are."""
    return torch.tensor(x, dtype=torch.float32, device="cpu")


_reached: dict[float, tuple[int, int]] = {}
"""beta -> the last step asked for, and the pattern of its power."""


def _power(beta: float, step: int) -> Tensor:
    """beta^step by repeated PAM, float32 (): each adds the same integer to the pattern, until it underflows to 0.

    A function of the step alone, so that there is nothing to save, and a run resumes with the same bits.
    """
    first = pattern(beta)
    at, size = _reached.get(beta, (1, first))
    if at > step:
        at, size = 1, first
    for _ in range(step - at):
        size = size + (first - FLOAT32.one) if size >= FLOAT32.smallest else 0
    _reached[beta] = (step, size)
    size = size if size >= FLOAT32.smallest else 0
    return torch.tensor(size, dtype=torch.int32, device="cpu").view(torch.float32)


class PAMSGD(_Optimizer):
    """SGD of piecewise affine operations, the update of `torch.optim.SGD`; state dicts load both ways.

    g <- g + PAM(p, wd); b <- PAM(b, momentum) + g (at first g); p <- p - PAM(b, lr), with Nesterov's momentum
    p <- p - PAM(g + PAM(b, momentum), lr).

    Args:
        params: tensors, or groups of them; float32 or float64.
        lr: learning rate, a number or a tensor with one element; schedulers may change it.
        momentum: in [0, 1).
        weight_decay: coupled, added to the gradient.
        nesterov: look ahead; needs momentum.
        maximize: ascend.

    Raises:
        TypeError: parameters of another dtype.
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        # torch.optim.SGD cannot load a state without its dampening
        super().__init__(params, {**defaults, "dampening": 0, "maximize": maximize})

    def _check(self, group: Group) -> None:
        super()._check(group)
        _require("momentum", group["momentum"], 0 <= group["momentum"] < 1, "in [0, 1)")
        _require("momentum", group["momentum"], group["momentum"] or not group["nesterov"], "> 0 for nesterov=True")
        _require("dampening", group.get("dampening", 0), not group.get("dampening"), "0, there is none here")

    def _update(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        for param, whole in zip(params, grads, strict=True):
            own, grad = _local(param), _local(whole)
            if decay:
                grad = grad + _times(own, decay)
            if momentum:
                state = self.state[param]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.empty_like(param)
                    buffer = _local(state["momentum_buffer"]).copy_(grad)
                else:
                    buffer = _local(state["momentum_buffer"])
                    buffer.copy_(_times(buffer, momentum) + grad)
                grad = grad + _times(buffer, momentum) if group["nesterov"] else buffer
            own.sub_(_times(grad, lr))
            if own is not param:
                torch.autograd.graph.increment_version(param)


def _times(x: Tensor, factor: float) -> Tensor:
    return ops.mul(x, x.new_full((), factor).expand_as(x), 0)
