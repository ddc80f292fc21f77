"""The Monte Carlo of the estimator and the blobs: errors in closed form, attackers counted, rounds one by one."""

import math

import pytest
import torch
from sklearn.datasets import make_blobs

from clustered_pfl.config import BlobsConfig, EstimationConfig
from clustered_pfl.radius import Quantile
from clustered_pfl.tasks import blobs, estimation
from clustered_pfl.tests.trials import config, method, run
from clustered_pfl.threshold import threshold_clustering
from common.streams import generator

torch.set_num_threads(1)
F64 = torch.float64


def points(seed: int, draws: int, members: int, dim: int, noise: float = 1.0) -> torch.Tensor:
    """The first cluster's points (draws, n, d), around the origin."""
    z = torch.randn(draws, 2 * members, dim, generator=generator(seed, estimation.POINTS, members), dtype=F64)
    return z[:, :members] * noise / math.sqrt(dim)


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_without_attackers_far_clusters_have_the_error_of_their_mean(noise):
    task = EstimationConfig(members=[4, 16], separation=[100.0 * noise], noise=noise, draws=300)
    (row,), _ = run(estimation, config(task, seed=2))
    assert row["setups"] == [[n, 100.0 * noise, 0.0, 0.7] for n in (4, 16)]
    for n, error in zip((4, 16), row["errors"], strict=True):
        exact = points(2, 300, n, 10, noise).mean(1).square().sum(1).mean().item()
        assert error == pytest.approx(exact, rel=1e-9)  # the start is forgotten by (1 / 2)^60
        # n |mean|^2 / sigma^2 is chi square of d degrees over d: relative deviation sqrt(2 / (d draws))
        assert error == pytest.approx(noise**2 / n, rel=4 * math.sqrt(2 / 3000))
    assert row["excess"] == [0, 0] and row["bound"] == [0, 0]


def test_few_rounds_leave_a_share_of_the_start():
    """With all of a half inside the start's part shrinks to 2^-M."""
    task = EstimationConfig(members=[8], rounds=2, draws=50)
    (row,), _ = run(estimation, config(task))
    z = points(0, 50, 8, 10)
    mean = z.mean(1)
    expected = (mean + (z[:, 0] - mean) / 4).square().sum(1).mean().item()
    assert row["errors"] == [pytest.approx(expected, rel=1e-9)]


@pytest.mark.parametrize(("beta", "count"), [(0.05, 4), (0.1, 8), (0.2, 18), (0.02, 1)])
def test_attackers_inside_the_radius_pull_by_their_share_of_the_members(beta, count):
    delta, n, noise = 80.0, 36, 2.0
    task = EstimationConfig(members=[n], separation=[delta], byzantine=[beta], noise=noise, draws=60)
    (row,), _ = run(estimation, config(task, seed=1))
    share = count / (2 * n + count)
    assert abs(share - beta) < 1 / (2 * n + count)  # whole points
    assert row["bound"] == [pytest.approx(share * noise * delta, rel=1e-12)]
    z = points(1, 60, n, 10, noise)
    pull = torch.zeros(10, dtype=F64)
    pull[0] = -0.7 * math.sqrt(noise * delta)  # on the far side from the other cluster
    estimate = (z.sum(1) + count * pull) / (n + count)
    assert row["errors"] == [pytest.approx(estimate.square().sum(1).mean().item(), rel=1e-9)]
    clean = z.mean(1).square().sum(1).mean().item()
    assert row["excess"] == [pytest.approx(row["errors"][0] - clean, rel=1e-6)]


@pytest.mark.parametrize("distance", [10.0, 1e6, 1e12])
def test_attackers_outside_the_radius_add_nothing(distance):
    task = EstimationConfig(members=[36], separation=[40.0], byzantine=[0.1], distance=[distance], draws=20)
    (row,), _ = run(estimation, config(task))
    assert row["errors"] == [pytest.approx(points(0, 20, 36, 10).mean(1).square().sum(1).mean().item(), rel=1e-6)]
    assert abs(row["excess"][0]) < 1e-6 * row["errors"][0]
    assert row["setups"] == [[36, 40.0, 0.1, distance]]


def test_close_clusters_are_mixed():
    task = EstimationConfig(members=[16], separation=[2.0, 100.0], dim=3, draws=100)
    (row,), _ = run(estimation, config(task))
    assert row["errors"][0] > 3 * row["errors"][1]


def test_setups_are_the_product_with_the_distance_fastest_and_seeds_have_their_own_points():
    task = EstimationConfig(members=[4, 8], byzantine=[0.0, 0.2], distance=[0.5, 2.0], draws=10)
    rows, log = run(estimation, config(task, seed=3, n_seeds=2))
    expected = [[n, 100.0, b, d] for n in (4, 8) for b in (0.0, 0.2) for d in (0.5, 2.0)]
    assert all(row["setups"] == expected for row in rows)
    assert rows[0]["errors"][0] == rows[0]["errors"][1]  # no attackers: their distance means nothing
    assert rows[0]["errors"] != rows[1]["errors"] and log.shown == [(1, 2), (2, 2)]
    (alone,), _ = run(estimation, config(task, seed=4))
    assert alone == rows[1]


# -- blobs


def blob_rows(rounds: int = 6, seed: int = 0, n_seeds: int = 1, **task):
    how = method(q=0.1, strict=True, rounds=rounds)
    return run(blobs, config(BlobsConfig(**task), seed=seed, n_seeds=n_seeds, method=how))


@pytest.mark.parametrize("std", [0.5, 4.0])
def test_rounds_one_by_one_are_rounds_at_once(std):
    """And the distance is the mean over estimates of the RMS distance to the points of the start's blob."""
    (row,), log = blob_rows(std=std, seed=3)
    z, y = make_blobs(90, 10, centers=10, cluster_std=std, random_state=3)
    z, y = torch.from_numpy(z), torch.from_numpy(y)
    rng = generator(3, blobs.START)
    first, owner = [], []
    for k in range(10):
        own = z[y == k]
        first += [own[i] for i in torch.randint(len(own), (10,), generator=rng)]
        owner += [k] * 10
    for rounds, value in enumerate(row["curve"]):
        found = threshold_clustering(z, torch.stack(first), radius=Quantile(0.1, strict=True), rounds=rounds).centers
        rms = [((z[y == k] - v) ** 2).sum(1).mean().sqrt() for v, k in zip(found, owner, strict=True)]
        assert value == pytest.approx(float(sum(rms)) / 100, rel=1e-9), rounds
        assert log.rows[rounds]["distance"] == [value]
    assert len(row["curve"]) == 7 and row["plateau"] == row["curve"][-1]
    assert row["largest_rise"] == max(b - a for a, b in zip(row["curve"][:-1], row["curve"][1:], strict=True))


def test_a_point_and_an_estimate_at_the_mean_are_as_far_as_a_gaussian_says():
    """A start of its own blob: sqrt(2 d) std between two points; the mean: sqrt(d) std, less what 9 points share."""
    rows, _ = blob_rows(rounds=50, n_seeds=4, std=1.0)
    start = sum(row["curve"][0] for row in rows) / 4
    # mean square 2 d std^2 to the 8 others and zero to itself
    assert start == pytest.approx(math.sqrt(20 * 8 / 9), rel=0.05)
    plateau = sum(row["plateau"] for row in rows) / 4
    assert plateau == pytest.approx(math.sqrt(10 * 8 / 9), rel=0.05)
    assert all(row["largest_rise"] < 0 for row in rows)
    assert len({row["plateau"] for row in rows}) == 4


def test_without_rounds_there_is_only_the_start():
    (row,), _ = blob_rows(rounds=1, starts=3, points=20, centers=4, dim=2)
    assert len(row["curve"]) == 2
