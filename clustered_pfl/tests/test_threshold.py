"""Threshold-Clustering against its equation in plain NumPy, and the invariants of the paper's section 3."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from clustered_pfl.radius import Fixed, Quantile, TwoMeans
from clustered_pfl.tests.plain import equation
from clustered_pfl.threshold import longest, threshold_clustering

torch.set_num_threads(1)
F64 = torch.float64
EPS = 2.0**-52
METHODS = ("direct", "gram")
RULES = [Quantile(0.3), Quantile(0.3, strict=True), Quantile(0.3, factor=0.8), Fixed(3.0), TwoMeans()]
seeds = st.integers(0, 2**31)


def cloud(n: int = 12, d: int = 5, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


def two_clusters(near: int = 5, far: int = 7, d: int = 4, seed: int = 0) -> torch.Tensor:
    """`near` points around the origin, `far` ones around 100 in the first coordinate."""
    points = cloud(near + far, d, seed)
    points[near:, 0] += 100
    return points


def near(found: torch.Tensor, expected, scale: float = 1.0, steps: int = 64) -> None:
    """Equal up to `steps` roundings of numbers of the size `scale`."""
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=steps * EPS * scale)


# -- the equation


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normalize", ["all", "members"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule_follows_the_equation(rule, weighted: bool, normalize: str, method: str) -> None:
    for seed in range(4):
        z = cloud(seed=seed)
        weights = torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=F64) if weighted else None
        for start, rounds in ((z[2], 1), (z[2], 6), (z[:3].mean(0), 4)):
            found = threshold_clustering(
                z, start, radius=rule, rounds=rounds, normalize=normalize, weights=weights, method=method
            )
            v, members, taus = equation(z, start, rule, rounds, normalize, weights)
            near(found.centers[0], v, 4)
            assert found.members[0].tolist() == members.tolist()
            near(found.radii[:, 0], taus, 4)


@pytest.mark.parametrize("method", METHODS)
def test_no_round_gives_the_starts_and_no_members(method: str) -> None:
    z = cloud()
    found = threshold_clustering(z, z[:3], rounds=0, method=method)
    assert torch.equal(found.centers, z[:3]) and not found.members.any()
    assert found.members.shape == (3, 12) and found.radii.shape == (0, 3)


def test_a_single_start_gives_one_centre_and_defaults_are_the_papers() -> None:
    z = cloud()
    found = threshold_clustering(z, z[0])
    assert found.centers.shape == (1, 5) and found.members.shape == (1, 12) and found.radii.shape == (10, 1)
    same = threshold_clustering(z, z[:1], radius=Quantile(0.2), rounds=10, normalize="all")
    assert torch.equal(found.centers, same.centers)


@pytest.mark.parametrize("method", METHODS)
def test_one_point_is_returned_at_once_from_anywhere(method: str) -> None:
    z, start = cloud(1), cloud(1, seed=1)[0]
    near(threshold_clustering(z, start, radius=Quantile(0.9), rounds=1, method=method).centers, z, 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rounds_are_rounds_one_after_another(rule, method: str) -> None:
    z = cloud()
    v, radii = z[:2], []
    for _ in range(5):
        step = threshold_clustering(z, v, radius=rule, rounds=1, method=method)
        v, radii = step.centers, [*radii, step.radii]
    whole = threshold_clustering(z, z[:2], radius=rule, rounds=5, method=method)
    near(whole.centers, v, 4)
    near(whole.radii, torch.cat(radii), 4)
    assert torch.equal(whole.members, step.members)


# -- contraction and limits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", [0, None], ids=["a member", "beside them"])
def test_fixed_members_contract_by_one_minus_their_share(start: int | None, method: str) -> None:
    z = two_clusters(near=5, far=7)
    v0 = z[0] if start == 0 else torch.tensor([10.0, -10.0, 0.0, 10.0], dtype=F64)
    mean = z[:5].mean(0)
    for rounds in range(8):
        found = threshold_clustering(z, v0, radius=Fixed(50.0), rounds=rounds, method=method)
        # l rounds of |S| = 5 of N = 12; 1e-12 of the start's distance
        error = found.centers[0] - mean - (1 - 5 / 12) ** rounds * (v0 - mean)
        assert error.norm() <= 1e-12 * (v0 - mean).norm()
        assert found.members[0].tolist() == [rounds > 0] * 5 + [False] * 7


@pytest.mark.parametrize("method", METHODS)
def test_dividing_by_members_lands_on_their_mean_in_one_round(method: str) -> None:
    z = two_clusters()
    for rounds in (1, 2):
        found = threshold_clustering(z, z[0], radius=Fixed(50.0), rounds=rounds, normalize="members", method=method)
        near(found.centers[0], z[:5].mean(0), 4)


@pytest.mark.parametrize("method", METHODS)
def test_an_infinite_radius_gives_the_mean_of_all_and_stays(method: str) -> None:
    z = two_clusters()
    for rounds in (1, 2, 5):
        found = threshold_clustering(z, z[0], radius=Fixed(math.inf), rounds=rounds, method=method)
        near(found.centers[0], z.mean(0), 100)
        assert found.members.all() and (found.radii == math.inf).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("normalize", ["all", "members"])
def test_a_radius_below_the_least_distance_leaves_the_start(normalize: str, method: str) -> None:
    z = cloud()
    least = torch.pdist(z).min().item()
    options = {"radius": Fixed(0.99 * least), "rounds": 7, "normalize": normalize, "method": method}
    at_points = threshold_clustering(z, z, **options)
    near(at_points.centers, z, 4)
    assert torch.equal(at_points.members, torch.eye(12, dtype=torch.bool))
    beside = z + 2 * least * torch.eye(12, 5, dtype=F64)[:1] + 1e3
    found = threshold_clustering(z, beside, **options)
    assert torch.equal(found.centers, beside) and not found.members.any()


@pytest.mark.parametrize("method", METHODS)
def test_separated_clusters_with_the_strict_quantile_give_the_clusters_means(method: str) -> None:
    z = cloud(24, 3, scale=0.1)
    z[:, 0] += 10 * torch.arange(4).repeat(6)  # K = 4 clusters of 6, dealt round robin
    means = torch.stack([z[k::4].mean(0) for k in range(4)])
    found = threshold_clustering(z, z[:4], radius=Quantile(1 / 4, strict=True), rounds=150, method=method)
    near(found.centers, means, 30)  # (1 - 1/4)^150 = 2e-19 of the start is left
    assert torch.equal(found.members, torch.arange(4)[:, None] == torch.arange(24) % 4)


# -- equivariance


@given(seeds, st.sampled_from(METHODS), st.sampled_from(RULES), st.sampled_from(["all", "members"]))
@settings(max_examples=40, deadline=None)
def test_permuting_moving_and_turning_the_points_does_the_same_to_the_centres(
    seed: int, method: str, rule, normalize: str
) -> None:
    rng = torch.Generator().manual_seed(seed)
    z = cloud(seed=seed)
    options = {"radius": rule, "rounds": 4, "normalize": normalize, "method": method}
    base = threshold_clustering(z, z[:2], **options)
    order = torch.randperm(12, generator=rng)
    shuffled = threshold_clustering(z[order], z[:2], **options)
    near(shuffled.centers, base.centers, 4)
    assert torch.equal(shuffled.members, base.members[:, order])
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=rng, dtype=F64))
    shift = 10 * torch.randn(5, generator=rng, dtype=F64)
    moved = threshold_clustering(z @ turn.T + shift, z[:2] @ turn.T + shift, **options)
    near(moved.centers, base.centers @ turn.T + shift, 40)
    near(moved.radii, base.radii, 40)
    if not isinstance(rule, Fixed):
        scaled = threshold_clustering(7 * z, 7 * z[:2], **options)
        near(scaled.centers, 7 * base.centers, 28)
        near(scaled.radii, 7 * base.radii, 28)


# -- robustness


@given(seeds, st.sampled_from(METHODS), st.sampled_from(["all", "members"]), st.floats(1, 1e12))
@settings(max_examples=40, deadline=None)
def test_outside_points_move_the_estimate_by_exactly_nothing(
    seed: int, method: str, normalize: str, factor: float
) -> None:
    z = two_clusters(seed=seed)
    for rule in (Fixed(30.0), Quantile(4 / 12)):  # rank 4 is the fifth and last of the near cluster
        options = {"radius": rule, "rounds": 5, "normalize": normalize, "method": method}
        base = threshold_clustering(z, z[1], **options)
        assert base.members[0].tolist() == [True] * 5 + [False] * 7
        other = z.clone()
        other[5:] *= factor
        other[6] = -other[6]
        found = threshold_clustering(other, z[1], **options)
        assert torch.equal(found.centers, base.centers)
        assert torch.equal(found.members, base.members) and torch.equal(found.radii, base.radii)


@given(seeds, st.sampled_from(METHODS), st.sampled_from(RULES), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_estimates_stay_in_the_convex_hull_of_start_and_points(seed: int, method: str, rule, rounds: int) -> None:
    z, start = cloud(8, 2, seed), cloud(1, 2, seed + 1, scale=2.0)[0]
    v = threshold_clustering(z, start, radius=rule, rounds=rounds, method=method).centers[0]
    corners = torch.cat([z, start[None]]).T
    # coefficients >= 0 of sum one that give v
    _, residual = nnls(torch.cat([corners, torch.ones(1, 9)]).numpy(), torch.cat([v, torch.ones(1)]).numpy())
    assert residual <= 256 * EPS * corners.norm()


@given(seeds, st.sampled_from(METHODS), st.sampled_from(RULES))
@settings(max_examples=30, deadline=None)
def test_no_step_is_longer_than_tau_times_the_share_inside(seed: int, method: str, rule) -> None:
    z = cloud(seed=seed)
    v = z[0] + 1
    for _ in range(5):
        found = threshold_clustering(z, v, radius=rule, rounds=1, method=method)
        bound = found.radii[0, 0] * found.members.sum() / 12
        assert (found.centers[0] - v).norm() <= bound * (1 + 64 * EPS) + 64 * EPS * v.norm()
        v = found.centers[0]


BAD = {
    torch.float32: [math.nan, math.inf, -math.inf, 1e38, -3e38, 6e18],
    torch.float64: [math.nan, math.inf, -math.inf, 1e300, -1e308, 4e153],
}


every_two = functools.partial(itertools.combinations_with_replacement, r=2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [Fixed(30.0), Fixed(math.inf), Quantile(4 / 12), TwoMeans()], ids=str)
def test_points_that_are_not_finite_or_overflow_never_leak(rule, dtype: torch.dtype, method: str) -> None:
    z = two_clusters(near=5, far=1).to(dtype)
    for normalize, values in itertools.product(("all", "members"), every_two(BAD[dtype])):
        bad = torch.cat([z, torch.full((6, 4), values[0], dtype=dtype)])
        bad[8:, 2] = values[1]
        options = {"rounds": 4, "normalize": normalize, "method": method}
        found = threshold_clustering(bad, bad[:2], radius=rule, **options)
        assert not found.members[:, 6:].any()
        # the same as if nobody were there, but counted in the divisor and in the quantile
        alike = Quantile(4 / 6) if isinstance(rule, Quantile) else rule
        runs = [equation(z, s, alike, 4, normalize, absent=6) for s in z[:2]]
        atol = 64 * torch.finfo(dtype).eps * 100
        expected = torch.tensor(np.stack([v for v, _, _ in runs]), dtype=dtype)
        torch.testing.assert_close(found.centers, expected, rtol=0, atol=atol)
        assert found.members[:, :6].tolist() == [members.tolist() for _, members, _ in runs]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_count_up_to_the_longest(dtype: torch.dtype, method: str) -> None:
    z = cloud().to(dtype)
    for share, counts in ((0.99, True), (1.01, False)):
        z[3] = 0
        z[3, 1] = share * longest(dtype)
        found = threshold_clustering(z, z[0], radius=Fixed(math.inf), rounds=1, method=method)
        assert found.members[0].tolist() == [counts or j != 3 for j in range(12)]
        assert found.centers.isfinite().all()
    start = torch.full((5,), longest(dtype), dtype=dtype)  # sqrt(5) times too long
    assert torch.equal(threshold_clustering(z, start, radius=Fixed(math.inf), method=method).centers[0], start)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", ["all", "members"])
def test_a_start_that_is_not_finite_stays_and_disturbs_nobody(normalize: str, dtype: torch.dtype, method: str) -> None:
    z = cloud().to(dtype)
    for value in BAD[dtype]:
        starts = torch.stack([z[0], z[0], z[1], z[2]])
        starts[0, 0] = value  # first: the others must not be measured from it
        options = {"radius": Fixed(3.0), "rounds": 4, "normalize": normalize, "method": method}
        found = threshold_clustering(z, starts, **options)
        assert torch.equal(found.centers[0].nan_to_num(1.5), starts[0].nan_to_num(1.5)) and not found.members[0].any()
        others = threshold_clustering(z, starts[1:], **options)
        atol = 64 * torch.finfo(dtype).eps * 4
        torch.testing.assert_close(found.centers[1:], others.centers, rtol=0, atol=atol)
        assert torch.equal(found.members[1:], others.members)


# -- weights


@given(seeds, st.sampled_from(METHODS), st.sampled_from(["all", "members"]))
@settings(max_examples=30, deadline=None)
def test_whole_weights_are_repeated_points(seed: int, method: str, normalize: str) -> None:
    z = cloud(seed=seed)
    weights = torch.randint(0, 4, (12,), generator=torch.Generator().manual_seed(seed)).clamp_min(
        torch.eye(12, dtype=torch.long)[0]
    )
    options = {"radius": Fixed(2.5), "rounds": 4, "normalize": normalize, "method": method}
    weighted = threshold_clustering(z, z[:2], weights=weights, **options)
    repeated = threshold_clustering(z.repeat_interleave(weights, 0), z[:2], **options)
    near(weighted.centers, repeated.centers, 4)
    scaled = threshold_clustering(z, z[:2], weights=1e-3 * weights.double(), **options)
    near(scaled.centers, weighted.centers, 4)


# -- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"points": [[0.0]]}, TypeError, "points: list, must be a float32 or float64 tensor"),
        ({"points": torch.zeros(3, 2, dtype=torch.long)}, TypeError, "points: torch.int64, must be a float32 or"),
        ({"points": torch.zeros(3, 2).half()}, TypeError, "points: torch.float16, must be"),
        ({"starts": np.zeros(2)}, TypeError, "starts: ndarray, must be a float32 or float64 tensor"),
        ({"starts": torch.zeros(2)}, TypeError, r"starts\.dtype=torch.float32: must be that of points, torch.float64"),
        ({"points": torch.zeros(3, dtype=F64)}, ValueError, r"points\.shape=\(3,\): must be \(\.\.\., N, D\) with N"),
        ({"points": torch.zeros(0, 2, dtype=F64)}, ValueError, r"points\.shape=\(0, 2\): must be .* N >= 1 and D >= 1"),
        ({"points": torch.zeros(3, 0, dtype=F64)}, ValueError, r"points\.shape=\(3, 0\)"),
        ({"starts": torch.zeros(3, dtype=F64)}, ValueError, r"starts\.shape=\(3,\): must be .* beside points \(3, 2\)"),
        ({"starts": torch.zeros((), dtype=F64)}, ValueError, r"starts\.shape=\(\)"),
        ({"starts": torch.zeros(0, 2, dtype=F64)}, ValueError, r"starts\.shape=\(0, 2\): .* with K >= 1"),
        ({"starts": torch.zeros(4, 1, 2, dtype=F64)}, ValueError, r"starts\.shape=\(4, 1, 2\)"),
        ({"rounds": -1}, ValueError, "rounds=-1: must be an integer >= 0"),
        ({"rounds": 1.0}, ValueError, r"rounds=1\.0: must be an integer >= 0"),
        ({"rounds": True}, ValueError, "rounds=True: must be an integer >= 0"),
        ({"normalize": "some"}, ValueError, "normalize='some': must be 'all' or 'members'"),
        ({"method": "fast"}, ValueError, "method='fast': must be 'auto', 'gram' or 'direct'"),
        ({"weights": [1, 1, 1]}, TypeError, "weights: list, must be a tensor"),
        ({"weights": torch.ones(2)}, ValueError, r"weights\.shape=\(2,\): must be \(3,\), one a point"),
        ({"weights": torch.tensor([1, -1, 1])}, ValueError, "weights: must be finite, >= 0 and not all zero"),
        ({"weights": torch.tensor([1, math.nan, 1])}, ValueError, "weights: must be finite"),
        ({"weights": torch.tensor([1, math.inf, 1])}, ValueError, "weights: must be finite"),
        ({"weights": torch.zeros(3)}, ValueError, "weights: must be .* not all zero"),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], message: str) -> None:
    good = {"points": torch.zeros(3, 2, dtype=F64), "starts": torch.zeros(2, dtype=F64)}
    with pytest.raises(error, match=message):
        threshold_clustering(**good | change)
