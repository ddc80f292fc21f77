"""Claims on estimation and on quadratic losses (C7 to C11) and their tests, fixed before the judging run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from clustered_pfl import figures
from clustered_pfl.judging.samples import BANDS, PLATEAUS, UNKNOWN, Test, estimates, fewer, slopes
from common.claims import Claim, Control, chain, swap_arms
from common.pairing import paired, rows, values
from common.statistics import (
    Outcome,
    equivalence,
    every,
    mean_less,
    paired_greater,
    ratio_equivalence,
    ratio_mean_greater,
)

if TYPE_CHECKING:
    from common.records import Records

Array = NDArray[np.float64]


def plateau(std: float, paper: float) -> Test:
    """The plateau of a blob curve lies within 5 % of the value read off the paper's figure."""

    def test(records: Records) -> Outcome:
        frame = rows(records["fig7"], task__std=std)
        return ratio_equivalence(values(frame, "fc", "plateau") / paper, 0.95, 1.05, unit="× the paper's")

    return test


def falls(std: float) -> Test:
    """The mean curve over seeds never rises by more than 0.1 % of its start."""

    def test(records: Records) -> Outcome:
        curves = np.array(rows(records["fig7"], task__std=std)["curve"].tolist(), dtype=float)
        mean = curves.mean(0)
        rise = float(np.diff(mean).max() / mean[0])
        ok = rise <= 1e-3
        test = "largest rise of the mean curve <= 0.1 % of its start"
        return Outcome(rise, rise, rise, len(curves), 0.0 if ok else 1.0, 1.0 if ok else 0.0, test, "of the start")

    return test


def members_slope(records: Records) -> Outcome:
    """The error falls like 1 / n_i."""
    setups, errors = estimates(records, "members")
    return equivalence(slopes(setups[:, 0], errors), -1.15, -0.85, unit="log-log slope")


def separated(records: Records) -> Outcome:
    """At Delta = 2 sigma the error is above the floor sigma^2 / n_i by more than 20 %."""
    setups, errors = estimates(records, "separation")
    return ratio_mean_greater(errors[:, setups[:, 1] == 2][:, 0] * setups[0, 0], 1.2, unit="× the floor")


def floored(records: Records) -> Outcome:
    """From Delta = 4 sigma on the error is within 10 % of the floor."""
    setups, errors = estimates(records, "separation")
    far = [i for i, delta in enumerate(setups[:, 1]) if delta >= 4]
    tests = [ratio_equivalence(errors[:, i] * setups[i, 0], 0.9, 1.1, unit="× the floor") for i in far]
    return every(tests, [f"Delta = {setups[i, 1]:g}" for i in far])


def excess_slope(beta: float) -> Test:
    """The excess error under attack grows like Delta."""

    def test(records: Records) -> Outcome:
        setups, excess = estimates(records, "byzantine", "excess")
        chosen = setups[:, 2] == beta
        return equivalence(slopes(setups[chosen, 1], excess[:, chosen]), 0.85, 1.15, unit="log-log slope")

    return test


def excess_bounded(records: Records) -> Outcome:
    """The excess error stays below beta sigma Delta everywhere."""
    _, excess = estimates(records, "byzantine", "excess")
    _, bound = estimates(records, "byzantine", "bound")
    return mean_less((excess / bound).max(1), 1.0, unit="of beta sigma Delta")


def far_harmless(records: Records) -> Outcome:
    """Attackers a million radii away and farther add less than 10 % to the error without them."""
    setups, errors = estimates(records, "far")
    _, excess = estimates(records, "far", "excess")
    chosen = setups[:, 3] >= 1e6
    share = (np.abs(excess) / (errors - excess))[:, chosen].max(1)
    return mean_less(share, 0.1, unit="of the clean error")


def saturates(records: Records) -> Outcome:
    """From ten radii to 1e12 radii the error does not change by more than 1 %."""
    setups, errors = estimates(records, "far")
    ratio = errors[:, setups[:, 3] == 1e12][:, 0] / errors[:, setups[:, 3] == 10][:, 0]
    return ratio_equivalence(ratio, 0.99, 1.01, unit="× the error at 10 radii")


def rate_slopes(records: Records, arm: str) -> Array:
    """Slope of log steady-state error over log n_i, (seeds,)."""
    table = rows(records["rate"], arm=arm).pivot(index="seed", columns="task.clients", values="error").sort_index()
    return slopes(table.columns.to_numpy(float), table.to_numpy(float))


def rate(arm: str) -> Test:
    """The steady-state error falls like 1 / n_i."""
    return lambda records: equivalence(rate_slopes(records, arm), -1.2, -0.8, unit="log-log slope")


def same_rate(records: Records) -> Outcome:
    """FC and ground truth have the same slope."""
    gap = rate_slopes(records, "fc") - rate_slopes(records, "ground_truth")
    return equivalence(gap, -0.1, 0.1, unit="log-log slope")


def assigned_more(records: Records) -> Outcome:
    """FC ends with the true clusters in more seeds than IFCA."""
    frame = records["assignment"]
    a, b = (values(frame, arm, "exact") < 1 for arm in ("fc", "ifca"))
    return fewer(a, b, f"not the true clusters: FC {a.sum()}, IFCA {b.sum()} of {len(b)} seeds")


def _with_and_without(records: Records, arm: str, metric: str, mode: Any = "max") -> tuple[Array, Array]:
    """A metric of Momentum-Clustering with alpha = .1 and with alpha = 1, (seeds,) each."""
    frame = rows(records["momentum"], arm=arm)
    named = [rows(frame, method__alpha=alpha).assign(arm=f"a{alpha:g}") for alpha in (0.1, 1.0)]
    return paired(pd.concat(named), "a0.1", "a1", metric, mode=mode)


def momentum_helps(records: Records) -> Outcome:
    """With alpha = .1 more pairs of clients are classified right than without momentum."""
    with_, without = _with_and_without(records, "mc", "pairs")
    return paired_greater(100 * with_, 100 * without, unit="points of pairs")


def momentum_error(records: Records) -> Outcome:
    """After 400 steps the models with alpha = .1 are closer to their optima."""
    with_, without = _with_and_without(records, "mc_long", "final_error", "min")
    return paired_greater(np.log10(without), np.log10(with_), unit="decades of squared error")


def empties(arm: str) -> Test:
    """The arm ends with fewer models in use than there are clusters."""

    def test(records: Records) -> Outcome:
        frame = records["motivation"]
        used, clusters = values(frame, arm, "occupied"), values(frame, arm, "task.clusters")
        return mean_less(used - clusters, 0.0, unit="models in use less clusters")

    return test


def finds_where(arm: str) -> Test:
    """FC classifies more pairs of clients right than the arm."""

    def test(records: Records) -> Outcome:
        first, second = paired(records["motivation"], "fc", arm, "pairs")
        return paired_greater(100 * first, 100 * second, unit="points of pairs")

    return test


def flat(experiment: str, metric: str) -> Control:
    """Control: every entry of a list-valued metric is its first, so that nothing varies."""

    def apply(records: Records) -> Records:
        frame = records[experiment]
        same = pd.Series([v[:1] * len(v) if isinstance(v, list) else v for v in frame[metric]], index=frame.index)
        return records.replace(experiment, frame.assign(**{metric: same}))

    return Control(f"every {metric} of {experiment} equal to its first", apply)


def backwards(experiment: str, metric: str) -> Control:
    """Control: list-valued metrics run backwards."""

    def apply(records: Records) -> Records:
        frame = records[experiment]
        turned = pd.Series([v[::-1] if isinstance(v, list) else v for v in frame[metric]], index=frame.index)
        return records.replace(experiment, frame.assign(**{metric: turned}))

    return Control(f"{metric} of {experiment} run backwards", apply)


CLAIMS = [
    Claim(
        id="C7",
        title="Threshold-Clustering converges within a few rounds",
        statement="The distance from a blob's points to the estimate falls with the rounds to a plateau.",
        source="figure 7, read by eye",
        paper_value="plateaus 1.5, 2.95, 5.9, 13.4; elbow at 5 to 17 rounds",
        experiments=("fig7",),
        parts={f"std {s:g}: plateau within 5 % of {v:g}": plateau(s, v) for s, v in PLATEAUS.items()}
        | {f"std {s:g}: the mean curve falls": falls(s) for s in PLATEAUS},
        control=chain(
            Control(
                "plateaus doubled",
                lambda records: records.replace("fig7", records["fig7"].assign(plateau=2 * records["fig7"]["plateau"])),
            ),
            backwards("fig7", "curve"),
        ),
        figure=figures.blobs,
        caption=f"90 points, 10 blobs, d = 10, radius at the 10th percentile. {BANDS} Dotted: the paper's plateaus.",
    ),
    Claim(
        id="C8",
        title="The estimation error has the three terms of the bound",
        statement="The squared error is of the order of σ²/n + σ³/Δ + βσΔ: it falls like 1/n, meets the floor σ²/n for "
        "separated clusters, and grows at most like βσΔ under attack.",
        source="theorem on Threshold-Clustering (second-hand)",
        paper_value="σ²/n + σ³/Δ + βσΔ up to constants",
        experiments=("theory",),
        parts={
            "slope over n is −1 within .15": members_slope,
            "Δ = 2σ: more than 20 % above the floor": separated,
            "Δ ≥ 4σ: within 10 % of the floor": floored,
            "excess at β = .05: slope 1 in Δ within .15": excess_slope(0.05),
            "excess at β = .1: slope 1 in Δ within .15": excess_slope(0.1),
            "excess at β = .2: slope 1 in Δ within .15": excess_slope(0.2),
            "excess below βσΔ everywhere": excess_bounded,
            "attackers a million radii away add less than 10 %": far_harmless,
            "the error stays the same from 10 to 1e12 radii": saturates,
        },
        control=chain(
            flat("theory", "errors"),
            flat("theory", "excess"),
        ),
        figure=figures.error_terms,
        caption=f"400 draws a seed, d = 10, radius √(σΔ), attackers at .7 radii. {BANDS}",
    ),
    Claim(
        id="C9",
        title="Training error falls like 1/n, as with known clusters",
        statement="The leading term of the rate is that of training with the true clusters: the variance of n clients.",
        source="theorem on Federated-Clustering (second-hand)",
        paper_value="rate of order 1/√(n T)",
        experiments=("rate",),
        parts={
            "FC: slope over n is −1 within .2": rate("fc"),
            "slopes of FC and ground truth within .1": same_rate,
        },
        control=Control(
            "the error of every cluster size is that of the smallest",
            lambda records: records.replace(
                "rate",
                records["rate"].assign(
                    error=records["rate"]["error"].where(records["rate"]["arm"] != "fc", records["rate"]["error"].max())
                    * (1 + 0.01 * records["rate"]["seed"] * (records["rate"]["task.clients"] > 8))
                ),
            ),
        ),
        figure=figures.rate,
        caption=f"Quadratic losses with noisy gradients, four clusters, rate .1, last half of 200 steps. {BANDS}",
    ),
    Claim(
        id="C9.assignment",
        title="From random starts FC finds the clusters more often than IFCA",
        statement="FC, which starts from each client's own gradient, ends with the true clusters in more seeds than "
        "IFCA from random models.",
        source="our test of the theory's assumption-free start",
        paper_value=UNKNOWN,
        experiments=("assignment",),
        parts={"more seeds with the true clusters": assigned_more},
        control=swap_arms("assignment", "fc", "ifca"),
        figure=figures.assignment,
        caption="Quadratic losses, four clusters of eight, 30 seeds. Bars: 95 % interval (Wilson).",
    ),
    Claim(
        id="C10",
        title="Momentum makes noisy gradients separable",
        statement="Momentum-Clustering needs one gradient a client and round; the momentum lowers the variance of the "
        "points to be clustered from σ² to about ασ².",
        source="theorem on Momentum-Clustering (second-hand); no experiment in the official code",
        paper_value=UNKNOWN,
        experiments=("momentum",),
        parts={
            "α = .1 classifies more pairs right than no momentum": momentum_helps,
            "and ends 400 steps closer to the optima": momentum_error,
        },
        control=Control(
            "the runs with α = .1 and without momentum exchanged",
            lambda records: records.replace(
                "momentum",
                records["momentum"].assign(
                    **{"method.alpha": records["momentum"]["method.alpha"].replace({0.1: 1.0, 1.0: 0.1})}
                ),
            ),
        ),
        figure=figures.momentum,
        caption=f"Quadratic losses, two clusters of eight, noise as large as the separation. {BANDS}",
    ),
    Claim(
        id="C11",
        title="Clustering by loss fails where clustering by gradient does not",
        statement="When one first model lies amid the clusters, every client finds it best and IFCA trains it alone; "
        "Federated-Clustering needs no first models and finds the clusters.",
        source="motivating example (second-hand)",
        paper_value=UNKNOWN,
        experiments=("motivation",),
        parts={
            "IFCA leaves models without clients": empties("ifca"),
            "its gradient variant too": empties("ifca_gradient"),
            "HypCluster too": empties("hypcluster"),
            "FC classifies more pairs right than IFCA": finds_where("ifca"),
        },
        control=chain(
            *(swap_arms("motivation", "fc", arm) for arm in ("ifca", "ifca_gradient", "hypcluster")),
        ),
        figure=figures.motivation,
        caption=f"Quadratic losses, four clusters of eight. {BANDS}",
    ),
]
