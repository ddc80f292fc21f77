"""Lion as published, and kin of the rotational variants to compare with.

The kin share the paper's theme, control of an update relative to its weight, and differ in what they control:

| class | held fixed or bounded | per | weight decay |
|---|---|---|---|
| `Hyperball` | norm and step/norm ratio, ‖Δ‖ = η‖w‖ | tensor or row | none |
| `UpdateFloor` | ‖Δ‖ ≥ floor·η‖w‖ | row | decoupled |
| `AdamP` | radial part of the update, to 0, where the loss looks scale-invariant | row, else tensor | decoupled |
| `LAMB` | ‖Δ‖ = η‖w‖ | tensor | inside the update |
| `Nero` | norm and mean of each row; step by the row's RMS gradient | row | none |

Each is implemented from the equation in its docstring, not from its authors' code; O(parameters) a step. Where a norm
is that of a whole tensor, `n_models` = M says that the tensor holds M networks along its first axis, each a tensor of
its own.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class _Relative(Optimizer):
    """Closure, checks and gathering of tensors; a subclass says how to update those of one group."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `torch.optim.Optimizer`, with the ranges of the group's values checked (ValueError)."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for key in ("lr", "weight_decay", "eps", "delta", "floor"):
            if key in group and not 0 <= group[key] < math.inf:
                self._refuse(key, group[key], ">= 0 and finite")
        if group.get("n_models", 1) < 1:
            self._refuse("n_models", group["n_models"], ">= 1")
        for key in ("betas", "beta", "decay_ratio"):
            values = group.get(key, ())
            for value in values if isinstance(values, tuple | list) else (values,):
                # 1 is a ratio, but no decay rate of an average
                if not 0 <= value < 1 and not (key == "decay_ratio" and value == 1):
                    self._refuse(key, values, "in [0, 1]" if key == "decay_ratio" else "in [0, 1)")

    def _refuse(self, key: str, value: Any, allowed: str) -> None:
        self.param_groups.pop()
        raise ValueError(f"{key}={value}: must be {allowed}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns the closure's value.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            if params:
                self._update(group, params, [p.grad for p in params])
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        raise TypeError(f"{type(self).__name__} does not define an update")

    def _buffers(self, params: list[Tensor], name: str) -> list[Tensor]:
        """State tensors like the parameters, zero at first."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return [self.state[p][name] for p in params]

    def _adam_direction(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        """u = (m/(1−β1^t)) / (√(v/(1−β2^t)) + eps), m and v moments of the raw gradient; one tensor a parameter."""
        beta1, beta2 = group["betas"]
        m, v = self._buffers(params, "exp_avg"), self._buffers(params, "exp_avg_sq")
        torch._foreach_lerp_(m, grads, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
        steps = [self._tick(p) for p in params]
        denominator = torch._foreach_sqrt(v)
        torch._foreach_div_(denominator, [math.sqrt(1 - beta2**t) for t in steps])
        torch._foreach_add_(denominator, group["eps"])
        direction = torch._foreach_div(m, denominator)
        torch._foreach_div_(direction, [1 - beta1**t for t in steps])
        return list(direction)

    def _tick(self, p: Tensor) -> int:
        state = self.state[p]
        state["step"] = state.get("step", 0) + 1
        return state["step"]

    def _views(self, group: dict[str, Any], *tensors: Tensor) -> list[Tensor]:
        """Tensors (K, …) as views (M, K/M, …) of the group's M networks."""
        models = group.get("n_models", 1)
        if models == 1:
            return [x.unsqueeze(0) for x in tensors]
        if tensors[0].shape[0] % models or group.get("neuron_dim", 0):
            shape = tuple(tensors[0].shape)
            raise ValueError(f"n_models={models}: must divide the first, neuron axis of a parameter of shape {shape}")
        return [x.unflatten(0, (models, -1)) for x in tensors]

    @staticmethod
    def _rotates(group: dict[str, Any], p: Tensor) -> bool:
        """Whether p is a matrix of neurons: the group's `rotational` where given, else by its axes."""
        rotational = group.get("rotational")
        return p.ndim > 1 if rotational is None else bool(rotational)


class Lion(_Relative):
    """Lion: u = sign(β1 m + (1−β1) g);  p ← (1 − ηλ) p − η u;  m ← β2 m + (1−β2) g.

    Args:
        params: parameters or groups.
        lr: η ≥ 0.
        betas: (β1, β2) in [0, 1).
        weight_decay: λ ≥ 0, decoupled.

    Raises:
        ValueError: a value out of range.

    Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms" (arXiv 2302.06675).
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        m = self._buffers(params, "exp_avg")
        direction = torch._foreach_lerp(m, grads, 1 - beta1)
        torch._foreach_sign_(direction)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, list(direction), alpha=-lr)
        torch._foreach_lerp_(m, grads, 1 - beta2)


class Hyperball(_Relative):
    """Fixed norm, fixed relative step: w ← R·normalise(w − ηR·u/‖u‖) with AdamW's direction u and R = ‖w_0‖.

    Norms are those of the whole tensor, or of each neuron with `per_neuron`. Other parameters (one axis, or a group
    with rotational=False) follow AdamW. A tensor or row of norm 0 stays 0. Kin of the rotational variants with f = 0,
    without centring and projection; the angle is set by η directly and not by λ.

    Args:
        params: parameters or groups; keys `rotational` (None: more than one axis) and `neuron_dim` (0) a group.
        lr: η ≥ 0, relative to the norm for fixed-norm tensors.
        betas: (β1, β2) in [0, 1).
        eps: ≥ 0, in the direction's denominator.
        weight_decay: λ ≥ 0, decoupled; for the other parameters only.
        per_neuron: one norm a neuron instead of one a tensor.
        n_models: networks stacked along the first axis, ≥ 1.

    Raises:
        ValueError: a value out of range.

    Source: the fixed-norm ("hyperball") updates of 2025 speed-run practice; no paper is cited for the exact form.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, per_neuron: bool = False, n_models: int = 1,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "per_neuron": per_neuron}
        super().__init__(params, {**defaults, "n_models": n_models})

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr = group["lr"]
        for p, u in zip(params, self._adam_direction(group, params, grads), strict=True):
            if not self._rotates(group, p):
                p.mul_(1 - lr * group["weight_decay"]).add_(u, alpha=-lr)
                continue
            w, d = self._views(group, p, u)
            dims = _axes(w, group if group["per_neuron"] else None)
            if "norm" not in self.state[p]:
                self.state[p]["norm"] = _norm(w, dims)  # R
            norm = self.state[p]["norm"]
            w.addcmul_(d, norm * _inverse(_norm(d, dims)), value=-lr)
            w.mul_(norm * _inverse(_norm(w, dims)))


class UpdateFloor(_Relative):
    """AdamW whose rows never step less than `floor`·η of their norm: Δ = η·u·max(1, floor·‖w‖/‖u‖), per row.

    Plain AdamW lets a long row turn slowly; the floor keeps every row's update-to-weight ratio above a bound, as the
    equilibrium does after its transient. floor = 0 is AdamW. Parameters of one axis follow AdamW.

    Args:
        params: parameters or groups; keys `rotational` (None: more than one axis) and `neuron_dim` (0) a group.
        lr: η ≥ 0.
        betas: (β1, β2) in [0, 1).
        eps: ≥ 0.
        weight_decay: λ ≥ 0, decoupled.
        floor: smallest ‖Δ‖/(η‖w‖), ≥ 0.

    Raises:
        ValueError: a value out of range.

    Source: per-row update-to-weight floors of 2025 speed-run practice; no paper is cited for the exact form.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, floor: float = 1.0,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "floor": floor})

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr = group["lr"]
        for p, u in zip(params, self._adam_direction(group, params, grads), strict=True):
            if self._rotates(group, p):
                w, d = p.unsqueeze(0), u.unsqueeze(0)
                dims = _axes(w, group)
                d.mul_((group["floor"] * _norm(w, dims) * _inverse(_norm(d, dims))).clamp_min_(1))
            p.mul_(1 - lr * group["weight_decay"]).add_(u, alpha=-lr)


class AdamP(_Relative):
    """AdamW that drops the radial part of the update where gradients look orthogonal to the weights.

    With rows first and the whole tensor second: if max |cos(w, g)| < δ/√n, n the length of a row, then
    u ← u − ŵ⟨ŵ, u⟩ and λ ← ρλ; then w ← (1 − ηλ) w − ηu. Removing the radial part stops the growth of the norm by
    momentum; rotational variants stop the growth altogether. Parameters of one axis follow AdamW.

    Args:
        params: parameters or groups; keys `rotational` (None: more than one axis) and `neuron_dim` (0) a group.
        lr: η ≥ 0.
        betas: (β1, β2) in [0, 1).
        eps: ≥ 0.
        weight_decay: λ ≥ 0, decoupled.
        delta: δ ≥ 0, threshold on the cosine.
        decay_ratio: ρ in [0, 1], share of the weight decay left where the update is projected.
        n_models: networks stacked along the first axis, ≥ 1.

    Raises:
        ValueError: a value out of range.

    Source: Heo et al. 2021, "AdamP" (arXiv 2006.08217), without Nesterov; from memory.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, delta: float = 0.1, decay_ratio: float = 0.1, n_models: int = 1,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "delta": delta, "decay_ratio": decay_ratio, "n_models": n_models})

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        lr, decay = group["lr"], group["weight_decay"]
        directions = self._adam_direction(group, params, grads)
        for p, g, u in zip(params, grads, directions, strict=True):
            if not self._rotates(group, p):
                p.mul_(1 - lr * decay).add_(u, alpha=-lr)
                continue
            w, g, u = self._views(group, p, g, u)
            free, step = w.new_ones((len(w), *[1] * (w.ndim - 1)), dtype=torch.bool), u  # (M, 1, …), (M, K/M, …)
            for dims in (_axes(w, group), _axes(w)):
                unit = w * _inverse(_norm(w, dims))
                cosine = (unit * g).sum(dims, keepdim=True) * _inverse(_norm(g, dims))
                bound = group["delta"] / math.sqrt(w.numel() / cosine.numel())
                orthogonal = free & (cosine.abs().amax(_axes(w), keepdim=True) < bound)
                step = torch.where(orthogonal, u - unit * (unit * u).sum(dims, keepdim=True), step)
                free = free & ~orthogonal
            share = torch.where(free, w.new_ones(()), group["decay_ratio"])
            w.mul_(1 - lr * decay * share).add_(step, alpha=-lr)


class LAMB(_Relative):
    """Layer-wise trust ratio: r = u + λw with AdamW's direction u;  w ← w − η·(‖w‖/‖r‖)·r, the ratio 1 if a norm is 0.

    It fixes ‖Δ‖/‖w‖ = η a tensor, so like the rotational variants it balances tensors (not neurons); weight decay sits
    inside the normalised update and only bends its direction. Parameters of one axis take ratio 1.

    Args:
        params: parameters or groups; key `rotational` (None: more than one axis) a group.
        lr: η ≥ 0.
        betas: (β1, β2) in [0, 1).
        eps: ≥ 0.
        weight_decay: λ ≥ 0.
        n_models: networks stacked along the first axis, ≥ 1.

    Raises:
        ValueError: a value out of range.

    Source: You et al. 2020, "Large Batch Optimization for Deep Learning" (arXiv 1904.00962), with the identity for its
    scaling function φ; from memory.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
        weight_decay: float = 0.0, n_models: int = 1,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "n_models": n_models})

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        update = self._adam_direction(group, params, grads)
        torch._foreach_add_(update, params, alpha=group["weight_decay"])
        for p, r in zip(params, update, strict=True):
            if self._rotates(group, p):
                w, r = self._views(group, p, r)
                size, length = _norm(w, _axes(w)), _norm(r, _axes(w))
                r.mul_(torch.where((size > 0) & (length > 0), size * _inverse(length), 1))
        torch._foreach_add_(params, update, alpha=-group["lr"])


class Nero(_Relative):
    """Per-neuron normalised descent on centred rows of fixed norm.

    v ← βv + (1−β)‖g‖² per row;  w ← w − ηN·g/√(v/(1−β^t));  w ← w − mean(w);  w ← N·w/‖w‖,  N = ‖w_0‖ after centring.

    Rotational SGD without momentum and projection, and with a norm average of the raw gradient. Other parameters (one
    axis, or rotational=False) step elementwise, p ← p − ησ·g/√(v/(1−β^t)), σ the RMS of p_0, or .01 if that is 0. A row
    of one coordinate or of norm 0 is left as it is; a zero gradient gives no step. There is no weight decay.

    Args:
        params: parameters or groups; keys `rotational` (None: more than one axis) and `neuron_dim` (0) a group.
        lr: η ≥ 0, relative to the norm.
        beta: β in [0, 1).
        n_models: networks stacked along the first axis, ≥ 1; matters for σ only.

    Raises:
        ValueError: a value out of range.

    Source: Liu et al. 2021, "Learning by Turning" (arXiv 2102.07227), with the initial norm in place of norm 1 (the
    same for a scale-invariant network); from memory.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, beta: float = 0.999, n_models: int = 1) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "n_models": n_models})

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> None:
        beta = group["beta"]
        for p, g in zip(params, grads, strict=True):
            state, rows = self.state[p], self._rotates(group, p)
            w, g = self._views(group, p, g)
            dims = _axes(w, group if rows else None)
            square = g.square().sum(dims, keepdim=True) if rows else g.square()
            if "scale" not in state:
                if rows:
                    w.sub_(w.mean(dims, keepdim=True))
                rms = w.square().mean(dims, keepdim=True).sqrt()
                state["scale"] = _norm(w, dims) if rows else torch.where(rms > 0, rms, 0.01)
                state["exp_avg_sq"] = torch.zeros_like(square)
            state["exp_avg_sq"].lerp_(square, 1 - beta)
            root = (state["exp_avg_sq"] / (1 - beta ** self._tick(p))).sqrt_()
            w.addcmul_(g, state["scale"] * _inverse(root), value=-group["lr"])
            if rows:
                w.sub_(w.mean(dims, keepdim=True))
                w.mul_(state["scale"] * _inverse(_norm(w, dims)))


def _axes(views: Tensor, group: dict[str, Any] | None = None) -> tuple[int, ...]:
    """Axes of one neuron in (M, K, …), all but the first and the group's neuron axis; of a tensor, without a group."""
    kept = (0,) if group is None else (0, 1 + group.get("neuron_dim", 0))
    return tuple(axis for axis in range(views.ndim) if axis not in kept)


def _norm(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Euclidean norm over `dims`, which stay as axes of size 1."""
    return torch.linalg.vector_norm(x, dim=dims, keepdim=True)


def _inverse(x: Tensor) -> Tensor:
    """1/x, and 0 for 0: a vector without length gets no direction."""
    return torch.where(x > 0, 1 / x, 0)
