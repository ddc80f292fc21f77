"""Quadratic losses: optima, noise, starts and metrics are those of the closed forms and of plain loops."""

import itertools
import math

import pytest
import torch

from clustered_pfl.config import QuadraticsConfig
from clustered_pfl.tasks import quadratics
from clustered_pfl.tests.trials import config, method, run

torch.set_num_threads(1)
F64 = torch.float64
FC = {"momentum": 0.0, "q": 0.25, "strict": True, "rounds": 10}
CLOSE = {"rel": 1e-10}  # some hundreds of float64 steps


@pytest.mark.parametrize(("clusters", "dim", "separation"), [(2, 2, 1.0), (4, 10, 50.0), (5, 7, 3.0)])
def test_optima_are_equally_far_from_each_other_around_the_origin(clusters, dim, separation):
    optima = quadratics.simplex(QuadraticsConfig(clusters=clusters, dim=dim, separation=separation))
    assert optima.shape == (clusters, dim) and optima.dtype == F64
    for a, b in itertools.combinations(optima, 2):
        assert (a - b).norm().item() == pytest.approx(separation, rel=1e-12)
    assert optima.mean(0).abs().max() < 1e-12 * separation


def test_the_gradient_is_the_way_to_the_optimum_plus_the_noise():
    rng = torch.Generator().manual_seed(0)
    x, target, noise = torch.randn(3, 6, generator=rng, dtype=F64)
    found = torch.func.grad(lambda x: quadratics.loss({"x": x}, (target, noise)))(x)
    torch.testing.assert_close(found, x - target + noise, rtol=1e-14, atol=1e-14)
    assert quadratics.loss({"x": x}, (target, 0 * noise)).item() == pytest.approx(((x - target) ** 2).sum().item() / 2)


def test_noise_has_mean_squared_norm_sigma_squared_in_every_direction():
    task = QuadraticsConfig(noise=3.0, dim=5)
    noise = quadratics._noise(task, [0, 1], 0, torch.Size([40, 5]))  # (steps, seeds, clients, dim)
    assert noise.shape == (quadratics.BLOCK, 2, 40, 5)
    count = noise.numel() / 5
    # |noise|^2 is sigma^2 / d times chi square of d degrees: relative deviation sqrt(2 / d) a draw
    assert noise.square().sum(-1).mean().item() == pytest.approx(9, rel=4 * math.sqrt(2 / 5 / count))
    assert (noise.mean((0, 1, 2)).abs() < 4 * 3 / math.sqrt(5 * count)).all()
    again = quadratics._noise(task, [1], 0, torch.Size([40, 5]))
    assert torch.equal(noise[:, 1:], again)  # a seed's own, whoever else is there
    assert not torch.equal(again, quadratics._noise(task, [1], 1, torch.Size([40, 5])))


def test_ground_truth_is_a_plain_loop_and_its_errors_are_of_the_late_steps():
    task = QuadraticsConfig(clusters=3, clients=2, dim=4, steps=100, burn_in=0.35, noise=2.0, separation=7.0)
    rows, log = run(quadratics, config(task, seed=4, method=method("ground_truth", momentum=0.0, lr=0.2)))
    optima = quadratics.simplex(task)
    x = quadratics._starts(config(task, method=method("ground_truth")), optima, 4)[::2].clone()
    noise = torch.cat([quadratics._noise(task, [4], block, torch.Size([6, 4])) for block in (0, 1)])[:, 0]
    errors = []
    for step in range(100):
        x = x - 0.2 * (x - optima + noise[step].view(3, 2, 4).mean(1))
        errors.append((x - optima).square().sum(1).mean().item())
    (row,) = rows
    assert row["error"] == pytest.approx(sum(errors[35:]) / 65, **CLOSE)
    assert row["final_error"] == pytest.approx(errors[-1], **CLOSE)
    assert row["expected"] == pytest.approx(0.2 / 1.8 * 4 / 2)
    assert (row["pairs"], row["exact"], row["occupied"]) == (1, 1, 3)
    assert {step: values["error"] for step, values in log.rows.items()} == {
        50: [pytest.approx(errors[49], **CLOSE)],
        100: [pytest.approx(errors[99], **CLOSE)],
    }


@pytest.mark.parametrize("name", ["ground_truth", "federated_clustering"])
def test_the_steady_state_is_the_closed_form(name):
    """eta / (2 - eta) sigma^2 / n of K = 4 independent models: relative deviation sqrt(2 / d) times that of the
    correlated steps, whose squares have a memory of (1 - eta)^2 a step."""
    lr, late, seeds, dim = 0.5, 400, 4, 20
    task = QuadraticsConfig(clients=4, dim=dim, separation=100.0, start_std=1.0, steps=500, burn_in=0.2)
    rows, _ = run(quadratics, config(task, n_seeds=seeds, method=method(name, lr=lr, **{**FC, "rounds": 30})))
    mean = sum(row["error"] for row in rows) / seeds
    memory = (1 + (1 - lr) ** 2) / (1 - (1 - lr) ** 2)
    deviation = math.sqrt(2 / dim * memory / (late * seeds * 4))
    assert mean == pytest.approx(rows[0]["expected"], rel=4 * deviation)
    assert rows[0]["expected"] == pytest.approx(lr / (2 - lr) / 4)
    assert all(row["pairs"] == 1 for row in rows)


def test_momentum_of_the_heavy_ball_settles_higher_than_the_expected_value():
    task = QuadraticsConfig(clients=4, steps=400, separation=100.0)
    rows, _ = run(quadratics, config(task, method=method("ground_truth", momentum=0.9, lr=0.1)))
    assert rows[0]["error"] > 3 * rows[0]["expected"]


def starts(name, seed=0, task=None, **values):
    task = task or QuadraticsConfig()
    return quadratics._starts(config(task, method=method(name, **values)), quadratics.simplex(task), seed)


def test_clients_start_at_one_random_point():
    task = QuadraticsConfig(start_std=3.0)
    first = starts("federated_clustering", task=task)
    assert first.shape == (16, 10) and (first == first[0]).all()
    assert not torch.equal(first, starts("federated_clustering", seed=1, task=task))
    many = torch.stack([starts("local", seed=s, task=task)[0] for s in range(60)])
    assert many.std().item() == pytest.approx(3, rel=4 / math.sqrt(2 * 600))
    assert torch.equal(first / 3, starts("local", task=QuadraticsConfig(start_std=1.0)))


def test_ifca_starts_from_different_models():
    task = QuadraticsConfig(start_std=2.0)
    first = starts("ifca", task=task)
    assert first.shape == (4, 10) and torch.unique(first, dim=0).shape == (4, 10)
    assert starts("hypcluster", models=7).shape == (7, 10)
    near = starts("ifca", start="oracle") - quadratics.simplex(QuadraticsConfig())
    assert 0.05 < near.std() < 0.2


@pytest.mark.parametrize("start_std", [0.0, 2.0])
def test_the_crowded_start_has_one_model_amid_the_optima_and_the_others_far_away(start_std):
    task = QuadraticsConfig(separation=5.0, start_std=start_std)
    first = starts("ifca", task=task, start="crowded")
    assert first[0].abs().max() == 0
    torch.testing.assert_close(first[1:].norm(dim=1), torch.full((3,), 50.0, dtype=F64))
    optima = quadratics.simplex(task)
    assert (torch.cdist(optima, first).argmin(1) == 0).all()


@pytest.mark.parametrize("name", ["ifca", "hypcluster"])
def test_from_a_crowded_start_clustering_by_loss_leaves_models_empty(name):
    task = QuadraticsConfig(clients=8, steps=60)
    rows, _ = run(quadratics, config(task, n_seeds=2, method=method(name, start="crowded", momentum=0.0)))
    for row in rows:
        assert (row["occupied"], row["exact"]) == (1, 0)
        assert row["pairs"] == pytest.approx(7 / 31)  # all together: right for the own cluster's pairs alone
    rows, _ = run(quadratics, config(task, n_seeds=2, method=method(**FC)))
    assert all((row["occupied"], row["exact"], row["pairs"]) == (4, 1, 1) for row in rows)


def test_ifca_from_the_true_optima_finds_its_clusters():
    task = QuadraticsConfig(clients=3, steps=20)
    (row,), _ = run(quadratics, config(task, method=method("ifca", start="oracle", momentum=0.0, variant="model")))
    assert (row["occupied"], row["exact"], row["pairs"]) == (4, 1, 1)


def test_pairs_count_the_late_steps_of_a_clustering_that_fails():
    """q = 0 of the strict rule: nobody inside, every pair apart."""
    task = QuadraticsConfig(clients=4, steps=10)
    (row,), _ = run(quadratics, config(task, method=method(**{**FC, "q": 0.0})))
    assert row["pairs"] == pytest.approx(1 - 3 / 15) and row["exact"] == 0


def test_starts_that_the_problem_lacks_are_refused():
    with pytest.raises(ValueError, match=r"method.start=official: must be random, crowded or oracle for quadratics"):
        starts("ifca", start="official")
    with pytest.raises(ValueError, match=r"method.models=3: must be task.clusters=4 for method.start=oracle"):
        starts("ifca", start="oracle", models=3)


@pytest.mark.parametrize(
    "how", [method(**FC), method("ifca", momentum=0.0), method("momentum_clustering", q=0.4), method("ditto")]
)
def test_seeds_together_are_seeds_alone(how):
    task = QuadraticsConfig(clients=3, steps=70, separation=3.0, noise=2.0)
    together, _ = run(quadratics, config(task, seed=5, n_seeds=3, method=how))
    assert [row["seed"] for row in together] == [5, 6, 7]
    assert len({row["error"] for row in together}) == 3
    (alone,), _ = run(quadratics, config(task, seed=6, method=how))
    assert alone == {key: pytest.approx(value, rel=1e-9) for key, value in together[1].items()}
