"""Lion and the kin of the rotational variants: one battery for all of what an optimizer must stand."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from rotational_optimizers.relatives import LAMB, AdamP, Hyperball, Lion, Nero, UpdateFloor
from rotational_optimizers.tests.kin import ADAM, ADAM_KIN, F64, OPTIMIZERS, adam_directions, gradients, start

torch.set_num_threads(1)


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3))
    return model, torch.randn(16, 2, 7), torch.randint(3, (16,))


def train(model, optimizer, x, y, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learns_a_small_network(name):
    model, x, y = model_and_data()
    losses = train(model, OPTIMIZERS[name](model.parameters(), lr=0.03), x, y, 80)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_from_a_safe_state_dict_is_bit_exact(name):
    model, x, y = model_and_data()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, x, y, 3)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    train(model, optimizer, x, y, 3)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other, _, _ = model_and_data()
    other.load_state_dict(state["model"])
    resumed = OPTIMIZERS[name](other.parameters())
    resumed.load_state_dict(state["optimizer"])
    train(other, resumed, x, y, 3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closure_is_called_once_with_gradients_and_its_value_returned(name):
    p = nn.Parameter(start((3, 4)))
    optimizer, calls = OPTIMIZERS[name]([p]), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    value = p.detach().square().sum()
    torch.testing.assert_close(optimizer.step(closure).detach(), value)
    assert calls == [True]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_learning_rate_changes_nothing(name):
    w = start((5, 7))
    w = w - w.mean(1, keepdim=True)  # nero centres at its first step
    p = nn.Parameter(w.clone())
    optimizer = OPTIMIZERS[name]([p], lr=0.0)
    p.grad = gradients((5, 7))[0]
    optimizer.step()
    torch.testing.assert_close(p.detach(), w, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_rows_zero_gradients_and_missing_gradients_do_no_harm(name):
    w = start((4, 6))
    w[1] = 0
    p, idle = nn.Parameter(w.clone()), nn.Parameter(start((3, 2)))
    optimizer = OPTIMIZERS[name]([p, idle])
    g = gradients((4, 6))[0]
    g[2] = 0
    for grad in (torch.zeros_like(g), g):
        p.grad = grad.clone()
        optimizer.step()
    assert torch.isfinite(p).all()
    assert torch.equal(idle, start((3, 2)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_mixed_dtypes_in_one_group_step_as_if_alone(name):
    grads = gradients((5, 7), 3)
    together = [nn.Parameter(start((5, 7)).to(dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    optimizer = OPTIMIZERS[name](together)
    for g in grads:
        for p in together:
            p.grad = g.to(p.dtype)
        optimizer.step()
    for p in together:
        alone = nn.Parameter(start((5, 7)).to(p.dtype))
        single = OPTIMIZERS[name]([alone])
        for g in grads:
            alone.grad = g.to(p.dtype)
            single.step()
        assert torch.equal(p, alone)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_schedulers_act_on_the_groups_and_groups_may_be_added(name):
    first, second = nn.Parameter(start((3, 4))), nn.Parameter(start((3, 4)))
    optimizer = OPTIMIZERS[name]([first])
    optimizer.add_param_group({"params": [second], "lr": 0.0})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    before = second.detach() - second.detach().mean(1, keepdim=True) if name == "nero" else second.detach().clone()
    for p in (first, second):
        p.grad = gradients((3, 4))[0]
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.defaults["lr"] / 2
    torch.testing.assert_close(second.detach(), before, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_survives_a_deep_copy(name):
    p = nn.Parameter(start((3, 4)))
    optimizer = OPTIMIZERS[name]([p])
    p.grad = gradients((3, 4))[0]
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    optimizer.step()
    twin.param_groups[0]["params"][0].grad = p.grad.clone()
    twin.step()
    assert torch.equal(twin.param_groups[0]["params"][0], p)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparse_gradients_are_refused(name):
    p = nn.Parameter(start((3, 4)))
    p.grad = torch.zeros(3, 4, dtype=F64).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        OPTIMIZERS[name]([p]).step()


RANGES = [(name, "lr", -0.1) for name in OPTIMIZERS]
RANGES += [(name, "weight_decay", -1.0) for name in OPTIMIZERS if name != "nero"]
RANGES += [(name, "betas", (0.9, 1.0)) for name in OPTIMIZERS if name != "nero"]
RANGES += [(name, "eps", math.nan) for name in ADAM_KIN]
RANGES += [("adamp", "delta", -1.0), ("adamp", "decay_ratio", 1.5)]
RANGES += [("update_floor", "floor", -1.0), ("nero", "beta", 1.0)]


@pytest.mark.parametrize(("name", "key", "value"), RANGES)
def test_values_out_of_range_are_named_in_constructor_and_groups(name, key, value):
    p = nn.Parameter(start((3, 4)))
    allowed = r"in \[0, 1\]$" if key == "decay_ratio" else r"(in \[0, 1\)|>= 0 and finite)$"
    with pytest.raises(ValueError, match=rf"^{key}=.*must be {allowed}"):
        OPTIMIZERS[name]([p], **{key: value})
    optimizer = OPTIMIZERS[name]([p])
    with pytest.raises(ValueError, match=rf"^{key}=.*must be"):
        optimizer.add_param_group({"params": [nn.Parameter(start((2, 2)))], key: value})
    assert len(optimizer.param_groups) == 1


def test_lamb_leaves_a_zero_tensor_by_ratio_one():
    grads = gradients((3, 4), 1)
    p = nn.Parameter(torch.zeros(3, 4, dtype=F64))
    p.grad = grads[0].clone()
    LAMB([p], **ADAM).step()
    torch.testing.assert_close(p.detach(), -0.03 * next(adam_directions(grads)), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("kind", "defaults"),
    [
        (Lion, {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0}),
        (Hyperball, {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "per_neuron": False}),
        (UpdateFloor, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "floor": 1.0}),
        (AdamP, {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0, "delta": 0.1, "decay_ratio": 0.1}),
        (LAMB, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0}),
        (Nero, {"lr": 1e-2, "beta": 0.999}),
    ],
)
def test_default_values_stay_the_published_ones(kind, defaults):
    found = kind([nn.Parameter(start((2, 2)))]).defaults
    assert {key: found[key] for key in defaults} == defaults


def test_projected_weight_decay_ratio_may_be_one():
    AdamP([nn.Parameter(start((2, 2)))], decay_ratio=1)
