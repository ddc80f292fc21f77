"""The formulas of rotational equilibrium against torch's own update maps, brute force sums and each other."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov
from torch import nn

from rotational_optimizers.equilibrium import (
    equilibrium_norm,
    equilibrium_rotation,
    equilibrium_time,
    norm_trajectory,
    rule_of,
)
from rotational_optimizers.relatives import LAMB, Lion

LR, DECAY, C, G = 0.02, 0.3, 128, 7.0
ROUNDING = 1e-12  # a few dozen float64 operations
RULES = ("sgdm", "sgdw", "nesterov", "adamw", "nadam", "adam_l2", "lion")


def arguments(rule, lr=LR, weight_decay=DECAY):
    values = {"lr": lr, "weight_decay": weight_decay}
    if rule in ("sgdm", "sgdw", "nesterov"):
        return values | {"momentum": 0.8, "grad_norm": G}
    values["betas"] = (0.7, 0.9)
    return values | {"numel": C} | ({"grad_norm": G} if rule == "adam_l2" else {})


def rotation(rule, exact=False, **overrides):
    return equilibrium_rotation(rule, **{**arguments(rule), **overrides}, exact=exact)


def norm(rule, exact=False, **overrides):
    return equilibrium_norm(rule, **{**arguments(rule), **overrides}, exact=exact)


@pytest.mark.parametrize(
    ("rule", "expected_rotation", "expected_norm"),
    [
        ("sgdm", math.sqrt(2 * LR * DECAY / 1.8), (LR * G**2 / (2 * DECAY * 0.2)) ** 0.25),
        ("sgdw", math.sqrt(2 * LR * DECAY * 0.2 / 1.8), (LR * G**2 / (2 * DECAY * 0.2**2)) ** 0.25),
        (
            "nesterov",
            math.sqrt(2 * LR * DECAY * 0.2 * (1 + 1.6 + 0.64 / 0.36)),
            (LR * G**2 / (2 * DECAY * 0.2)) ** 0.25,
        ),
        ("adamw", math.sqrt(2 * LR * DECAY * 0.3 / 1.7), math.sqrt(LR * C / (2 * DECAY))),
        (
            "adam_l2",
            math.sqrt(0.3 / 1.7) * (2 * LR**2 * DECAY * C / G) ** (1 / 3),
            (LR * math.sqrt(C) * G / (2 * DECAY)) ** (1 / 3),
        ),
        (
            "lion",
            math.sqrt(math.pi * LR * DECAY * (0.09 + 0.49 * 0.1 / 1.9)),
            math.sqrt(LR * C / (math.pi * DECAY * (0.09 + 0.49 * 0.1 / 1.9))),
        ),
    ],
)
def test_first_order_forms_are_the_table(rule, expected_rotation, expected_norm):
    assert rotation(rule) == pytest.approx(expected_rotation, rel=ROUNDING)
    assert norm(rule) == pytest.approx(expected_norm, rel=ROUNDING)


def update_map(nesterov, decoupled, dampening, lr=LR, decay=DECAY, alpha=0.8):
    """F, h of (w, m)' = F (w, m) + h g, read off torch's own SGD by feeding it unit vectors."""
    p = nn.Parameter(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    sgd = torch.optim.SGD(
        [p], lr, momentum=alpha, nesterov=nesterov, dampening=dampening, weight_decay=0 if decoupled else decay
    )
    sgd.state[p]["momentum_buffer"] = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    p.grad = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    if decoupled:
        p.data *= 1 - lr * decay
    sgd.step()
    columns = np.stack([p.detach().numpy(), sgd.state[p]["momentum_buffer"].numpy()])
    return columns[:, :2], columns[:, 2:]


def stationary(transition, noise):
    """(variance of w, correlation of successive w) of the stationary law."""
    covariance = solve_discrete_lyapunov(transition, noise @ noise.T)
    return covariance[0, 0], (transition @ covariance)[0, 0] / covariance[0, 0]


@pytest.mark.parametrize(
    ("nesterov", "decoupled", "dampening"),
    [(False, False, 0.0), (False, True, 0.0), (True, False, 0.0), (True, True, 0.0), (False, False, 0.3)],
)
@pytest.mark.parametrize("lr", [0.002, 0.4])
def test_exact_sgd_is_the_stationary_law_of_torchs_update(nesterov, decoupled, dampening, lr):
    variance, cosine = stationary(*update_map(nesterov, decoupled, dampening, lr=lr))
    kind = {"nesterov": nesterov, "decoupled": decoupled, "dampening": dampening, "lr": lr}
    assert rotation("sgdm", exact=True, **kind) == pytest.approx(math.sqrt(2 * (1 - cosine)), rel=1e-9)
    # E|g|^2 = G^2/|w|^2
    assert norm("sgdm", exact=True, **kind) ** 4 == pytest.approx(variance * G**2, rel=1e-9)


@pytest.mark.parametrize(("rule", "nesterov"), [("adamw", False), ("nadam", True)])
def test_exact_adamw_is_sgdw_on_unit_gradients(rule, nesterov):
    # Adam's m is a heavy ball with dampening beta1; torch refuses nesterov with dampening, hence the smaller lr
    variance, cosine = stationary(*update_map(nesterov, True, 0.0, lr=LR * 0.3, decay=DECAY / 0.3, alpha=0.7))
    assert rotation(rule, exact=True) == pytest.approx(math.sqrt(2 * (1 - cosine)), rel=1e-9)
    assert norm(rule, exact=True) ** 2 == pytest.approx(variance * C, rel=1e-9)


def test_sgdm_cosine_is_one_minus_decay_over_one_plus_alpha_even_for_large_steps():
    chord = rotation("sgdm", exact=True, lr=0.4, weight_decay=0.5)
    assert 1 - chord**2 / 2 == pytest.approx(1 - 0.4 * 0.5 / 1.8, rel=ROUNDING)
    assert chord == pytest.approx(rotation("sgdm", lr=0.4, weight_decay=0.5), rel=ROUNDING)


def test_exact_adamw_matches_its_closed_form():
    d, beta = 1 - LR * DECAY, 0.7
    fall = LR * DECAY * (1 - beta) / (1 + d * beta)
    assert rotation("adamw", exact=True) ** 2 / 2 == pytest.approx(fall, rel=ROUNDING)
    square = LR**2 * C * (1 - beta) / (1 + beta) * (1 + d * beta) / ((1 - d * beta) * (1 - d**2))
    assert norm("adamw", exact=True) ** 2 == pytest.approx(square, rel=1e-11)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.5, 0.5), (0.9, 0.99), (0.95, 0.98), (0.99, 0.999), (0.9, 0.0)])
def test_exact_lion_sums_the_arcsine_autocovariance(betas):
    beta1, beta2 = betas
    d = 1 - LR * DECAY
    # x_t = beta1 m_{t-1} + (1 - beta1) g_t as a moving average: weight of g_{t-j}
    past = np.arange(40000)
    weights = np.concatenate([[1 - beta1], beta1 * (1 - beta2) * np.where(past == 0, 1.0, beta2**past)])
    spectrum = np.abs(np.fft.rfft(weights, 2 * len(weights))) ** 2
    rho = np.fft.irfft(spectrum)[: len(weights)]
    gamma = 2 / np.pi * np.arcsin(np.clip(rho / rho[0], -1, 1))
    powers = d ** np.arange(len(gamma))
    total = gamma[0] + 2 * (gamma * powers)[1:].sum()
    square = LR**2 * total / (1 - d**2)
    cosine = d + LR**2 * (gamma[1:] * powers[:-1]).sum() / square
    assert norm("lion", exact=True, betas=betas) ** 2 == pytest.approx(C * square, rel=2e-5)
    assert rotation("lion", exact=True, betas=betas) == pytest.approx(math.sqrt(2 * (1 - cosine)), rel=2e-5)


def test_lion_without_momentum_rotates_as_white_noise_not_as_the_table():
    values = {"lr": 1e-5, "weight_decay": 1.0, "betas": (0.0, 0.0)}
    ratio = equilibrium_rotation("lion", **values, exact=True) / equilibrium_rotation("lion", **values)
    assert ratio == pytest.approx(math.sqrt(2 / math.pi), rel=1e-4)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "lion"])
def test_exact_forms_tend_to_the_table_as_the_decay_vanishes(rule):
    small = {"lr": 1e-7, "weight_decay": 1e-2}
    assert rotation(rule, exact=True, **small) == pytest.approx(rotation(rule, **small), rel=1e-4)
    assert norm(rule, exact=True, **small) == pytest.approx(norm(rule, **small), rel=1e-4)


def test_exact_adam_l2_balances_the_walk_at_its_own_second_moment():
    size = norm("adam_l2", exact=True)
    root = math.sqrt((G / size) ** 2 / C + (DECAY * size) ** 2 / C)
    variance, cosine = stationary(*update_map(False, False, 0.7, lr=LR / root, alpha=0.7))
    assert size**2 == pytest.approx(variance * (G / size) ** 2, rel=1e-9)
    assert rotation("adam_l2", exact=True) == pytest.approx(math.sqrt(2 * (1 - cosine)), rel=1e-9)


@pytest.mark.parametrize("rule", ["sgdm", "sgdw", "nesterov", "adamw", "lion"])
def test_rotation_ignores_gradient_size_and_depends_on_lr_times_decay_only(rule):
    assert rotation(rule, lr=4 * LR, weight_decay=DECAY / 4) == pytest.approx(rotation(rule), rel=ROUNDING)
    assert rotation(rule, grad_norm=1e3) == rotation(rule)
    assert rotation(rule, weight_decay=4 * DECAY) == pytest.approx(2 * rotation(rule), rel=ROUNDING)


def test_adam_with_l2_turns_large_gradient_neurons_slower_by_the_cube_root():
    assert rotation("adam_l2", grad_norm=8 * G) == pytest.approx(rotation("adam_l2") / 2, rel=ROUNDING)
    assert norm("adam_l2", grad_norm=8 * G) == pytest.approx(2 * norm("adam_l2"), rel=ROUNDING)


@pytest.mark.parametrize("rule", ["sgdm", "sgdw", "adamw", "lion", "nesterov"])
def test_distance_to_equilibrium_falls_by_e_within_the_equilibrium_time(rule):
    values = arguments(rule)
    settled, time = norm(rule) ** 2, equilibrium_time(rule, **values)
    power = 2 if rule in ("sgdm", "sgdw", "nesterov") else 1
    start = 9 * settled
    end = norm_trajectory(rule, start, time, **values)
    assert end**power - settled**power == pytest.approx((start**power - settled**power) / math.e, rel=1e-9)
    assert norm_trajectory(rule, settled, 1234.0, **values) == pytest.approx(settled, rel=ROUNDING)
    assert norm_trajectory(rule, start, 0.0, **values) == pytest.approx(start, rel=ROUNDING)
    assert norm_trajectory(rule, start, 100 * time, **values) == pytest.approx(settled, rel=1e-9)


def test_equilibrium_times_are_those_of_the_decay():
    assert equilibrium_time("adamw", lr=LR, weight_decay=DECAY) == pytest.approx(1 / (2 * LR * DECAY), rel=ROUNDING)
    sgdm = equilibrium_time("sgdm", lr=LR, weight_decay=DECAY, momentum=0.8)
    assert sgdm == pytest.approx(0.2 / (4 * LR * DECAY), rel=ROUNDING)
    assert equilibrium_time("sgdw", lr=LR, weight_decay=DECAY, momentum=0.8) == pytest.approx(5 * sgdm, rel=ROUNDING)


def test_adam_l2_relaxes_as_its_norm_balance_says():
    # d|w|^2/dt = eta^2 C - (2 eta lambda / sigma) |w|^3, linearised by a central difference
    sigma = G / math.sqrt(C)
    speed = lambda x: LR**2 * C - 2 * LR * DECAY / sigma * x**1.5  # noqa: E731
    settled, h = norm("adam_l2") ** 2, 1e-4
    assert speed(settled) == pytest.approx(0, abs=1e-12)
    slope = (speed(settled + h) - speed(settled - h)) / (2 * h)
    assert equilibrium_time("adam_l2", **arguments("adam_l2")) == pytest.approx(-1 / slope, rel=1e-5)


@pytest.mark.parametrize(
    ("build", "rule"),
    [
        (lambda p: torch.optim.SGD(p, LR, momentum=0.8, weight_decay=DECAY), "sgdm"),
        (lambda p: torch.optim.SGD(p, LR, momentum=0.8, weight_decay=DECAY, nesterov=True), "nesterov"),
        (lambda p: torch.optim.AdamW(p, LR, betas=(0.7, 0.9), weight_decay=DECAY), "adamw"),
        (lambda p: torch.optim.Adam(p, LR, betas=(0.7, 0.9), weight_decay=DECAY), "adam_l2"),
        (lambda p: torch.optim.NAdam(p, LR, (0.7, 0.9), weight_decay=DECAY, decoupled_weight_decay=True), "nadam"),
        (lambda p: Lion(p, LR, betas=(0.7, 0.9), weight_decay=DECAY), "lion"),
    ],
    ids=["sgd", "nesterov", "adamw", "adam", "nadam", "lion"],
)
def test_optimizers_and_their_groups_speak_for_themselves(build, rule):
    optimizer = build([nn.Parameter(torch.ones(3, 2))])
    needed = {"numel": C, "grad_norm": G}
    for source in (optimizer, optimizer.param_groups[0]):
        assert equilibrium_rotation(source, **needed) == rotation(rule)
        assert equilibrium_norm(source, **needed) == norm(rule)
        assert equilibrium_rotation(source, lr=LR / 4, **needed) == rotation(rule, lr=LR / 4)


def test_scheduled_learning_rates_are_read_at_the_moment_of_the_call():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], LR, betas=(0.7, 0.9), weight_decay=DECAY)
    optimizer.param_groups[0]["lr"] = LR / 9
    assert equilibrium_rotation(optimizer) == pytest.approx(rotation("adamw") / 3, rel=ROUNDING)


def test_decoupled_adam_is_adamw():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], LR, (0.7, 0.9), weight_decay=DECAY, decoupled_weight_decay=True)
    assert equilibrium_rotation(optimizer) == equilibrium_rotation(optimizer.param_groups[0]) == rotation("adamw")


def test_groups_that_disagree_are_refused_by_name():
    groups = [{"params": [nn.Parameter(torch.ones(2))], "weight_decay": d} for d in (0.0, 0.1)]
    with pytest.raises(ValueError, match=r"groups differ in weight_decay \(0.0, 0.1\)"):
        equilibrium_rotation(torch.optim.AdamW(groups, 0.1))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("exact", [False, True])
def test_tensors_give_elementwise_what_floats_give(rule, exact):
    lrs = torch.tensor([[0.01, 0.02, 0.05]], dtype=torch.float64)
    for function in (rotation, norm):
        together = function(rule, exact, lr=lrs)
        assert together.shape == lrs.shape
        apart = torch.tensor([[function(rule, exact, lr=lr) for lr in lrs[0].tolist()]], dtype=torch.float64)
        torch.testing.assert_close(together, apart, rtol=ROUNDING, atol=0)


def test_a_tensor_of_times_gives_a_trajectory():
    t = torch.arange(5, dtype=torch.float64)
    curve = norm_trajectory("sgdm", 4.0, t, **arguments("sgdm"))
    single = [norm_trajectory("sgdm", 4.0, step, **arguments("sgdm")) for step in t.tolist()]
    torch.testing.assert_close(curve, torch.tensor(single, dtype=torch.float64), rtol=ROUNDING, atol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("off", [{"lr": 0.0}, {"weight_decay": 0.0}], ids=["lr", "weight_decay"])
def test_without_decay_or_step_nothing_turns_and_no_norm_settles(rule, exact, off):
    assert rotation(rule, exact, **off) == 0
    with pytest.raises(ValueError, match=rf"{next(iter(off))}=0.0: must be > 0"):
        norm(rule, exact, **off)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lr": -0.1}, r"lr=-0.1: must be >= 0"),
        ({"lr": math.nan}, r"lr=nan"),
        ({"weight_decay": math.inf}, r"weight_decay=inf: must be >= 0 and finite"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0: must be >= 0 and < 1"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\]=-0.1"),
        ({"lr": torch.tensor([0.1, -1.0])}, r"lr=tensor"),
    ],
)
def test_values_out_of_range_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        rotation("adamw", **overrides)


@pytest.mark.parametrize(("rule", "limit"), [("sgdm", 3.6), ("sgdw", 2.0), ("adamw", 2.0), ("lion", 2.0)])
def test_the_exact_law_ends_where_the_walk_diverges(rule, limit):
    assert math.isfinite(norm(rule, exact=True, lr=1.0, weight_decay=limit * 0.999))
    with pytest.raises(ValueError, match=r"lr\*weight_decay=.*diverge"):
        rotation(rule, exact=True, lr=1.0, weight_decay=limit * 1.001)


def test_missing_and_unknown_things_are_named():
    with pytest.raises(ValueError, match=r"momentum=1\.5"):
        rotation("sgdm", momentum=1.5)
    with pytest.raises(ValueError, match="weight_decay: not given"):
        equilibrium_rotation("adamw", lr=0.1)
    with pytest.raises(ValueError, match="numel=None"):
        equilibrium_norm("adamw", lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="grad_norm=None"):
        equilibrium_norm("sgdm", lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="optimizer='adagrad': allowed are sgd, "):
        equilibrium_rotation("adagrad", lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="optimizer=LAMB: no formula"):
        rule_of(LAMB([nn.Parameter(torch.ones(2))]))
    with pytest.raises(ValueError, match="keys"):
        rule_of({"params": [], "lr": 0.1})
    with pytest.raises(ValueError, match="no closed form"):
        norm_trajectory("adam_l2", 1.0, 1.0, **arguments("adam_l2"))
