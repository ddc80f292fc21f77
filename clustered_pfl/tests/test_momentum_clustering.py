"""Momentum-Clustering against plain loops: momenta, centres kept by the server, attackers, clients that diverge."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clustered_pfl.attacks import bit_flip
from clustered_pfl.baselines import Local
from clustered_pfl.clustering import MomentumClustering, spread
from clustered_pfl.federation import Params
from clustered_pfl.radius import Fixed, Quantile
from clustered_pfl.tests.plain import equation

torch.set_num_threads(1)
F64 = torch.float64
CLOSE = {"rtol": 1e-11, "atol": 1e-11}  # some hundreds of float64 roundings of gradients of size 100
cluster = torch.arange(9) % 3


def bowl(params: Params, data: Tensor) -> Tensor:
    return (params["x"] - data).square().sum() / 2


def targets(step: int, n: int = 9) -> Tensor:
    """(n, 4): clusters 20 apart, noise of 1 anew in every step."""
    rng = torch.Generator().manual_seed(step)
    return 20 * torch.eye(3, 4, dtype=F64)[torch.arange(n) % 3] + torch.randn(n, 4, generator=rng, dtype=F64)


def starts(same: bool = False) -> Params:
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(99), dtype=F64)
    return {"x": x[:1].expand(9, 4) if same else x}


def mc(same: bool = False, **options: Any) -> MomentumClustering:
    return MomentumClustering(bowl, starts(same), **{"lr": 0.3, "radius": Quantile(0.25), "rounds": 3} | options)


def loop(steps: int, alpha: float, clusters: int | None, flipped: int = 0, poisoned: int = 0) -> np.ndarray:
    """The algorithm client by client; models (9, 4)."""
    x = starts()["x"].numpy().copy()
    m: list[np.ndarray] = []
    centers: list[np.ndarray] | None = None
    for t in range(steps):
        data = targets(t, 9 + poisoned).numpy()
        fresh = [x[i if i < 9 else 0] - data[i] for i in range(9 + poisoned)]
        m = [alpha * g + (1 - alpha) * old for g, old in zip(fresh, m, strict=True)] if m else fresh
        points = m + [-m[0]] * flipped
        if clusters is None:
            v = [equation(points, own, Quantile(0.25), 3)[0] for own in m[:9]]
        else:
            if centers is None:
                centers = [m[0]]
                while len(centers) < clusters:  # the momentum farthest from all centres so far
                    gaps = [min(np.linalg.norm(p - c) for c in centers) for p in m[:9]]
                    centers.append(m[int(np.argmax(gaps))])
            centers = [equation(points, c, Quantile(0.25), 3)[0] for c in centers]
            v = [min(centers, key=lambda c, own=own: np.linalg.norm(own - c)) for own in m[:9]]
        x = x - 0.3 * np.stack(v)
    return x


@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize("clusters", [None, 1, 3])
@pytest.mark.parametrize(("flipped", "poisoned"), [(0, 0), (2, 0), (0, 3)])
def test_iterates_are_those_of_a_plain_loop(flipped: int, poisoned: int, clusters: int | None, alpha: float) -> None:
    federation = mc(
        alpha=alpha, clusters=clusters, n_byzantine=flipped + poisoned, attack=bit_flip if flipped else None
    )
    for t in range(6):
        found = federation.step(targets(t, 9 + poisoned))
    torch.testing.assert_close(
        federation.params["x"], torch.from_numpy(loop(6, alpha, clusters, flipped, poisoned)), **CLOSE
    )
    assert found.members.shape == (9, 9 + flipped + poisoned) and found.radii.shape == (3, 9)


def test_default_weight_of_a_new_gradient_is_a_tenth() -> None:
    federation = mc()
    for t in range(4):
        federation.step(targets(t))
    torch.testing.assert_close(federation.params["x"], torch.from_numpy(loop(4, 0.1, None)), **CLOSE)


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_without_rounds_every_client_follows_its_own_momentum(alpha: float) -> None:
    federation = mc(alpha=alpha, rounds=0)
    local = Local(bowl, starts(), lr=0.3, momentum=1 - alpha, momentum_style="ema")
    for t in range(6):
        found = federation.step(targets(t))
        local.step(targets(t))
    torch.testing.assert_close(federation.params["x"], local.params["x"], **CLOSE)
    assert not found.members.any() and found.radii.shape == (0, 9)


def test_clients_of_one_cluster_hold_one_model() -> None:
    federation = mc(same=True, clusters=3, alpha=0.5, lr=0.1)
    for t in range(4):
        found = federation.step(targets(t))
    models = federation.params["x"]
    for k in range(3):
        assert (models[cluster == k] == models[k]).all()
    assert torch.pdist(models[:3]).min() > 5
    assert torch.equal(found.members, cluster[:, None] == cluster)


def test_members_and_radii_are_those_of_the_clients_centre() -> None:
    federation = mc(clusters=3)
    for t in range(3):
        old, found = federation.centers, federation.step(targets(t))
    m, centers = federation.momenta[0], federation.centers[0]
    for i in range(9):
        k = (m[i] - centers).norm(dim=1).argmin()
        v, members, taus = equation(m, old[0, k], Quantile(0.25), 3)
        torch.testing.assert_close(centers[k], torch.from_numpy(v), **CLOSE)
        assert found.members[i].tolist() == members.tolist()
        torch.testing.assert_close(found.radii[:, i], torch.tensor(taus), **CLOSE)


def test_the_nearest_centre_is_found_far_from_zero_in_float32() -> None:
    # gradients of 1e4 in one coordinate, 1 in another: |a|^2 + |b|^2 - 2ab would lose the difference
    side = torch.arange(40) % 2
    data = torch.stack([torch.full((40,), -1e4), side.float()], 1)
    params = {"x": torch.zeros(40, 2)}
    federation = MomentumClustering(bowl, params, lr=1.0, alpha=1.0, clusters=2, radius=Fixed(0.5), rounds=60)
    found = federation.step(data)
    assert torch.equal(found.members, side[:, None] == side)
    torch.testing.assert_close(federation.params["x"][:, 1], side.float())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clusters", [None, 3, 4])
@pytest.mark.parametrize("client", [0, 4, 8])
def test_a_client_that_diverges_takes_nobody_with_it(client: int, clusters: int | None, value: float) -> None:
    federation = mc(same=True, clusters=clusters, alpha=0.5, rounds=30, lr=0.1, radius=Fixed(8.0))
    others = torch.arange(9) != client
    for t in range(4):
        data = targets(t)
        data[client, 1] = value
        found = federation.step(data)
        assert not found.members[:, client].any()
    models = federation.params["x"]
    assert models[others].isfinite().all()
    # the others are in their three clusters, one model each but for (1 - 2/9)^30 = 5e-4 of the noise
    same = cluster[:, None] == cluster
    assert torch.equal(found.members[others][:, others], same[others][:, others])
    assert torch.equal(torch.cdist(models[others], models[others]) < 0.05, same[others][:, others])


@pytest.mark.parametrize("n", [1, 2, 7])
def test_spread_takes_the_farthest_point_each_time(n: int) -> None:
    points = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(n), dtype=F64)
    found = spread(points, n)
    assert found.shape == (3, n, 2)
    for z, chosen in zip(points, found, strict=True):
        assert torch.equal(chosen[0], z[0])
        for i in range(1, n):
            gaps = torch.stack([torch.stack([(p - c).norm() for c in chosen[:i]]).min() for p in z])
            assert torch.equal(chosen[i], z[gaps.argmax()])


def test_spread_takes_points_that_are_not_finite_last() -> None:
    points = torch.tensor([[[math.nan, 0], [1, 0], [math.inf, 1], [5, 0], [2, 0]]])
    assert spread(points, 3)[0].tolist() == [[1, 0], [5, 0], [2, 0]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 0.0}, ValueError, r"alpha=0\.0: must be in \(0, 1\]"),
        ({"alpha": 1.1}, ValueError, r"alpha=1\.1: must be in \(0, 1\]"),
        ({"alpha": math.nan}, ValueError, "alpha=nan: must be in"),
        ({"rounds": -1}, ValueError, "rounds=-1: must be an integer >= 0"),
        ({"clusters": 0}, ValueError, r"clusters=0: must be an integer in \[1, 9\], or None"),
        ({"clusters": 10}, ValueError, r"clusters=10: must be an integer in \[1, 9\], or None"),
        ({"n_byzantine": -1}, ValueError, "n_byzantine=-1: must be an integer >= 0"),
        ({"momentum": 0.5}, TypeError, "momentum"),
    ],
)
def test_bad_arguments(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mc(**options)
