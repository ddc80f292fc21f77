"""Lion and the kin of the rotational variants: each against its own equation, and one battery for all."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from rotational_optimizers.relatives import LAMB, AdamP, Hyperball, Lion, Nero, UpdateFloor

torch.set_num_threads(1)
F64 = torch.float64
ADAM = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-6}
OPTIMIZERS = {
    "lion": lambda p, **k: Lion(p, **{"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.1, **k}),
    "hyperball": lambda p, **k: Hyperball(p, **{**ADAM, "weight_decay": 0.1, **k}),
    "hyperball_rows": lambda p, **k: Hyperball(p, **{**ADAM, "weight_decay": 0.1, "per_neuron": True, **k}),
    "update_floor": lambda p, **k: UpdateFloor(p, **{**ADAM, "weight_decay": 0.1, **k}),
    "adamp": lambda p, **k: AdamP(p, **{**ADAM, "weight_decay": 0.1, **k}),
    "lamb": lambda p, **k: LAMB(p, **{**ADAM, "weight_decay": 0.1, **k}),
    "nero": lambda p, **k: Nero(p, **{"lr": 0.01, "beta": 0.9, **k}),
}
ADAM_KIN = ("hyperball", "hyperball_rows", "update_floor", "adamp", "lamb")


def gradients(shape, steps=6, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [scale * torch.randn(shape, generator=generator, dtype=F64) for _ in range(steps)]


def start(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)


def drive(build, shape, grads, group=None):
    """The parameter after the given gradients."""
    p = nn.Parameter(start(shape))
    optimizer = build([{"params": [p], **(group or {})}])
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def adam_directions(grads, beta1=0.8, beta2=0.9, eps=1e-6):
    m = v = torch.zeros_like(grads[0])
    for t, g in enumerate(grads, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        yield m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)


def rows(x):
    return x.flatten(1)


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


def lion_equation(w, grads):
    m = torch.zeros_like(w)
    for g in grads:
        w = (1 - 0.01 * 0.1) * w - 0.01 * torch.sign(0.8 * m + 0.2 * g)
        m = 0.9 * m + 0.1 * g
    return w


def hyperball_equation(w, grads):
    norm = w.norm()
    for u in adam_directions(grads):
        w = w - 0.03 * norm * u / u.norm()
        w = norm * w / w.norm()
    return w


def hyperball_rows_equation(w, grads):
    norm, shape = rows(w).norm(dim=1, keepdim=True), w.shape
    w = rows(w)
    for u in adam_directions(grads):
        w = norm * unit(w - 0.03 * norm * unit(rows(u)))
    return w.view(shape)


def update_floor_equation(w, grads):
    shape, w = w.shape, rows(w)
    for u in adam_directions(grads):
        ratio = w.norm(dim=1, keepdim=True) / rows(u).norm(dim=1, keepdim=True)
        w = (1 - 0.03 * 0.1) * w - 0.03 * rows(u) * torch.clamp(ratio, min=1)
    return w.view(shape)


def lamb_equation(w, grads):
    for u in adam_directions(grads):
        r = u + 0.1 * w
        w = w - 0.03 * w.norm() / r.norm() * r
    return w


def nero_equation(w, grads):
    shape, w = w.shape, rows(w)
    w = w - w.mean(1, keepdim=True)
    norm, v = w.norm(dim=1, keepdim=True), torch.zeros(len(w), 1, dtype=F64)
    for t, g in enumerate(grads, 1):
        v = 0.9 * v + 0.1 * rows(g).square().sum(1, keepdim=True)
        w = w - 0.01 * norm * rows(g) / (v / (1 - 0.9**t)).sqrt()
        w = norm * unit(w - w.mean(1, keepdim=True))
    return w.view(shape)


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 2)], ids=str)
@pytest.mark.parametrize(
    ("name", "equation"),
    [
        ("lion", lion_equation),
        ("hyperball", hyperball_equation),
        ("hyperball_rows", hyperball_rows_equation),
        ("update_floor", update_floor_equation),
        ("lamb", lamb_equation),
        ("nero", nero_equation),
    ],
)
def test_trajectory_is_the_equation_in_the_docstring(name, equation, shape):
    grads = gradients(shape)
    expected = equation(start(shape), grads)
    torch.testing.assert_close(drive(OPTIMIZERS[name], shape, grads), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", [*ADAM_KIN, "lion"])
@pytest.mark.parametrize("group", [{"rotational": False}, None], ids=["not rotational", "one axis"])
def test_other_parameters_follow_adamw_or_lion(name, group):
    shape = (5, 7) if group else (5,)
    grads, decay = gradients(shape), 0.0 if name == "lamb" else 0.1
    adamw = drive(lambda p: torch.optim.AdamW(p, **ADAM, weight_decay=decay), shape, grads)
    expected = lion_equation(start(shape), grads) if name == "lion" else adamw
    found = drive(lambda p: OPTIMIZERS[name](p, weight_decay=decay), shape, grads, group)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_lamb_without_trust_ratio_adds_the_decay_to_the_update():
    w = start((5,))
    for u in adam_directions(gradients((5,))):
        w = w - 0.03 * (u + 0.1 * w)
    torch.testing.assert_close(drive(OPTIMIZERS["lamb"], (5,), gradients((5,))), w, rtol=1e-11, atol=1e-13)


def test_nero_elsewhere_steps_elementwise_by_the_initial_size():
    w, grads = start((6,)), gradients((6,))
    size, v = w.square().mean().sqrt(), torch.zeros(6, dtype=F64)
    for t, g in enumerate(grads, 1):
        v = 0.9 * v + 0.1 * g * g
        w = w - 0.01 * size * g / (v / (1 - 0.9**t)).sqrt()
    torch.testing.assert_close(drive(OPTIMIZERS["nero"], (6,), grads), w, rtol=1e-11, atol=1e-13)


def test_nero_moves_a_zero_bias():
    p = nn.Parameter(torch.zeros(3, dtype=F64))
    p.grad = torch.tensor([1.0, -2.0, 0.0], dtype=F64)
    Nero([p], lr=0.5).step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.005, 0.005, 0.0], dtype=F64))


def test_floor_zero_is_adamw_and_a_high_floor_fixes_the_ratio():
    grads = gradients((5, 7))
    adamw = drive(lambda p: torch.optim.AdamW(p, **ADAM, weight_decay=0.1), (5, 7), grads)
    off = drive(lambda p: UpdateFloor(p, **ADAM, weight_decay=0.1, floor=0.0), (5, 7), grads)
    torch.testing.assert_close(off, adamw, rtol=1e-11, atol=1e-13)
    before = start((5, 7))
    high = drive(lambda p: UpdateFloor(p, **ADAM, weight_decay=0.0, floor=100.0), (5, 7), grads[:1])
    torch.testing.assert_close((high - before).norm(dim=1), 0.03 * 100 * before.norm(dim=1))


def radial_gradient(w):
    return w + 1e-3 * torch.ones_like(w)


def orthogonal_rows(w, g):
    return g - unit(w) * (unit(w) * g).sum(1, keepdim=True)


def test_adamp_drops_the_radial_part_row_by_row_where_gradients_are_orthogonal():
    w, (g, h) = start((5, 40)), gradients((5, 40), 2)
    p = nn.Parameter(w.clone())
    optimizer = AdamP([p], **ADAM, weight_decay=0.1, decay_ratio=0.25)
    expected, seen = w, []
    for raw in (g, h):
        seen.append(orthogonal_rows(expected, raw))
        p.grad = seen[-1].clone()
        optimizer.step()
        *_, u = adam_directions(seen)
        expected = (1 - 0.03 * 0.1 * 0.25) * expected - 0.03 * orthogonal_rows(expected, u)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-11, atol=1e-13)


def test_adamp_falls_back_to_the_whole_tensor_and_else_to_adamw():
    w, g = start((5, 40)), gradients((5, 40), 1)[0]
    whole = (w * g).sum() / w.square().sum()
    for grad, expected in (
        (g - whole * w, "tensor"),
        (radial_gradient(w), "adamw"),
    ):
        *_, u = adam_directions([grad])
        decay = 0.1
        if expected == "tensor":
            # not orthogonal row by row: the largest cosine of a row exceeds .1/sqrt(40)
            assert (unit(w) * unit(grad)).sum(1).abs().max() > 0.1 / math.sqrt(40)
            u, decay = u - w * (w * u).sum() / w.square().sum(), 0.01
        target = (1 - 0.03 * decay) * w - 0.03 * u
        torch.testing.assert_close(drive(OPTIMIZERS["adamp"], (5, 40), [grad]), target, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["hyperball", "hyperball_rows", "nero"])
def test_norms_stay_for_ever(name):
    shape = (5, 7)
    w = start(shape)
    w = w - w.mean(1, keepdim=True) if name == "nero" else w
    end = drive(OPTIMIZERS[name], shape, gradients(shape, 50))
    torch.testing.assert_close(end.norm(), w.norm(), rtol=1e-13, atol=0)
    if name != "hyperball":
        torch.testing.assert_close(end.norm(dim=1), w.norm(dim=1), rtol=1e-13, atol=0)
    assert (end - w).norm() > 0.03 * w.norm()


@pytest.mark.parametrize("name", ["hyperball_rows", "update_floor", "adamp", "nero"])
def test_columns_as_neurons_are_rows_of_the_transpose(name):
    grads = gradients((5, 7))
    p = nn.Parameter(start((5, 7)).T.contiguous())
    optimizer = OPTIMIZERS[name]([{"params": [p], "neuron_dim": 1}])
    for g in grads:
        p.grad = g.T.contiguous()
        optimizer.step()
    torch.testing.assert_close(p.detach().T, drive(OPTIMIZERS[name], (5, 7), grads), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(4, 6), (4,)], ids=["weight", "bias"])
def test_networks_stacked_in_one_tensor_do_not_feel_each_other(name, shape):
    if name in ("lion", "update_floor"):
        pytest.skip("works on coordinates or rows only")
    sizes = (1.0, 50.0)
    grads = [[scale * g for g in gradients(shape, 4, scale)] for scale in sizes]
    whole = nn.Parameter(torch.cat([scale * start(shape) for scale in sizes]))
    optimizer = OPTIMIZERS[name]([whole], n_models=2)
    for pair in zip(*grads, strict=True):
        whole.grad = torch.cat(pair)
        optimizer.step()
    for i, scale in enumerate(sizes):
        p = nn.Parameter(scale * start(shape))
        alone = OPTIMIZERS[name]([p])
        for g in grads[i]:
            p.grad = g.clone()
            alone.step()
        torch.testing.assert_close(whole.detach().chunk(2)[i], p.detach(), rtol=1e-12, atol=1e-14)


def test_adamp_decides_for_every_stacked_network_on_its_own():
    w, g = start((5, 40)), gradients((5, 40), 1)[0]
    grads = (orthogonal_rows(w, g), radial_gradient(w))
    whole = nn.Parameter(torch.cat([w, w]))
    whole.grad = torch.cat(grads)
    OPTIMIZERS["adamp"]([whole], n_models=2).step()
    alone = torch.cat([drive(OPTIMIZERS["adamp"], (5, 40), [grad]) for grad in grads])
    torch.testing.assert_close(whole.detach(), alone, rtol=1e-12, atol=1e-14)


def test_stacks_that_do_not_divide_are_named():
    p = nn.Parameter(start((5, 4)))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"n_models=2: must divide .* shape \(5, 4\)"):
        LAMB([p], n_models=2).step()
    with pytest.raises(ValueError, match="n_models=0: must be >= 1"):
        LAMB([p], n_models=0)


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
