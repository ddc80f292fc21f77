"""Threshold-Clustering's two paths, many starts at once and batches of sets: all the same numbers."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from clustered_pfl import threshold
from clustered_pfl.radius import Fixed, Quantile, TwoMeans
from clustered_pfl.threshold import gram_matrix, threshold_clustering

torch.set_num_threads(1)
F32, F64 = torch.float32, torch.float64
METHODS = ("direct", "gram")
SHAPES = [(7, 1), (9, 63), (30, 64), (20, 65), (30, 200), (90, 40)]  # (N, D), N above and below D


def groups(n: int, d: int, rng: torch.Generator) -> torch.Tensor:
    z = torch.randn(n, d, generator=rng, dtype=F64)
    z[n // 2 :] += 3 * torch.randn(d, generator=rng, dtype=F64)
    return z


def duplicates(n: int, d: int, rng: torch.Generator) -> torch.Tensor:
    return groups(n, d, rng)[torch.randint(0, n // 3, (n,), generator=rng)]


def lattice(n: int, d: int, rng: torch.Generator) -> torch.Tensor:
    """Coordinates -1, 0, 1: distances tie in masses."""
    return torch.randint(-1, 2, (n, d), generator=rng).double()


def far_lattices(n: int, d: int, rng: torch.Generator) -> torch.Tensor:
    return lattice(n, d, rng) + 100 * (torch.arange(n) % 2)[:, None]


def offset(n: int, d: int, rng: torch.Generator) -> torch.Tensor:
    return groups(n, d, rng) + 1e4


def attacked(value: float) -> Callable[[int, int, torch.Generator], torch.Tensor]:
    def build(n: int, d: int, rng: torch.Generator) -> torch.Tensor:
        z = groups(n, d, rng)
        z[-2:] = value
        return z

    return build


SCENES = {
    "groups": groups,
    "duplicates": duplicates,
    "lattice": lattice,
    "attackers at 1e6": attacked(1e6),
    "attackers at 1e38": attacked(1e38),
}


def rules(d: int) -> list:
    return [Quantile(0.3), Quantile(0.3, strict=True), Fixed(1.2 * d**0.5), TwoMeans()]


@pytest.fixture(params=[1, threshold.BLOCK_BYTES], ids=["small blocks", "one block"], autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest blocks have 64 coordinates: D = 63, 64, 65 and 200 end before, on and after their edge."""
    monkeypatch.setattr(threshold, "BLOCK_BYTES", request.param)


def first_guesses(z: torch.Tensor, starts: str) -> torch.Tensor:
    return {"one": z[1:2], "first points": z[:5], "points": z[1:5], "beside": z[:5] + 0.25}[starts]


# of points that tie, several starts are resolved to 1e-8 of their distance: enough for float32
TIES = [("duplicates", F64), ("lattice", F64)]
CASES = [
    (scene, dtype, starts)
    for scene, dtype, starts in itertools.product(SCENES, (F32, F64), ("one", "first points", "points", "beside"))
    if starts == "one" or (scene, dtype) not in TIES
]


@pytest.mark.parametrize(("scene", "dtype", "starts"), CASES)
def test_gram_path_is_the_direct_path(scene: str, dtype: torch.dtype, starts: str) -> None:
    tolerance = 1e-6 if dtype == F32 else 1e-10  # relative, the bound that the method promises
    for (n, d), seed in itertools.product(SHAPES, (0, 2)):
        z = SCENES[scene](n, d, torch.Generator().manual_seed(seed)).to(dtype)
        size = z[:-2].norm(dim=1).max().item()
        for rule, normalize in itertools.product(rules(d), ("all", "members")):
            options = {"radius": rule, "rounds": 5, "normalize": normalize}
            v0 = first_guesses(z, starts)
            direct, gram = (threshold_clustering(z, v0, method=m, **options) for m in METHODS)
            assert torch.equal(gram.members, direct.members)
            torch.testing.assert_close(gram.centers, direct.centers, rtol=0, atol=tolerance * size)
            # the Gram path's squares are off by float64 roundings of size^2, its distances by their root
            atol = (64 * 2.0**-52) ** 0.5 * size
            torch.testing.assert_close(gram.radii, direct.radii, rtol=2 * tolerance, atol=atol)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("starts", [1, 5])
def test_copies_of_a_start_are_at_distance_zero(starts: int, dtype: torch.dtype, method: str) -> None:
    for (n, d), seed in itertools.product(SHAPES, range(3)):
        z = duplicates(n, d, torch.Generator().manual_seed(seed)).to(dtype)
        found = threshold_clustering(z, z[-starts:], radius=Quantile(0.0), rounds=4, method=method)
        assert found.radii.max() <= 4 * torch.finfo(dtype).eps * z.norm(dim=1).max()
        assert torch.equal(found.members, (z[-starts:, None] == z).all(-1))


@pytest.mark.parametrize(("scene", "size"), [(offset, 1e4), (far_lattices, 100)])
@pytest.mark.parametrize("starts", [1, 5])
def test_far_from_zero_the_gram_path_keeps_what_float32_can_keep(starts: int, scene: Callable, size: float) -> None:
    for (n, d), seed in itertools.product(SHAPES, (0, 2)):
        z = scene(n, d, torch.Generator().manual_seed(seed)).float()
        for rule in rules(d):
            options = {"radius": rule, "rounds": 5}
            truth = threshold_clustering(z.double(), z[:starts].double(), method="direct", **options)
            found = {m: threshold_clustering(z, z[:starts], method=m, **options) for m in METHODS}
            error = {m: (f.centers - truth.centers).norm(dim=1).max() for m, f in found.items()}
            # twice the plain path's error, and in every coordinate a few roundings
            assert error["gram"] <= 2 * error["direct"] + 4 * d**0.5 * size * torch.finfo(F32).eps
            assert torch.equal(found["gram"].members, truth.members)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_gram_matrix_is_exact_to_float64_for_both_types(dtype: torch.dtype) -> None:
    rows = 1e4 + torch.randn(2, 3, 6, 200, generator=torch.Generator().manual_seed(0), dtype=F64).to(dtype)
    origin = rows[..., 1:2, :]
    centred = rows.double().numpy() - origin.double().numpy()
    exact = (centred.astype(np.longdouble) @ centred.astype(np.longdouble).swapaxes(-1, -2)).astype(float)
    # a sum of D products is off by at most D roundings of the sum of their sizes
    bound = 200 * 2.0**-52 * (np.abs(centred) @ np.abs(centred).swapaxes(-1, -2))
    found = gram_matrix(rows, origin)
    assert found.dtype == F64 and (np.abs(found.numpy() - exact) <= bound).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", rules(5), ids=str)
def test_many_starts_at_once_are_single_runs(rule, method: str) -> None:
    z = groups(15, 5, torch.Generator().manual_seed(3))
    starts = torch.cat([z[:4], z[:2] + 0.5])
    whole = threshold_clustering(z, starts, radius=rule, rounds=4, method=method)
    for k, start in enumerate(starts):
        one = threshold_clustering(z, start, radius=rule, rounds=4, method=method)
        torch.testing.assert_close(whole.centers[k : k + 1], one.centers, rtol=0, atol=1e-13)  # 64 roundings of 10
        torch.testing.assert_close(whole.radii[:, k : k + 1], one.radii, rtol=0, atol=1e-13)
        assert torch.equal(whole.members[k : k + 1], one.members)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bad", [False, True], ids=["finite", "with NaN"])
@pytest.mark.parametrize("d", [5, 150])
def test_a_batch_of_sets_is_the_sets_one_by_one(d: int, bad: bool, weighted: bool, method: str) -> None:
    rng = torch.Generator().manual_seed(4)
    z = torch.stack([groups(9, d, rng) for _ in range(6)]).view(2, 3, 9, d)
    starts = z[..., 2:5, :].clone()
    if bad:
        z[0, 1, 8] = torch.nan
        starts[1, 2, 0, 3] = torch.inf
    weights = torch.rand(9, generator=rng, dtype=F64) if weighted else None
    options = {"radius": Quantile(0.4), "rounds": 4, "weights": weights, "method": method}
    whole = threshold_clustering(z, starts, **options)
    single = threshold_clustering(z, starts[..., 1, :], **options)  # (..., D): one start a set
    assert whole.centers.shape == (2, 3, 3, d) and whole.members.shape == (2, 3, 3, 9)
    assert whole.radii.shape == (4, 2, 3, 3) and single.centers.shape == (2, 3, 1, d)
    for i, j in itertools.product(range(2), range(3)):
        one = threshold_clustering(z[i, j], starts[i, j], **options)
        close = {"rtol": 0, "atol": 1e-12, "equal_nan": True}  # 64 roundings of 60
        torch.testing.assert_close(whole.centers[i, j], one.centers, **close)
        torch.testing.assert_close(whole.radii[:, i, j], one.radii, **close)
        torch.testing.assert_close(single.centers[i, j], one.centers[1:2], **close)
        assert torch.equal(whole.members[i, j], one.members)


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("distance", [1e6, 1e12, 1e17])
def test_one_start_far_away_costs_the_others_nothing(distance: float, place: int) -> None:
    z = groups(15, 40, torch.Generator().manual_seed(5))
    starts = z[:5].clone()
    starts[place] += distance
    rest = [k for k in range(5) if k != place]
    options = {"radius": Fixed(8.0), "rounds": 4}
    found = threshold_clustering(z, starts, method="gram", **options)
    direct = threshold_clustering(z, starts, method="direct", **options)
    torch.testing.assert_close(found.centers[rest], direct.centers[rest], rtol=0, atol=1e-12)  # 64 roundings of 30
    assert torch.equal(found.members, direct.members)


def test_auto_multiplies_the_gram_matrix_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("_Direct", "_Gram"):
        cls = getattr(threshold, name)
        monkeypatch.setattr(threshold, name, lambda *a, cls=cls, name=name: taken.append(name) or cls(*a))
    z = torch.randn(8, 5000, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = [threshold_clustering(z, z[0], radius=Quantile(0.5), rounds=4, method=m) for m in ("auto", *METHODS)]
    assert taken == ["_Gram", "_Direct", "_Gram"]
    assert torch.equal(found[0].centers, found[2].centers)
    taken.clear()
    threshold_clustering(z, z[0], rounds=2)
    threshold_clustering(z[:, :1000], z[0, :1000], rounds=4)
    threshold_clustering(z.repeat(200, 1), z[0], rounds=3)
    assert taken == ["_Direct"] * 3
