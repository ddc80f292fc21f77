"""Measure how every neuron of a network turns while any optimizer trains it.

A pair of optimizer hooks copies the tracked weights before a step and compares after it. For a row that goes from x to
y the angle comes from the chord of the unit vectors,

    c = ‖x − y·‖x‖/‖y‖‖ / ‖x‖,      angle = 2·asin(c/2),      ‖y − x‖² = c²‖x‖‖y‖ + (‖y‖ − ‖x‖)²

which in float32 is good down to 1e-7 rad, where acos of a cosine is noise below 5e-4. A tracked step costs one copy and
four reads of the weights; between tracked steps nothing is held but a few float64 sums per row.
"""

import math
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rotational_optimizers.equilibrium import equilibrium_rotation, rule_of
from rotational_optimizers.groups import as_rows, neuron_axes

if TYPE_CHECKING:
    import pandas as pd

_TINY = torch.finfo(torch.float32).tiny
_STATS = ("angle_sq", "norm_sq", "update_sq", "radial", "radial_sq")


class _Window:
    """Sums over tracked steps: the `_STATS` of every row, the squared prediction of every tensor."""

    def __init__(self, n_rows: int, n_tensors: int) -> None:
        self.sums = torch.zeros(len(_STATS), n_rows, dtype=torch.float64)
        self.predicted = torch.zeros(n_tensors, dtype=torch.float64)
        self.count = 0

    def add(self, stats: Tensor, predicted: Tensor) -> None:
        self.sums += stats
        self.predicted += predicted
        self.count += 1


class RotationTracker:
    """RMS angle, norm and update size per neuron over windows of steps; a context manager on optimizer hooks.

    ```
    with RotationTracker(model, optimizer, every=10) as tracker:
        train()
    print(tracker.summary())
    ```

    Args:
        model: its weights whose slices are neurons (`groups.neuron_axes`) are tracked, if `optimizer` holds them.
        optimizer: any torch optimizer; learning rates may change.
        every: track steps 0, every, 2·every, …, ≥ 1.
        window: either W ≥ 1: readings cover the last complete block of W tracked steps (before that, what there is); or
            a mapping name → (first step, end step): each range has sums of its own, and steps outside cost nothing.
        per: "neuron": a row is a neuron; "tensor": the whole tensor is one vector.
        center: measure rows without their mean (weight-standardised layers do not see it).
        predict: param group → predicted rotation (rad per step); default: what a rotational variant is set to, else
            `equilibrium_rotation` of the optimizer, NaN where there is no formula.

    Rows of stacked models are rows like any others: split `rows()` by seed.

    Raises:
        ValueError: every, window or per out of range; the optimizer holds no tracked weight of the model.

    Source: paper, section on measuring (angles in RMS, as the theory has them); chord from three norms: derivation.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        every: int = 1,
        window: int | Mapping[str, tuple[int, int]] = 100,
        per: str = "neuron",
        center: bool = False,
        predict: Callable[[dict[str, Any]], float] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: must be >= 1")
        if per not in ("neuron", "tensor"):
            raise ValueError(f"per={per!r}: must be 'neuron' or 'tensor'")
        ranges = {} if isinstance(window, int) else dict(window)
        if isinstance(window, int) and window < 1:
            raise ValueError(f"window={window}: must be >= 1")
        for name, (first, end) in ranges.items():
            if not 0 <= first < end:
                raise ValueError(f"window[{name!r}]=({first}, {end}): must be 0 <= first < end")
        self.every, self.per, self.center, self.step = every, per, center, 0
        self._ranges, self._block = ranges, window if isinstance(window, int) else 0
        self._predict = predict or _Predictor(optimizer)
        self._optimizer = optimizer
        # by index: load_state_dict replaces the groups themselves
        held = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        parameters = dict(model.named_parameters())
        self._axes = {name: axis for name, axis in neuron_axes(model).items() if id(parameters[name]) in held}
        if not self._axes:
            raise ValueError("optimizer: holds no weight of `model` whose rows are neurons")
        self._weights = {name: parameters[name] for name in self._axes}
        self._group_of = [held[id(p)] for p in self._weights.values()]
        sizes = [1 if per == "tensor" else self._weights[name].shape[axis] for name, axis in self._axes.items()]
        self._sizes = dict(zip(self._axes, sizes, strict=True))
        self._before: tuple[list[Tensor], Tensor] | None = None
        self.reset()
        self._hooks = [
            optimizer.register_step_pre_hook(self._copy),
            optimizer.register_step_post_hook(self._compare),
        ]

    def __enter__(self) -> "RotationTracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off; the readings stay."""
        for hook in self._hooks:
            hook.remove()
        self._before = None

    def reset(self) -> None:
        """Forget all sums; the count of steps goes on."""
        self._windows = {name: self._new() for name in self._ranges or ("running",)}

    def rows(self, window: str | None = None) -> dict[str, Tensor]:
        """Parameter name → RMS angle of each of its rows, (K,) float64 in rad per step; NaN before the first step.

        Args:
            window: name of a range, when the tracker was given ranges (may be left out if there is one).

        Raises:
            ValueError: no such range.
        """
        return {name: stats["angle_sq"].sqrt() for name, stats in self._means(window).items()}

    def norms(self, window: str | None = None) -> dict[str, Tensor]:
        """Parameter name → RMS norm of each of its rows after the step, (K,) float64. Arguments as in `rows`."""
        return {name: stats["norm_sq"].sqrt() for name, stats in self._means(window).items()}

    def summary(self, window: str | None = None) -> "pd.DataFrame":
        """One line a tensor: what its rows do in RMS (over rows and steps), against the prediction.

        Columns: rows; angle (rad per step); predicted (rad per step, RMS over the window's learning rates); ratio of
        the two; norm; update (‖Δ‖/‖x‖); radial (mean relative change of the norm per step) and tangential (RMS of the
        rest of the update, relative). Index: parameter name. Arguments and errors as in `rows`.
        """
        import pandas as pd

        return pd.DataFrame.from_dict(self._lines(window), orient="index")

    def imbalance(self, window: str | None = None) -> dict[str, float]:
        """How unequally neurons turn: standard deviations of log RMS angle, 0 when perfectly balanced.

        Keys: "all" over all rows of all tensors; "within" RMS over tensors of the deviation inside each; "between" over
        tensors, of the log of each tensor's RMS angle; "still" the number of rows that did not turn (left out of the
        others). NaN where fewer than two values are left. Arguments and errors as in `rows`.
        """
        rows = self.rows(window)
        turning = {name: angle[angle > 0].log() for name, angle in rows.items()}
        every = torch.cat(list(turning.values()))
        layers = torch.stack([angle.square().mean().sqrt() for angle in rows.values()])
        inside = [logs.var() for logs in turning.values() if len(logs) > 1]
        return {
            "all": every.std().item() if len(every) > 1 else math.nan,
            "within": torch.stack(inside).mean().sqrt().item() if inside else math.nan,
            "between": layers[layers > 0].log().std().item() if (layers > 0).sum() > 1 else math.nan,
            "still": float(sum(len(angle) for angle in rows.values()) - len(every)),
        }

    def log(self, tracking: Any, step: int | None = None, window: str | None = None) -> None:
        """Hand the summary to `tracking.log(metrics, step=…)`: rotation/<column>/<tensor>, rotation/imbalance/<kind>.

        Args:
            tracking: anything with `log(dict, step=int)`: a W&B run, this house's tracker or trial.
            step: default: steps seen so far.
            window: as in `rows`.
        """
        metrics = {
            f"rotation/{column}/{name}": line[column]
            for name, line in self._lines(window).items()
            for column in ("angle", "ratio", "norm")
        }
        metrics |= {f"rotation/imbalance/{kind}": value for kind, value in self.imbalance(window).items()}
        tracking.log(metrics, step=self.step if step is None else step)

    def state_dict(self) -> dict[str, Any]:
        """Step count and sums: tensors and numbers only, safe for `torch.load(weights_only=True)`."""
        windows = {name: (w.sums.clone(), w.predicted.clone(), w.count) for name, w in self._windows.items()}
        return {"step": self.step, "windows": windows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()` of a tracker with the same arguments."""
        self.step = state["step"]
        for name, (sums, predicted, count) in state["windows"].items():
            window = self._windows[name] = self._new()
            window.sums += sums
            window.predicted += predicted
            window.count = count

    def _lines(self, window: str | None) -> dict[str, dict[str, float]]:
        sums = self._read(window)
        predicted = (sums.predicted / sums.count).sqrt().tolist()
        lines = {}
        for (name, stats), expected in zip(self._means(window).items(), predicted, strict=True):
            mean = {key: value.mean().item() for key, value in stats.items()}
            angle = math.sqrt(mean["angle_sq"])
            lines[name] = {
                "rows": self._sizes[name],
                "angle": angle,
                "predicted": expected,
                "ratio": angle / expected if expected > 0 else math.nan,
                "norm": math.sqrt(mean["norm_sq"]),
                "update": math.sqrt(mean["update_sq"]),
                "radial": mean["radial"],
                "tangential": math.sqrt(max(0.0, mean["update_sq"] - mean["radial_sq"])),
            }
        return lines

    def _new(self) -> _Window:
        return _Window(sum(self._sizes.values()), len(self._sizes))

    def _read(self, window: str | None) -> _Window:
        if window is None and len(self._ranges) < 2:
            window = next(iter(self._ranges), "complete" if "complete" in self._windows else "running")
        elif window not in self._ranges:
            raise ValueError(f"window={window!r}: must be one of {', '.join(self._ranges) or 'None'}")
        return self._windows[window]

    def _means(self, window: str | None) -> dict[str, dict[str, Tensor]]:
        """Parameter name → stat → mean over the window's steps, (K,)."""
        sums = self._read(window)
        parts = (sums.sums / sums.count).split(list(self._sizes.values()), dim=1)  # each (stats, K)
        return {name: dict(zip(_STATS, part, strict=True)) for name, part in zip(self._sizes, parts, strict=True)}

    def _active(self) -> list[str]:
        if self.step % self.every:
            return []
        ranges = [name for name, (first, end) in self._ranges.items() if first <= self.step < end]
        return ranges if self._ranges else ["running"]

    def _matrix(self, name: str, copy: bool) -> Tensor:
        """Rows of a weight, (K, n), at least float32; a view unless `copy` or the layout forbids."""
        p = self._weights[name].detach()
        dtype = p.dtype if p.dtype == torch.float64 else torch.float32
        rows = p.reshape(1, -1) if self.per == "tensor" else as_rows(p, self._axes[name])
        if self.center:
            return rows.to(dtype) - rows.mean(dim=1, keepdim=True, dtype=dtype)
        return rows.to(dtype, copy=copy)

    @torch.no_grad()
    def _copy(self, *_: Any) -> None:
        # a step that failed half-way must not leave its copy behind
        self._before = None
        if self._active():
            rows = [self._matrix(name, copy=True) for name in self._weights]
            self._before = rows, _norms(rows)

    @torch.no_grad()
    def _compare(self, *_: Any) -> None:
        active, before, self._before = self._active(), self._before, None
        self.step += 1
        if before is None:
            return
        after = [self._matrix(name, copy=False) for name in self._weights]
        (rows, norm_x), norm_y = before, _norms(after)
        ratio = (norm_x / norm_y.clamp_min(_TINY))[:, None].split(list(self._sizes.values()))
        for x, y, r in zip(rows, after, ratio, strict=True):
            x.addcmul_(y, r.to(x), value=-1)
        stats = _row_stats(*torch.stack([norm_x, norm_y, _norms(rows)]).double().cpu())
        groups = self._optimizer.param_groups
        expected = {index: self._predict(groups[index]) ** 2 for index in set(self._group_of)}
        predicted = torch.tensor([expected[index] for index in self._group_of], dtype=torch.float64)
        for name in active:
            self._windows[name].add(stats, predicted)
        running = self._windows.get("running")
        if running is not None and running.count == self._block:
            self._windows |= {"complete": running, "running": self._new()}


def _norms(rows: list[Tensor]) -> Tensor:
    """Norms of the rows of all matrices (K, n), one after the other, on the first one's device."""
    return torch.cat([torch.linalg.vector_norm(x, dim=1).to(rows[0].device) for x in rows])


def _row_stats(norm_x: Tensor, norm_y: Tensor, turned: Tensor) -> Tensor:
    """(stats, rows) of one step from ‖x‖, ‖y‖ and ‖x − y·‖x‖/‖y‖‖; a row of norm 0 before or after has angle 0."""
    scale = norm_x.clamp_min(_TINY)
    chord = torch.where(norm_y > 0, turned / scale, 0).clamp_max(2)
    angle = 2 * torch.asin(chord / 2)
    growth = (norm_y - norm_x) / scale
    update_sq = chord.square() * norm_y / scale + growth.square()
    # ⟨y − x, x⟩/‖x‖², with cos = 1 − c²/2
    radial = growth - norm_y / scale * chord.square() / 2
    return torch.stack([angle.square(), norm_y.square(), update_sq, radial, radial.square()])


class _Predictor:
    """Param group → expected rotation of the optimizer that owns it; NaN where the theory has no number."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # rotational variants know their own, which may be a number, a function or the paper's form
        self.own = getattr(optimizer, "_rotation", None)
        try:
            self.rule = "" if self.own else rule_of(optimizer)
        except ValueError:
            self.rule = ""

    def __call__(self, group: dict[str, Any]) -> float:
        keys = ("lr", "weight_decay", "betas", "momentum", "nesterov", "decoupled", "dampening")
        values = {key: group[key] for key in keys if key in group}
        if "decoupled_weight_decay" in group:
            values["decoupled"] = group["decoupled_weight_decay"]
        try:
            return float(self.own(group) if self.own else equilibrium_rotation(self.rule, **values))
        except ValueError:
            return math.nan
