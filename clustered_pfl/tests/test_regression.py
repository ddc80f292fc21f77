"""The synthetic problem is the official one, draw by draw, and its metrics are those of a plain computation."""

import math

import numpy as np
import pytest
import torch

from clustered_pfl.config import RegressionConfig
from clustered_pfl.tasks import regression
from clustered_pfl.tests.trials import config, method, run

torch.set_num_threads(1)
SYNTHETIC = {"momentum_style": "ema", "q": 0.25, "strict": True, "rounds": 10}
FC = method(**SYNTHETIC)
GT = method("ground_truth", momentum_style="ema")


def ifca(start: str, **values):
    return method("ifca", start=start, variant="model", momentum=0.0, **{"lr": 0.01, **values})


@pytest.mark.parametrize("seed", [0, 7])
def test_draws_are_in_the_order_of_the_official_code(seed):
    """Per cluster the bits of the optimum, then per client its inputs and its noise; last all starts."""
    task = RegressionConfig(clusters=3, clients=2, samples=4, dim=5, scale=100.0, start_std=0.1)
    rng = np.random.default_rng(seed)
    xs, ys, optima = [], [], []
    for cluster in range(3):
        theta = np.array([100.0 * bit for bit in rng.integers(0, 2, 5)])
        optima.append(theta)
        for _ in range(2):
            x = cluster + rng.standard_normal((4, 5))
            noise = rng.standard_normal(4)
            xs.append(x)
            ys.append(np.array([sum(row * theta) for row in x]) + 0 * noise)
    starts = np.array(optima) + 0.1 * rng.standard_normal((3, 5))
    found = regression.draw(task, seed)
    for mine, expected in zip(found, (xs, ys, optima, starts), strict=True):
        np.testing.assert_allclose(mine, np.array(expected), rtol=1e-13, atol=1e-11)
    assert all(part.dtype == np.float64 for part in found)
    assert set(np.unique(found[2])) == {0.0, 100.0}


def test_gradient_is_the_mean_over_samples_of_the_residual_times_the_input():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(9, 10, generator=rng, dtype=torch.float64)
    y, w = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (9, 10))
    value = regression.loss({"w": w}, (x, y))
    assert value.item() == pytest.approx(sum((x[i] @ w - y[i]).item() ** 2 for i in range(9)) / 18, rel=1e-12)
    grad = torch.func.grad(lambda w: regression.loss({"w": w}, (x, y)))(w)
    torch.testing.assert_close(grad, x.T @ (x @ w - y) / 9, rtol=1e-12, atol=1e-12)


def test_the_distance_is_the_mean_over_clients_to_their_own_optimum():
    """One step of local training, by hand."""
    task = RegressionConfig(clusters=2, clients=2, steps=1)
    (row,), log = run(regression, config(task, seed=3, method=method("local", lr=0.01, momentum_style="ema")))
    x, y, optima, first = regression.draw(task, 3)
    far = []
    for i in range(4):
        start = first[i // 2]
        w = start - 0.01 * x[i].T @ (x[i] @ start - y[i]) / 9
        far.append(np.linalg.norm(w - optima[i // 2]))
    assert row["distance"] == pytest.approx(np.mean(far), rel=1e-10)
    assert row["log10_distance"] == pytest.approx(math.log10(np.mean(far)), rel=1e-10)
    assert log.rows[1]["distance"] == [row["distance"]]
    assert row["seed"] == 3 and "intra_max" not in row


def test_clients_of_a_cluster_start_at_their_clusters_noisy_optimum():
    task = RegressionConfig(clusters=3, clients=2, steps=1, start_std=0.5)
    (row,), _ = run(regression, config(task, method=method("local", lr=1e-12)))
    _, _, optima, first = regression.draw(task, 0)
    assert row["distance"] == pytest.approx(np.linalg.norm(first - optima, axis=1).mean(), rel=1e-6)
    exact, _ = run(regression, config(RegressionConfig(steps=1, start_std=0.0), method=FC))
    assert exact[0]["distance"] < 1e-12  # the targets' rounding


@pytest.fixture(scope="module")
def short():
    """All methods on the first panel after 200 steps in float64, two seeds."""
    task = RegressionConfig(steps=200, log_every=100)
    methods = {
        "fc": FC,
        "ground_truth": GT,
        "local": method("local", momentum_style="ema"),
        "global": method("global", momentum_style="ema"),
        "ifca": ifca("oracle"),
    }
    return {name: run(regression, config(task, seed=10, n_seeds=2, method=m)) for name, m in methods.items()}


def test_fc_finds_the_optima_that_a_client_alone_cannot(short):
    """With n < d samples the part of the start's error in the null space stays; a cluster has 4 n > d samples."""
    far = {name: [row["distance"] for row in rows] for name, (rows, _) in short.items()}
    assert max(far["fc"]) < 1e-3 and max(far["ground_truth"]) < 1e-3
    for fc, truth in zip(far["fc"], far["ground_truth"], strict=True):
        assert abs(math.log10(fc / truth)) < 0.5
    assert min(far["local"]) > 1e-2
    assert min(far["global"]) > 50
    assert max(far["fc"]) < min(far["ifca"]) < max(far["ifca"]) < min(far["global"])


def test_fc_goes_on_below_a_ten_millionth():
    (row,), _ = run(regression, config(RegressionConfig(steps=350), method=FC))
    assert row["distance"] < 1e-7


def test_local_training_keeps_the_null_space_of_its_samples(short):
    task = RegressionConfig()
    x, _, optima, first = regression.draw(task, 10)
    kept = []
    for i in range(16):
        error = first[i // 4] - optima[i // 4]
        basis = np.linalg.svd(x[i])[2][:9]  # of the row space
        kept.append(np.linalg.norm(error - basis.T @ (basis @ error)))
    (row, _), _ = short["local"]
    assert row["distance"] >= np.mean(kept) * (1 - 1e-9)


def test_history_has_every_tenth_step_and_the_last():
    rows, log = run(regression, config(RegressionConfig(steps=25, log_every=10), method=FC))
    assert list(log.rows) == [10, 20, 25] and log.shown == [(10, 25), (20, 25), (25, 25)]
    assert log.rows[25]["distance"] == [rows[0]["distance"]]


def test_float32_stops_at_its_rounding():
    ends = {}
    for dtype in ("float64", "float32"):
        (row,), _ = run(regression, config(RegressionConfig(steps=350, dtype=dtype), method=FC))
        ends[dtype] = row["log10_distance"]
    # optima of size 100 sqrt(d / 2): one unit in the last place of float32 is 1e-5 of a coordinate
    assert ends["float64"] < -7 < -6 < ends["float32"] < -2


@pytest.mark.parametrize("name", ["fc", "ifca"])
def test_seeds_together_are_seeds_alone(name):
    task = RegressionConfig(steps=20)
    how = FC if name == "fc" else ifca("oracle")
    together, _ = run(regression, config(task, seed=3, n_seeds=3, method=how))
    for row in together:
        (alone,), _ = run(regression, config(task, seed=row["seed"], method=how))
        # sums over a batch of seeds are grouped differently than those of one
        assert alone["distance"] == pytest.approx(row["distance"], rel=1e-9)
    assert len({row["distance"] for row in together}) == 3


def test_official_indexing_trains_the_first_models_only(monkeypatch):
    """It takes every K-th client's start: n_i models, of which it updates the first K."""
    seen = []
    build = regression.build

    def watched(*arguments):
        seen.append(build(*arguments))
        return seen[-1]

    monkeypatch.setattr(regression, "build", watched)
    for clusters, clients in ((4, 4), (4, 6), (6, 2)):
        task = RegressionConfig(clusters=clusters, clients=clients, steps=3)
        run(regression, config(task, method=ifca("official", lr=1e-3)))
        _, _, _, first = regression.draw(task, 0)
        owner = np.repeat(np.arange(clusters), clients)[::clusters]
        start = torch.from_numpy(first[owner])
        models = seen[-1].models[0]
        assert models.shape == start.shape == (clients, 10)
        moved = (models != start).any(1).tolist()
        chosen = set(seen[-1].assignment().flatten().tolist())
        assert moved == [k in chosen and k < clusters for k in range(clients)]
        assert not any(moved[clusters:])
    # in (4, 4) these are the clusters' own starts: as with the oracle
    task = RegressionConfig(steps=30)
    official, oracle = (run(regression, config(task, method=ifca(start)))[0] for start in ("official", "oracle"))
    assert official == oracle
    wide = RegressionConfig(clients=6, steps=400)
    official, oracle = (run(regression, config(wide, method=ifca(start)))[0] for start in ("official", "oracle"))
    assert official[0]["distance"] > 3 * oracle[0]["distance"]


@pytest.mark.parametrize("name", ["ifca", "hypcluster"])
def test_starts_that_the_problem_lacks_are_refused(name):
    with pytest.raises(ValueError, match=r"method.start=random: must be oracle or official for regression"):
        run(regression, config(RegressionConfig(steps=1), method=method(name)))


def test_assumptions_are_measured_at_client_0s_model_in_every_epoch():
    task = RegressionConfig(clusters=3, clients=3, steps=4, assumptions=True, log_every=1)
    (row,), log = run(regression, config(task, seed=1, method=method("ground_truth", lr=1e-4, momentum_style="ema")))
    x, y, _, first = regression.draw(task, 1)
    models, velocity = first.copy(), None
    ratios, inter, intra = [], [], []
    for _ in range(4):
        at = models[0]
        g = np.array([x[i].T @ (x[i] @ at - y[i]) / 9 for i in range(9)])
        means = g.reshape(3, 3, 10).mean(1)
        own = np.repeat(means, 3, 0)
        ratios.append(((g - own) ** 2).sum(1) / (own**2).sum(1))
        intra.append(((g - own) ** 2).sum(1))
        apart = [[((g[i] - g[j]) ** 2).sum() for j in range(9) if j // 3 != i // 3] for i in range(9)]
        inter.append(np.min(apart, axis=1))
        mine = np.array([x[i].T @ (x[i] @ models[i // 3] - y[i]) / 9 for i in range(9)]).reshape(3, 3, 10).mean(1)
        velocity = mine if velocity is None else 0.9 * velocity + 0.1 * mine
        models = models - 1e-4 * velocity
    ratios, inter, intra = map(np.array, (ratios, inter, intra))  # (epochs, clients)
    assert row["intra_max"] == pytest.approx(ratios.max(), rel=1e-9)
    assert row["inter_min"] == pytest.approx(inter.min(), rel=1e-9)
    assert row["intra_distance_max"] == pytest.approx(intra.max(), rel=1e-9)
    by_cluster = ratios.reshape(4, 3, 3).mean(2)
    assert row["intra_cluster_max"] == pytest.approx(by_cluster.max(), rel=1e-9)
    slopes = [np.polyfit([0, 1], np.log(by_cluster[2:, k]), 1)[0] for k in range(3)]
    assert row["intra_slope"] == pytest.approx(max(slopes), rel=1e-6)
    last = log.rows[4]
    assert last["intra_mean"] == [pytest.approx(ratios[-1].mean(), rel=1e-9)]
    assert last["intra_max"] == [pytest.approx(ratios[-1].max(), rel=1e-9)]
    assert last["inter_mean"] == [pytest.approx(inter[-1].mean(), rel=1e-9)]
    assert last["inter_min"] == [pytest.approx(inter[-1].min(), rel=1e-9)]
