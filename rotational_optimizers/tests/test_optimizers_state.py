"""RotationalAdamW, RotationalSGD and RotationalLion: state, groups, odd gradients, and every way a step can be run."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from rotational_optimizers.adamw import RotationalAdamW
from rotational_optimizers.lion import RotationalLion
from rotational_optimizers.sgd import RotationalSGD
from rotational_optimizers.tests.steps import CLASSES, FORMS, options, parameters, tensor, walk

torch.set_num_threads(1)


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
