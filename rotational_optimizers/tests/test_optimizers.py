"""RotationalAdamW, RotationalSGD and RotationalLion: trajectories, groups, state, and every way a step can be run."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from rotational_optimizers.adamw import RotationalAdamW
from rotational_optimizers.equilibrium import equilibrium_rotation
from rotational_optimizers.lion import RotationalLion
from rotational_optimizers.relatives import Lion
from rotational_optimizers.sgd import RotationalSGD

torch.set_num_threads(1)
CLASSES = [RotationalAdamW, RotationalSGD, RotationalLion]
FORMS = [{"foreach": False}, {"foreach": True}, {"fused": True}, {"capturable": True}]
SHAPES = ((6, 20), (5, 2, 3), (4, 70), (6,))


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parameters(shapes=SHAPES, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(tensor(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]


def walk(optimizer, params, steps: int, first: int = 1, scale: float = 1.0) -> None:
    """Steps on fixed random gradients; step number t always sees the same ones."""
    for t in range(first, first + steps):
        for i, param in enumerate(params):
            param.grad = scale * tensor(*param.shape, seed=1000 * t + i, dtype=param.dtype)
        optimizer.step()


def options(cls) -> dict:
    return {"lr": 1e-2, "weight_decay": 0.1} | ({"momentum": 0.9} if cls is RotationalSGD else {})


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


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_resuming_from_a_checkpoint_is_bit_exact(cls, form):
    def make(params):
        return cls(params, **options(cls), **form, neuron_speed=lambda p: torch.linspace(0.5, 2, p.shape[0]))

    straight, resumed = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
    walk(make(straight), straight, 8)
    first = make(resumed)
    walk(first, resumed, 3)
    file = io.BytesIO()
    torch.save({"weights": list(resumed), "optimizer": first.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again = [nn.Parameter(weight.detach().clone()) for weight in loaded["weights"]]
    second = make(again)
    assert all(torch.equal(x, y) for x, y in zip(again, resumed, strict=True))
    second.load_state_dict(loaded["optimizer"])
    walk(second, again, 5, 4)
    assert all(torch.equal(x, y) for x, y in zip(again, straight, strict=True))


@pytest.mark.parametrize("master_copy", [False, True])
def test_low_precision_state_survives_a_checkpoint_in_float32(master_copy):
    def make(params):
        return RotationalAdamW(params, 1e-2, weight_decay=0.1, master_copy=master_copy)

    straight, again = parameters(dtype=torch.bfloat16), parameters(dtype=torch.bfloat16)
    walk(make(straight), straight, 6)
    first = make(again)
    walk(first, again, 3)
    second = make(again)
    second.load_state_dict(first.state_dict())
    assert second.state[again[0]]["norm"].dtype == torch.float32
    walk(second, again, 3, 4)
    assert all(torch.equal(x, y) for x, y in zip(again, straight, strict=True))


def test_a_master_copy_keeps_small_rotations_that_bfloat16_would_lose():
    """100 steps of one direction: 100 x 1e-3 radians, each of them a fraction of a bfloat16 rounding."""
    turned = {}
    for master_copy in (False, True):
        param = nn.Parameter(tensor(20, 100, dtype=torch.bfloat16))
        keys = {"rotation": 1e-3, "rotational": True, "update_norm_decay": 0.0}
        optimizer = RotationalSGD([param], master_copy=master_copy, **keys)
        before = param.detach().double()
        for _ in range(100):
            param.grad = tensor(20, 100, seed=1, dtype=torch.bfloat16)
            optimizer.step()
        chord = (before - param.detach().double()).norm(dim=1) / before.norm(dim=1)
        turned[master_copy] = 2 * torch.asin(chord / 2).mean().item()
    assert turned[True] == pytest.approx(0.1, rel=0.05)
    assert turned[False] < 0.07


@pytest.mark.parametrize("cls", CLASSES)
def test_state_is_that_of_the_base_and_two_values_a_row(cls):
    param = nn.Parameter(tensor(8, 30, dtype=torch.float32))
    optimizer = cls([param], **options(cls))
    walk(optimizer, [param], 1)
    full = {RotationalAdamW: 2, RotationalSGD: 1, RotationalLion: 1}[cls]
    assert sum(v.numel() for v in optimizer.state[param].values()) == full * param.numel() + 2 * 8 + 1


def test_every_key_is_read_from_its_group():
    changes = {
        "lr": 0.5, "betas": (0.1, 0.2), "eps": 1.0, "weight_decay": 2.0, "rotation": 0.3, "update_norm_decay": 0.0,
        "per_neuron": False, "zero_mean": False, "rotational": False, "neuron_dim": 1, "second_moment_l2": 1.0,
        "neuron_speed": lambda p: torch.arange(p.shape[0]) + 1.0, "maximize": True,
    }  # fmt: skip
    base = nn.Parameter(tensor(4, 6))
    default = {"lr": 0.05, "weight_decay": 0.1}
    walk(RotationalAdamW([base], **default), [base], 3)
    for key, value in changes.items():
        one, other = nn.Parameter(tensor(4, 6)), nn.Parameter(tensor(4, 6))
        optimizer = RotationalAdamW([{"params": [one]}, {"params": [other], key: value}], **default)
        for t in range(1, 4):
            one.grad = other.grad = tensor(4, 6, seed=1000 * t)
            optimizer.step()
        assert torch.equal(one, base), key
        assert not torch.allclose(other, base, rtol=1e-3), key


def test_groups_added_later_are_centred_by_their_own_key():
    first, centred, free = parameters(((3, 8), (3, 8), (3, 8)))
    optimizer = RotationalSGD([first], 0.1, 0.9, 0.1)
    with torch.no_grad():
        centred += 1
        free += 1
    before = free.detach().clone()
    optimizer.add_param_group({"params": [centred]})
    optimizer.add_param_group({"params": [free], "zero_mean": False})
    assert (centred.mean(1).abs() < 1e-15).all()
    assert torch.equal(free, before)
    walk(optimizer, [first, centred, free], 3)
    assert (centred.mean(1).abs() < 1e-14).all()
    assert (free.mean(1).abs() > 0.1).all()


def test_weights_loaded_after_construction_keep_their_norm():
    param = nn.Parameter(tensor(4, 30))
    optimizer = RotationalSGD([param], 0.1, 0.9, 0.1)
    with torch.no_grad():
        param.copy_(tensor(4, 30, seed=9) + 3)
    norm = param.detach().norm(dim=1)
    walk(optimizer, [param], 1)
    torch.testing.assert_close(param.detach().norm(dim=1), norm, rtol=1e-12, atol=0)
    assert (param.mean(1).abs() < 1e-14).all()


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_row_with_a_non_finite_gradient_stays_and_its_moments_stay_finite(cls, form):
    for bad in (math.nan, math.inf, -math.inf):
        hit, spared = (nn.Parameter(tensor(5, 40, dtype=torch.float32)) for _ in range(2))
        runs = []
        for param in (hit, spared):
            optimizer = cls([param], **options(cls), **form)
            walk(optimizer, [param], 2)
            runs.append(optimizer)
        before = {k: v.clone() for k, v in runs[0].state[hit].items()} | {"weight": hit.detach().clone()}
        g = tensor(5, 40, seed=77, dtype=torch.float32)
        hit.grad, spared.grad = g.clone(), g.clone()
        hit.grad[2, 7] = bad
        for optimizer in runs:
            optimizer.step()
        assert torch.equal(hit[2], before["weight"][2])
        others, news = [0, 1, 3, 4], torch.isfinite(hit.grad)
        torch.testing.assert_close(hit[others], spared[others], rtol=1e-6, atol=1e-7)
        for name in {"exp_avg", "exp_avg_sq", "momentum_buffer"} & set(before):
            expected = torch.where(news, runs[1].state[spared][name], before[name])
            torch.testing.assert_close(runs[0].state[hit][name], expected, rtol=1e-6, atol=1e-7)
        assert runs[0].state[hit]["update_norm_sq"][2] == before["update_norm_sq"][2]
        walk(runs[0], [hit], 2, 4)
        assert torch.isfinite(hit).all()
        assert not torch.equal(hit[2], before["weight"][2])


def test_parameters_without_gradient_and_empty_groups_are_passed_over():
    used, unused = parameters(((3, 5), (3, 5)))
    optimizer = RotationalAdamW([{"params": [used, unused]}, {"params": []}], weight_decay=0.1)
    before = unused.detach().clone()
    walk(optimizer, [used], 2)
    assert torch.equal(unused, before)
    assert unused not in optimizer.state
    empty = nn.Parameter(torch.zeros(0, 5))
    empty.grad = torch.zeros(0, 5)
    for form in FORMS[:3]:
        RotationalAdamW([empty], weight_decay=0.1, **form).step()


def test_a_closure_is_run_with_gradients_and_its_loss_returned():
    param = nn.Parameter(tensor(3, 5))
    optimizer = RotationalSGD([param], 0.1, weight_decay=0.1)
    target = tensor(3, 5, seed=3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = ((param / param.norm(dim=1, keepdim=True) - target) ** 2).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert optimizer.step() is None


def test_mixed_dtypes_in_one_group_take_every_form_of_the_step():
    for form in ({}, *FORMS[:3]):
        params = [nn.Parameter(tensor(4, 30, seed=1, dtype=d)) for d in (torch.float64, torch.float32, torch.bfloat16)]
        optimizer = RotationalAdamW(params, 1e-2, weight_decay=0.1, **form)
        for t in range(1, 4):
            for p in params:
                p.grad = tensor(4, 30, seed=t, dtype=p.dtype)
            optimizer.step()
        torch.testing.assert_close(params[0].float(), params[1].detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(params[0].bfloat16(), params[2].detach(), rtol=0.05, atol=0.02)


def test_grad_scaler_skips_an_overflow_and_otherwise_changes_nothing():
    scaled, plain = parameters(((4, 6),), torch.float32), parameters(((4, 6),), torch.float32)
    a, b = (RotationalAdamW(p, 1e-2, weight_decay=0.1) for p in (scaled, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(1, 4):
        x = tensor(4, 6, seed=t, dtype=torch.float32)
        a.zero_grad()
        scaler.scale((scaled[0] * x).sum()).backward()
        if t == 2:
            scaled[0].grad[0, 0] = math.inf
        scaler.step(a)
        scaler.update()
        if t != 2:
            plain[0].grad = x.clone()
            b.step()
    torch.testing.assert_close(scaled[0], plain[0], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "backend"), [(RotationalAdamW, "inductor"), (RotationalSGD, "aot_eager"), (RotationalLion, "aot_eager")]
)
def test_a_compiled_step_equals_the_eager_one_under_a_schedule(cls, backend):
    shapes = ((6, 20), (6,))
    eager, compiled = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    a, b = cls(eager, **options(cls), foreach=False), cls(compiled, **options(cls))
    fast = torch.compile(b.step, backend=backend)
    for t in range(1, 6):
        for group in (*a.param_groups, *b.param_groups):
            group["lr"] = 1e-2 / t
        for x, y, i in zip(eager, compiled, range(2), strict=True):
            x.grad = y.grad = tensor(*x.shape, seed=10 * t + i, dtype=torch.float32)
        a.step()
        fast()
    for x, y in zip(eager, compiled, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_like_the_original(make):
    params = parameters(dtype=torch.float32)
    optimizer = RotationalLion(params, 1e-3, weight_decay=1.0)
    walk(optimizer, params, 2)
    twin = make(optimizer)
    walk(optimizer, params, 2, 3)
    copies = twin.param_groups[0]["params"]
    walk(twin, copies, 2, 3)
    assert all(torch.equal(x, y) for x, y in zip(params, copies, strict=True))


def test_maximize_climbs_along_the_same_path():
    for cls in CLASSES:
        for form in FORMS[:3]:
            down, up = parameters(dtype=torch.float32), parameters(dtype=torch.float32)
            walk(cls(down, **options(cls), **form), down, 3)
            walk(cls(up, **options(cls), **form, maximize=True), up, 3, scale=-1.0)
            for x, y in zip(down, up, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_rows_without_gradient_turn_on_stale_momentum_until_it_dies_out():
    """As in the paper's code: f = .9 is slower than AdamW's momentum squared, so rare rows come to rest."""
    param = nn.Parameter(tensor(2, 40))
    optimizer = RotationalAdamW([param], 1e-2, weight_decay=1.0)
    walk(optimizer, [param], 10)
    turned = []
    for _ in range(80):
        before = param.detach().clone()
        param.grad = torch.zeros_like(param)
        optimizer.step()
        turned.append(((before - param.detach()).norm(dim=1) / before.norm(dim=1)).mean().item())
    assert turned[0] > 0.01
    assert turned[-1] < 0.05 * turned[0]
