"""The counterparts of the paper's figures, drawn from records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.figures import INK, bars_with_ci, curve_with_band, heat_map, new
from common.pairing import rows
from sparse_flash_attention.judging.samples import names_of
from sparse_flash_attention.names import name

if TYPE_CHECKING:
    from common.records import Records

EVEN: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": ":"}


def errors(records: Records) -> Figure:
    """Errors of outputs and gradients by precision, seeds as dots."""
    frame = records["exactness"]
    cases = list(dict.fromkeys(zip(frame["arm"], frame["task.dtype"], strict=True)))
    figure, ax = new()
    for shift, metric, marker in ((-0.12, "forward_error", "o"), (0.12, "backward_error", "s")):
        for i, (arm, dtype) in enumerate(cases):
            found = rows(frame, arm=arm, task__dtype=dtype)[metric]
            label = {"forward_error": "output", "backward_error": "gradients"}[metric] if i == 0 else None
            ax.plot(
                np.full(len(found), i + shift), found, linestyle="none", marker=marker, markersize=4, label=label,
                color=INK if marker == "o" else "white", markeredgecolor=INK,
            )  # fmt: skip
    ax.set_yscale("log")
    ax.set_xticks(range(len(cases)), [dtype if arm == "default" else f"{dtype}\n({arm})" for arm, dtype in cases])
    ax.set_ylabel("largest error")
    ax.legend()
    return figure


def _ratio_axis(ax: Axes, ylabel: str = "dense time / sparse time (×)") -> None:
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.axhline(1, **EVEN)
    ax.set_ylabel(ylabel)


def _length_axis(ax: Axes, found: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(found), [f"{x:,}" for x in found])
    ax.minorticks_off()
    ax.set_xlabel("rows T")


def _against_length(ax: Axes, frame: pd.DataFrame, names: Sequence[str], labels: Sequence[str]) -> None:
    """Ratio against the length, one line a sparsity; lengths with fewer repetitions keep theirs."""
    for i, (column, label) in enumerate(zip(names, labels, strict=True)):
        ratio = (frame["dense_ms"] / frame[f"{column}_ms"]).to_numpy(dtype=np.float64)
        own = pd.DataFrame({"x": frame["task.length"], "seed": frame["seed"], "y": ratio}).dropna()
        table = own.pivot(index="seed", columns="x", values="y").dropna()
        curve_with_band(ax, table.columns.to_numpy(), table.to_numpy(), label, i)
    _length_axis(ax, sorted(frame["task.length"].unique()))
    _ratio_axis(ax)


def bucket_runtime(records: Records) -> Figure:
    """Hash-sparse attention: ratio against the length, one line a number of buckets."""
    frame = records["runtime"]
    counts = sorted(int(c.split("_")[1]) for c in names_of(frame, "buckets_"))
    figure, ax = new()
    _against_length(ax, frame, [f"buckets_{n}" for n in counts], [f"{n} buckets" for n in counts])
    ax.legend(ncols=2)
    return figure


def keep_runtime(records: Records) -> Figure:
    """QK-sparse attention: ratio against the kept share, with the square of the share as the ideal."""
    frame = records["runtime"]
    found = sorted((float(c.split("_")[1]) for c in names_of(frame, "keep_")), reverse=True)
    length = 8192 if (frame["task.length"] == 8192).any() else int(frame["task.length"].max())
    own = rows(frame, task__length=length)
    ratios = np.stack([own["dense_ms"] / own[f"keep_{keep:g}_ms"] for keep in found], axis=1)
    figure, ax = new()
    curve_with_band(ax, found, ratios, f"measured, {length:,} rows", 0)
    ax.plot(found, 1 / np.square(found), label="1 / kept share²", **EVEN)
    _ratio_axis(ax)
    ax.set_xscale("log")
    ax.set_xticks(found, [f"{keep:g}" for keep in found])
    ax.minorticks_off()
    ax.invert_xaxis()
    ax.set_xlabel("kept share of queries and of keys")
    ax.legend()
    return figure


def crossing(records: Records) -> Figure:
    """Dense time over the time of both ways against the dropped share."""
    frame = records["crossing"]
    keeps = sorted((float(c.split("_")[1]) for c in names_of(frame, "naive_")), reverse=True)
    figure, ax = new()
    for i, (kind, label) in enumerate((("keep", "ranges (ours)"), ("naive", "compact, then an explicit mask"))):
        ratios = np.stack([frame["dense_ms"] / frame[f"{kind}_{keep:g}_ms"] for keep in keeps], axis=1)
        curve_with_band(ax, 100 * (1 - np.array(keeps)), ratios, label, i)
    _ratio_axis(ax, "dense time / time (×)")
    ax.set_xlabel("dropped queries and keys (%)")
    ax.legend()
    return figure


def coverage(records: Records) -> Figure:
    """Coverage against the length: ours, and Reformer's in four set-ups."""
    frame = records["coverage"]
    arms = {
        "uniform": "Reformer, 16 random buckets",
        "angular": "Reformer, 16 LSH buckets",
        "chunk_128": "Reformer, 16 buckets, chunks of 128",
        "growing": "Reformer, a bucket a chunk",
    }
    figure, ax = new(height=4.2)
    ours = rows(frame, arm="uniform").pivot(index="seed", columns="task.length", values="ours")
    curve_with_band(ax, ours.columns.to_numpy(), ours.to_numpy(), "ranges (ours), any buckets", 0)
    for i, (arm, label) in enumerate(arms.items(), 1):
        table = rows(frame, arm=arm).pivot(index="seed", columns="task.length", values="reformer")
        curve_with_band(ax, table.columns.to_numpy(), table.to_numpy(), label, i)
    _length_axis(ax, sorted(frame["task.length"].unique()))
    ax.set_ylabel("same-bucket pairs attended (share)")
    ax.set_ylim(0, 1.05)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return figure


def steps(records: Records) -> Figure:
    """Dense step time over sparse step time, by length."""
    frame = records["step"]
    labels, samples = [], []
    for length in sorted(frame["task.length"].unique()):
        own = rows(frame, task__length=length)
        for column in names_of(frame, "hash_") + names_of(frame, "drop_"):
            if own[column].notna().all():
                kind, value = column.removesuffix("_ms").split("_")
                what = f"{value} buckets" if kind == "hash" else f"{float(value):.0%} dropped"
                labels.append(f"{what}\n{length:,}")
                samples.append((own["dense_ms"] / own[column]).to_numpy(dtype=np.float64))
    figure, ax = new()
    bars_with_ci(ax, labels, samples, "dense step / sparse step (×)")
    return figure


def losses(arms: Sequence[str], experiment: str = "language") -> Callable[[Records], Figure]:
    """A figure of test losses, one bar an arm."""

    def draw(records: Records) -> Figure:
        frame = records[experiment]
        shown = [arm for arm in arms if (frame["arm"] == arm).any()]
        figure, ax = new(height=4.0)
        samples = [rows(frame, arm=arm).sort_values("seed")["test_loss"].to_numpy() for arm in shown]
        bars_with_ci(
            ax,
            [name(arm).replace(" (", "\n(").replace(", ", ",\n") for arm in shown],
            samples,
            "test loss (nats a token)",
        )
        ax.tick_params(axis="x", labelsize=8)
        return figure

    return draw


def training(records: Records) -> Figure:
    """Density of the buckets early and late in training, a line a seed."""
    frame = rows(records["language"], arm="hash").sort_values("seed")
    figure, ax = new()
    for _, row in frame.iterrows():
        ax.plot([0, 1], [row["density_early"], row["density_late"]], color=INK, alpha=0.5, marker="o")
    ax.set_xticks([0, 1], ["early", "end of training"])
    ax.set_xlim(-0.4, 1.4)
    ax.set_ylabel("live share of causal pairs")
    ax.set_ylim(bottom=0)
    return figure


def registers(records: Records) -> Figure:
    """Registers and shared memory of every kernel on every target."""
    row = records["aot"].iloc[0]
    kernels, targets = list(dict.fromkeys(row["kernels"])), list(dict.fromkeys(row["targets"]))
    figure, axes = new(1, 2, height=0.32 * len(kernels) + 1.6, sharey=True)
    for ax, column, label in zip(
        axes, ("registers", "shared_kib"), ("registers a thread", "shared memory (KiB)"), strict=True
    ):
        cells = np.full((len(kernels), len(targets)), np.nan)
        for kernel, target, value in zip(row["kernels"], row["targets"], row[column], strict=True):
            cells[kernels.index(kernel), targets.index(target)] = value
        heat_map(ax, cells, kernels, [t.removeprefix("sm_") for t in targets], label, xlabel="target sm_…", fmt=".0f")
    return figure
