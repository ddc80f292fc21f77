"""The rules for tau against plain formulas, the paper's three conventions, ties, and what is never inside."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from clustered_pfl.radius import TIE_ULPS, Fixed, Quantile, TwoMeans, inside

torch.set_num_threads(1)
F64 = torch.float64
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
CIFAR, MNIST, SYNTHETIC = {}, {"factor": 0.99}, {"strict": True}
distances = npst.arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 1e6))


def row(*values: float, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


# -- quantile


@given(distances, st.floats(0, 1, exclude_max=True), st.floats(0.01, 100))
def test_quantile_is_the_sorted_distance_of_rank_floor_qn(d: np.ndarray, q: float, factor: float) -> None:
    n = len(d)
    rank = min(math.floor(q * n + 1e-9), n - 1)  # nine digits, so that 0.29 * 100 is 29
    near = abs(q * n - round(q * n))
    if not 1e-10 < near < 1e-8:  # on the edge of those nine digits either rank is right
        assert Quantile(q, factor=factor)(torch.from_numpy(d)).item() == factor * np.sort(d)[rank]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_row_of_a_batch_has_its_own_tau(dtype: torch.dtype) -> None:
    d = torch.rand(3, 2, 7, generator=torch.Generator().manual_seed(0), dtype=dtype)
    for rule in (Quantile(0.4, factor=0.5), Fixed(0.3), TwoMeans()):
        tau = rule(d)
        assert tau.shape == (3, 2) and tau.dtype == dtype
        for i, j in itertools.product(range(3), range(2)):
            assert tau[i, j] == rule(d[i, j])


@given(st.integers(2, 50), st.integers(1, 50))
def test_a_quantile_of_one_kth_of_k_equal_clusters_is_the_size_of_one(k: int, size: int) -> None:
    assert Quantile(1 / k).rank(k * size) == size


def test_rank_is_floored_after_rounding_and_never_beyond_the_last() -> None:
    assert 0.29 * 100 < 29 and Quantile(0.29).rank(100) == 29
    assert [Quantile(0.2).rank(n) for n in (4, 5, 9, 10, 50)] == [0, 1, 1, 2, 10]
    assert Quantile(math.nextafter(1, 0)).rank(10) == 9
    assert Quantile(math.nextafter(1, 0))(torch.arange(10.0)) == 9


@pytest.mark.parametrize("n", [5, 16, 40])
@pytest.mark.parametrize("q", [0.0, 0.1, 0.2, 0.25, 0.99])
def test_first_round_of_the_three_conventions(q: float, n: int) -> None:
    d = torch.arange(n, dtype=F64)  # the start is the first point, no ties
    floor = math.floor(q * n)
    assert inside(d, Quantile(q, **SYNTHETIC))[0].sum() == floor
    assert inside(d, Quantile(q, **CIFAR))[0].sum() == floor + 1
    # one percent of tau is less than the gap of 1 between neighbours; the start itself is always inside
    assert inside(d, Quantile(q, **MNIST))[0].sum() == max(floor, 1)


def test_mnists_factor_drops_all_points_within_a_percent() -> None:
    d = torch.cat([row(0), torch.linspace(10, 10.05, 9, dtype=F64)])
    assert inside(d, Quantile(0.5, **MNIST))[0].sum() == 1
    assert inside(d, Quantile(0.5, **CIFAR))[0].sum() == 6


def test_quantile_counts_points_that_are_not_finite_as_the_farthest() -> None:
    d = row(3, math.nan, 1, math.inf, 2)
    for q, tau, count in ((0.0, 1, 1), (0.4, 3, 3), (0.6, math.inf, 3)):
        members, found = inside(d, Quantile(q))
        assert found == tau and members.sum() == count and not members[[1, 3]].any()


# -- fixed


@given(distances, st.floats(0, 1e6))
def test_fixed_compares_with_tau(d: np.ndarray, tau: float) -> None:
    d = d[np.abs(d - tau) > 2 * TIE_ULPS * EPS[F64] * tau]  # ties have their own test
    for strict in (False, True):
        members, found = inside(torch.from_numpy(d), Fixed(tau, strict))
        assert found == tau
        assert members.tolist() == [x < tau for x in d]


def test_strict_decides_about_the_boundary() -> None:
    for tau in (0.0, 2.0):
        assert inside(row(tau), Fixed(tau))[0].all()
        assert not inside(row(tau), Fixed(tau, strict=True))[0].any()


# -- two means


def cuts_of_least_cost(d: list[float]) -> list[float]:
    """tau of every cut of the sorted distances into three whose squared error is the least, up to rounding."""
    x = np.sort(d)
    found = []
    for i, j in itertools.combinations(range(1, len(x)), 2):
        parts = x[:i], x[i:j], x[j:]
        cost = sum(((p - p.mean()) ** 2).sum() for p in parts)
        found.append((cost, (parts[1].mean() + parts[2].mean()) / 2))
    least = min(cost for cost, _ in found)
    # costs are differences of sums of squares: their rounding is that of the sum of squares
    return [tau for cost, tau in found if cost <= least + 16 * len(x) * EPS[F64] * (x**2).sum()]


@given(st.lists(st.floats(0, 1e3), min_size=3, max_size=9), st.integers(0, 3), st.randoms())
@settings(max_examples=150, deadline=None)
def test_two_means_is_the_best_of_all_cuts_into_three(d: list[float], lost: int, random) -> None:
    best = np.array(cuts_of_least_cost(d))
    d = d + [math.inf] * lost
    random.shuffle(d)
    tau = TwoMeans()(row(*d)).item()
    assert np.abs(best - tau).min() <= 16 * len(d) * EPS[F64] * best.max()


def test_two_means_finds_the_start_its_cluster_and_the_rest() -> None:
    d = row(0, 0.9, 1, 1.1, 8.9, 9, 9.1)
    assert TwoMeans()(d).item() == pytest.approx((1 + 9) / 2, rel=8 * EPS[F64])
    assert inside(d, TwoMeans())[0].tolist() == [True] * 4 + [False] * 3


def test_two_means_lets_a_far_attacker_claim_the_third_group() -> None:
    assert inside(row(0, 0.9, 1, 1.1, 8.9, 9, 9.1, 1e6), TwoMeans())[0].sum() == 7


@pytest.mark.parametrize("d", [[1.0], [1.0, 2.0], [1.0, 2.0, math.inf], [math.inf] * 4])
def test_two_means_of_fewer_than_three_distances_is_infinite(d: list[float]) -> None:
    members, tau = inside(row(*d), TwoMeans())
    assert tau == math.inf
    assert members.tolist() == [math.isfinite(x) for x in d]


# -- inside


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strict", [False, True])
def test_distances_that_differ_by_rounding_are_a_tie(strict: bool, dtype: torch.dtype) -> None:
    few, many = TIE_ULPS / 2 * EPS[dtype], TIE_ULPS * 4 * EPS[dtype]
    d = row(3 * (1 - many), 3 * (1 - few), 3, 3 * (1 + few), 3 * (1 + many), dtype=dtype)
    assert inside(d, Fixed(3.0, strict))[0].tolist() == [True] + [not strict] * 3 + [False]


@pytest.mark.parametrize("radius", [Fixed(math.inf), Fixed(math.inf, strict=True), Quantile(0.99)], ids=str)
def test_what_is_not_finite_is_never_inside(radius) -> None:
    members, _ = inside(row(0, math.nan, 1, math.inf, 2, math.nan, math.inf, math.nan), radius)
    assert members.nonzero()[:, 0].tolist() == [0, 2, 4]


def test_a_rule_of_ones_own() -> None:
    class Mean:
        strict = False

        def __call__(self, distances: torch.Tensor) -> torch.Tensor:
            return distances.mean(-1)

    members, tau = inside(row(0, 1, 2, 9), Mean())
    assert tau == 3 and members.tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Quantile(1.0), r"q=1\.0: must be in \[0, 1\)"),
        (lambda: Quantile(-0.1), r"q=-0\.1: must be in \[0, 1\)"),
        (lambda: Quantile(math.nan), r"q=nan: must be in \[0, 1\)"),
        (lambda: Quantile(0.2, factor=0.0), r"factor=0\.0: must be > 0 and finite"),
        (lambda: Quantile(0.2, factor=math.inf), r"factor=inf: must be > 0 and finite"),
        (lambda: Quantile(0.2, factor=math.nan), r"factor=nan: must be > 0 and finite"),
        (lambda: Fixed(-1.0), r"tau=-1\.0: must be >= 0"),
        (lambda: Fixed(math.nan), r"tau=nan: must be >= 0"),
    ],
)
def test_values_out_of_range(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
