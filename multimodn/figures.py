"""The counterparts of the paper's figures, drawn from records; scores are AUROC on held-out folds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from common.figures import INK, curve_with_band, heat_map, interval, look, new
from common.pairing import rows
from multimodn.judging import samples
from multimodn.names import cohort as cohort_name
from multimodn.names import name

if TYPE_CHECKING:
    from common.records import Records

CHANCE = {"color": INK, "linewidth": 0.8, "linestyle": ":"}
SHOWN = "nhefs"
"""The cohort of the heat maps."""


def _legend_below(figure: Figure, ax: Axes, columns: int) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)


def _dots(ax: Axes, labels: Sequence[str], arms: Sequence[str], values: dict[tuple[int, str], pd.Series]) -> None:
    """One row a label, one marker an arm with its interval; values: (row, arm) -> sample."""
    for i, arm in enumerate(arms):
        style = look(i)
        for row in range(len(labels)):
            if (row, arm) not in values:
                continue
            mean, low, high = interval(values[row, arm].to_numpy())
            at = row + (i - (len(arms) - 1) / 2) * 0.8 / len(arms)
            label = name(arm) if row == min(r for r, a in values if a == arm) else None
            ax.errorbar(
                mean, at, xerr=[[mean - low], [high - mean]], fmt=style["marker"], color=style["color"], label=label,
                capsize=2, markersize=4, linewidth=1,
            )  # fmt: skip
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("AUROC")


def ten_tasks(records: Records) -> Figure:
    """Every task, every arm."""
    frame = records["single"]
    frame = frame.assign(task=frame["task_names"].str[0])
    arms = ("mm", "pf", "pf_raw", "logistic", "boosting")
    tasks = [(c, t) for c, own in samples.SINGLE.items() for t in own]
    found = {(i, arm): samples.of(frame, arm, cohort__name=c, task=t) for i, (c, t) in enumerate(tasks) for arm in arms}
    figure, ax = new(height=6.2)
    _dots(ax, [f"{cohort_name(c)}\n{t.replace('_', ' ')}" for c, t in tasks], arms, found)
    _legend_below(figure, ax, 3)
    return figure


def joint_tasks(records: Records) -> Figure:
    """One network a task, one for all tasks, and P-Fusion for all tasks, by cohort."""
    multi, single = records["multi"], records["single"]
    labels = list(samples.SINGLE)
    found: dict[tuple[int, str], pd.Series] = {}
    for i, c in enumerate(labels):
        found[i, "one network a task"] = samples.of(single, "mm", cohort__name=c)
        for arm in ("mm", "pf", "pf_raw"):
            found[i, arm] = samples.of(multi, arm, cohort__name=c)
    figure, ax = new(height=4.2)
    _dots(ax, [cohort_name(c) for c in labels], ("mm", "one network a task", "pf", "pf_raw"), found)
    _legend_below(figure, ax, 2)
    return figure


def other_encoders(records: Records) -> Figure:
    """Recurrent, transformer and convolutional encoders."""
    frame = records["encoders"]
    kinds = {"gru": "recurrent", "transformer": "transformer", "conv": "convolutions"}
    found = {
        (i, kind): samples.of(frame, f"{kind}_{k}", cohort__name=_cohort_of(k))
        for i, k in enumerate(kinds)
        for kind in ("mm", "pf")
    }
    figure, ax = new(height=2.6)
    _dots(ax, list(kinds.values()), ("mm", "pf"), found)
    _legend_below(figure, ax, 2)
    return figure


def _cohort_of(kind: str) -> str:
    return "digits_images" if kind == "conv" else "weather_sequence"


def details(records: Records) -> Figure:
    """Variants of the network, by cohort."""
    frame = records["ablation"]
    arms = ("mm", "mm_sigmoid", "mm_output", "mm_reversed", "mm_shuffle")
    found = {(i, arm): samples.of(frame, arm, cohort__name=c) for i, c in enumerate(samples.MNAR) for arm in arms}
    figure, ax = new(height=4.2)
    _dots(ax, [cohort_name(c) for c in samples.MNAR], arms, found)
    _legend_below(figure, ax, 3)
    return figure


def _mean_cells(frame: pd.DataFrame, column: str) -> NDArray:
    return np.mean([np.array(value) for value in frame[column]], axis=0)


def contributions(records: Records) -> Figure:
    """Heat maps: cumulative prediction along the chain, and each modality's own contribution, by true class."""
    frame = rows(records["multi"], arm="mm", cohort__name=SHOWN)
    tasks, modalities = frame["task_names"].iloc[0], frame["modality_names"].iloc[0]
    labels = [f"{t.replace('_', ' ')}\n{'yes' if c else 'no'}" for t in tasks for c in (0, 1)]
    figure, axes = new(2, 1, height=6.4)
    cumulative = _mean_cells(frame, "cumulative")  # (K+1, D, 2)
    individual = _mean_cells(frame, "individual")  # (K, D, 2)
    steps = ["start", *(f"+ {m}" for m in modalities)]
    heat_map(
        axes[0], cumulative.reshape(len(steps), -1).T, labels, steps, "P(yes)", fmt=".2f", xlabel="along the chain"
    )
    heat_map(
        axes[1], individual.reshape(len(modalities), -1).T, labels, modalities, "change of P(yes)", fmt="+.2f",
        xlabel="alone, on the initial state",
    )  # fmt: skip
    axes[0].tick_params(axis="x", labelsize=8)
    return figure


def planted(records: Records) -> Figure:
    """Mean increase of the AUROC at each step, task by modality."""
    frame = rows(records["planted"], arm="mm")
    jumps = np.diff(_mean_cells(frame, "chain"), axis=0)  # (K, D)
    modalities, tasks = frame["modality_names"].iloc[0], frame["task_names"].iloc[0]
    figure, ax = new(height=3.2)
    heat_map(ax, jumps.T, tasks, modalities, "increase of AUROC", fmt="+.2f", xlabel="modality", ylabel="task")
    return figure


def subsets(records: Records) -> Figure:
    """AUROC by the number of modalities shown, mean over subsets, a panel a cohort."""
    frame = records["multi"]
    labels = list(samples.SINGLE)
    figure, axes = new(2, 3, height=5.4, sharex=True)
    for ax, c in zip(axes.flat, labels, strict=False):
        for i, arm in enumerate(("mm", "mm_dropout", "pf", "pf_dropout")):
            own = rows(frame, arm=arm, cohort__name=c)
            table = np.array([_by_size(s) for s in own["subsets"]])
            curve_with_band(ax, np.arange(table.shape[1]), table, name(arm), i)
        ax.set_title(cohort_name(c))
    axes.flat[-1].set_visible(False)
    for ax in axes[1]:
        ax.set_xlabel("modalities shown")
    for ax in axes[:, 0]:
        ax.set_ylabel("AUROC")
    _legend_below(figure, axes.flat[0], 2)
    return figure


def single_modalities(records: Records) -> Figure:
    """Each modality alone and all of them, by cohort."""
    found: dict[tuple[int, str], pd.Series] = {}
    arms = ["all modalities", *(f"modality {k + 1} alone" for k in range(4))]
    for i, c in enumerate(samples.SINGLE):
        found[i, arms[0]] = samples.of(records["multi"], "mm", cohort__name=c)
        for k in range(4):
            found[i, arms[k + 1]] = samples.of(records["unimodal"], "mm", cohort__name=c, network__only=k)
    figure, ax = new(height=4.6)
    _dots(ax, [cohort_name(c) for c in samples.SINGLE], arms, found)
    _legend_below(figure, ax, 3)
    return figure


def _by_size(scores: Sequence[float]) -> list[float]:
    sizes = np.array([bits.bit_count() for bits in range(len(scores))])
    return [float(np.mean(np.array(scores)[sizes == k])) for k in range(sizes.max() + 1)]


def missing_shares(records: Records) -> Figure:
    """AUROC under the unchanged and the flipped pattern over the share of missing rows."""
    figure, axes = new(2, 2, height=5.6, sharex=True, sharey="row")
    arms = ("mm_batch", "mm_sample", "pf_batch", "pf_sample", "raw_sample")
    for row, c in zip(axes, ("star", "digits"), strict=True):
        for ax, metric, title in zip(row, ("auroc_same", "auroc_flip"), ("unchanged", "flipped"), strict=True):
            for i, arm in enumerate(arms):
                frame = rows(records["mnar"], arm=arm, cohort__name=c)
                table = frame.pivot(index="seed", columns="corruption.share", values=metric).sort_index(axis=1)
                curve_with_band(ax, 100 * table.columns.to_numpy(float), table.to_numpy(float), name(arm), i)
            ax.axhline(0.5, **CHANCE)
            ax.set_title(f"{cohort_name(c)}, {title} pattern")
        row[0].set_ylabel("AUROC")
    for ax in axes[1]:
        ax.set_xlabel("missing in class 1, %")
    _legend_below(figure, axes[0, 0], 3)
    return figure


def positions(records: Records) -> Figure:
    """AUROC under the flipped pattern by the hidden modality."""
    figure, axes = new(1, 2, height=3.8, sharey=True)
    arms = ("mm_sample", "pf_sample", "mm_batch", "pf_batch", "mm_robust")
    for ax, c in zip(axes, ("star", "digits"), strict=True):
        for i, arm in enumerate(arms):
            frame = rows(records["positions"], arm=arm, cohort__name=c)
            table = frame.pivot(index="seed", columns="corruption.modality", values="auroc_flip").sort_index(axis=1)
            curve_with_band(ax, table.columns.to_numpy(float) + 1, table.to_numpy(float), name(arm), i)
        ax.axhline(0.5, **CHANCE)
        ax.set_xticks(range(1, 5))
        ax.set_title(cohort_name(c))
        ax.set_xlabel("hidden modality, in the chain")
    axes[0].set_ylabel("AUROC, flipped")
    _legend_below(figure, axes[0], 3)
    return figure


def batch_sizes(records: Records) -> Figure:
    """AUROC under the flipped pattern over the batch size, two shares of missing rows."""
    figure, axes = new(1, 2, height=3.6, sharey=True)
    frame = records["batch_sizes"]
    for ax, share in zip(axes, (0.4, 0.8), strict=True):
        for i, arm in enumerate(("mm_batch", "pf_batch")):
            own = rows(frame, arm=arm, cohort__name="star", corruption__share=share)
            table = own.pivot(index="seed", columns="task.batch_size", values="auroc_flip").sort_index(axis=1)
            curve_with_band(ax, table.columns.to_numpy(float), table.to_numpy(float), name(arm), i)
        ax.axhline(0.5, **CHANCE)
        ax.set_xscale("log", base=2)
        ax.set_title(f"p = {share:g}")
        ax.set_xlabel("batch size")
    axes[0].set_ylabel("AUROC, flipped")
    _legend_below(figure, axes[0], 3)
    return figure


def at_random(records: Records) -> Figure:
    """AUROC over the share missing at random."""
    cohorts = ("star", "nhefs", "digits")
    figure, axes = new(1, 3, height=3.4)
    for ax, c in zip(axes, cohorts, strict=True):
        for i, arm in enumerate(("mm", "pf")):
            frame = rows(records["mcar"], arm=arm, cohort__name=c)
            table = frame.pivot(index="seed", columns="corruption.share", values="auroc_same").sort_index(axis=1)
            curve_with_band(ax, 100 * table.columns.to_numpy(float), table.to_numpy(float), name(arm), i)
        ax.set_title(cohort_name(c))
        ax.set_xlabel("missing, %")
    axes[0].set_ylabel("AUROC")
    _legend_below(figure, axes[0], 2)
    return figure


def rules(records: Records) -> Figure:
    """Training rules against the three test patterns, a panel a pattern, and what trees and bits do."""
    frame = pd.concat([records["rules"], _hidden(records)])
    patterns = {"auroc_full": "complete test", "auroc_same": "unchanged", "auroc_flip": "flipped"}
    arms = [
        *("mm_sample", "mm_batch_then_sample", "mm_dropout", "mm_shuffle", "mm_leak_penalty", "mm_robust_dropout"),
        *("mm_robust", "pf_robust", "pf_sample", "pf_indicator", "boosting"),
    ]
    figure, axes = new(3, 1, height=8.4)
    for ax, (metric, title) in zip(axes, patterns.items(), strict=True):
        table = [[samples.of(frame, arm, metric, cohort__name=c).mean() for c in samples.MNAR] for arm in arms]
        heat_map(ax, table, [name(a) for a in arms], [cohort_name(c) for c in samples.MNAR], "AUROC", fmt=".2f")
        ax.set_title(title)
    return figure


def _hidden(records: Records) -> pd.DataFrame:
    frame = records["mnar"]
    return frame[frame["arm"].isin(("boosting", "pf_indicator"))]


def mechanisms(records: Records) -> Figure:
    """Missingness by other values and by the hidden ones, unchanged and turned round."""
    frame = records["mechanisms"]
    settings = [(c, m) for c in ("star", "nhefs") for m in ("mar", "mnar_values")]
    words = {"mar": "by another modality", "mnar_values": "by its own values"}
    arms = ("mm_sample", "mm_robust", "pf_sample")
    figure, axes = new(1, 2, height=3.8, sharey=True, sharex=True)
    for ax, metric, title in zip(axes, ("auroc_same", "auroc_flip"), ("unchanged", "turned round"), strict=True):
        found: dict[tuple[int, str], Any] = {
            (i, arm): samples.of(frame, arm, metric, cohort__name=c, corruption__mechanism=m)
            for i, (c, m) in enumerate(settings)
            for arm in arms
        }
        _dots(ax, [f"{cohort_name(c)},\n{words[m]}" for c, m in settings], arms, found)
        ax.set_title(title)
    _legend_below(figure, axes[0], 3)
    return figure


def really_missing(records: Records) -> Figure:
    """Tables with really missing values, every arm."""
    frame = records["natural"]
    cohorts = ("star", "weather", "pbc")
    arms = ("mm_sample", "mm_robust", "mm_batch", "pf_sample", "pf_indicator", "logistic", "boosting")
    found = {(i, arm): samples.of(frame, arm, cohort__name=c) for i, c in enumerate(cohorts) for arm in arms}
    figure, ax = new(height=4.4)
    _dots(ax, [cohort_name(c) for c in cohorts], arms, found)
    _legend_below(figure, ax, 3)
    return figure
