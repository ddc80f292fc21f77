"""RotationalAdamW, RotationalSGD and RotationalLion: trajectories, and what the settings mean."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from rotational_optimizers.adamw import RotationalAdamW
from rotational_optimizers.equilibrium import equilibrium_rotation
from rotational_optimizers.lion import RotationalLion
from rotational_optimizers.relatives import Lion
from rotational_optimizers.sgd import RotationalSGD
from rotational_optimizers.tests.steps import CLASSES, FORMS, SHAPES, options, parameters, tensor, walk

torch.set_num_threads(1)

# -- the algorithm in float64 numpy, one direction function an optimizer


def adamw_direction(state, g, t, x, b1=0.9, b2=0.999, eps=1e-8, l2=0.0):
    state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0) + (1 - b2) * (g + l2 * x) ** 2
    return (state["m"] / (1 - b1**t)) / (np.sqrt(state["v"] / (1 - b2**t)) + eps)


def sgd_direction(state, g, t, x, alpha=0.0, nesterov=False, dampening=0.0):
    state["b"] = g if t == 1 else alpha * state["b"] + (1 - dampening) * g
    if alpha == 0:
        return g
    return g + alpha * state["b"] if nesterov else state["b"]


def lion_direction(state, g, t, x, b1=0.9, b2=0.99):
    m = state.get("m", np.zeros_like(g))
    state["m"] = b2 * m + (1 - b2) * g
    return np.sign(b1 * m + (1 - b1) * g)


RULES = {
    "adamw": (RotationalAdamW, {}, adamw_direction, {}, math.sqrt(2 * 1e-3 * 0.1 / 1.9)),
    "adamw betas": (
        RotationalAdamW, {"betas": (0.5, 0.8), "eps": 1e-2}, adamw_direction, {"b1": 0.5, "b2": 0.8, "eps": 1e-2},
        math.sqrt(2 * 1e-3 * 0.5 / 1.5),
    ),
    "adam l2 forced": (
        RotationalAdamW, {"second_moment_l2": 0.3}, adamw_direction, {"l2": 0.3}, math.sqrt(2 * 1e-3 * 0.1 / 1.9),
    ),
    "sgd": (RotationalSGD, {}, sgd_direction, {}, math.sqrt(2 * 1e-3)),
    "sgdm": (RotationalSGD, {"momentum": 0.9}, sgd_direction, {"alpha": 0.9}, math.sqrt(2 * 1e-3 / 1.9)),
    "sgdm dampened": (
        RotationalSGD, {"momentum": 0.9, "dampening": 0.5}, sgd_direction, {"alpha": 0.9, "dampening": 0.5},
        math.sqrt(2 * 1e-3 * 0.5 / 1.9),
    ),
    "sgdw": (
        RotationalSGD, {"momentum": 0.9, "decoupled": True}, sgd_direction, {"alpha": 0.9},
        math.sqrt(2 * 1e-3 * 0.1 / 1.9),
    ),
    "nesterov": (
        RotationalSGD, {"momentum": 0.9, "nesterov": True}, sgd_direction, {"alpha": 0.9, "nesterov": True},
        math.sqrt(2 * 1e-3 * 0.1 * (1 + 1.8 + 0.81 / (1 - 0.81))),
    ),
    "lion": (
        RotationalLion, {}, lion_direction, {}, math.sqrt(math.pi * 1e-3 * (0.01 + 0.81 * 0.01 / 1.99)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS[:2] + FORMS[3:], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_trajectory_is_that_of_the_formulas(rule, form):
    cls, kwargs, direction, constants, eta = RULES[rule]
    param = nn.Parameter(tensor(5, 7))
    optimizer = cls([param], lr=1e-2, weight_decay=0.1, **kwargs, **form)
    x = param.detach().numpy().copy()
    np.testing.assert_allclose(x.mean(1), 0, atol=1e-15)
    norm, u, state = np.linalg.norm(x, axis=1, keepdims=True), 0.0, {}
    for t in range(1, 8):
        param.grad = tensor(5, 7, seed=t) * 2.0**t
        optimizer.step()
        d = direction(state, (tensor(5, 7, seed=t) * 2.0**t).numpy(), t, x, **constants)
        d = d - d.mean(1, keepdims=True)
        d = d - x * (d * x).sum(1, keepdims=True) / norm**2
        u = 0.9 * u + 0.1 * (d**2).sum(1, keepdims=True)
        x = x - eta * norm * d / np.sqrt(u / (1 - 0.9**t))
        x = x * norm / np.linalg.norm(x, axis=1, keepdims=True)
        np.testing.assert_allclose(param.detach().numpy(), x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_other_parameters_follow_torch_bit_for_bit(flags, maximize, nesterov):
    shapes = ((7,), (4, 3), (2, 3, 4))
    for ours, torchs, extra in (
        (RotationalAdamW, torch.optim.AdamW, {"betas": (0.8, 0.95)}),
        (RotationalSGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": nesterov}),
        (RotationalSGD, torch.optim.SGD, {}),
    ):
        a, b = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
        keys = {"lr": 0.02, "weight_decay": 0.3, "maximize": maximize, **flags, **extra}
        walk(ours(a, rotational=False, **keys), a, 6)
        walk(torchs(b, **keys), b, 6)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_other_parameters_of_lion_follow_lion_bit_for_bit():
    a, b = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    walk(RotationalLion(a, 0.01, weight_decay=0.3, rotational=False), a, 6)
    walk(Lion(b, 0.01, weight_decay=0.3), b, 6)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_decoupled_decay_of_other_parameters_shrinks_them_outside_the_gradient():
    a, b = parameters(), parameters()
    walk(RotationalSGD(a, 0.01, 0.9, 0.3, decoupled=True, rotational=False), a, 5)
    optimizer = torch.optim.SGD(b, 0.01, 0.9)
    for t in range(1, 6):
        with torch.no_grad():
            torch._foreach_mul_(b, 1 - 0.01 * 0.3)
        walk(optimizer, b, 1, t)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("cls", CLASSES)
def test_by_default_decayed_tensors_of_two_axes_rotate_and_no_others(cls):
    weight, bias, free = parameters(((3, 5), (5,), (3, 5)))
    norm = weight.detach().norm(dim=1)
    optimizer = cls([{"params": [weight, bias]}, {"params": [free], "weight_decay": 0.0}], **options(cls))
    walk(optimizer, [weight, bias, free], 3)
    assert ["norm" in optimizer.state[p] for p in (weight, bias, free)] == [True, False, False]
    torch.testing.assert_close(weight.detach().norm(dim=1), norm)
    assert optimizer.state[weight]["norm"].shape == optimizer.state[weight]["update_norm_sq"].shape == (3,)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_lr_times_decay_is_all_that_matters_to_rotational_tensors(cls, form):
    form = {**form, "capturable": False} if "capturable" in form else form
    results = []
    for c in (1.0, 8.0):
        params = parameters(dtype=torch.float32)
        keys = options(cls) | {"lr": 0.01 * c, "weight_decay": 0.1 / c}
        walk(cls(params, **keys, **form), params, 5)
        results.append(params)
    *rotational, bias = zip(*results, strict=True)
    for x, y in rotational:
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(*bias, rtol=1e-3)


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_learning_rate_of_zero_changes_no_bit(cls, form):
    params = parameters(dtype=torch.float32)
    optimizer = cls(params, **options(cls) | {"lr": 0.0}, **form)
    before = [p.detach().clone() for p in params]
    walk(optimizer, params, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("cls", CLASSES)
def test_fourfold_decay_doubles_the_tangent_of_the_first_turn(cls):
    tangents = []
    for factor in (1, 4):
        param = nn.Parameter(tensor(5, 30))
        optimizer = cls([param], **options(cls) | {"weight_decay": 0.1 * factor}, update_norm_decay=0.0)
        before = param.detach().clone()
        walk(optimizer, [param], 1)
        cosine = (before * param).sum(1) / before.norm(dim=1) ** 2
        tangents.append((1 / cosine**2 - 1).sqrt())
    torch.testing.assert_close(2 * tangents[0], tangents[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
@pytest.mark.parametrize("cls", [RotationalSGD, RotationalLion])
def test_the_size_of_the_gradient_does_not_matter(cls, form):
    results = []
    for scale in (1.0, 2.0**-40):
        params = parameters(SHAPES[:3], torch.float32)
        walk(cls(params, **options(cls), **form), params, 5, scale=scale)
        results.append(params)
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_rotation_may_be_a_mode_a_number_or_a_function_and_follows_the_schedule():
    param = nn.Parameter(tensor(4, 50))

    def turned(**kwargs) -> float:
        optimizer = RotationalSGD([param], momentum=0.9, nesterov=True, update_norm_decay=0.0, **kwargs)
        before = param.detach().clone()
        walk(optimizer, [param], 1)
        chord = (before - param.detach()).norm(dim=1) / before.norm(dim=1)
        return math.tan(2 * math.asin(chord.max().item() / 2))

    keys = {"lr": 0.1, "weight_decay": 0.5}
    rule = {**keys, "momentum": 0.9}
    ours, exact = (equilibrium_rotation("nesterov", exact=flag, **rule) for flag in (False, True))
    assert turned(**keys) == pytest.approx(ours, rel=1e-6)
    assert turned(**keys, rotation="exact") == pytest.approx(exact, rel=1e-6)
    # the official code's heavy-ball value is too slow by sqrt((1 + a)(1 - a) S)
    slow = math.sqrt(1.9 * 0.1 * (1 + 1.8 + 0.81 / 0.19))
    assert turned(**keys, rotation="paper") == pytest.approx(ours / slow, rel=1e-6)
    assert turned(**keys, rotation=0.02) == pytest.approx(0.02, rel=1e-6)
    assert turned(**keys, rotation=lambda group: 0.3 * group["lr"]) == pytest.approx(0.03, rel=1e-6)
    assert turned(lr=torch.tensor(0.1), weight_decay=0.5) == pytest.approx(ours, rel=1e-6)
    assert turned(lr=0.1, weight_decay=0.0, rotational=True, rotation=0.02) == pytest.approx(0.02, rel=1e-6)


@pytest.mark.parametrize("cls", CLASSES)
def test_schedulers_act_through_the_square_root(cls):
    param = nn.Parameter(tensor(4, 50))
    optimizer = cls([param], **options(cls), update_norm_decay=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.25)
    turned = []
    for t in (1, 2, 3):
        before = param.detach().clone()
        walk(optimizer, [param], 1, t)
        scheduler.step()
        turned.append(((before - param.detach()).norm(dim=1) / before.norm(dim=1)).mean().item())
    assert turned[0] / turned[1] == pytest.approx(2, rel=1e-2)
    assert turned[1] / turned[2] == pytest.approx(2, rel=1e-2)


def test_in_equilibrium_of_the_random_walk_the_plain_optimizer_turns_as_fast_as_the_rotational_one():
    eta = math.sqrt(2 * 0.01 * 0.1 / 1.9)
    weight = nn.Parameter(tensor(64, 32))
    optimizer, turned = RotationalSGD([weight], 0.01, 0.9, 0.1, zero_mean=False), []
    for t in range(300):
        before = weight.detach().clone()
        g = tensor(64, 32, seed=t)
        weight.grad = g - before * (g * before).sum(1, keepdim=True) / before.square().sum(1, keepdim=True)
        optimizer.step()
        turned.append(((before - weight.detach()).norm(dim=1) / before.norm(dim=1)).square().mean())
    assert torch.stack(turned[50:]).mean().sqrt().item() == pytest.approx(eta, rel=0.02)


@pytest.mark.parametrize("cls", CLASSES)
def test_convolutions_in_any_layout_are_their_rows(cls):
    shape = (6, 4, 3, 3)
    plain, rows = nn.Parameter(tensor(*shape)), nn.Parameter(tensor(*shape).flatten(1))
    last = nn.Parameter(tensor(*shape).to(memory_format=torch.channels_last))
    transposed = nn.Parameter(tensor(*shape).transpose(0, 1).contiguous())
    runs = [(plain, 0), (rows, 0), (last, 0), (transposed, 1)]
    for param, axis in runs:
        optimizer = cls([param], **options(cls), neuron_dim=axis)
        for t in range(1, 5):
            g = tensor(*shape, seed=t)
            param.grad = {1: g.transpose(0, 1)}.get(axis, g).reshape(param.shape)
            optimizer.step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    for other in (rows.view(shape), last, transposed.transpose(0, 1)):
        torch.testing.assert_close(plain, other, rtol=1e-9, atol=1e-12)


def test_expanded_and_strided_gradients_are_read_right():
    a, b = nn.Parameter(tensor(3, 6)), nn.Parameter(tensor(3, 6))
    grads = (tensor(3, 1).expand(3, 6) * 1.0 + tensor(6, 3, seed=4).t(), tensor(6, 3, seed=5).t())
    for param, convert in ((a, torch.clone), (b, lambda g: g.contiguous())):
        optimizer = RotationalSGD([param], 0.1, 0.9, 0.1)
        for g in grads:
            param.grad = convert(g)
            optimizer.step()
    assert torch.equal(a, b)
