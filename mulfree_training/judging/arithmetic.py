"""Claims on the arithmetic itself, on what multiplies, and on what it would cost; all but C7 without statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.claims import Claim
from common.pairing import Array, both, rows
from common.statistics import Outcome, exact_identity, mean_greater, mean_less, ratio_mean_less
from mulfree_training import figures
from mulfree_training.judging.samples import Test, table
from mulfree_training.names import ROWS, name

if TYPE_CHECKING:
    from common.records import Records

TABLE = {
    "mul": (-1 / 9, 0.0),
    "div": (0.0, 1 / 8),
    "square": (-1 / 9, 0.0),
    "exp2": (0.0, 0.061476),
    "log2": (-0.086071, 0.0),
    "sqrt": (0.0, 0.060660),
}
"""Lowest and highest error of each operation: relative, for log2 absolute (section 2; closed forms)."""
MEANS = {
    "mul_mean_uniform": -0.038488,
    "mul_mean_logarithmic": -0.038203,
    "div_mean_uniform": 0.041018,
    "div_mean_logarithmic": 0.040684,
    "square_mean_uniform": -0.038341,
    "exp2_mean": 0.040684,
    "log2_mean": -0.057305,
}
"""Integrals over mantissas, evenly distributed as they are or as logarithms."""
EXTREME, MEAN = 1e-6, 1e-4
DISTANCE, FLATTER = "1e-06", 1e-3
SHARE, WRONG = 0.6, 0.1
CHEAPER, ROUGHLY = 30.0, 1.5
PLANTS = ("machine", "ptx", "sass", "backward")


def column(frame: pd.DataFrame, metric: str) -> Array:
    """All values of a metric.

    Raises:
        ValueError: it is not recorded, or for some rows only.
    """
    if metric not in frame or frame[metric].isna().any():
        raise ValueError(f"{metric} is not recorded for arm={', '.join(sorted(set(frame['arm'])))}")
    return frame[metric].to_numpy(dtype=np.float64)


def within(found: Array, expected: float, tolerance: float, unit: str) -> Outcome:
    """Every seed's value is `expected` to the tolerance; nothing is estimated."""
    gap = np.abs(found - expected)
    outcome = exact_identity(np.maximum(gap - tolerance, 0), np.zeros(len(gap)), unit=unit)
    shown = float(found.mean())
    test = f"equality with {expected:.6g} within {tolerance:g}"
    return replace(outcome, effect=shown, ci_low=float(found.min()), ci_high=float(found.max()), test=test)


def kind_of_error(operation: str) -> str:
    """Relative, but for the logarithm."""
    return "absolute error" if operation == "log2" else "relative error"


def extreme(operation: str) -> Test:
    """Both ends of an operation's error; the one that is further off is shown."""

    def test(records: Records) -> Outcome:
        frame = rows(records["primitives"], arm="pam")
        ends = [
            within(column(frame, f"{operation}_{end}"), value, EXTREME, kind_of_error(operation))
            for end, value in zip(("min", "max"), TABLE[operation], strict=True)
        ]
        # the end that is not 0 says more, unless the other one fails
        return max(ends, key=lambda o: (o.p, abs(o.effect)))

    return test


def mean_error(metric: str) -> Test:
    """A mean error over mantissas."""

    def test(records: Records) -> Outcome:
        found = column(rows(records["primitives"], arm="pam"), metric)
        return within(found, MEANS[metric], MEAN, kind_of_error(metric.split("_")[0]))

    return test


def shifted_errors(records: Records) -> Records:
    """All errors are a thousandth larger."""
    frame = records["primitives"]
    columns = [c for c in frame.columns if str(c).split("_")[0] in TABLE and frame[c].dtype.kind == "f"]
    return records.replace("primitives", frame.assign(**{str(c): frame[c] + 1e-3 for c in columns}))


def flat(records: Records) -> Outcome:
    """Median second difference of the piecewise affine network over that of the standard one, paired by seed."""
    own, other = both(table(records, "affine"), "pam", "standard", f"curvature_{DISTANCE}", mode="min")
    return ratio_mean_less(own / other, FLATTER)


def right_slopes(records: Records) -> Outcome:
    """Share of points where the exact rule's slope is the central difference."""
    found = column(rows(records["affine"], arm="pam"), "gradient_right")
    return mean_greater(found, SHARE, unit="share of points")


def wrong_slopes(records: Records) -> Outcome:
    """Share of points where the approximate rule's slope is the central difference, which it does not claim to be."""
    found = column(rows(records["affine"], arm="pam_approx"), "gradient_right")
    return mean_less(found, WRONG, unit="share of points")


def smooth(records: Records) -> Records:
    """The standard network, the exact and the approximate rule are called each other."""
    frame = records["affine"]
    turned = frame["arm"].replace({"pam": "standard", "standard": "pam_approx", "pam_approx": "pam"})
    return records.replace("affine", frame.assign(arm=turned))


def count(records: Records, arm: str, metric: str) -> float:
    """A number of the proof's record of one arm.

    Raises:
        ValueError: it is not recorded, or not the same for all seeds.
    """
    found = column(rows(records["proof"], arm=arm), metric)
    if (found != found[0]).any():
        raise ValueError(f"{metric} of arm={arm} differs between seeds: {', '.join(f'{x:g}' for x in found)}")
    return float(found[0])


def none(arm: str, metric: str, unit: str, looked_at: str = "") -> Test:
    """Nothing was found; `looked_at` is the metric that counts where."""

    def test(records: Records) -> Outcome:
        outcome = exact_identity([count(records, arm, metric)], [0.0], unit=unit)
        where = f"in {count(records, arm, looked_at):,.0f} {looked_at.split('_')[1]}" if looked_at else "in two steps"
        return replace(outcome, detail=where)

    return test


def rejected(records: Records) -> Outcome:
    """Every arm that multiplies is refused."""
    arms = ("standard", *ROWS[:-1], "language_standard")
    passed = [float(count(records, arm, "findings") == 0) for arm in arms]
    found = "; ".join(f"{name(arm)}: {count(records, arm, 'findings'):.0f}" for arm in arms)
    return replace(exact_identity(passed, np.zeros(len(arms)), unit="arms let through"), detail=found)


def planted(records: Records) -> Outcome:
    """The scans find what was planted: in C++ code, in PTX, in a GPU's machine code and in a backward pass."""
    found = {where: count(records, "full", f"planted_{where}") for where in PLANTS}
    missed = [float(number <= 0) for number in found.values()]
    words = "; ".join(f"{where}: {number:.0f}" for where, number in found.items())
    return replace(exact_identity(missed, np.zeros(len(PLANTS)), unit="plants missed"), detail=words)


def blind(records: Records) -> Records:
    """A hundred findings are in the arms without, and none in the others."""
    frame = records["proof"]
    columns = ("findings", "machine_findings", "ptx_findings", "sass_findings")
    changed = {c: np.where(frame[c] == 0, 100, 0) for c in columns} | {
        f"planted_{x}": 0 * frame[f"planted_{x}"] for x in PLANTS
    }
    return records.replace("proof", frame.assign(**changed))


def cheaper(metric: str, low: float, high: float = np.inf) -> Test:
    """A ratio of energies, computed from counted operations and published figures, lies between bounds."""

    def test(records: Records) -> Outcome:
        ratio = count(records, "full", metric)
        inside = low < ratio < high
        words = f"computed ratio > {low:g}" + (f" and < {high:g}" if np.isfinite(high) else "")
        outcome = Outcome(ratio, ratio, ratio, 1, float(not inside), float(inside), words, "×")
        if f"{metric}_area" in records["proof"]:
            outcome = replace(outcome, detail=f"area: {count(records, 'full', f'{metric}_area'):.3g} ×")
        return outcome

    return test


def free_multiplications(records: Records) -> Records:
    """Multiplications cost as little as integer additions."""
    frame = records["proof"]
    return records.replace("proof", frame.assign(**{c: 1.0 for c in frame.columns if str(c).startswith("cost_ratio")}))


def gain(records: Records) -> Outcome:
    """Least-squares gain of products of normal variables with alpha."""
    return within(column(rows(records["primitives"], arm="alpha"), "gain"), 1.0, 2e-3, "gain")


def without_alpha(records: Records) -> Records:
    """The arms with and without alpha change places."""
    frame: pd.DataFrame = records["primitives"]
    return records.replace("primitives", frame.assign(arm=frame["arm"].replace({"pam": "alpha", "alpha": "pam"})))


CLAIMS = [
    Claim(
        id="C6",
        title="The error law of the operations",
        statement="A piecewise affine product is never too large, and too small by at most 1/9; the other operations "
        "have errors of the same size.",
        source="section 2 and its error figure",
        paper_value="product: −1/9 to 0",
        experiments=("primitives",),
        parts={
            **{f"{operation}: {low:.6g} to {high:.6g}": extreme(operation) for operation, (low, high) in TABLE.items()},
            **{f"{column.replace('_', ' ')} = {value}": mean_error(column) for column, value in MEANS.items()},
        },
        control=shifted_errors,
        figure=figures.error_law,
        caption="Left: relative error of a product over both mantissas; lines of equal error. Right: its distribution "
        "and that of a quotient, mantissas uniform.",
        note="Extremes on a grid of all mantissas of 11 bits (functions of one number: 20 bits), means over a million "
        "random pairs a seed.",
    ),
    Claim(
        id="C6.alpha",
        title="Alpha makes products right on average",
        statement="With alpha = 1.0552 products of normal variables have gain 1 in the sense of least squares.",
        source="section 2.7 (read in a third party's summary); official code's comment",
        paper_value="1.0552 for that gain",
        experiments=("primitives",),
        parts={"gain within .002 of 1": gain},
        control=without_alpha,
        caption="See the figure of C6.",
    ),
    Claim(
        id="C7",
        title="Piecewise affine in inputs and weights at once",
        statement="Along a random line through inputs and all weights together the network is piecewise affine, and "
        "the exact rule gives its true slope.",
        source="abstract: jointly piecewise affine",
        paper_value="exactly",
        experiments=("affine",),
        parts={
            "median second difference: < a thousandth of the standard network's": flat,
            "exact rule: slope = central difference at > 60 % of points": right_slopes,
            "approximate rule: at < 10 % of points": wrong_slopes,
        },
        control=smooth,
        figure=figures.affine,
        caption="Second over first difference against the distance h, median over 200 points; a line a seed. A smooth "
        "network's falls with h, a piecewise affine one's is rounding until steps cross kinks.",
        note="Linear layer, layer norm, attention and sum in float64; the points that fail straddle a kink.",
    ),
    Claim(
        id="C4.proof",
        title="A training step contains no multiplication",
        statement="Forward pass, loss, backward pass and optimizer contain no floating-point multiplication, division, "
        "root or fused multiply-add, nor do the compiled kernels.",
        source="abstract: fully multiplication-free training",
        paper_value="0, as a method; the official code emulates it with multiplications",
        experiments=("proof",),
        parts={
            "vision step": none("full", "findings", "operations"),
            "vision step, exact rule": none("full_exact", "findings", "operations"),
            "language step": none("language_full", "findings", "operations"),
            "language step, exact rule": none("language_full_exact", "findings", "operations"),
            "compiled C++": none("full", "machine_findings", "instructions", "machine_instructions"),
            "Triton kernels, PTX for three GPUs": none("full", "ptx_findings", "instructions", "ptx_kernels"),
            "Triton kernels, machine code for H100": none("full", "sass_findings", "instructions", "sass_kernels"),
            "every other arm is refused": rejected,
            "planted multiplications are found": planted,
        },
        control=blind,
        figure=figures.findings,
        caption="Operations with floating-point numbers in the first two training steps that are not on the list of "
        "what adds, compares and moves, row by row of the ablation.",
        note="Outside tensors Python computes the learning rate's schedule, one number a step, and constants that are "
        "the same in all steps: the weights of label smoothing, 1 / sqrt(d), dropout's scale. The optimizer's bias "
        "correction and decay are piecewise affine, as in all arms in which nothing multiplies.",
    ),
    Claim(
        id="C8",
        title="An integer addition costs a thirtieth of a multiplication",
        statement="Replacing a float32 multiplication by an integer addition saves a factor of about 30 in energy; a "
        "multiply-accumulate with float32 sums saves less.",
        source="cost argument (read in a third party's summary); Horowitz, ISSCC 2014, 45 nm",
        paper_value="roughly 30 ×",
        experiments=("proof",),
        parts={
            f"multiplication alone: {CHEAPER:g} × less energy, within a factor {ROUGHLY:g}": cheaper(
                "cost_ratio_multiplication", CHEAPER / ROUGHLY, CHEAPER * ROUGHLY
            ),
            "multiply-accumulate: > 4 × less energy": cheaper("cost_ratio_accumulate", 4.0),
            "arithmetic of a whole vision step: > 4 × less energy": cheaper("cost_ratio_step", 4.0),
        },
        control=free_multiplications,
        figure=figures.cost,
        caption="Energy of the arithmetic in one training step of the digits ViT, by kind of operation.",
        note="Arithmetic from counted operations and published figures of 45 nm, not a measurement; memory traffic, "
        "which usually dominates, is the same in both.",
    ),
]
