"""Statistical tests behind the verdicts: each gives an `Outcome` with effect, 95 % interval, n, p and opposite p.

Every test is one-sided at the alternative that the claim states; `p_opposite` is the p-value of the mirrored
alternative at the same bound, so that a claim can be significantly contradicted and not merely unsupported. The unit of
replication is the seed: comparisons are paired over seeds, and a diverged run enters as the worst value
(`common.pairing`), because dropping it would reward instability.

Student's t throughout; equivalence by two one-sided tests (Schuirmann 1987); several parts by Holm (1979); trends by
permutation of ranks within seeds. A sample without variance beyond rounding needs no distribution: the side of the
bound on which it lies decides (p is 0 or 1), and an exact tie supports neither side (both p are 1). One seed supports
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from common.pairing import paired, values

Array = NDArray[np.float64]
LEVEL = 0.95  # of every confidence interval
SHARED = ", splits of shared rows"

__all__ = [
    "Outcome",
    "bootstrap_ci",
    "equivalence",
    "every",
    "exact_identity",
    "holm",
    "mean_greater",
    "mean_less",
    "monotone_trend",
    "noninferior",
    "paired",
    "paired_greater",
    "ratio_equivalence",
    "ratio_greater",
    "ratio_mean_greater",
    "ratio_mean_less",
    "ratio_noninferior",
    "values",
]


@dataclass(frozen=True)
class Outcome:
    """One statistical test: what was measured, and how surprising that is if the claim (or its opposite) is false."""

    effect: float
    """Point estimate, in `unit`."""
    ci_low: float
    """Lower end of the two-sided 95 % confidence interval; NaN where one seed leaves it unknown."""
    ci_high: float
    """Upper end of the interval."""
    n: int
    """Independent replicates: seeds or pairs of seeds."""
    p: float
    """p-value of the claim's alternative, in [0, 1]; small supports the claim."""
    p_opposite: float
    """p-value of the mirrored alternative, in [0, 1]; small contradicts the claim."""
    test: str
    """The test in words, with its bound."""
    unit: str = ""
    """Unit of the effect, e.g. `points`, `nats/byte`, `×`."""
    detail: str = ""
    """What a reader should know beside the numbers."""

    def __post_init__(self) -> None:
        for name in ("p", "p_opposite"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}={value}: must lie in [0, 1]")
        if self.n < 1:
            raise ValueError(f"n={self.n}: must be >= 1")


def paired_greater(a: ArrayLike, b: ArrayLike, margin: float = 0.0, *, unit: str = "", overlap: float = 0.0) -> Outcome:
    """Test mean(a − b) > margin by a paired one-sided t test.

    a, b: (n,) one value a seed, same seeds in the same order (as `paired` gives them). Effect: mean(a − b).
    overlap: test rows over training rows, where seeds are splits of the same rows and therefore not independent: the
    variance of the mean is (1/n + overlap) times that of a value (Nadeau and Bengio 2003). 0: independent seeds.
    Raises ValueError for unequal lengths, different seed indices (when both are Series) or values that are not finite.
    """
    first, second = _pair(a, b)
    test = f"paired one-sided t: difference > {margin:g}"
    return _greater(first - second, margin, test, unit, _rounding(first, second), overlap)


def noninferior(a: ArrayLike, b: ArrayLike, margin: float, *, unit: str = "", overlap: float = 0.0) -> Outcome:
    """Test mean(a − b) > −margin: a is not worse than b by `margin` or more (larger is better). margin > 0."""
    if margin <= 0:
        raise ValueError(f"margin={margin}: must be > 0")
    outcome = paired_greater(a, b, -margin, unit=unit, overlap=overlap)
    return replace(outcome, test=f"non-inferiority, {outcome.test}")


def mean_greater(x: ArrayLike, bound: float, *, unit: str = "", overlap: float = 0.0) -> Outcome:
    """Test mean(x) > bound by a one-sample t test; x: (n,) one value a seed. Effect: mean(x).

    overlap: as in `paired_greater`.
    """
    values, test = _sample("x", x), f"one-sided t: mean > {bound:g}"
    return _greater(values, bound, test, unit, _rounding(values, np.asarray(bound)), overlap)


def mean_less(x: ArrayLike, bound: float, *, unit: str = "", overlap: float = 0.0) -> Outcome:
    """Test mean(x) < bound by a one-sample t test; arguments as in `mean_greater`. Effect: mean(x)."""
    outcome = mean_greater(x, bound, unit=unit, overlap=overlap)
    return replace(_mirror(outcome), test=outcome.test.replace(">", "<"))


def equivalence(x: ArrayLike, low: float, high: float, *, unit: str = "", overlap: float = 0.0) -> Outcome:
    """Test low < mean(x) < high by two one-sided t tests (TOST); x: (n,) one value a seed. Effect: mean(x).

    overlap: as in `paired_greater`.

    p is the larger of the two one-sided p-values. p_opposite asks for a mean outside [low, high] on either side: twice
    the smaller of the mirrored p-values, which keeps its size at any width of the interval.
    """
    if not low < high:
        raise ValueError(f"low={low}, high={high}: must satisfy low < high")
    above = mean_greater(x, low, unit=unit, overlap=overlap)
    below = mean_less(x, high, unit=unit, overlap=overlap)
    outside = min(1.0, 2.0 * min(above.p_opposite, below.p_opposite))
    test = f"two one-sided t (TOST): {low:g} < mean < {high:g}" + (SHARED if overlap else "")
    return replace(above, p=max(above.p, below.p), p_opposite=outside, test=test)


def ratio_greater(a: ArrayLike, b: ArrayLike, factor: float = 1.0, *, unit: str = "×") -> Outcome:
    """Test that the geometric mean of a/b exceeds `factor` > 0 (paired t on logs); a, b > 0. Effect: that mean."""
    outcome = paired_greater(_log("a", a), _log("b", b), _log_bound("factor", factor), unit=unit)
    return _exp(outcome, f"paired one-sided t on logs: ratio > {factor:g}")


def ratio_noninferior(a: ArrayLike, b: ArrayLike, factor: float, *, unit: str = "×") -> Outcome:
    """Test that the geometric mean of a/b exceeds 1/factor, factor > 1: a is not smaller than b by that factor."""
    if factor <= 1:
        raise ValueError(f"factor={factor}: must be > 1")
    return replace(
        ratio_greater(a, b, 1.0 / factor, unit=unit), test=f"non-inferiority, paired t on logs: ratio > 1/{factor:g}"
    )


def ratio_mean_greater(x: ArrayLike, bound: float, *, unit: str = "×") -> Outcome:
    """Test that the geometric mean of x > 0 exceeds `bound` > 0 (t test on logs)."""
    outcome = mean_greater(_log("x", x), _log_bound("bound", bound), unit=unit)
    return _exp(outcome, f"one-sided t on logs: geometric mean > {bound:g}")


def ratio_mean_less(x: ArrayLike, bound: float, *, unit: str = "×") -> Outcome:
    """Test that the geometric mean of x > 0 is below `bound` > 0 (t test on logs)."""
    outcome = mean_less(_log("x", x), _log_bound("bound", bound), unit=unit)
    return _exp(outcome, f"one-sided t on logs: geometric mean < {bound:g}")


def ratio_equivalence(x: ArrayLike, low: float, high: float, *, unit: str = "×") -> Outcome:
    """Test low < geometric mean of x < high by TOST on logs; x > 0, 0 < low < high."""
    outcome = equivalence(_log("x", x), _log_bound("low", low), _log_bound("high", high), unit=unit)
    return _exp(outcome, f"TOST on logs: {low:g} < geometric mean < {high:g}")


def monotone_trend(
    x: ArrayLike,
    y: ArrayLike,
    *,
    blocks: ArrayLike | None = None,
    increasing: bool = True,
    permutations: int = 9999,
    seed: int = 0,
) -> Outcome:
    """Test that y rises (or falls) with x: Spearman's rho, averaged over blocks, against permutations within blocks.

    x, y: (m,) levels and values; blocks: (m,) the seed of each point, None = one block. Effect: mean rho in [−1, 1].
    n: blocks, or points when there is one block. The permutation test is exact in size for any distribution of y.
    Raises ValueError when a block has fewer than three points or constant x.
    """
    levels, values = _pair(x, y)
    labels = np.zeros(len(levels)) if blocks is None else np.asarray(blocks)
    if labels.shape != levels.shape:
        raise ValueError(f"blocks has shape {labels.shape}: must match x with shape {levels.shape}")
    sign = 1.0 if increasing else -1.0
    generator = np.random.default_rng(seed)
    observed: list[float] = []
    shuffled = np.zeros(permutations)
    for label in np.unique(labels):
        rho, null = _block_rho(levels[labels == label], values[labels == label], permutations, generator)
        observed.append(rho)
        shuffled += null
    shuffled /= len(observed)
    effect = float(np.mean(observed))
    low, high = _rho_interval(np.asarray(observed), len(levels))
    slack = 1e-12  # equal rank sums in another order of summation must count as ties
    p, opposite = (
        (1.0 + float(np.sum(s * shuffled >= s * effect - slack))) / (1.0 + permutations) for s in (sign, -sign)
    )
    word = "rising" if increasing else "falling"
    n = len(observed) if len(observed) > 1 else len(levels)
    return Outcome(effect, low, high, n, p, opposite, f"one-sided permutation within seeds: {word} trend", "rho")


def exact_identity(a: ArrayLike, b: ArrayLike, rtol: float = 0.0, *, unit: str = "") -> Outcome:
    """Check that a and b (any equal shapes) are the same numbers within rtol · max |b|. Effect: max |a − b|.

    Nothing is estimated: p is 0 or 1. NaN equals nothing, so two diverged runs are no evidence of identity.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"a has shape {first.shape}, b {second.shape}: must be equal and not empty")
    gap = np.abs(first - second)
    allowed = rtol * float(np.max(np.abs(second)))
    same = bool(np.all(gap <= allowed))
    largest = math.inf if np.isnan(gap).any() else float(gap.max())
    test = "exact equality" if rtol == 0 else f"equality within {rtol:g} of the largest value"
    detail = f"{int(np.sum(~(gap <= allowed)))} of {gap.size} values differ"
    n = first.shape[0] if first.ndim else 1
    return Outcome(largest, largest, largest, n, 0.0 if same else 1.0, 1.0 if same else 0.0, test, unit, detail)


def every(outcomes: Sequence[Outcome], names: Sequence[str] = ()) -> Outcome:
    """Combine tests that must all hold (intersection–union test): p is the largest, the weakest one gives the effect.

    p_opposite is Bonferroni's, because one failure is enough to contradict. names: labels of the outcomes.
    """
    if not outcomes:
        raise ValueError("outcomes=[]: must hold at least one outcome")
    weakest = max(range(len(outcomes)), key=lambda i: (outcomes[i].p, -outcomes[i].p_opposite))
    opposite = min(1.0, len(outcomes) * min(o.p_opposite for o in outcomes))
    name = names[weakest] if names else f"number {weakest + 1}"
    chosen = outcomes[weakest]
    return replace(
        chosen,
        n=min(o.n for o in outcomes),
        p_opposite=opposite,
        test=f"all of {len(outcomes)}: {chosen.test}",
        detail=f"weakest of {len(outcomes)}: {name}",
    )


def bootstrap_ci(
    x: ArrayLike,
    statistic: Callable[..., NDArray[np.float64]] = np.mean,
    *,
    level: float = LEVEL,
    resamples: int = 9999,
    seed: int = 0,
) -> tuple[float, float]:
    """Give the BCa bootstrap interval of `statistic(x, axis=…)`; x: (n,). Same input, same interval.

    With fewer than about ten values any bootstrap interval is too short: the tests above use t intervals instead.
    """
    values = _sample("x", x)
    if np.ptp(values) == 0:
        point = float(statistic(values, axis=-1))
        return point, point
    result = stats.bootstrap(
        (values,), statistic, confidence_level=level, n_resamples=resamples, rng=np.random.default_rng(seed)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def holm(pvalues: ArrayLike) -> Array:
    """Adjust p-values (k,) by Holm's step-down rule: rejecting at <= alpha keeps the family-wise error."""
    p = np.asarray(pvalues, dtype=np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"pvalues={p}: must be a list of numbers in [0, 1]")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _sample(name: str, x: ArrayLike) -> Array:
    numbers = np.asarray(x, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size == 0:
        raise ValueError(f"{name} has shape {numbers.shape}: must be (n,) with n >= 1")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} has values that are not finite: a diverged run must enter as the worst value")
    return numbers


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[Array, Array]:
    if isinstance(a, pd.Series) and isinstance(b, pd.Series) and not a.index.equals(b.index):
        raise ValueError(f"a has seeds {list(a.index)}, b {list(b.index)}: must be the same, in the same order")
    first, second = _sample("a", a), _sample("b", b)
    if first.shape != second.shape:
        raise ValueError(f"a has {first.size} values, b {second.size}: a paired test needs the same seeds in both")
    return first, second


def _rounding(*arrays: Array) -> float:
    """Give the size below which a difference of these float64 numbers is rounding: a few ulp of the largest of them."""
    return 8.0 * float(np.finfo(np.float64).eps) * max(float(np.max(np.abs(a))) for a in arrays)


def _greater(d: Array, bound: float, test: str, unit: str, rounding: float, overlap: float = 0.0) -> Outcome:
    """One-sample t test of mean(d) > bound; d: (n,)."""
    if not 0 <= overlap < math.inf:
        raise ValueError(f"overlap={overlap}: must be >= 0, test rows over training rows")
    n, mean, test = len(d), float(np.mean(d)), test + (SHARED if overlap else "")
    if n == 1:
        return Outcome(mean, math.nan, math.nan, 1, 1.0, 1.0, test, unit, "one seed: no test possible")
    error = float(np.std(d, ddof=1)) / math.sqrt(n) * math.sqrt(1 + n * overlap)
    if float(np.ptp(d)) <= rounding or error == 0:  # error underflows for differences near the smallest float
        gap = mean - bound
        tie = abs(gap) <= rounding
        p, opposite = (1.0, 1.0) if tie else ((0.0, 1.0) if gap > 0 else (1.0, 0.0))
        return Outcome(mean, mean, mean, n, p, opposite, test, unit, f"the same value in all {n} seeds: no variance")
    t = (mean - bound) / error
    half = float(special.stdtrit(n - 1, 0.5 + LEVEL / 2)) * error
    p, opposite = float(special.stdtr(n - 1, -t)), float(special.stdtr(n - 1, t))
    return Outcome(mean, mean - half, mean + half, n, p, opposite, test, unit)


def _mirror(outcome: Outcome) -> Outcome:
    return replace(outcome, p=outcome.p_opposite, p_opposite=outcome.p)


def _log(name: str, x: ArrayLike) -> ArrayLike:
    numbers = _sample(name, x)
    if not np.all(numbers > 0):
        raise ValueError(f"{name} has the value {numbers.min():g}: a ratio test needs values > 0")
    return pd.Series(np.log(numbers), index=x.index) if isinstance(x, pd.Series) else np.log(numbers)


def _log_bound(name: str, bound: float) -> float:
    if not bound > 0:
        raise ValueError(f"{name}={bound}: must be > 0")
    return math.log(bound)


def _exp(outcome: Outcome, test: str) -> Outcome:
    effect, low, high = (math.exp(v) for v in (outcome.effect, outcome.ci_low, outcome.ci_high))
    return replace(outcome, effect=effect, ci_low=low, ci_high=high, test=test)


def _block_rho(x: Array, y: Array, permutations: int, generator: np.random.Generator) -> tuple[float, Array]:
    """Give Spearman's rho of one block and (permutations,) draws of it under the null of no association."""
    if len(x) < 3 or np.ptp(x) == 0:
        raise ValueError(
            f"a block has {len(x)} points on {len(np.unique(x))} levels of x: must be >= 3 points, >= 2 levels"
        )
    rank_x, rank_y = (_unit(stats.rankdata(v)) for v in (x, y))
    order = generator.permuted(np.broadcast_to(np.arange(len(y)), (permutations, len(y))), axis=1)
    return float(rank_x @ rank_y), rank_y[order] @ rank_x


def _unit(ranks: Array) -> Array:
    centred = ranks - ranks.mean()
    length = float(np.linalg.norm(centred))
    return centred / length if length > 0 else centred  # constant y: rho is 0


def _rho_interval(rhos: Array, points: int) -> tuple[float, float]:
    """t interval over blocks; Fisher's z with Bonett and Wright's standard error (2000) for one block."""
    if len(rhos) > 1:
        mean, error = float(rhos.mean()), float(np.std(rhos, ddof=1)) / math.sqrt(len(rhos))
        half = float(special.stdtrit(len(rhos) - 1, 0.5 + LEVEL / 2)) * error
        return max(-1.0, mean - half), min(1.0, mean + half)
    rho = float(rhos[0])
    if points < 4 or abs(rho) > 1 - 1e-12:
        return (rho, rho) if points >= 4 else (-1.0, 1.0)
    half = float(special.ndtri(0.5 + LEVEL / 2)) * math.sqrt((1 + rho**2 / 2) / (points - 3))
    return math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)
