"""One step of a rotational optimizer, by the fastest of three equal forms.

`update.rotational_update_` is the plain form; `kernels.native` does all tensors in one pass of C; `kernels.foreach`
needs no compiler. `fused` and `foreach` choose as in torch: with both None, tensor by tensor, native on contiguous
float32 CPU tensors, in-place passes on other contiguous ones, and the plain form for the rest (strided weights, low
precision without a master copy). `capturable=True` and `torch.compile`, which fuses it, take the plain form.
`fused=True` means native where it fits. Parameters that do not rotate have the flags passed on to torch's own step.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rotational_optimizers.base import LOW_PRECISION, Group, RowOptimizer
from rotational_optimizers.kernels import foreach, native
from rotational_optimizers.update import rotational_update_, row_dims, row_dtype

Moments = tuple[Tensor, ...]
Pair = tuple[Tensor, Tensor]


class Turn(NamedTuple):
    """One rotational tensor in one step."""

    weight: Tensor  # the parameter itself, or its float32 master copy
    grad: Tensor
    moments: Moments
    step: Tensor  # (), this step included
    norm: Tensor  # (K,)
    update_norm_sq: Tensor  # (K,)
    speed: Tensor | None  # (K,)


class RotationalOptimizer(RowOptimizer, ABC):
    """Base class: a subclass gives its base optimizer's direction in three forms, and the base optimizer's own step."""

    _moments: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def _direction(
        self, group: Group, grad: Tensor, weight: Tensor, moments: Moments, step: int | Tensor
    ) -> tuple[Tensor, Moments]:
        """(direction without lr and decay, new moments); changes nothing."""

    @abstractmethod
    def _direction_into(self, group: Group, turn: Turn, grad: Tensor, step: int, out: Tensor) -> float:
        """Write the direction to `out` and the moments in place; returns the factor that the direction still lacks."""

    @abstractmethod
    def _native_constants(self, group: Group, step: int) -> tuple[int, float, tuple[float, ...]]:
        """(kind, factor that the direction lacks, constants) of `rows.c`."""

    @abstractmethod
    def _plain_step(self, group: Group, params: list[Tensor], grads: list[Tensor]) -> None:
        """The base optimizer's step, bit for bit, its state included."""

    def _check(self, group: Group) -> None:
        super()._check(group)
        if group["foreach"] and group["fused"]:
            raise RuntimeError("foreach=True and fused=True: must not both be True")

    def _moments_of(self, group: Group) -> tuple[str, ...]:
        return self._moments

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        A row with a non-finite gradient does not turn in this step, and what is not finite stays out of the moments.
        Parameters that do not rotate treat such gradients as their base optimizer does.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The loss if there is a closure, else None.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batch = native.Batch()
        masters: list[Pair] = []
        # all that can be refused is refused before anything changes
        work = [(group, *self._gather(group, masters)) for group in self.param_groups]
        for group, plain, turns in work:
            if plain:
                self._plain_step(group, [param for param, _ in plain], [grad for _, grad in plain])
            if turns:
                self._turn(group, turns, self._rotation(group), batch)
        batch.run()
        for param, master in masters:
            param.copy_(master)
        return loss

    @torch.compiler.disable
    def _gather(self, group: Group, masters: list[Pair]) -> tuple[list[Pair], list[Turn]]:
        """Tensors with a gradient: pairs of those that do not rotate, those that do; makes states that are missing."""
        plain, turns = [], []
        for index, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise RuntimeError(f"{self._name(group, index)} has a sparse gradient: not supported")
            state = self.state.get(param) or self._start(group, param, index)
            if "norm" not in state:
                plain.append((param, grad))
                continue
            weight = state.get("master", param)
            if weight is not param:
                masters.append((param, weight))
            moments = tuple(state[name] for name in self._moments_of(group))
            rows = (state["norm"], state["update_norm_sq"], self._speed(group, param, index))
            turns.append(Turn(weight, grad, moments, state["step"], *rows))
        return plain, turns

    def _start(self, group: Group, param: Tensor, index: int) -> Group:
        """State at the first step; a tensor that should rotate and cannot is marked, so that it stays plain."""
        rows = self._start_rows(group, param, index)
        if rows is None:
            if self._wanted(group, param, index):
                self.state[param]["rotates"] = False
            return {}
        state = self.state[param]
        if group["master_copy"] and param.dtype in LOW_PRECISION:
            state["master"] = param.detach().to(row_dtype(param), copy=True)
        like = state.get("master", param)
        state["step"] = new_step(group, param)
        for name in self._moments_of(group):
            state[name] = torch.zeros_like(like, memory_format=torch.preserve_format)
        state.update(rows)
        return state

    def _turn(self, group: Group, turns: list[Turn], rotation: float | Tensor, batch: native.Batch) -> None:
        """Turn these now, or queue them for the native kernel."""
        for turn in turns:
            turn.step.add_(1)
        if torch.compiler.is_compiling() or group["capturable"] or (group["foreach"] is False and not group["fused"]):
            for turn in turns:
                self._turn_plainly(group, turn, rotation)
            return
        in_rows = group["neuron_dim"] == 0 or not group["per_neuron"]
        allow_native = in_rows and (group["fused"] or (group["fused"] is None and not group["foreach"]))
        rules: dict[int, native.Rule] = {}
        scratch: dict[Any, tuple[Tensor, Tensor]] = {}
        for turn in turns:
            if allow_native and native.fits(turn.weight, turn.moments) and native.library():
                step = int(turn.step)
                if step not in rules:
                    rules[step] = self._native_rule(group, step, float(rotation))
                batch.add(turn.weight, turn.grad, turn.moments, turn.norm, turn.update_norm_sq, turn.speed, rules[step])
            elif in_rows and self._fits_passes(turn):
                kind = (turn.weight.dtype, turn.weight.device)
                if kind not in scratch:
                    alike = [t.weight for t in turns if (t.weight.dtype, t.weight.device) == kind]
                    scratch[kind] = foreach.scratch_for(alike)
                self._turn_in_passes(group, turn, rotation, scratch[kind])
            else:
                self._turn_plainly(group, turn, rotation)

    def _turn_plainly(self, group: Group, turn: Turn, rotation: float | Tensor) -> None:
        weight, dtype = turn.weight, row_dtype(turn.weight)
        layout = {"neuron_dim": group["neuron_dim"], "per_neuron": group["per_neuron"]}
        step: int | Tensor = turn.step
        if not (torch.compiler.is_compiling() or group["capturable"]):
            step = int(turn.step)
        elif weight.device.type != "mps":
            # 1 − β2^t of the first steps cancels in float32
            step = turn.step.double()
        grad = (-turn.grad if group["maximize"] else turn.grad).to(dtype)
        moments = tuple(moment.to(dtype) for moment in turn.moments)
        finite = torch.isfinite(grad)
        alive = finite.all(dim=row_dims(weight.ndim, **layout), keepdim=True)
        direction, new_moments = self._direction(group, grad, weight.to(dtype), moments, step)
        for moment, new in zip(turn.moments, new_moments, strict=True):
            moment.copy_(torch.where(finite, new, moment))
        rotational_update_(
            weight, direction, turn.norm, turn.update_norm_sq, step, rotation=rotation, speed=turn.speed, alive=alive,
            update_norm_decay=group["update_norm_decay"], zero_mean=group["zero_mean"], **layout,
            lr=group["lr"], weight_decay=group["weight_decay"],
        )  # fmt: skip

    def _fits_passes(self, turn: Turn) -> bool:
        contiguous = all(tensor.is_contiguous() for tensor in (turn.weight, *turn.moments))
        return contiguous and turn.weight.dtype == turn.norm.dtype and foreach.is_regular(turn.grad, turn.norm)

    def _turn_in_passes(
        self, group: Group, turn: Turn, rotation: float | Tensor, scratch: tuple[Tensor, Tensor]
    ) -> None:
        step, numel, rows = int(turn.step), turn.weight.numel(), turn.norm.numel()
        grad = turn.grad.to(turn.weight.dtype).contiguous()
        direction, spare = (buffer[:numel].view(rows, -1) for buffer in scratch)
        out = direction.view(turn.weight.shape)
        factor = self._direction_into(group, turn, -grad if group["maximize"] else grad, step, out)
        foreach.turn_rows_(
            turn.weight.view(rows, -1), direction, turn.norm, turn.update_norm_sq, rotation=rotation, factor=factor,
            decay=group["update_norm_decay"], correction=1 - group["update_norm_decay"] ** step,
            zero_mean=group["zero_mean"], speed=turn.speed, spare=spare,
        )  # fmt: skip

    def _native_rule(self, group: Group, step: int, rotation: float) -> native.Rule:
        kind, scale, constants = self._native_constants(group, step)
        decay, sign = group["update_norm_decay"], -1.0 if group["maximize"] else 1.0
        return native.Rule(
            kind, group["zero_mean"], rotation, decay, 1 - decay**step, scale, float(group["lr"]),
            group["weight_decay"], sign, constants,
        )  # fmt: skip


def new_step(group: Group, param: Tensor) -> Tensor:
    """Counter of steps, as torch's own optimizers keep it: on the CPU unless a captured or fused step reads it."""
    on_device = group["capturable"] or group["fused"]
    double = torch.get_default_dtype() == torch.float64 and not group["fused"]
    dtype = torch.float64 if double else torch.float32
    return torch.zeros((), dtype=dtype, device=param.device if on_device else "cpu")
