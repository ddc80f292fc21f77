"""The counterparts of the paper's figures, drawn from records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.figures import INK, interval, look, new, paired_dots
from common.pairing import Array, rows, values
from mulfree_training.judging.samples import ACCURACY, FULL_NATS, FULL_POINTS, NATS, NLL, POINTS, gaps, pair
from mulfree_training.names import ROWS, name

if TYPE_CHECKING:
    from common.records import Records

EVEN: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": ":"}
MARGIN: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": "--"}
MARGINS = {ACCURACY: (-POINTS, -FULL_POINTS), NLL: (NATS, FULL_NATS)}
LABELS = {ACCURACY: "accuracy less\n{} (points)", NLL: "loss less\n{} (nats)"}
BEFORE = ("perturbed", "bf16")
DOMAINS = (("vision", ACCURACY), ("language", NLL))


def _line(ax: Axes, found: Array, place: float) -> None:
    """Numbers on one line: seeds as dots, mean and interval below them."""
    mean, low, high = interval(found)
    ax.plot(found, np.full(len(found), place - 0.15), linestyle="none", marker="o", markersize=3, color=INK, alpha=0.4)
    ax.errorbar(mean, place + 0.15, xerr=[[mean - low], [high - mean]], fmt="s", color=INK, capsize=3, markersize=4)


def _differences(ax: Axes, frame: pd.DataFrame, arms: Sequence[str], metric: str) -> None:
    """Paired differences from float32, an arm a line; that of an arm without records stays empty."""
    for i, arm in enumerate(arms):
        if (frame["arm"] == arm).any():
            _line(ax, gaps(frame, arm, "standard", metric).to_numpy(), i)
    ax.axvline(0, **EVEN)
    ax.set_yticks(range(len(arms)), [name(arm) for arm in arms])
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.set_xlabel(LABELS[metric].format("float32"))
    ax.locator_params(axis="x", nbins=4)


def _known(records: Records, arms: Sequence[str]) -> list[str]:
    """Those of the arms that vision or language has."""
    found = {arm for experiment, _ in DOMAINS for arm in records[experiment]["arm"]}
    return [arm for arm in arms if arm in found]


def _margins(ax: Axes, metric: str, arms: Sequence[str]) -> None:
    """The margin of each arm, wider where nothing multiplies."""
    usual, full = MARGINS[metric]
    for i, arm in enumerate(arms):
        bound = full if arm == "full" else usual
        ax.plot([bound, bound], [i - 0.45, i + 0.45], **MARGIN)


def rows_of_ablation(records: Records) -> Figure:
    """What each row of the ablation costs, in vision and in language; what a rounding unit does, for comparison."""
    figure, axes = new(1, 2, height=3.9)
    arms = _known(records, (*BEFORE, *ROWS))
    for ax, (experiment, metric) in zip(axes, DOMAINS, strict=True):
        _differences(ax, records[experiment], arms, metric)
        _margins(ax, metric, arms)
        ax.set_title(experiment, loc="left")
    axes[1].set_yticklabels([])
    return figure


def training_lengths(records: Records) -> Figure:
    """What piecewise affine arithmetic costs in language after the usual and after more steps."""
    arms = ("matmul", "full")
    figure, axes = new(1, 2, height=2.6)
    for ax, experiment in zip(axes, ("language", "language_long"), strict=True):
        frame = records[experiment]
        _differences(ax, frame, arms, NLL)
        _margins(ax, NLL, arms)
        ax.set_title(f"{frame['task.steps'].iloc[0]:g} steps", loc="left")
    axes[1].set_yticklabels([])
    return figure


def convolution(records: Records) -> Figure:
    """Accuracy of the convolutional network in both arithmetics."""
    a, b = pair(records["convolution"], "standard", "matmul", ACCURACY)
    figure, ax = new()
    paired_dots(ax, a, b, (name("standard"), "piecewise affine"), "test accuracy (%)")
    return figure


def rules(records: Records) -> Figure:
    """Test loss of both rules less that of float32."""
    arms = _known(records, ("matmul", "matmul_exact", "full", "full_exact", "full_exact_but_loss"))
    figure, axes = new(1, 2, height=3.4)
    for ax, (experiment, _) in zip(axes, DOMAINS, strict=True):
        _differences(ax, records[experiment], arms, NLL)
        ax.set_title(experiment, loc="left")
    axes[1].set_yticklabels([])
    return figure


def constant(records: Records) -> Figure:
    """What alpha changes, in accuracy and loss."""
    figure, axes = new(1, 3, height=2.6)
    panels = (("vision", ACCURACY), ("vision", NLL), ("language", NLL))
    for ax, (experiment, metric) in zip(axes, panels, strict=True):
        for i, arm in enumerate(("matmul", "full")):
            _line(ax, gaps(records[experiment], f"{arm}_alpha", arm, metric).to_numpy(), i)
        bound = abs(MARGINS[metric][0])
        for edge in (-bound, bound):
            ax.axvline(edge, **MARGIN)
        ax.axvline(0, **EVEN)
        ax.set_yticks([0, 1], ["matrix products", "everything"] if ax is axes[0] else [])
        ax.set_ylim(1.5, -0.5)
        ax.set_xlabel(LABELS[metric].format("without"))
        ax.locator_params(axis="x", nbins=4)
        ax.set_title(experiment, loc="left")
    return figure


def baselines(records: Records) -> Figure:
    """Accuracy beside other ways to avoid multiplications."""
    frame = records["vision"]
    arms = ("standard", "bf16", "matmul", "matmul_own", "full", "full_own", "power_of_two", "adder")
    shown = [arm for arm in arms if (frame["arm"] == arm).any()]
    figure, ax = new(height=3.9)
    for i, arm in enumerate(shown):
        _line(ax, values(frame, arm, ACCURACY), i)
    ax.set_yticks(range(len(shown)), [name(arm) for arm in shown])
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.set_xlabel("test accuracy (%)")
    return figure


def error_law(records: Records) -> Figure:
    """Error of a product over both mantissas, and its distribution."""
    row = rows(records["primitives"], arm="pam").iloc[0]
    figure, axes = new(1, 2, height=3.4)
    errors = 100 * np.array(list(row["map"]), dtype=np.float64)
    side = np.linspace(1, 2, len(errors) + 1)
    centres = (side[:-1] + side[1:]) / 2
    shown = axes[0].pcolormesh(side, side, errors, cmap="gray", shading="flat")
    lines = axes[0].contour(centres, centres, errors, levels=[-10, -8, -6, -4, -2], colors="white", linewidths=0.7)
    axes[0].clabel(lines, fmt="%g %%", fontsize=7)
    axes[0].set_xlabel("mantissa of a")
    axes[0].set_ylabel("mantissa of b")
    figure.colorbar(shown, ax=axes[0], label="error of PAM(a, b) (%)")
    for i, (operation, label) in enumerate((("mul", "product"), ("div", "quotient"))):
        edges, density = (np.array(list(row[f"{operation}_{x}"]), dtype=np.float64) for x in ("edges", "density"))
        style = look(i) | {"marker": None}
        axes[1].stairs(density / 100, 100 * edges, label=label, color=style["color"], linestyle=style["linestyle"])
    axes[1].set_xlabel("relative error (%)")
    axes[1].set_ylabel("density (1 / %)")
    axes[1].legend()
    return figure


def affine(records: Records) -> Figure:
    """Second over first difference against the distance."""
    frame = records["affine"]
    distances = sorted(float(str(c).split("_")[1]) for c in frame.columns if str(c).startswith("curvature_"))
    columns = [f"curvature_{h:g}" for h in distances]
    figure, ax = new()
    for i, (arm, label) in enumerate((("standard", "standard network"), ("pam", "piecewise affine network"))):
        for j, (_, row) in enumerate(rows(frame, arm=arm).iterrows()):
            found = row[columns].to_numpy(dtype=np.float64)
            ax.plot(distances, found, label=label if j == 0 else None, alpha=0.6, **look(i))
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("distance h along the line")
    ax.set_ylabel("second / first difference")
    ax.legend()
    return figure


def findings(records: Records) -> Figure:
    """Multiplying operations in two steps, row by row."""
    frame = records["proof"]
    arms = ("standard", *ROWS, "full_exact")
    counts = [float(rows(frame, arm=arm)["findings"].iloc[0]) for arm in arms]
    figure, ax = new()
    ax.barh(range(len(arms)), counts, color="0.75", edgecolor=INK)
    for i, found in enumerate(counts):
        ax.text(found, i, f" {found:.0f}", va="center")
    ax.set_yticks(range(len(arms)), [name(arm) for arm in arms])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.15 * max(max(counts), 1))
    ax.set_xlabel("multiplying operations in two training steps")
    return figure


def cost(records: Records) -> Figure:
    """Energy of one step's arithmetic by kind of operation."""
    frame = records["proof"]
    figure, ax = new()
    kinds = sorted(c for c in frame.columns if str(c).startswith("energy_uj_"))
    for j, arm in enumerate(("standard", "full")):
        row, left = rows(frame, arm=arm).iloc[0], 0.0
        for i, kind in enumerate(kinds):
            value = float(row[kind])
            own = {"color": str(0.3 + 0.55 * i / max(len(kinds) - 1, 1)), "edgecolor": INK}
            title = str(kind).removeprefix("energy_uj_").replace("_", " ") if j == 0 else None
            ax.barh(j, value, left=left, label=title, **own)
            left += value
        ax.text(left, j, f" {left:,.0f} µJ", va="center")
    ax.set_yticks([0, 1], ["float32", "no multiplication"])
    ax.set_ylim(1.6, -0.6)
    ax.set_xlim(right=1.2 * ax.get_xlim()[1])
    ax.set_xlabel("energy of the arithmetic of one step (µJ)")
    ax.legend(ncols=2, loc="lower right", fontsize=7)
    return figure
