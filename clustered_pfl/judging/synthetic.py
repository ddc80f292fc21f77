"""Claims on the synthetic regression (C1, C2, C4.cliff) and their tests, fixed before the judging run.

Distances to the optimum are compared in decades (log10).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from clustered_pfl import figures
from clustered_pfl.judging.samples import BANDS, PANELS, UNKNOWN, Test
from common.claims import Claim, Control, chain, permute, swap_arms
from common.pairing import both, paired, rows, values
from common.statistics import (
    Outcome,
    equivalence,
    mean_greater,
    mean_less,
    paired_greater,
    ratio_mean_greater,
)

if TYPE_CHECKING:
    from common.records import Records

Array = NDArray[np.float64]


def panel(records: Records, k: int, n: int, dtype: str = "float64") -> pd.DataFrame:
    """Figure 3's rows of one panel."""
    return rows(records["fig3"], task__clusters=k, task__clients=n, task__dtype=dtype)


def decades(records: Records, k: int, n: int, a: str, b: str, dtype: str = "float64") -> Array:
    """log10 distance of arm b minus that of arm a, (seeds,): how many decades a is closer."""
    first, second = both(panel(records, k, n, dtype), a, b, "log10_distance", mode="min")
    return second - first


def closer(k: int, n: int, a: str, b: str) -> Test:
    """Arm a ends closer to the optima than arm b."""
    return lambda records: mean_greater(decades(records, k, n, a, b), 0.0, unit="decades")


def as_close(k: int, n: int, a: str, b: str, dtype: str = "float64", margin: float = 0.5) -> Test:
    """Arms a and b end within `margin` decades of each other."""
    return lambda records: equivalence(decades(records, k, n, b, a, dtype), -margin, margin, unit="decades")


def assumption(metric: str, bound: float, unit: str = "") -> Test:
    """A measured constant of figure 2 stays below its bound."""
    return lambda records: mean_less(values(records["fig2"], "ground_truth", metric), bound, unit=unit)


def separation(factor: float) -> Test:
    """The least squared distance between clusters exceeds the largest within one by `factor`."""

    def test(records: Records) -> Outcome:
        frame = records["fig2"]
        ratio = values(frame, "ground_truth", "inter_min") / values(frame, "ground_truth", "intra_distance_max")
        return ratio_mean_greater(ratio, factor)

    return test


def cliff(q: float, other: float, margin: float) -> Test:
    """Quantile q ends more than `margin` decades closer to the optima than the other."""

    def test(records: Records) -> Outcome:
        frame = records["cliff"]
        named = [rows(frame, method__radius__quantile=v).assign(arm=f"q{v:g}") for v in (q, other)]
        near, far = paired(pd.concat(named), f"q{q:g}", f"q{other:g}", "log10_distance", mode="min")
        return paired_greater(far, near, margin, unit="decades")

    return test


def scale_far(records: Records) -> Records:
    """Float64 distances of FC are those of Local, float32 ones a thousand times larger."""
    frame = records["fig3"]
    keys = ["task.clusters", "task.clients", "seed"]
    alone = frame[frame["arm"] == "local"].set_index(keys)["log10_distance"]
    double = (frame["arm"] == "fc") & (frame["task.dtype"] == "float64")
    single = (frame["arm"] == "fc") & (frame["task.dtype"] == "float32")
    moved = frame["log10_distance"] + 3.0 * single
    moved[double] = alone.loc[pd.MultiIndex.from_frame(frame.loc[double, keys])].to_numpy()
    return records.replace("fig3", frame.assign(log10_distance=moved))


CLAIMS = [
    Claim(
        id="C1",
        title="Synthetic regression: FC ends closer than Local, Local than Global",
        statement="With over-parameterised clients, Federated-Clustering ends nearer to each client's optimum than "
        "local training, and local training nearer than one global model.",
        source="figure 3, read by eye",
        paper_value="after 800 rounds FC 1.5e-4, as GT, .018; Local .12, .09, .12; Global 190, 140, 190",
        experiments=("fig3",),
        parts={f"{k} clusters of {n}: FC closer than Local": closer(k, n, "fc", "local") for k, n in PANELS}
        | {f"{k} clusters of {n}: Local closer than Global": closer(k, n, "local", "global") for k, n in PANELS},
        control=chain(swap_arms("fig3", "fc", "global"), swap_arms("fig3", "local", "fc")),
        figure=figures.convergence,
        caption=f"Mean distance of the clients' models to their own optimum, float64. {BANDS} Same size, rates and "
        f"rounds "
        "as the paper; IFCA's rate is tuned in every panel, its official indexing has the official rates.",
    ),
    Claim(
        id="C1.truth",
        title="FC ends within half a decade of knowing the clusters",
        statement="Federated-Clustering reaches the distance of training with the true clusters.",
        source="figure 3, read by eye",
        paper_value="1.5e-4 against 3e-5; equal; .018 against .009",
        experiments=("fig3",),
        parts={
            "4 clusters of 4, float64": as_close(4, 4, "fc", "ground_truth"),
            "4 clusters of 16, float64": as_close(4, 16, "fc", "ground_truth"),
            "4 clusters of 4, float32": as_close(4, 4, "fc", "ground_truth", "float32"),
            "4 clusters of 16, float32": as_close(4, 16, "fc", "ground_truth", "float32"),
            "16 clusters of 4, float64": as_close(16, 4, "fc", "ground_truth"),
        },
        control=scale_far,
        figure=figures.float32_floor,
        caption=f"The same runs in single and double precision. {BANDS} The paper's plateaus of 1e-5 to 1e-4 are the "
        "rounding of float32: in float64 both curves fall on to 1e-9 and below.",
    ),
    Claim(
        id="C1.ifca",
        title="FC ends closer than a correctly indexed, tuned IFCA",
        statement="Federated-Clustering ends nearer to the optima than IFCA from the same start, even when IFCA's "
        "models are indexed as meant and its rate is tuned in each panel.",
        source="figure 3; indexing and tuning are ours",
        paper_value="IFCA .012, .25 and 150 (with its official indexing)",
        experiments=("fig3",),
        parts={f"{k} clusters of {n}": closer(k, n, "fc", "ifca") for k, n in PANELS},
        control=swap_arms("fig3", "fc", "ifca"),
        caption="See the figure of C1.",
        note="IFCA starts at the true clusters' own starts, as in the paper, so it never has to find them.",
    ),
    Claim(
        id="C1.ifca_official",
        title="FC ends closer than IFCA as the official code indexes it",
        statement="Figure 3 as published: IFCA stays near its first error in the second panel and far off in the "
        "third.",
        source="figure 3, read by eye; official synthetic code",
        paper_value="IFCA .012, .25 and 150",
        experiments=("fig3",),
        parts={f"{k} clusters of {n}": closer(k, n, "fc", "ifca_official") for k, n in PANELS},
        control=swap_arms("fig3", "fc", "ifca_official"),
        caption="See the figure of C1.",
        note="A fidelity arm: the official start takes every K-th client's model, which is right only where clusters "
        "have K clients. Its curves in the second and third panel are this indexing, not IFCA.",
    ),
    Claim(
        id="C2",
        title="Gradient distances within clusters are bounded",
        statement="At a common model the gradients of a cluster differ by a bounded multiple A of their mean, "
        "throughout training.",
        source="figure 2, number in its legend",
        paper_value="largest A² 10.2",
        experiments=("fig2",),
        parts={
            "largest A² over clients and epochs below 100": assumption("intra_max", 100.0, "A²"),
            "log A² of every cluster rises at most .01 an epoch": assumption("intra_slope", 0.01, "an epoch"),
        },
        control=Control(
            "A² exchanged for Δ²",
            lambda records: records.replace(
                "fig2", records["fig2"].assign(intra_max=records["fig2"]["inter_min"], intra_slope=0.1)
            ),
        ),
        figure=figures.assumptions,
        caption=f"All gradients at client 0's model, 300 clients, ground-truth training at rate 1e-4. {BANDS}",
    ),
    Claim(
        id="C2.separation",
        title="Gradients of different clusters are far apart",
        statement="At a common model the least squared distance between clients of different clusters is a thousand "
        "times the largest one within a cluster.",
        source="figure 2, number in its legend; the factor is ours",
        paper_value="least Δ² 2.2e7, flat over epochs",
        experiments=("fig2",),
        parts={"least Δ² above 1000 × the largest squared distance within": separation(1e3)},
        control=Control(
            "distances within and between exchanged, and those within as small as one",
            lambda records: records.replace(
                "fig2", records["fig2"].assign(inter_min=1.0, intra_distance_max=records["fig2"]["inter_min"])
            ),
        ),
        caption="See the figure of C2.",
        note="Gradients grow with the cluster's index (inputs lie around (k, ..., k)), so the scatter within the last "
        "cluster exceeds the gap between the first two. Our Δ² are about n² = 81 times below the legend's, as if its "
        "gradients were sums over the 9 samples; ratios do not depend on that.",
    ),
    Claim(
        id="C4.cliff",
        title="Synthetic: a cliff just above quantile 1/K",
        statement="On the synthetic problem FC converges for quantiles up to about 1/K, slowly for small ones, and "
        "goes to the global mean above.",
        source="our test of figure 4's question on figure 3's problem",
        paper_value=UNKNOWN,
        experiments=("cliff",),
        parts={
            "quantile .25 at least 5 decades closer than .4": cliff(0.25, 0.4, 5.0),
            "quantile .25 at least 2 decades closer than .1": cliff(0.25, 0.1, 2.0),
        },
        control=permute("cliff", "log10_distance"),
        figure=figures.cliff,
        caption=f"First panel of figure 3 after 400 rounds. {BANDS}",
    ),
]
