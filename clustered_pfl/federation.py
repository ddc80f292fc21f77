"""Many clients, each with a loss and a model, side by side: what the method and its baselines share.

Clients and models live in stacked tensors; gradients of all of them come from `torch.func`, so any loss written for one
model and one batch will do. Dimensions: R independent replicas (seeds), N clients, K models, D parameters of a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

Params = dict[str, Tensor]
Loss = Callable[[Params, Any], Tensor]
"""Parameters of one model and one client's batch -> scalar."""
MomentumStyle = Literal["heavy_ball", "ema"]


def module_loss(module: nn.Module, criterion: Callable[..., Tensor]) -> Loss:
    """Make a `Loss` of a module: a batch is a tuple (inputs ..., target), the loss criterion(module(inputs), target).

    Raises:
        ValueError: the module has running statistics (batch norm), which clients cannot share; use GroupNorm.
    """
    if any(isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats for m in module.modules()):
        raise ValueError(f"module={type(module).__name__}: has running statistics (batch norm), GroupNorm has none")

    def loss(params: Params, batch: Any) -> Tensor:
        *inputs, target = batch
        return criterion(functional_call(module, params, tuple(inputs)), target)

    return loss


def stack(modules: Sequence[nn.Module] | nn.Module, n: int | None = None) -> Params:
    """Parameters of several modules of one architecture, or of one module n times, with a leading axis (n, ...).

    Raises:
        ValueError: no module, or one module without n >= 1.
    """
    if isinstance(modules, nn.Module):
        if n is None or n < 1:
            raise ValueError(f"n={n}: must be >= 1, the number of copies of the one module")
        own = {name: p.detach() for name, p in modules.named_parameters()}
        return {name: p.expand(n, *p.shape).clone() for name, p in own.items()}
    if not modules:
        raise ValueError("modules=[]: must hold at least one module")
    each = [dict(m.named_parameters()) for m in modules]
    return {name: torch.stack([params[name].detach() for params in each]) for name in each[0]}


@dataclass(frozen=True)
class Layout:
    """Where each parameter lies in a flat vector of D numbers."""

    shapes: dict[str, torch.Size]

    @property
    def sizes(self) -> list[int]:
        """Numbers of each parameter."""
        return [shape.numel() for shape in self.shapes.values()]

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """(..., shape) each -> (..., D), a new tensor."""
        lead = {name: p.ndim - len(self.shapes[name]) for name, p in params.items()}
        rows = [params[name].reshape(*params[name].shape[: lead[name]], -1) for name in self.shapes]
        return torch.cat(rows, -1).detach().clone()

    def unflatten(self, flat: Tensor) -> Params:
        """(..., D) -> views (..., shape) each."""
        parts = zip(self.shapes.items(), flat.split(self.sizes, -1), strict=True)
        return {name: part.unflatten(-1, shape) if shape else part[..., 0] for (name, shape), part in parts}


class Federation:
    """Base of the method and its baselines: models, who uses which, gradients, momentum.

    Args:
        loss: parameters of one model and one client's batch -> scalar; see `module_loss`.
        params: stacked starts: name -> (N, ...), or (K, ...) where a baseline keeps K models; see `stack`.
        lr: learning rate eta, > 0; the attribute may be changed between steps.
        momentum: beta in [0, 1).
        momentum_style: "heavy_ball": m <- beta m + v; "ema": m <- beta m + (1 - beta) v. Both start with m = v.
        replicas: `params` and batches have one more leading axis R of independent simulations (seeds).
        seed: of whatever is drawn at random (groups, attacks); with replicas one number for all, or R of them.

    Raises:
        TypeError: a parameter is not a floating-point tensor.
        ValueError: a value out of range, or parameters that do not share their leading axes.
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        *,
        lr: float,
        momentum: float = 0.9,
        momentum_style: MomentumStyle = "heavy_ball",
        replicas: bool = False,
        seed: int | Sequence[int] = 0,
    ) -> None:
        check("lr", lr, lr > 0 and math.isfinite(lr), "> 0")
        check("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
        check("momentum_style", repr(momentum_style), momentum_style in ("heavy_ball", "ema"), "'heavy_ball' or 'ema'")
        self.lr, self.momentum, self.momentum_style, self.replicas = lr, momentum, momentum_style, replicas
        lead = 2 if replicas else 1
        _check_params(params, lead)
        self.layout = Layout({name: p.shape[lead:] for name, p in params.items()})
        flat = self.layout.flatten(params)
        self.models = flat if replicas else flat[None]  # (R, K, D)
        self.velocity: Tensor | None = None
        self.steps = 0
        seeds = [seed] * len(self.models) if isinstance(seed, int) else list(seed)
        check("seed", seed, len(seeds) == len(self.models), f"one number, or one a replica ({len(self.models)})")
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self._vector_loss = lambda flat, batch: loss(self.layout.unflatten(flat), batch)
        one = grad(self._vector_loss)
        self._own = vmap(one, randomness="different")
        self._pairs = _pairwise(one)
        self._pair_losses = _pairwise(self._vector_loss)

    def assignment(self) -> Tensor | None:
        """Which model each client uses, (R, N); None: client i uses model i."""
        return None

    def client_models(self) -> Tensor:
        """The flat model of every client, (R, N, D)."""
        chosen = self.assignment()
        return self.models if chosen is None else take(self.models, chosen)

    @property
    def params(self) -> Params:
        """The model of every client, name -> (N, ...), or (R, N, ...) with replicas."""
        flat = self.client_models()
        return self.layout.unflatten(flat if self.replicas else flat[0])

    def step(self, batches: Any) -> Any:
        """One round: every client has one batch; leaves of `batches` are (N, ...), or (R, N, ...) with replicas."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes from step to step, plain enough for torch.load(weights_only=True)."""
        state = {k: v for k, v in vars(self).items() if isinstance(v, Tensor | int | float) and not isinstance(v, bool)}
        return state | {"generators": [generator.get_state() for generator in self.generators]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name in [k for k, v in vars(self).items() if isinstance(v, Tensor) and k not in state]:
            setattr(self, name, None)  # not yet there at that time
        for name, value in state.items():
            if name != "generators":
                setattr(self, name, value.to(self.models.device, copy=True) if isinstance(value, Tensor) else value)
        for generator, value in zip(self.generators, state["generators"], strict=True):
            generator.set_state(value)

    def lift(self, batches: Any) -> Any:
        """Give batches their axis R."""
        return batches if self.replicas else pytree.tree_map(lambda x: x[None], batches)

    def lower(self, value: Tensor, dim: int = 0) -> Tensor:
        """Take the axis R away from a result where the user has none."""
        return value if self.replicas else value.squeeze(dim)

    def gradients(self, flat: Tensor, batches: Any) -> Tensor:
        """Gradient of every client's loss at its own row: flat (R, N, D), batches (R, N, ...) -> (R, N, D)."""
        joined = pytree.tree_map(lambda x: x.flatten(0, 1), batches)
        return self._own(flat.flatten(0, 1), joined).view_as(flat)

    def losses(self, batches: Any) -> Tensor:
        """Loss of every client on every model, (R, K, N)."""
        return self._pair_losses(self.models, batches)

    def accelerate(self, velocity: Tensor | None, gradient: Tensor) -> Tensor:
        """The next momentum; the first is the gradient itself, in both styles."""
        if velocity is None:
            return gradient.clone()
        if self.momentum_style == "ema":
            return velocity.lerp_(gradient, 1 - self.momentum)
        return velocity.mul_(self.momentum).add_(gradient)

    def descend(self, gradient: Tensor) -> None:
        """Momentum of a gradient (R, K, D), and a step of all models along it."""
        self.velocity = self.accelerate(self.velocity, gradient)
        self.models.add_(self.velocity, alpha=-self.lr)


def _pairwise(function: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    """Every model on every client's batch: flat (R, K, D), batches (R, N, ...) -> (R, K, N, ...)."""
    each = vmap(vmap(function, (None, 0), randomness="different"), randomness="different")
    # models outermost: torch's batching rule of mse_loss breaks where the target lacks an inner level
    return vmap(each, (1, None), out_dims=1, randomness="different")


def take(models: Tensor, chosen: Tensor) -> Tensor:
    """Rows of models (R, K, D) by chosen (R, N) -> (R, N, D)."""
    return models.gather(1, chosen[..., None].expand(-1, -1, models.shape[-1]))


def mean_by(values: Tensor, chosen: Tensor, count: int, divisor: Literal["members", "all"] = "members") -> Tensor:
    """Mean of values (R, N, D) over the clients of each of `count` models -> (R, count, D); zero where there is none.

    divisor: "members" of the model, or "all" N clients.
    """
    hot = nn.functional.one_hot(chosen, count).to(values.dtype)  # (R, N, count)
    members = hot.sum(1, keepdim=True).clamp_min(1) if divisor == "members" else values.shape[1]
    return (hot / members).transpose(1, 2) @ values


def check(name: str, value: object, ok: bool, allowed: str) -> None:
    """Raise ValueError `name=value: must be allowed` unless ok."""
    if not ok:
        raise ValueError(f"{name}={value}: must be {allowed}")


def whole(value: object, least: int) -> bool:
    """Whether value is an integer >= least."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_params(params: Mapping[str, Tensor], lead: int) -> None:
    if not params:
        raise ValueError("params={}: must hold at least one parameter")
    for name, p in params.items():
        if not isinstance(p, Tensor) or not p.is_floating_point():
            raise TypeError(f"params[{name!r}]: must be a floating-point tensor")
    leads = {tuple(p.shape[:lead]) for p in params.values()}
    if len(leads) != 1 or len(next(iter(leads))) < lead or 0 in next(iter(leads)):
        axes = "(R, N, ...)" if lead == 2 else "(N, ...)"
        raise ValueError(f"params: leading axes {sorted(leads)}, must be the same {axes} in all of them, none empty")
