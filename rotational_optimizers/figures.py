"""The counterparts of the paper's figures, drawn from records. Accuracies in percent, angles in radians per step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from common.figures import INK, PALETTE, bars_with_ci, curve_with_band, look, new, ratio_dots
from common.pairing import values
from rotational_optimizers.names import ARM_NAMES

if TYPE_CHECKING:
    from common.records import Records

KIN = ("hyperball", "update_floor", "adamp", "lamb", "nero")
PAIRS = (("adamw", "rv_adamw"), ("sgdm", "rv_sgdm"), ("lion", "rv_lion"))


def _name(arm: str) -> str:
    return ARM_NAMES.get(arm, arm.replace("_", " "))


def _accuracy(records: Records, experiment: str, arm: str) -> NDArray[np.float64]:
    """Test accuracy in percent, (n seeds,)."""
    return 100 * values(records[experiment], arm, "test_accuracy")


def _log_rate(ax: Axes, label: str = "learning rate") -> None:
    ax.set_xscale("log")
    ax.set_xlabel(label)


def random_walk(records: Records) -> Figure:
    """Measured over predicted angle and norm of every optimizer, first-order and exact form."""
    frame = records["random_walk"]
    arms = list(dict.fromkeys(frame["arm"]))
    figure, axes = new(1, 2, height=4.2, sharey=True)
    for ax, metric, half in ((axes[0], "angle", 0.02), (axes[1], "norm", 0.05)):
        measured = [values(frame, arm, metric) for arm in arms]
        predicted = [values(frame, arm, f"{metric}_predicted") for arm in arms]
        ratios = [m / p for m, p in zip(measured, predicted, strict=True)]
        word = "rotation" if metric == "angle" else "norm"
        ratio_dots(ax, [_name(arm) for arm in arms], ratios, 1 - half, 1 + half, f"{word}: measured / predicted")
        best = [values(frame, arm, f"{metric}_predicted_exact") for arm in arms]
        exact = [m.mean() / b.mean() for m, b in zip(measured, best, strict=True)]
        ax.plot(exact, range(len(arms)), linestyle="none", marker="x", color=INK, label="against the exact form")
    axes[1].legend(loc="lower right", fontsize=8)
    return figure


def gradient_scale(records: Records) -> Figure:
    """Rotation against gradient size, log-log."""
    frame = records["gradient_scale"]
    figure, ax = new()
    for i, arm in enumerate(dict.fromkeys(frame["arm"])):
        rows = frame[frame["arm"] == arm]
        scales = np.array(rows["scales"].iloc[0], dtype=float)
        curve_with_band(ax, scales, np.array(rows["scale_angles"].tolist(), dtype=float), _name(arm), i)
    start = values(frame, "adam_l2", "angle").mean()
    ax.plot(scales, start * scales ** (-1 / 3), color=INK, alpha=0.4, linewidth=1)
    ax.set_yscale("log")
    _log_rate(ax, "gradient size (RMS, relative)")
    ax.set_ylabel("RMS rotation (rad / step)")
    ax.legend(ncols=2)
    return figure


EQUILIBRIUM_ARMS = ("sgdm_bn", "sgdm_ln_ws", "adamw_bn", "rv_sgdm_bn", "rv_adamw_bn", "sgdm_ln", "sgdm_none")


def equilibrium_ratio(records: Records) -> Figure:
    """Measured over predicted rotation per layer and arm; the head shows what a scale-sensitive layer does."""
    frame = records["equilibrium"]
    figure, ax = new(height=4.0)
    x = np.arange(len(frame["layers"].iloc[0]))
    for i, arm in enumerate(EQUILIBRIUM_ARMS):
        rows = frame[frame["arm"] == arm]
        ratio = np.array(rows["angle"].tolist(), dtype=float) / rows["predicted"].to_numpy(float)[:, None]
        mean = ratio.mean(0)
        error = ratio.std(0, ddof=1) / np.sqrt(len(ratio)) * 2.78 if len(ratio) > 1 else np.zeros(len(x))
        style = look(i) | {"linestyle": "none"}
        ax.errorbar(x + (i - 3) * 0.1, mean, yerr=error, capsize=2, label=_name(arm), **style)  # type: ignore[arg-type]
    ax.axhspan(0.97, 1.03, color=PALETTE[2], alpha=0.15, linewidth=0)
    ax.axhspan(0.85, 1.15, color=PALETTE[2], alpha=0.08, linewidth=0)
    ax.set_xticks(x, [f"conv {i + 1}" for i in x[:-1]] + ["head"])
    ax.set_ylabel("rotation: measured / predicted")
    ax.legend(fontsize=8, ncols=2)
    return figure


def neuron_spread(records: Records) -> Figure:
    """Cumulative distribution of every hidden neuron's RMS rotation relative to its arm's geometric mean."""
    frame = records["equilibrium"]
    figure, ax = new(height=3.8)
    arms = ("adam_l2_bn", "adamw_bn", "sgdm_bn", "sgdm_ln", "sgdm_ln_ws", "rv_adamw_bn", "rv_sgdm_bn")
    for i, arm in enumerate(arms):
        rows = frame[frame["arm"] == arm]
        logs = np.log2(np.array(rows["neuron_angle"].tolist(), dtype=float))
        relative = np.sort((logs - logs.mean(1, keepdims=True)).ravel())
        share = np.arange(1, len(relative) + 1) / len(relative)
        spread = rows["neuron_log_std"].mean()
        style = look(i) | {"marker": None}
        ax.plot(relative, share, label=f"{_name(arm)}: {spread:.3f}", **style)  # type: ignore[arg-type]
    ax.set_xlim(-2, 2)
    ax.set_xlabel("log2 of a neuron's rotation over the mean")
    ax.set_ylabel("share of neurons")
    ax.legend(fontsize=8, title="std of log rotation", title_fontsize=8)
    return figure


def _bars(records: Records, experiment: str, arms: list[str], ylabel: str = "test accuracy (%)") -> Figure:
    figure, ax = new()
    bars_with_ci(ax, [_name(arm) for arm in arms], [_accuracy(records, experiment, arm) for arm in arms], ylabel)
    return figure


def adam_family(records: Records) -> Figure:
    """AdamW, Adam+L2 and Adam+L2 forced to AdamW's rotation in the plain network."""
    return _bars(records, "compare", ["adamw", "adam_l2", "forced_adam_l2", "rv_adamw"])


def adam_family_unequal(records: Records) -> Figure:
    """The same where the layers' gradients are a factor 1000 apart."""
    return _bars(records, "unequal", ["adamw", "adam_l2", "forced_adam_l2"])


def compare(records: Records) -> Figure:
    """Every arm at its own best point: base beside rotational variant, then kin."""
    arms = [arm for pair in PAIRS for arm in pair] + ["adam_l2", "forced_adam_l2", *KIN]
    frame = records["compare"]
    arms = [arm for arm in arms if (frame["arm"] == arm).any()]
    figure, ax = new(height=4.2)
    bars_with_ci(ax, [_name(a) for a in arms], [_accuracy(records, "compare", a) for a in arms], "test accuracy (%)")
    ax.set_xticks(range(len(arms)), [_name(a) for a in arms], rotation=40, ha="right", fontsize=8)
    return figure


def zero_shot(records: Records) -> Figure:
    """Base, zero-shot and tuned rotational variant; then the starved setting."""
    figure, axes = new(1, 2, height=3.8, width_ratios=(3, 1.4))
    labels, samples = [], []
    for base, rotational in PAIRS:
        labels += [_name(base), "RV zero-shot", "RV tuned"]
        samples += [_accuracy(records, "compare", base), _accuracy(records, "zero_shot", rotational)]
        samples.append(_accuracy(records, "compare", rotational))
    bars_with_ci(axes[0], labels, samples, "test accuracy (%)")
    axes[0].set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=8)
    starved = ["adamw_starved", "rv_adamw_starved", "rv_adamw_fed"]
    bars_with_ci(axes[1], [_name(a) for a in starved], [_accuracy(records, "zero_shot", a) for a in starved], "")
    axes[1].set_xticks(range(3), [_name(a) for a in starved], rotation=40, ha="right", fontsize=8)
    axes[1].set_title("lr x decay x steps << 1", fontsize=9)
    return figure


def _curves(ax: Axes, frame: pd.DataFrame, groups: list[tuple[str, pd.DataFrame]], column: str) -> None:
    for i, (label, rows) in enumerate(groups):
        table = rows.pivot_table(index="seed", columns="optimizer.lr", values=column)
        curve_with_band(ax, table.columns.to_numpy(float), 100 * table.to_numpy(float), label, i)
    _log_rate(ax)
    ax.set_ylabel("test accuracy (%)" if column.startswith("test") else "validation accuracy (%)")


def _warmup_panel(ax: Axes, frame: pd.DataFrame) -> None:
    groups = []
    for arm in dict.fromkeys(frame["arm"]):
        for warm, word in ((0.0, "no warm-up"), (0.1, "warm-up")):
            rows = frame[(frame["arm"] == arm) & np.isclose(frame["schedule.warmup"], warm)]
            groups.append((f"{_name(arm)}, {word}", rows))
    _curves(ax, frame, groups, "test_accuracy")
    ax.legend(fontsize=8)


def warmup(records: Records) -> Figure:
    """Accuracy over learning rates (SGDM, large batch), and the language model's loss, with and without warm-up."""
    figure, axes = new(1, 2, height=3.8, width_ratios=(1.5, 1))
    _warmup_panel(axes[0], records["warmup"])
    frame = records["language"]
    for i, arm in enumerate(("adamw", "adamw_gains", "rv_gains")):
        pair = [values(frame, f"{arm}_{word}", "test_loss", mode="min") for word in ("none", "warm")]
        curve_with_band(axes[1], [0, 1], np.stack(pair, 1), _name(arm), i)
    axes[1].set_xticks([0, 1], ["no warm-up", "warm-up"])
    axes[1].set_ylabel("test loss (nats / byte)")
    axes[1].legend(fontsize=8)
    return figure


def warmup_deep(records: Records) -> Figure:
    """Accuracy over learning rates in the deeper network."""
    figure, ax = new()
    _warmup_panel(ax, records["warmup_deep"])
    return figure


def warmup_provoked(records: Records) -> Figure:
    """Gain from warm-up of each arm when the first steps turn weights wildly."""
    frame = records["warmup_provoked"]
    figure, ax = new()
    arms = ["sgdm", "rv_sgdm", "adamw", "rv_adamw"]
    gains = []
    for arm in arms:
        table = frame[frame["arm"] == arm].pivot(index="seed", columns="schedule.warmup", values="test_accuracy")
        gains.append(100 * (table[0.1] - table[0.0]).to_numpy())
    bars_with_ci(ax, [_name(arm) for arm in arms], gains, "gain from warm-up (points)")
    ax.axhline(0, color=INK, linewidth=1)
    return figure


def normalization(records: Records) -> Figure:
    """Validation accuracy over learning rates at each arm's best weight decay, and the judged test accuracy."""
    figure, axes = new(1, 2, height=3.8, width_ratios=(1.5, 1))
    frame = records["normalization_tune"]
    groups = []
    for arm in ("ln", "ln_ws", "rv_ln"):
        rows = frame[frame["arm"] == arm]
        best = rows.groupby("optimizer.weight_decay")["validation_accuracy"].max().idxmax()
        groups.append((_name(arm), rows[rows["optimizer.weight_decay"] == best]))
    _curves(axes[0], frame, groups, "validation_accuracy")
    axes[0].legend(fontsize=8)
    arms = ["ln", "ln_ws", "rv_ln"]
    samples = [_accuracy(records, "normalization", arm) for arm in arms]
    bars_with_ci(axes[1], [_name(a) for a in arms], samples, "test accuracy (%)")
    axes[1].set_xticks(range(3), [_name(a) for a in arms], rotation=30, ha="right", fontsize=8)
    return figure


def lr_vs_wd(records: Records) -> Figure:
    """Accuracy over learning rates at a constant product of learning rate and weight decay."""
    frame = records["lr_vs_wd"]
    figure, ax = new()
    _curves(ax, frame, [(_name(a), frame[frame["arm"] == a]) for a in ("adamw", "rv_adamw", "frozen")], "test_accuracy")
    _log_rate(ax, "learning rate (weight decay = 2^-7 / learning rate)")
    ax.legend()
    return figure


def imbalance(records: Records) -> Figure:
    """Accuracy of every kind and degree of imbalance."""
    arms = ["none", "triple_q10", "triple_s3", "triple_s10", "triple_s30", "triple_q90", "double_s10", "narrow"]
    figure, ax = new(height=4.0)
    bars_with_ci(ax, [_name(a) for a in arms], [_accuracy(records, "imbalance", a) for a in arms], "test accuracy (%)")
    ax.set_xticks(range(len(arms)), [_name(a) for a in arms], rotation=35, ha="right", fontsize=8)
    return figure


def _trace(frame: pd.DataFrame, arm: str, column: str, layer: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps (points,) and one layer's curve (seeds, points)."""
    rows = frame[frame["arm"] == arm].sort_values("seed")
    curves = np.array([curve[layer] for curve in rows[column]], dtype=float)
    return np.array(rows["curve_steps"].iloc[0], dtype=float), curves


def transient(records: Records) -> Figure:
    """Rotation over its prediction and relative norm of the third convolution, from the first step on."""
    frame = records["equilibrium"]
    figure, axes = new(1, 2, height=3.6)
    for i, arm in enumerate(("adamw_bn", "rv_adamw_bn", "sgdm_bn", "rv_sgdm_bn")):
        predicted = float(frame.loc[frame["arm"] == arm, "predicted"].iloc[0])
        steps, angle = _trace(frame, arm, "angle_curve", 2)
        curve_with_band(axes[0], steps, angle / predicted, _name(arm), i)
        steps, norm = _trace(frame, arm, "norm_curve", 2)
        curve_with_band(axes[1], steps, norm / norm[:, -1:].mean(), _name(arm), i)
    for ax, label in zip(axes, ("rotation / predicted", "norm / final norm"), strict=True):
        ax.set_xscale("log")
        ax.set_xlabel("step")
        ax.set_ylabel(label)
    axes[0].axhline(1, color=INK, linewidth=1, linestyle=":")
    axes[0].legend(fontsize=8)
    return figure
