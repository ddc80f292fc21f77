"""From records to samples and tests that several claims share. Seeds from 10 on judge, seeds below tuned."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from common.pairing import rows
from common.statistics import Outcome

if TYPE_CHECKING:
    from common.records import Records

Test = Callable[["Records"], Outcome]
Array = NDArray[np.float64]
UNKNOWN = "not established"
PANELS = ((4, 4), (4, 16), (16, 4))
"""Panels of figure 3: clusters, clients of a cluster."""
PLATEAUS = {0.5: 1.5, 1.0: 2.95, 2.0: 5.9, 4.0: 13.4}
"""Standard deviation of the blobs -> plateau read off the paper's figure by eye."""
BANDS = "Bands and bars: 95 % confidence interval over seeds."


def fewer(a: NDArray[np.bool_], b: NDArray[np.bool_], detail: str = "") -> Outcome:
    """Test that events are rarer in a than in b by Fisher's exact test; effect: difference of the shares, b less a."""
    table = [[int(a.sum()), int((~a).sum())], [int(b.sum()), int((~b).sum())]]
    p = float(stats.fisher_exact(table, alternative="less").pvalue)
    opposite = float(stats.fisher_exact(table, alternative="greater").pvalue)
    low, high = _newcombe(b, a)
    effect = float(b.mean() - a.mean())
    return Outcome(effect, low, high, len(a), p, opposite, "Fisher's exact test, one-sided", "of seeds", detail)


def _newcombe(x: NDArray[np.bool_], y: NDArray[np.bool_]) -> tuple[float, float]:
    """95 % interval of the difference of two shares, x less y (Newcombe 1998, from Wilson's intervals)."""

    def wilson(events: NDArray[np.bool_]) -> tuple[float, float, float]:
        found = stats.binomtest(int(events.sum()), len(events)).proportion_ci(method="wilson")
        return float(events.mean()), float(found.low), float(found.high)

    (p, l1, u1), (q, l2, u2) = wilson(x), wilson(y)
    return p - q - math.hypot(p - l1, u2 - q), p - q + math.hypot(u1 - p, q - l2)


def slopes(x: Array, y: Array) -> Array:
    """Least-squares slope of log y (seeds, m) over log x (m,), (seeds,); NaN where y is not positive."""
    u = np.log(x) - np.log(x).mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        return (np.log(y) @ u) / (u @ u)


def task_rows(records: Records, kind: str, experiment: str = "table1") -> pd.DataFrame:
    """The rows of one partition."""
    return rows(records[experiment], partition__kind=kind)


def by_quantile(records: Records, q: float) -> pd.DataFrame:
    """Figure 4's rows at one quantile, as an arm of that name."""
    return rows(records["fig4"], arm="radius", method__radius__quantile=q).assign(arm=f"q{q:g}")


def estimates(records: Records, arm: str, metric: str = "errors") -> tuple[Array, Array]:
    """Set-ups (set-ups, 4) as [n_i, Delta, beta, distance], and a metric (seeds, set-ups), of one arm."""
    frame = rows(records["theory"], arm=arm).sort_values("seed")
    return np.array(frame["setups"].iloc[0], dtype=float), np.array(frame[metric].tolist(), dtype=float)
