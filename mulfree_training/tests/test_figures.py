"""Figures show the records' numbers, on axes that say what they are."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common import figures as house
from common.claims import Claim
from common.tests.report_fakes import FakeRecords
from common.tests.worlds import changed
from mulfree_training import dashboard, figures
from mulfree_training.claims import CLAIMS
from mulfree_training.names import ARM_NAMES, ROWS, name
from mulfree_training.tests import worlds
from mulfree_training.tests.worlds import without

ACCURACY, NLL = "test_accuracy", "test_nll"
DRAWN = [claim for claim in CLAIMS if claim.figure]


@pytest.fixture(scope="module")
def laptop() -> FakeRecords:
    return worlds.records("laptop")


def plots(figure: Figure) -> list[Axes]:
    """The axes that are no colour bars."""
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


@pytest.mark.parametrize("claim", DRAWN, ids=lambda c: c.id)
def test_figures_are_drawn_and_say_what_their_axes_are(claim: Claim, laptop: FakeRecords) -> None:
    assert claim.figure is not None and claim.caption
    for ax in plots(claim.figure(laptop)):  # type: ignore[arg-type]
        assert ax.get_xlabel() or ax.get_ylabel()
        assert ax.lines or ax.patches or ax.collections
        for line in ax.lines:
            assert np.isfinite(np.asarray(line.get_xydata(), dtype=float)).all()


@pytest.mark.parametrize("claim", DRAWN, ids=lambda c: c.id)
def test_no_label_covers_another(claim: Claim, laptop: FakeRecords) -> None:
    assert claim.figure is not None
    with house.style():
        figure = claim.figure(laptop)  # type: ignore[arg-type]
        FigureCanvasAgg(figure).draw()  # places everything
    width, height = figure.canvas.get_width_height()
    for axis in (axis for ax in plots(figure) for axis in (ax.xaxis, ax.yaxis)):
        low, high = sorted(axis.get_view_interval())
        labels = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [text.get_window_extent() for text in (*labels, axis.label) if text.get_text()]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    titles = [ax.xaxis.label.get_window_extent() for ax in plots(figure)]
    titles += [t.get_window_extent() for ax in plots(figure) for t in (ax.title, ax._left_title, ax._right_title)]  # type: ignore[attr-defined]
    titles = [box for box in titles if box.width]
    assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[:i])
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in titles)


def test_every_claim_shows_a_figure_or_names_one() -> None:
    for claim in CLAIMS:
        assert claim.figure or claim.caption.startswith("See the figure") or claim.scale_needed, claim.id
        if claim.caption.startswith("See the figure"):
            (named,) = [c for c in CLAIMS if claim.caption == f"See the figure of {c.id}."]
            assert named.figure


def ticks(ax: Axes) -> list[str]:
    return [tick.get_text() for tick in ax.get_yticklabels()]


def drawn(ax: Axes, place: int) -> list[float]:
    """Differences of the seeds on a line of dots."""
    (line,) = [line for line in ax.lines if np.allclose(np.asarray(line.get_ydata(), dtype=float), place - 0.15)]
    return [float(x) for x in line.get_xdata()]


def differences(records: FakeRecords, experiment: str, arm: str, other: str, metric: str) -> list[float]:
    wide = records[experiment].pivot(index="seed", columns="arm", values=metric)
    return (wide[arm] - wide[other]).dropna().tolist()


def test_rows_are_differences_from_float32_beside_their_margins(laptop: FakeRecords) -> None:
    left, right = figures.rows_of_ablation(laptop).axes  # type: ignore[arg-type]
    arms = ["perturbed", *ROWS]  # bfloat16 runs on a GPU only
    assert ticks(left) == [name(arm) for arm in arms]
    for i, arm in enumerate(arms):
        assert drawn(left, i) == pytest.approx(differences(laptop, "vision", arm, "standard", ACCURACY))
        if arm in ROWS:  # the others are not run in language
            assert drawn(right, i) == pytest.approx(differences(laptop, "language", arm, "standard", NLL))
    for ax, usual, full in ((left, -1.5, -2.0), (right, 0.05, 0.08)):
        margins = {line.get_ydata()[0]: line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"}
        assert list(margins) == [i - 0.45 for i in range(len(arms))]
        assert list(margins.values()) == [usual] * (len(arms) - 1) + [full]
    assert "points" in left.get_xlabel() and "nats" in right.get_xlabel()


def test_rules_are_losses_less_those_of_float32(laptop: FakeRecords) -> None:
    arms = ["matmul", "matmul_exact", "full", "full_exact", "full_exact_but_loss"]
    fewer = changed(laptop, "language", without("full_exact"))
    for records, lacks in ((laptop, ""), (fewer, "full_exact")):
        axes = figures.rules(records).axes  # type: ignore[arg-type]
        assert ticks(axes[0]) == [name(arm) for arm in arms]
        for ax, experiment in zip(axes, ("vision", "language"), strict=True):
            for i, arm in enumerate(arms):
                if (experiment, arm) != ("language", lacks):
                    assert drawn(ax, i) == pytest.approx(differences(records, experiment, arm, "standard", NLL))
    without_it = changed(fewer, "vision", without("full_exact"))
    assert name("full_exact") not in ticks(figures.rules(without_it).axes[0])  # type: ignore[arg-type]


def test_alpha_is_compared_with_the_same_arm_without(laptop: FakeRecords) -> None:
    axes = figures.constant(laptop).axes  # type: ignore[arg-type]
    panels = (("vision", ACCURACY, 1.5), ("vision", NLL, 0.05), ("language", NLL, 0.05))
    for ax, (experiment, metric, bound) in zip(axes, panels, strict=True):
        for i, arm in enumerate(("matmul", "full")):
            assert drawn(ax, i) == pytest.approx(differences(laptop, experiment, f"{arm}_alpha", arm, metric))
        edges = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
        assert edges == [-bound, bound]


def test_lengths_are_differences_from_float32(laptop: FakeRecords) -> None:
    axes = figures.training_lengths(laptop).axes  # type: ignore[arg-type]
    for ax, experiment, steps in zip(axes, ("language", "language_long"), (400, 600), strict=True):
        for i, arm in enumerate(("matmul", "full")):
            assert drawn(ax, i) == pytest.approx(differences(laptop, experiment, arm, "standard", NLL))
        assert ax.get_title(loc="left") == f"{steps} steps"
        assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"] == [0.05, 0.08]


def test_baselines_are_shown_seed_by_seed(laptop: FakeRecords) -> None:
    arms = ["standard", "matmul", "matmul_own", "full", "full_own", "power_of_two", "adder"]
    for records, shown in ((laptop, arms), (changed(laptop, "vision", without("adder")), arms[:-1])):
        (ax,) = figures.baselines(records).axes  # type: ignore[arg-type]
        assert ticks(ax) == [name(arm) for arm in shown]
        for i, arm in enumerate(shown):
            frame = records["vision"]
            assert drawn(ax, i) == frame[frame["arm"] == arm][ACCURACY].tolist()


def test_convolution_joins_both_arms_of_a_seed(laptop: FakeRecords) -> None:
    (ax,) = figures.convolution(laptop).axes  # type: ignore[arg-type]
    wide = laptop["convolution"].pivot(index="seed", columns="arm", values=ACCURACY)[["standard", "matmul"]]
    joined = [list(line.get_ydata()) for line in ax.lines if list(line.get_xdata()) == [0, 1]]
    assert joined == wide.to_numpy().tolist()


def test_the_error_law_is_shown_in_percent(laptop: FakeRecords) -> None:
    figure = figures.error_law(laptop)  # type: ignore[arg-type]
    left, right = plots(figure)
    row = laptop["primitives"].query("arm == 'pam'").iloc[0]
    mesh = left.collections[0]
    assert np.asarray(mesh.get_array()).ravel() == pytest.approx(100 * np.ravel(row["map"]))
    for patch, operation in zip(right.patches, ("mul", "div"), strict=True):
        values, edges, _ = patch.get_data()  # type: ignore[attr-defined]
        assert edges == pytest.approx(100 * np.array(row[f"{operation}_edges"]))
        assert (values * np.diff(edges)).sum() == pytest.approx(1)


def test_curvatures_are_shown_over_the_distance(laptop: FakeRecords) -> None:
    (ax,) = figures.affine(laptop).axes  # type: ignore[arg-type]
    frame, distances = laptop["affine"], [1e-7, 1e-6, 1e-5]
    shown = [list(line.get_ydata()) for line in ax.lines]
    wanted = [frame[frame["arm"] == arm][[f"curvature_{h:g}" for h in distances]] for arm in ("standard", "pam")]
    assert shown == [row for part in wanted for row in part.to_numpy().tolist()]
    assert all(list(line.get_xdata()) == distances for line in ax.lines)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_findings_are_counted_row_by_row(laptop: FakeRecords) -> None:
    (ax,) = figures.findings(laptop).axes  # type: ignore[arg-type]
    arms = ["standard", *ROWS, "full_exact"]
    assert [patch.get_width() for patch in ax.patches] == [worlds.FINDINGS[arm] for arm in arms]  # type: ignore[attr-defined]
    assert ticks(ax) == [name(arm) for arm in arms]


def test_energies_of_a_step_are_stacked(laptop: FakeRecords) -> None:
    (ax,) = figures.cost(laptop).axes  # type: ignore[arg-type]
    total = sum(worlds.ENERGY.values())
    assert [text.get_text().strip() for text in ax.texts] == [f"{total:,.0f} µJ", f"{total / 4.4:,.0f} µJ"]
    standard = [patch for patch in ax.patches if abs(patch.get_y() + patch.get_height() / 2) < 0.1]  # type: ignore[attr-defined]
    assert sorted(patch.get_width() for patch in standard) == sorted(worlds.ENERGY.values())  # type: ignore[attr-defined]
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {k.replace("_", " ") for k in worlds.ENERGY}


def test_arms_are_called_by_what_they_are() -> None:
    assert name("full_exact") == "5, exact rule" and name("some_arm") == "some arm"
    assert len(set(ARM_NAMES.values())) == len(ARM_NAMES)
    twins = {job.config["arm"] for e, jobs in worlds.plans("laptop").items() if e != "affine" for job in jobs}
    assert twins - set(ARM_NAMES) == {"pam", "alpha"}  # of the operations themselves


def test_the_dashboard_has_a_section_a_claim_in_their_order(laptop: FakeRecords) -> None:
    sections = dashboard.sections()
    stems = list(dict.fromkeys(claim.id.split(".")[0] for claim in CLAIMS))
    assert [section.title.split()[0] for section in sections] == stems
    recorded = {str(c) for frame in laptop.frames.values() for c in frame.columns}
    for section, stem in zip(sections, stems, strict=True):
        assert section.panels
        own = {e for claim in CLAIMS if claim.id.split(".")[0] == stem for e in claim.experiments}
        known = {str(c) for e in own for c in laptop[e].columns} | {"train/loss"}
        assert all(panel.y.removeprefix("summary.") in known for panel in section.panels), stem
        assert all(panel.group.removeprefix("config.") in recorded for panel in section.panels)
