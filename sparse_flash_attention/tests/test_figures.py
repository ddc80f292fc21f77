"""Figures show the records' numbers, on axes that say what they are."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes

from common.claims import Claim
from common.tests.report_fakes import FakeRecords
from sparse_flash_attention import dashboard, figures
from sparse_flash_attention.claims import CLAIMS
from sparse_flash_attention.names import ARM_NAMES, name
from sparse_flash_attention.tests import worlds


@pytest.fixture(scope="module")
def laptop() -> FakeRecords:
    return worlds.records("laptop")


@pytest.fixture(scope="module")
def paper() -> FakeRecords:
    return worlds.records("paper")


DRAWN = [claim for claim in CLAIMS if claim.figure]


def check(figure: object) -> None:
    for ax in figure.axes:  # type: ignore[attr-defined]
        assert ax.get_ylabel() or ax.get_xlabel() or ax.get_title()
        assert ax.lines or ax.patches or ax.collections or ax.images
        for line in ax.lines:
            assert np.isfinite(np.asarray(line.get_ydata(), dtype=float)).all()


@pytest.mark.parametrize("claim", DRAWN, ids=lambda c: c.id)
def test_figures_are_drawn_and_say_what_their_axes_are(claim: Claim, laptop: FakeRecords, paper: FakeRecords) -> None:
    assert claim.figure is not None and claim.caption
    for world in (laptop, paper):
        check(claim.figure(world))  # type: ignore[arg-type]


def test_every_claim_shows_a_figure_or_names_one() -> None:
    for claim in CLAIMS:
        assert claim.figure or claim.caption.startswith("See the figure") or claim.scale_needed, claim.id


def curve(ax: Axes, label: str) -> tuple[list[float], list[float]]:
    """x and y of the line with a label."""
    (line,) = [line for line in ax.lines if str(line.get_label()).startswith(label)]
    return [float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()]


def test_bucket_runtime_is_dense_time_over_sparse_time(laptop: FakeRecords) -> None:
    (ax,) = figures.bucket_runtime(laptop).axes  # type: ignore[arg-type]
    frame = laptop["runtime"]
    for n in (2, 8, 16, 32):
        x, y = curve(ax, f"{n} buckets")
        ratio = (frame["dense_ms"] / frame[f"buckets_{n}_ms"]).groupby(frame["task.length"])
        assert x == sorted(frame["task.length"].unique())
        assert y == pytest.approx(ratio.mean().tolist(), rel=0.01)  # lengths with fewer repetitions cut all
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_xlabel()) == ("log", "log", "rows T")


def test_keep_runtime_stands_beside_the_square(laptop: FakeRecords) -> None:
    (ax,) = figures.keep_runtime(laptop).axes  # type: ignore[arg-type]
    frame = laptop["runtime"]
    own = frame[frame["task.length"] == 8192]
    x, y = curve(ax, "measured, 8,192 rows")
    assert x == [1.0, 0.7, 0.5, 0.3, 0.1]
    assert y == pytest.approx([(own["dense_ms"] / own[f"keep_{k:g}_ms"]).mean() for k in x])
    x, y = curve(ax, "1 / kept share²")
    assert y == pytest.approx([1 / k**2 for k in x])
    assert ax.xaxis_inverted()


def test_crossing_counts_what_is_dropped(laptop: FakeRecords) -> None:
    (ax,) = figures.crossing(laptop).axes  # type: ignore[arg-type]
    frame = laptop["crossing"]
    for kind, label in (("keep", "ranges (ours)"), ("naive", "compact")):
        x, y = curve(ax, label)
        assert x == sorted(x) and x[0] == 0
        wanted = [(frame["dense_ms"] / frame[f"{kind}_{1 - p / 100:g}_ms"]).mean() for p in x]
        assert y == pytest.approx(wanted)
    assert "%" in ax.get_xlabel()


def test_coverage_shows_ours_and_all_of_reformers(laptop: FakeRecords) -> None:
    (ax,) = figures.coverage(laptop).axes  # type: ignore[arg-type]
    assert set(curve(ax, "ranges (ours)")[1]) == {1.0}
    frame = laptop["coverage"]
    labels = {
        "uniform": "Reformer, 16 random", "angular": "Reformer, 16 LSH", "chunk_128": "Reformer, 16 buckets, chunks",
        "growing": "Reformer, a bucket a chunk",
    }  # fmt: skip
    for arm, label in labels.items():
        own = frame[frame["arm"] == arm]
        x, y = curve(ax, label)
        assert y == pytest.approx(own.groupby("task.length")["reformer"].mean().tolist()) and len(x) == 6


def heights(ax: Axes) -> dict[str, float]:
    """Label of every bar -> its height."""
    labels = [tick.get_text().replace("\n", " ") for tick in ax.get_xticklabels()]
    return dict(zip(labels, (patch.get_height() for patch in ax.patches), strict=True))


def test_steps_shows_every_model_that_was_timed(laptop: FakeRecords) -> None:
    (ax,) = figures.steps(laptop).axes  # type: ignore[arg-type]
    found, frame = heights(ax), laptop["step"]
    assert set(found) == {
        "16 buckets 8,192", "30% dropped 8,192", "50% dropped 8,192", "70% dropped 8,192", "16 buckets 16,384",
    }  # fmt: skip
    own = frame[frame["task.length"] == 16384]
    assert found["16 buckets 16,384"] == pytest.approx((own["dense_ms"] / own["hash_16_ms"]).mean())


def test_losses_are_means_over_seeds_and_absent_arms_are_left_out(laptop: FakeRecords) -> None:
    (ax,) = figures.losses(("dense", "drop_30", "drop_50"))(laptop).axes  # type: ignore[arg-type]
    found, frame = heights(ax), laptop["language"]
    assert list(found.values()) == pytest.approx(
        [frame[frame["arm"] == arm]["test_loss"].mean() for arm in ("dense", "drop_30")]
    )
    assert "nats" in ax.get_ylabel()


def test_training_joins_early_and_late_densities_of_a_seed(laptop: FakeRecords) -> None:
    (ax,) = figures.training(laptop).axes  # type: ignore[arg-type]
    own = laptop["language"].query("arm == 'hash'").sort_values("seed")
    assert [list(line.get_ydata()) for line in ax.lines] == own[["density_early", "density_late"]].to_numpy().tolist()
    assert ax.get_ylim()[0] == 0


def test_errors_shows_every_seed(laptop: FakeRecords) -> None:
    (ax,) = figures.errors(laptop).axes  # type: ignore[arg-type]
    frame = laptop["exactness"]
    shown = sorted(float(y) for line in ax.lines for y in line.get_ydata())
    assert shown == sorted([*frame["forward_error"], *frame["backward_error"]])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["fp32", "bf16", "fp16", "fp32\n(torch)"]


def test_registers_shows_every_kernel_on_every_target(laptop: FakeRecords) -> None:
    row = laptop["aot"].iloc[0]
    count = len(row["registers"])
    numbered = laptop["aot"].assign(registers=[list(range(count))])
    left = figures.registers(FakeRecords({"aot": numbered})).axes[0]  # type: ignore[arg-type]
    shown = [text.get_text() for text in left.texts]
    assert sorted(map(int, shown)) == list(range(count)) == sorted(range(24))


def test_arms_are_called_by_what_they_are() -> None:
    assert name("none") == "no attention" and name("hash_32") == "hash 32"
    assert len(set(ARM_NAMES.values())) == len(ARM_NAMES)


def test_the_dashboard_has_a_section_a_claim_in_their_order(laptop: FakeRecords) -> None:
    sections = dashboard.sections()
    stems = list(dict.fromkeys(claim.id.split(".")[0] for claim in CLAIMS))
    assert [section.title.split()[0] for section in sections] == stems
    recorded = {str(c) for frame in laptop.frames.values() for c in frame.columns}
    logged = {"train/loss", "density"}
    for panel in (panel for section in sections for panel in section.panels):
        assert panel.y.removeprefix("summary.") in recorded | logged | {"wall_s"}, panel.y
        for key in (panel.x, panel.group):
            assert not key.startswith("config.") or key.removeprefix("config.") in recorded, key
