"""The walk obeys the paper's model, and real optimizers on it obey the equilibrium formulas."""

import math
from types import SimpleNamespace

import pytest
import torch

from rotational_optimizers.config import RandomWalkConfig
from rotational_optimizers.tasks.random_walk import NOISE_STEPS, _Walk, run

torch.set_num_threads(1)
TRIAL = SimpleNamespace(progress=lambda done, total: None)


def optimizer(**values):
    defaults = {"name": "adamw", "lr": 0.01, "weight_decay": 0.5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    defaults |= {"momentum": 0.9, "nesterov": False, "decoupled": False, "update_norm_decay": 0.9, "zero_mean": True}
    return SimpleNamespace(**{**defaults, **values})


def config(task, seed=0, n_seeds=1, **values):
    return SimpleNamespace(task=RandomWalkConfig(**task), optimizer=optimizer(**values), seed=seed, n_seeds=n_seeds)


# relaxation times of 50 to 500 steps, so that 3000 steps of 48 rows average over many
SETTLED = {"neurons": 48, "steps": 3000, "burn_in": 0.15}
ARMS = {
    "adamw": {},
    "sgdm": {"name": "sgdm", "lr": 0.1, "weight_decay": 0.01},
    "sgdw": {"name": "sgdm", "lr": 0.1, "weight_decay": 0.05, "decoupled": True},
    "nesterov": {"name": "sgdm", "lr": 0.1, "weight_decay": 0.01, "nesterov": True},
    "adam_l2": {"name": "adam_l2", "weight_decay": 0.01},
    "lion": {"name": "lion", "lr": 0.005, "weight_decay": 1.0, "beta2": 0.99},
    "lion without momentum": {"name": "lion", "lr": 0.005, "weight_decay": 1.0, "beta1": 0.0, "beta2": 0.0},
    "lion with little": {"name": "lion", "lr": 0.005, "weight_decay": 1.0, "beta1": 0.5, "beta2": 0.5},
}


@pytest.mark.parametrize("arm", ARMS)
def test_real_optimizers_settle_at_the_exact_norm_and_angle(arm):
    row = run(config(SETTLED, **ARMS[arm]), TRIAL)[0]
    assert row["angle_ratio_exact"] == pytest.approx(1, abs=0.01)
    assert row["norm_ratio_exact"] == pytest.approx(1, abs=0.01)
    assert not row["diverged"]


def test_the_published_form_of_lion_fails_without_momentum():
    row = run(config({**SETTLED, "steps": 1500}, **ARMS["lion without momentum"]), TRIAL)[0]
    assert row["angle_ratio"] == pytest.approx(math.sqrt(2 / math.pi), abs=0.02)
    assert row["norm_ratio"] == pytest.approx(math.sqrt(math.pi / 2), abs=0.02)


@pytest.mark.parametrize(("arm", "slope"), [("adamw", 0), ("sgdm", 0), ("lion", 0), ("adam_l2", -1 / 3)])
def test_only_adam_with_l2_depends_on_the_size_of_the_gradient(arm, slope):
    scales = {"gradient_scales": [0.01, 1.0, 100.0], "neurons": 16, "steps": 1500, "burn_in": 0.2}
    row = run(config(scales, **ARMS[arm] | ({"weight_decay": 0.001} if arm == "adam_l2" else {})), TRIAL)[0]
    assert row["slope"] == pytest.approx(slope, abs=0.01)
    assert row["spread"] == pytest.approx(10 ** (-4 * slope), rel=0.05)
    assert len(row["scale_angles"]) == len(row["scale_norms"]) == 3
    ratio = torch.tensor(row["scale_angles"]) / torch.tensor(row["scale_angles_predicted"])
    assert (ratio / ratio[0] - 1).abs().max() < 0.05


def test_norm_relaxes_exponentially_if_the_second_moment_is_quick():
    task = {"neurons": 64, "steps": 1000, "start_norm": 4.0}
    task["burn_in"] = 0
    row = run(config(task, weight_decay=0.2, beta2=0.95), TRIAL)[0]
    assert row["max_deviation"] < 0.05
    assert row["curve_steps"][0] == 0 and row["curve_steps"][-1] <= 1000
    assert row["curve_norm_sq"][0] == pytest.approx(16 * row["norm_predicted_exact"] ** 2, rel=1e-9)
    slow = run(config(task, weight_decay=0.2, beta2=0.999), TRIAL)[0]
    assert slow["max_deviation"] > 0.2


@pytest.mark.parametrize("arm", ["rv_sgdm", "rv_adamw", "rv_lion"])
def test_rotational_variants_turn_at_the_equilibrium_angle_with_a_norm_that_never_moves(arm):
    values = ARMS[{"rv_sgdm": "sgdm", "rv_adamw": "adamw", "rv_lion": "lion"}[arm]]
    task = {**SETTLED, "steps": 600, "burn_in": 0.05, "start_norm": 3.0}
    row = run(config(task, **{**values, "name": arm}), TRIAL)[0]
    assert row["angle_ratio"] == pytest.approx(1, abs=0.03)
    assert row["curve_norm_sq"] == pytest.approx([row["curve_norm_sq"][0]] * len(row["curve_norm_sq"]), rel=1e-9)
    assert row["norm"] == pytest.approx(3 * row["norm_predicted_exact"], rel=1e-9)


def test_gradients_are_orthogonal_inverse_to_the_norm_and_of_the_asked_scale():
    task = RandomWalkConfig(neurons=400, gradient_scales=[0.1, 10.0], dim=16)
    walk = _Walk(optimizer(), task, [0], [2.0, 5.0])
    w = walk.weight.detach().clone()
    walk._step(walk._noise(1)[0], w.square().sum(1), torch.empty(len(w), dtype=torch.float64))
    g = walk.weight.grad
    assert ((g * w).sum(1).abs() / g.norm(dim=1) / w.norm(dim=1)).max() < 1e-14
    for block, scale, norm in ((g[:400], 0.1, 2.0), (g[400:], 10.0, 5.0)):
        rms = block.square().sum(1).mean().sqrt().item()
        assert rms * norm == pytest.approx(scale * math.sqrt(15), rel=0.03)


def test_angles_and_norms_are_means_over_the_steps_after_the_burn_in():
    task = RandomWalkConfig(dim=8, neurons=3, steps=150, burn_in=70 / 150, gradient_scales=[1.0, 2.0])
    walk = _Walk(optimizer(), task, [0, 1], [1.0, 1.0])
    path = [walk.weight.detach().clone()]
    step = walk._step

    def remember(*arguments):
        result = step(*arguments)
        path.append(walk.weight.detach().clone())
        return result

    walk._step = remember
    angle_sq, norm_sq, curve = walk.run(TRIAL)
    path = torch.stack(path)  # (151, 2*2*3, 8)
    unit = path / path.norm(dim=2, keepdim=True)
    angles = 2 * torch.asin((unit[1:] - unit[:-1]).norm(dim=2) / 2)
    by_block = lambda x: x.view(len(x), 2, 2, 3).mean((0, 3))  # noqa: E731
    torch.testing.assert_close(angle_sq, by_block(angles[70:].square()), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm_sq, by_block(path[71:].norm(dim=2).square()), rtol=1e-12, atol=0)
    expected = path.norm(dim=2).square().view(151, 2, 2, 3)[walk.curve_steps, :, 0].mean(2)
    torch.testing.assert_close(curve, expected, rtol=1e-12, atol=0)


def test_a_seed_walks_the_same_alone_and_in_company_and_seeds_differ():
    task = {"neurons": 5, "steps": 200, "burn_in": 0.25, "dim": 32, "gradient_scales": [1.0, 3.0], "start_norm": 2.0}
    together = run(config(task, seed=3, n_seeds=3), TRIAL)
    alone = run(config(task, seed=4), TRIAL)[0]
    assert together[1] == alone
    assert len({row["angle"] for row in together}) == 3
    assert [row["seed"] for row in together] == [3, 4, 5]
    slow, fast = alone["scale_angles"]
    assert alone["slope"] == pytest.approx(math.log(fast / slow) / math.log(3), rel=1e-9)


def test_steps_below_rounding_are_no_rotation():
    row = run(config({"neurons": 50, "steps": 70}, lr=1e-30), TRIAL)[0]
    assert row["angle"] < 1e-7 and not row["diverged"]


def test_decoupled_sgd_shrinks_apart_from_the_momentum():
    task = RandomWalkConfig(neurons=2, dim=4)
    walk = _Walk(optimizer(name="sgdm", lr=0.1, weight_decay=0.5, decoupled=True), task, [0], [1.0])
    w = walk.weight.detach().clone()
    walk._step(torch.zeros_like(w), w.square().sum(1), torch.empty(2, dtype=torch.float64))
    torch.testing.assert_close(walk.weight.detach(), 0.95 * w)
    assert walk.optimizer.state[walk.weight]["momentum_buffer"].abs().max() == 0


def test_divergence_is_a_result():
    row = run(config({"steps": 400, "burn_in": 0, "neurons": 2}, name="sgdm", lr=10.0, weight_decay=10.0), TRIAL)[0]
    assert row["diverged"]
    assert math.isnan(row["norm_predicted_exact"])


def test_rows_hold_plain_numbers_only():
    task = {"neurons": 2, "steps": 70, "burn_in": 0.1, "start_norm": 2.0}
    row = run(config(task), TRIAL)[0]
    flat = [item for value in row.values() for item in (value if isinstance(value, list) else [value])]
    assert {type(item) for item in flat} <= {float, int, bool}


def test_optimizers_without_a_formula_are_refused():
    with pytest.raises(ValueError, match="hyperball"):
        run(config({}, name="hyperball"), TRIAL)


def test_progress_ends_at_the_last_step():
    seen = []
    trial = SimpleNamespace(progress=lambda done, total: seen.append((done, total)))
    run(config({"neurons": 1, "steps": NOISE_STEPS + 5, "burn_in": 0}), trial)
    assert seen[-1] == (NOISE_STEPS + 5, NOISE_STEPS + 5)
