"""Figures in one style: colour-blind safe, told apart in grey by line style and marker, legible on light and dark.

Everything that is ink (text, axes, ticks) has the one colour `INK`, which `save` turns into `currentColor` in the
inline SVG, so that a page's theme colours it; backgrounds are transparent. Data colours are those of Okabe and Ito,
legible on white and on near-black. No pyplot, no global state: `new` gives a Figure, the caller passes axes around.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from numpy.typing import ArrayLike, NDArray
from scipy import special

from common.statistics import LEVEL

INK = "#1f2430"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo")
WIDTH = 6.4  # inches; a page shows it at up to 720 px, so that 11 pt text stays readable at 400 px
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "papers-in-one-house",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color", "hatch.color"),
        INK,
    ),
}


@contextmanager
def style() -> Iterator[None]:
    """Apply the house style to the figures drawn and saved inside."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc must not change the bytes of a report
        matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
        yield


def new(rows: int = 1, columns: int = 1, *, height: float = 3.6, **kwargs: Any) -> tuple[Figure, Any]:
    """Give a Figure of the house's width and its axes (an array of Axes when there are several).

    height: inches of the whole figure; kwargs go to `Figure.subplots` (sharex, sharey, …).
    """
    with style():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        return figure, figure.subplots(rows, columns, **kwargs)


def look(index: int) -> dict[str, Any]:
    """Give colour, line style and marker of series number `index`; distinct for the first seven."""
    return {"color": PALETTE[index % 7], "linestyle": LINES[index % 7], "marker": MARKERS[index % 7]}


def interval(samples: ArrayLike, axis: int = 0) -> tuple[NDArray, NDArray, NDArray]:
    """Give mean and ends of the 95 % t interval over `axis` (seeds); NaN-free input of any shape with that axis."""
    values = np.asarray(samples, dtype=np.float64)
    n = values.shape[axis]
    mean = values.mean(axis=axis)
    if n < 2:
        return mean, mean, mean
    half = special.stdtrit(n - 1, 0.5 + LEVEL / 2) * values.std(axis=axis, ddof=1) / np.sqrt(n)
    return mean, mean - half, mean + half


def curve_with_band(ax: Axes, x: ArrayLike, samples: ArrayLike, label: str, index: int = 0) -> None:
    """Draw the mean over seeds as a line and its 95 % t interval as a band.

    x: (points,); samples: (seeds, points), NaN where a run had diverged (the line has a gap there); index: see
    `look`.
    """
    positions = np.asarray(x, dtype=np.float64)
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != len(positions):
        raise ValueError(f"samples has shape {values.shape}: must be (seeds, {len(positions)})")
    mean, low, high = interval(values)
    every = max(1, len(positions) // 10)
    ax.plot(positions, mean, label=label, markevery=every, **look(index))
    ax.fill_between(positions, low, high, color=PALETTE[index % 7], alpha=0.2, linewidth=0)


def paired_dots(ax: Axes, a: ArrayLike, b: ArrayLike, labels: tuple[str, str], ylabel: str) -> None:
    """Draw two arms as dots joined by one line a seed, with the mean and 95 % t interval beside each column.

    a, b: (seeds,) in the same order; ylabel: quantity with unit.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"a has shape {first.shape}, b {second.shape}: must be equal")
    for u, v in zip(first, second, strict=True):
        ax.plot([0, 1], [u, v], color=INK, alpha=0.35, linewidth=1)
    for i, values in enumerate((first, second)):
        ax.plot(np.full(len(values), i), values, linestyle="none", marker=MARKERS[i], color=PALETTE[i])
        mean, low, high = interval(values)
        side = i + (0.15 if i else -0.15)
        ax.errorbar(
            side, mean, yerr=[[mean - low], [high - mean]], fmt=MARKERS[i], color=PALETTE[i], capsize=4, mfc="none"
        )
    ax.set_xticks([0, 1], labels)
    ax.set_xlim(-0.5, 1.5)
    ax.set_ylabel(ylabel)


def ratio_dots(
    ax: Axes,
    labels: Sequence[str],
    samples: Sequence[ArrayLike],
    low: float,
    high: float,
    xlabel: str,
    target: float = 1.0,
) -> None:
    """Draw one row a quantity: its seeds as dots, mean and 95 % t interval, against the band [low, high] of the claim.

    labels: names of the rows, first on top; samples: one (seeds,) a row; xlabel: quantity with unit.
    """
    ax.axvspan(low, high, color=PALETTE[2], alpha=0.15, linewidth=0, label=f"claimed: {low:g} to {high:g}")
    ax.axvline(target, color=INK, linewidth=1, linestyle=":")
    for row, sample in enumerate(samples):
        values = np.asarray(sample, dtype=np.float64)
        mean, left, right = interval(values)
        ax.plot(
            values, np.full(len(values), row), linestyle="none", marker="o", color=PALETTE[0], alpha=0.45, markersize=4
        )
        ax.errorbar(mean, row, xerr=[[mean - left], [right - mean]], fmt="D", color=PALETTE[1], capsize=4, markersize=5)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_xlabel(xlabel)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0))


def heat_map(
    ax: Axes,
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    *,
    ylabel: str = "",
    xlabel: str = "",
    fmt: str = ".3g",
) -> None:
    """Draw values (rows, columns) as cells with their numbers written in; NaN (diverged) is crossed. label: unit."""
    grid = np.ma.masked_invalid(np.asarray(values, dtype=np.float64))
    if grid.shape != (len(rows), len(columns)):
        raise ValueError(f"values has shape {grid.shape}: must be ({len(rows)}, {len(columns)})")
    mesh = ax.pcolormesh(grid, cmap="cividis", edgecolors="none")
    for i, j in np.ndindex(grid.shape):
        if grid.mask is not np.ma.nomask and np.ma.getmaskarray(grid)[i, j]:
            ax.text(j + 0.5, i + 0.5, "×", ha="center", va="center")
            continue
        red, green, blue, _ = mesh.cmap(mesh.norm(grid[i, j]))
        light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
        ink = "#000000" if light else "#ffffff"
        ax.text(j + 0.5, i + 0.5, format(float(grid[i, j]), fmt), ha="center", va="center", color=ink, fontsize=9)
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns)
    ax.set_yticks(np.arange(len(rows)) + 0.5, rows)
    ax.invert_yaxis()
    ax.grid(False)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.figure.colorbar(mesh, ax=ax, label=label)


def bars_with_ci(ax: Axes, labels: Sequence[str], samples: Sequence[ArrayLike], ylabel: str) -> None:
    """Draw one bar an arm (mean over seeds) with its 95 % t interval and the seeds as dots.

    samples: one (seeds,) an arm; ylabel: quantity with unit. The axis is cut to the data, and says so, when they lie
    far from zero.
    """
    for i, sample in enumerate(samples):
        values = np.asarray(sample, dtype=np.float64)
        mean, low, high = interval(values)
        ax.bar(i, mean, width=0.6, color=PALETTE[i % 7], alpha=0.55, hatch=HATCHES[i % 7], edgecolor=INK)
        ax.errorbar(i, mean, yerr=[[mean - low], [high - mean]], color=INK, capsize=5)
        beside = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
        ax.plot(i + beside, values, linestyle="none", marker=".", color=INK, alpha=0.7)
    everything = np.concatenate([np.asarray(s, dtype=np.float64) for s in samples])
    smallest, largest, spread = float(everything.min()), float(everything.max()), float(np.ptp(everything))
    if min(abs(smallest), abs(largest)) > spread > 0:
        ax.set_ylim(smallest - 0.15 * spread, largest + 0.15 * spread)
        ax.set_title("axis does not start at 0", loc="right", fontsize=8)
    ax.set_xticks(range(len(labels)), labels)
    ax.grid(axis="x", visible=False)
    ax.set_ylabel(ylabel)


def partition_map(
    ax: Axes, counts: ArrayLike, clusters: ArrayLike, *, xlabel: str = "client", ylabel: str = "class"
) -> None:
    """Draw what each client of a federation holds: one dot a client and class, its area the number of rows.

    counts: (clients, classes) rows; clusters: (clients,) cluster of each client, a thin line where it changes.
    """
    rows, cluster = np.asarray(counts, dtype=np.float64), np.asarray(clusters)
    if rows.ndim != 2 or cluster.shape != rows.shape[:1]:
        raise ValueError(f"counts has shape {rows.shape}, clusters {cluster.shape}: must be (N, classes) and (N,)")
    n, classes = rows.shape
    largest = max(float(rows.max(initial=0)), 1.0)
    # the largest dot fills its cell (of the axes before labels take their room), and can be seen among 300 clients
    inches = ax.get_position().size * ax.get_figure(root=True).get_size_inches()  # type: ignore[union-attr]
    diameter = max(5.0, 0.9 * 72 * min(inches[0] / n, inches[1] / classes))
    client, label = np.nonzero(rows)
    colours = np.array(PALETTE)[cluster[client] % 7]
    ax.scatter(client, label, s=diameter**2 * rows[client, label] / largest, c=colours, linewidths=0, clip_on=False)
    borders = np.concatenate([[-0.5], np.flatnonzero(np.diff(cluster)) + 0.5, [n - 0.5]])
    for border in borders[1:-1]:
        ax.axvline(border, color=INK, linewidth=0.8)
    if 2 < len(borders) < 20:
        top = ax.secondary_xaxis("top")
        names = cluster[(borders[:-1] + 0.5).astype(int)]
        top.set_xticks((borders[:-1] + borders[1:]) / 2, [str(name) for name in names])
        top.tick_params(length=0)
        top.spines["top"].set_visible(False)
        top.set_xlabel("cluster")
    sizes = (float(f"{largest / part:.0e}") for part in (1.5, 6, 24))  # one digit
    for size in sorted({max(1.0, size) for size in sizes}):
        width = diameter * np.sqrt(size / largest)
        ax.plot([], [], linestyle="none", marker="o", color=INK, mew=0, markersize=width, label=f"{size:g}")
    ax.legend(title="rows", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    ax.set(xlim=(-0.5, n - 0.5), ylim=(classes - 0.5, -0.5), xlabel=xlabel, ylabel=ylabel)
    for axis, count in ((ax.xaxis, n), (ax.yaxis, classes)):
        axis.set_major_locator(FixedLocator(range(count)) if count <= 10 else MaxNLocator(integer=True))
    ax.grid(False)


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write <folder>/<name>.svg and .png, the same bytes for the same figure; give the SVG to put inside a page.

    The page's SVG takes its ink from the text colour around it, and its ids start with `name`, so that several fit on
    one page. The files carry their own ink: dark, and light for readers in dark mode.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with style():
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(folder / f"{name}.png", dpi=150, facecolor="white", metadata={"Software": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL).replace(INK, "currentColor")
    ink = "<style>svg{color:" + INK + "}@media(prefers-color-scheme:dark){svg{color:#e6e9ef}}</style>"
    (folder / f"{name}.svg").write_text(re.sub(r"(<svg[^>]*>)", rf"\1{ink}", svg, count=1))
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)  # would apply to the whole page
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    head, body = svg.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + body
