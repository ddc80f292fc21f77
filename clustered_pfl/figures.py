"""The counterparts of the paper's figures, drawn from records. Accuracies in percent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from clustered_pfl.judging import samples
from clustered_pfl.names import ATTACK_NAMES, name
from common.figures import INK, bars_with_ci, curve_with_band, interval, look, new, partition_map
from common.pairing import values

if TYPE_CHECKING:
    from common.records import Records

METHODS = ("fc", "ground_truth", "local", "global", "ifca", "hypcluster", "ditto", "knn_per")
FLOOR = 1e-14  # a distance of exactly zero has no logarithm


def _table(frame: pd.DataFrame, column: str, metric: str) -> tuple[NDArray, NDArray]:
    """Sorted values of a column (m,) and the metric by seed (seeds, m)."""
    table = frame.pivot(index="seed", columns=column, values=metric).sort_index(axis=1)
    return table.columns.to_numpy(), table.to_numpy(float)


def _legend_below(figure: Figure, ax: Axes, columns: int) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)


def convergence(records: Records) -> Figure:
    """Distance to the own cluster's optimum over rounds, three panels, log scale."""
    history = records.history("fig3")
    history = history[history["task.dtype"] == "float64"]
    figure, axes = new(1, 3, height=4.2, sharey=True)
    for ax, (k, n) in zip(axes, samples.PANELS, strict=True):
        part = samples.rows(history, task__clusters=k, task__clients=n)
        for i, arm in enumerate(("fc", "ground_truth", "local", "global", "ifca", "ifca_official")):
            steps, distance = _table(part[part["arm"] == arm], "step", "distance")
            curve_with_band(ax, steps, np.log10(np.maximum(distance, FLOOR)), name(arm), i)
        ax.set_title(f"{k} clusters of {n}")
        ax.set_xlabel("round")
    axes[0].set_ylabel("log10 of the distance to the optimum")
    _legend_below(figure, axes[0], 3)
    return figure


def float32_floor(records: Records) -> Figure:
    """FC and ground truth in single and double precision: the paper's plateaus are rounding."""
    history = records.history("fig3")
    figure, axes = new(1, 2, height=3.8, sharey=True)
    for ax, (k, n) in zip(axes, samples.PANELS[:2], strict=True):
        part = samples.rows(history, task__clusters=k, task__clients=n)
        arms = [(arm, dtype) for dtype in ("float32", "float64") for arm in ("fc", "ground_truth")]
        for i, (arm, dtype) in enumerate(arms):
            own = part[(part["arm"] == arm) & (part["task.dtype"] == dtype)]
            steps, distance = _table(own, "step", "distance")
            curve_with_band(ax, steps, np.log10(np.maximum(distance, FLOOR)), f"{name(arm)}, {dtype}", i)
        ax.set_title(f"{k} clusters of {n}")
        ax.set_xlabel("round")
    axes[0].set_ylabel("log10 of the distance to the optimum")
    _legend_below(figure, axes[0], 2)
    return figure


def assumptions(records: Records) -> Figure:
    """Intra-cluster ratio A² and inter-cluster distance Δ² over epochs at client 0's model."""
    history = records.history("fig2")
    figure, axes = new(1, 2, height=3.6)
    pairs = (("intra", "A²: distance within, relative"), ("inter", "Δ²: squared distance between"))
    for ax, (kind, label) in zip(axes, pairs, strict=True):
        end, word = ("max", "largest client") if kind == "intra" else ("min", "smallest client")
        for i, (metric, text) in enumerate(((f"{kind}_mean", "mean of clients"), (f"{kind}_{end}", word))):
            steps, table = _table(history, "step", metric)
            curve_with_band(ax, steps, np.log10(table), text, i)
        ax.set_xlabel("epoch")
        ax.set_ylabel(f"log10 of {label}")
        ax.legend(fontsize=9)
    return figure


def _accuracy(frame: pd.DataFrame, arm: str) -> NDArray:
    return 100 * values(frame, arm, "test_accuracy")


def table1(records: Records) -> Figure:
    """Test accuracy of every method on both tasks."""
    figure, axes = new(2, 1, height=6.4)
    for ax, kind in zip(axes, ("private_label", "rotation"), strict=True):
        frame = samples.task_rows(records, kind)
        arms = [arm for arm in METHODS if (frame["arm"] == arm).any()]
        bars_with_ci(ax, [name(arm) for arm in arms], [_accuracy(frame, arm) for arm in arms], "test accuracy (%)")
        ax.set_title(kind.replace("_", " "), loc="left")
        ax.tick_params(axis="x", labelsize=9)
    return figure


def official(records: Records) -> Figure:
    """The same arm as it should be and as the official code has it."""
    losses = [arm for base in ("fc", "ground_truth", "local") for arm in (base, f"{base}_neg_prob")]
    arms = [*losses, "local_redraw", "ifca", "ifca_shared", "ifca_equal"]
    frame = pd.concat([samples.task_rows(records, "private_label", e) for e in ("table1", "official")])
    figure, ax = new(height=4.0)
    labels = [name(arm).replace(" ", "\n") for arm in arms]
    bars_with_ci(ax, labels, [_accuracy(frame, arm) for arm in arms], "test accuracy (%)")
    ax.tick_params(axis="x", labelsize=8)
    return figure


def sensitivity(records: Records) -> Figure:
    """Accuracy over the radius' quantile and over the steps between clusterings."""
    frame = records["fig4"]
    figure, (left, right) = new(1, 2, height=3.6, sharey=True)
    x, table = _table(frame[frame["arm"] == "radius"], "method.radius.quantile", "test_accuracy")
    curve_with_band(left, x, 100 * table, "FC", 0)
    left.axvline(0.25, color=INK, linewidth=1, linestyle=":", label="1/K")
    left.set_xlabel("quantile of the radius")
    left.set_ylabel("test accuracy (%)")
    left.legend(fontsize=9)
    several = frame[frame["arm"] == "local_steps"]
    single = samples.by_quantile(records, 0.2)
    single = single[~single["method.local_steps"].isin(several["method.local_steps"])]
    steps, table = _table(pd.concat([single, several]), "method.local_steps", "test_accuracy")
    curve_with_band(right, steps, 100 * table, "FC", 0)
    right.set_xscale("log")
    right.set_xticks(steps, [f"{s:g}" for s in steps])
    right.set_xlabel("steps, the last of which clusters")
    return figure


def cliff(records: Records) -> Figure:
    """Distance after 400 rounds over the quantile: a cliff just above 1/K."""
    figure, ax = new()
    x, table = _table(records["cliff"], "method.radius.quantile", "log10_distance")
    curve_with_band(ax, x, table, "FC, 4 clusters of 4", 0)
    ax.axvline(0.25, color=INK, linewidth=1, linestyle=":", label="1/K")
    ax.set_xlabel("quantile of the radius")
    ax.set_ylabel("log10 of the distance to the optimum")
    ax.legend()
    return figure


def label_groups(records: Records) -> Figure:
    """Who holds which classes, and the accuracy of each method there."""
    frame = records["fig5"]
    first = frame.iloc[0]
    counts = np.array(first["label_counts"])
    clusters = np.repeat(np.arange(first["partition.n_clusters"]), len(counts) // first["partition.n_clusters"])
    figure, (left, right) = new(2, 1, height=6.6)
    partition_map(left, counts, clusters)
    arms = ("fc", "ground_truth", "local", "global")
    bars_with_ci(right, [name(a) for a in arms], [_accuracy(frame, a) for a in arms], "test accuracy (%)")
    return figure


def attacks(records: Records) -> Figure:
    """Accuracy of every method under every attack; FC under fewer adaptive attackers as their number."""
    frame = records["fig6"]
    few = {"fc_5": 5, "fc_2": 2}
    arms = [arm for arm in dict.fromkeys(frame["arm"]) if arm not in few]
    kinds = [k for k in ATTACK_NAMES if (frame["attack.name"] == k).any()]
    figure, ax = new(height=4.6)
    for i, arm in enumerate(arms):
        own = frame[frame["arm"] == arm]
        at = [j for j, k in enumerate(kinds) if (own["attack.name"] == k).any()]
        ends = [interval(100 * own["test_accuracy"][own["attack.name"] == kinds[j]].to_numpy(float)) for j in at]
        mean, low, high = (np.array(part, dtype=float) for part in zip(*ends, strict=True))
        x, style = np.array(at) + 0.1 * (i - len(arms) / 2), look(i) | {"linestyle": "none"}
        ax.errorbar(x, mean, yerr=[mean - low, high - mean], capsize=3, label=name(arm), **style)  # type: ignore[arg-type]
    for arm, count in few.items():
        if not (frame["arm"] == arm).any():
            continue  # at laptop scale only
        place, height = kinds.index("inside_radius") - 0.4, 100 * values(frame, arm, "test_accuracy").mean()
        ax.plot(place, height, marker=f"${count}$", color=INK, markersize=9, linestyle="none", label=name(arm))
    ax.axhline(10, color=INK, linewidth=1, linestyle=":")
    ax.set_xticks(range(len(kinds)), [ATTACK_NAMES[k].replace(" ", "\n", 1) for k in kinds])
    ax.set_xlabel("attack by a fifth of the clients")
    ax.set_ylabel("test accuracy (%)")
    _legend_below(figure, ax, 4)
    return figure


def blobs(records: Records) -> Figure:
    """RMS distance from a blob's points to the estimate over rounds; dotted: the paper's plateaus."""
    frame = records["fig7"]
    figure, ax = new(height=4.0)
    for i, (std, plateau) in enumerate(samples.PLATEAUS.items()):
        curves = np.array(samples.rows(frame, task__std=std)["curve"].tolist(), dtype=float)
        curve_with_band(ax, np.arange(curves.shape[1]), curves, f"std {std:g}", i)
        ax.axhline(plateau, color=INK, linewidth=1, linestyle=":")
    ax.set_yscale("log")
    ax.set_yticks([1.5, 3, 6, 13], ["1.5", "3", "6", "13"])
    ax.minorticks_off()
    ax.set_xlabel("rounds M")
    ax.set_ylabel("RMS distance to the estimate")
    ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    return figure


def error_terms(records: Records) -> Figure:
    """The three terms of the bound: 1/n, the separation, and the excess under attack."""
    figure, axes = new(1, 3, height=3.8)
    setups, errors = samples.estimates(records, "members")
    _log_log(axes[0], setups[:, 0], errors, "measured", 0)
    axes[0].plot(setups[:, 0], 1 / setups[:, 0], color=INK, linewidth=1, linestyle=":", label="1/n")
    _ticks(axes[0], setups[::2, 0], (0.02, 0.05, 0.1, 0.2))
    axes[0].set_xlabel("members n")
    axes[0].set_ylabel("squared error (σ²)")
    setups, errors = samples.estimates(records, "separation")
    _log_log(axes[1], setups[:, 1], errors, "measured", 0)
    axes[1].axhline(1 / setups[0, 0], color=INK, linewidth=1, linestyle=":", label="1/n")
    _ticks(axes[1], (2, 4, 10, 30, 100), (0.06, 0.08, 0.1))
    axes[1].set_xlabel("separation Δ (σ)")
    setups, excess = samples.estimates(records, "byzantine", "excess")
    for i, beta in enumerate(np.unique(setups[:, 2])):
        chosen = setups[:, 2] == beta
        _log_log(axes[2], setups[chosen, 1], excess[:, chosen], f"β = {beta:g}", i)
    _ticks(axes[2], (10, 40, 160), (0.1, 1, 10))
    axes[2].set_xlabel("separation Δ (σ)")
    axes[2].set_ylabel("excess error (σ²)")
    for ax in axes:
        ax.legend(fontsize=8)
    return figure


def _ticks(ax: Axes, x: Sequence[float] | NDArray, y: Sequence[float]) -> None:
    """Plain numbers at these places of two logarithmic axes, nothing between them."""
    ax.minorticks_off()
    ax.set_xticks(list(x), [f"{v:g}" for v in x])
    ax.set_yticks(list(y), [f"{v:g}" for v in y])


def _log_log(ax: Axes, x: NDArray, samples: NDArray, label: str, index: int) -> None:
    """Mean over seeds with its interval, both axes logarithmic; samples: (seeds, points) > 0."""
    mean, low, high = interval(samples)
    style: Any = look(index)
    ax.errorbar(x, mean, yerr=[mean - low, high - mean], label=label, capsize=2, **style)
    ax.set_xscale("log")
    ax.set_yscale("log")


def rate(records: Records) -> Figure:
    """Steady-state error over cluster size; dotted: the closed form."""
    figure, ax = new()
    for i, arm in enumerate(("fc", "ground_truth")):
        own = samples.rows(records["rate"], arm=arm)
        x, table = _table(own, "task.clients", "error")
        _log_log(ax, x.astype(float), table, name(arm), i)
    x, expected = _table(own, "task.clients", "expected")
    ax.plot(x, expected[0], color=INK, linewidth=1, linestyle=":", label="η σ² / ((2 − η) n)")
    ax.set_xticks(x, [f"{v:g}" for v in x])
    ax.minorticks_off()
    ax.set_xlabel("clients of a cluster")
    ax.set_ylabel("mean squared error")
    ax.legend()
    return figure


def assignment(records: Records) -> Figure:
    """Share of seeds in which the final clusters are the true ones."""
    frame = records["assignment"]
    figure, ax = new(height=3.2)
    for i, arm in enumerate(("fc", "ifca")):
        exact = values(frame, arm, "exact")
        share = 100 * exact.mean()
        ends = stats.binomtest(int(exact.sum()), len(exact)).proportion_ci(method="wilson")
        ax.errorbar(i, share, yerr=[[share - 100 * ends.low], [100 * ends.high - share]], capsize=5, **look(i))
    ax.set_xticks([0, 1], [name("fc"), name("ifca")])
    ax.set_xlim(-0.6, 1.6)
    ax.set_ylim(-5, 105)
    ax.set_ylabel("seeds with the true clusters (%)")
    return figure


def momentum(records: Records) -> Figure:
    """Pairs of clients classified right over the weight of the new gradient."""
    frame = records["momentum"]
    figure, ax = new()
    x, table = _table(frame[frame["arm"] == "mc"], "method.alpha", "pairs")
    curve_with_band(ax, x, 100 * table, name("mc"), 0)
    mean = 100 * values(frame, "fc", "pairs").mean()
    ax.axhline(mean, color=INK, linewidth=1, linestyle=":", label="FC")
    ax.set_xscale("log")
    ax.set_xticks(x, [f"{v:g}" for v in x])
    ax.minorticks_off()
    ax.set_xlabel("weight α of the new gradient (1: no momentum)")
    ax.set_ylabel("pairs classified right (%)")
    ax.legend()
    return figure


def motivation(records: Records) -> Figure:
    """Pairs of clients classified right when one first model lies amid the clusters."""
    frame = records["motivation"]
    arms = ("fc", "ifca", "ifca_gradient", "hypcluster")
    figure, ax = new(height=3.4)
    bars_with_ci(ax, [name(a) for a in arms], [100 * values(frame, a, "pairs") for a in arms], "pairs right (%)")
    return figure
