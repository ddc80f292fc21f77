"""Lion and the kin of the rotational variants: each against its own equation."""

import math

import pytest
import torch
from torch import nn

from rotational_optimizers.relatives import LAMB, AdamP, Nero, UpdateFloor
from rotational_optimizers.tests.kin import (
    ADAM,
    ADAM_KIN,
    F64,
    OPTIMIZERS,
    adam_directions,
    drive,
    gradients,
    rows,
    start,
    unit,
)

torch.set_num_threads(1)


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
