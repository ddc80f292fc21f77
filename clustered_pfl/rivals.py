"""Robust aggregation rules of the package byzfl, to compare with: `Global(..., aggregate=RULES["krum"](n_byzantine))`.

Each rule turns messages (N, D) into their aggregate (D,), one for all clients: it knows about attackers, not about
clusters. byzfl computes in float32 whatever it gets; the result has the dtype of the messages again.

What a message with NaN does to them: "krum" returns such a message, "median" and "geometric_median" become NaN
themselves, "multi_krum" and "trimmed_mean" drop up to n_byzantine of them. Messages with infinite coordinates of one
sign, up to n_byzantine of them, harm none of the five. (Threshold-Clustering leaves both kinds out, however many.)
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from clustered_pfl.baselines import Aggregator
from clustered_pfl.federation import check, whole


@functools.cache
def _byzfl() -> ModuleType:
    """byzfl.aggregators alone: byzfl's own start imports its benchmark, which needs torchvision and seaborn."""
    if sys.modules.get("byzfl") is not None:
        return importlib.import_module("byzfl.aggregators")
    spec = importlib.util.find_spec("byzfl")
    if spec is None:
        raise ImportError("clustered_pfl.rivals needs byzfl: pip install --no-deps byzfl")
    before = set(sys.modules)
    sys.modules["byzfl"] = importlib.util.module_from_spec(spec)  # a parent that is not run
    try:
        return importlib.import_module("byzfl.aggregators")
    finally:
        # whoever imports byzfl later gets all of it
        for name in [n for n in sys.modules if n.partition(".")[0] == "byzfl" and n not in before]:
            del sys.modules[name]


def _rule(name: str, n_byzantine: int, **settings: int) -> Aggregator:
    check("n_byzantine", n_byzantine, whole(n_byzantine, 0), "an integer >= 0")
    combine = getattr(_byzfl(), name)(**settings)

    def aggregate(messages: Tensor) -> Tensor:
        return combine(messages).to(messages)

    return aggregate


RULES: dict[str, Callable[[int], Aggregator]] = {
    "krum": lambda n: _rule("Krum", n, f=n),
    "multi_krum": lambda n: _rule("MultiKrum", n, f=n),
    "median": lambda n: _rule("Median", n),
    "trimmed_mean": lambda n: _rule("TrMean", n, f=n),
    "geometric_median": lambda n: _rule("GeometricMedian", n),
}
"""Name -> number of Byzantine messages expected -> rule; each at byzfl's defaults.

"krum" returns the message closest to its n - f - 1 nearest others, "multi_krum" the mean of the n - f best; "median" is
coordinate-wise, as is "trimmed_mean", which drops the f largest and the f smallest; "geometric_median" makes three
Weiszfeld steps from zero (smoothing 0.1). The first two and "trimmed_mean" raise ValueError for 2 f >= n messages.
"""
