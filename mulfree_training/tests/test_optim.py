"""AdamW and SGD: invariants of the step, the written-out update, and state dicts shared with torch.optim."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from mulfree_training import formulas, reference
from mulfree_training.modules import PAMLinear
from mulfree_training.operators import ops
from mulfree_training.optim import PAMSGD, PAMAdamW, adamw_numbers
from mulfree_training.primitives import pam_mul


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = torch.int64 if a.dtype is torch.float64 else torch.int32
    return a.shape == b.shape and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(dtype=torch.float32) -> list[nn.Parameter]:
    shapes = [(4, 3), (7,), (), (2, 3, 2)]
    return [nn.Parameter(normal(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]


def run(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        for i, param in enumerate(params):
            param.grad = normal(*param.shape, seed=100 * step + i).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("scalars", ["exact", "pam"])
@pytest.mark.parametrize("lr", [0.003, 2.0**-4])
def test_first_step_of_powers_of_two_is_the_sign_times_lr(scalars, lr):
    start = normal(64)
    grad = (torch.randint(2, (64,)) * 2 - 1) * 2.0 ** torch.randint(-20, 20, (64,))
    param = nn.Parameter(start.clone())
    param.grad = grad
    # m = g / 2, sqrt v = |g| / 2, step size = lr sqrt(1 / 4) / (1 / 2): every product is exact
    PAMAdamW([param], lr, (0.5, 0.75), eps=0.0, weight_decay=0.0, scalars=scalars).step()
    assert same_bits(param.detach(), start - torch.tensor(lr) * grad.sign())


def test_without_gradient_only_the_decay_acts():
    start = normal(64)
    for eps in (0.0, 1e-8):
        param = nn.Parameter(start.clone())
        param.grad = torch.zeros(64)
        PAMAdamW([param], 0.5, eps=eps, weight_decay=0.25).step()
        assert same_bits(param.detach(), start - start * 0.125)
        other = nn.Parameter(start.clone())
        other.grad = torch.zeros(64)
        PAMAdamW([other], 0.5, eps=eps, weight_decay=0.0).step()
        assert same_bits(other.detach(), start)


def test_gradients_times_a_power_of_two_give_the_same_steps_without_eps():
    results = []
    for factor in (1.0, 2.0**7, 2.0**-9):
        param = nn.Parameter(normal(64))
        optimizer = PAMAdamW([param], eps=0.0)
        for step in range(4):
            param.grad = normal(64, seed=step + 1) * factor
            optimizer.step()
        results.append(param.detach())
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@pytest.mark.parametrize("scalars", ["exact", "pam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_are_the_written_formula(scalars, dtype):
    params = parameters(dtype)
    group = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "scalars": scalars}
    expected = [(p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    optimizer = PAMAdamW(params, **group)
    for step in range(1, 4):
        run(optimizer, params, 1, step)
        numbers = adamw_numbers(group, step)
        expected = [
            formulas.adamw(reference, p, param.grad, m, v, numbers)
            for (p, m, v), param in zip(expected, params, strict=True)
        ]
    for param, (p, m, v) in zip(params, expected, strict=True):
        state = optimizer.state[param]
        assert same_bits(param.detach(), p.detach())
        assert same_bits(state["exp_avg"], m.detach()) and same_bits(state["exp_avg_sq"], v.detach())
        assert state["step"] == 3


def test_exact_scalars_are_the_official_ones():
    group = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "scalars": "exact"}
    size = 0.01 * math.sqrt(1 - 0.95**3) / (1 - 0.8**3)
    assert adamw_numbers(group, 3) == (0.8, 1 - 0.8, 0.95, 1 - 0.95, 1e-3, 0.1 * 0.01, size)


def test_pam_scalars_are_repeated_products_and_near_the_exact_ones():
    group = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "scalars": "pam"}
    t = torch.tensor
    for step in (1, 2, 9, 3, 40):  # also backwards: nothing is remembered that matters
        first, second = t(0.8), t(0.95)
        for _ in range(step - 1):
            first, second = ops.mul(first, t(0.8), 0), ops.mul(second, t(0.95), 0)
        size = ops.div(ops.mul(t(0.01), ops.sqrt(1 - second), 0), 1 - first, 0)
        numbers = adamw_numbers(group, step)
        assert numbers.step_size == size.item()
        assert numbers.rest1 == (1 - t(0.8)).item() and numbers.rest2 == (1 - t(0.95)).item()
        assert numbers.decay == ops.mul(t(0.1), t(0.01), 0).item()
        exact = adamw_numbers({**group, "scalars": "exact"}, step)
        # a product, a quotient and a root of the powers, whose own errors grow with the step
        assert abs(numbers.step_size / exact.step_size - 1) < 0.35
    late = adamw_numbers(group, 100_000)  # both powers have underflowed to 0
    assert late.step_size == t(0.01).item()


def test_one_call_or_many_give_the_same_bits():
    results = []
    for foreach in (True, False):
        params = parameters()
        run(PAMAdamW(params, 0.01, foreach=foreach), params, 3)
        results.append(params)
    for a, b in zip(*results, strict=True):
        assert same_bits(a.detach(), b.detach())


def test_mixed_dtypes_layouts_and_late_gradients_go_together():
    params = [*parameters(), *parameters(torch.float64)]
    params.append(nn.Parameter(normal(2, 3, 4, 5).to(memory_format=torch.channels_last)))
    alone = copy.deepcopy(params)
    optimizer = PAMAdamW(params, 0.01)
    run(optimizer, params[1:], 2)
    run(optimizer, params, 2, 2)  # the first one starts later than the others
    for i, param in enumerate(alone):
        own = PAMAdamW([param], 0.01)
        for step in range(2 if i == 0 else 0, 4):
            number = i - 1 if step < 2 else i
            param.grad = normal(*param.shape, seed=100 * step + number).to(param.dtype)
            own.step()
        assert same_bits(param.detach(), params[i].detach()), i


def test_maximize_is_the_step_of_the_negative_gradient():
    for make in (PAMAdamW, PAMSGD):
        a, b = parameters(), parameters()
        up, down = make(a, 0.01, maximize=True), make(b, 0.01)
        for x, y in zip(a, b, strict=True):
            x.grad = normal(*x.shape)
            y.grad = -x.grad
        up.step()
        down.step()
        assert all(same_bits(x.detach(), y.detach()) for x, y in zip(a, b, strict=True))


MAKERS = {
    "adamw": (lambda p: PAMAdamW(p, 0.01), lambda p: torch.optim.AdamW(p, 0.01)),
    "adamw pam": (lambda p: PAMAdamW(p, 0.01, scalars="pam"), lambda p: torch.optim.AdamW(p, 0.01)),
    "sgd": (
        lambda p: PAMSGD(p, 0.01, 0.9, 0.1, True),
        lambda p: torch.optim.SGD(p, 0.01, 0.9, weight_decay=0.1, nesterov=True),
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_resumes_with_the_same_bits(name, tmp_path):
    make = MAKERS[name][0]
    whole, first = parameters(), parameters()
    run(make(whole), whole, 6)
    optimizer = make(first)
    run(optimizer, first, 3)
    torch.save({"optimizer": optimizer.state_dict(), "params": first}, tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=False)
    resumed = make(saved["params"])
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, saved["params"], 3, 3)
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(whole, saved["params"], strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_state_dicts_load_to_and_from_torch(name):
    ours, theirs = MAKERS[name]
    for source, target in ((ours, theirs), (theirs, ours)):
        params = parameters()
        optimizer = source(params)
        run(optimizer, params, 3)
        other = target(params)
        other.load_state_dict(optimizer.state_dict())
        for param in params:
            for key, value in optimizer.state[param].items():
                assert torch.equal(other.state[param][key], value)
        before = [param.detach().clone() for param in params]
        run(other, params, 1, 3)  # and goes on from there
        assert not any(torch.equal(a, b) for a, b in zip(before, params, strict=True))
        for param in params:
            assert other.state[param].get("step", 4) == 4


def test_adamw_follows_torch_roughly():
    ours, theirs, start = parameters(), parameters(), parameters()
    run(PAMAdamW(ours, 1e-3, (0.9, 0.99)), ours, 20)
    run(torch.optim.AdamW(theirs, 1e-3, (0.9, 0.99)), theirs, 20)
    moved = torch.cat([(a - b).detach().flatten() for a, b in zip(ours, start, strict=True)])
    expected = torch.cat([(a - b).detach().flatten() for a, b in zip(theirs, start, strict=True)])
    assert torch.dot(moved, expected) / (moved.norm() * expected.norm()) > 0.97
    assert 0.8 < moved.norm() / expected.norm() < 1.2


def test_steps_that_are_numbers_load_as_in_torch():
    params, others = parameters(), parameters()
    theirs, whole = torch.optim.AdamW(params, 0.01), PAMAdamW(others, 0.01)
    run(theirs, params, 2)
    whole.load_state_dict(copy.deepcopy(theirs.state_dict()))
    saved = copy.deepcopy(theirs.state_dict())
    saved["state"] = {key: {**own, "step": int(own["step"])} for key, own in saved["state"].items()}
    again = copy.deepcopy(others)
    ours = PAMAdamW(again, 0.01)
    ours.load_state_dict(saved)
    run(whole, others, 2, 2)
    run(ours, again, 2, 2)
    assert all(same_bits(x.detach(), y.detach()) for x, y in zip(others, again, strict=True))
    assert all(isinstance(own["step"], Tensor) and own["step"] == 4 for own in ours.state.values())
    torch.optim.AdamW(again).load_state_dict(ours.state_dict())


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_the_written_update(nesterov):
    param = nn.Parameter(normal(32))
    optimizer = PAMSGD([param], 0.03, 0.7, 0.1, nesterov)
    p, buffer = param.detach().clone(), None
    for step in range(3):
        grad = normal(32, seed=step + 5)
        param.grad = grad
        optimizer.step()
        grad = grad + pam_mul(p, 0.1)
        buffer = grad if buffer is None else pam_mul(buffer, 0.7) + grad
        p = p - pam_mul(grad + pam_mul(buffer, 0.7) if nesterov else buffer, 0.03)
        assert same_bits(param.detach(), p)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_of_powers_of_two_is_torch(nesterov):
    a, b = parameters(), parameters()
    run(PAMSGD(a, 0.25, 0.5, 0.125, nesterov), a, 4)
    run(torch.optim.SGD(b, 0.25, 0.5, weight_decay=0.125, nesterov=nesterov, foreach=False), b, 4)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_groups_schedulers_tensor_rates_and_closures():
    a, b = nn.Parameter(normal(8)), nn.Parameter(normal(8, seed=1))
    optimizer = PAMAdamW([{"params": [a], "lr": 0.5}, {"params": [b], "weight_decay": 0.0}], torch.tensor(0.25))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure():
        optimizer.zero_grad()
        loss = (a + b).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss == (normal(8) + normal(8, seed=1)).sum()
    scheduler.step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, 0.125]
    assert optimizer.param_groups[1]["weight_decay"] == 0 and (a != normal(8)).all()


def test_a_step_is_seen_by_autograd():
    layer = PAMLinear(3, 3)
    x = normal(2, 3).requires_grad_()
    out = layer(x)
    for param in layer.parameters():
        param.grad = torch.ones_like(param)
    PAMAdamW(layer.parameters()).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (PAMAdamW, {"lr": -1.0}, "lr=-1.0: must be finite and >= 0"),
        (PAMAdamW, {"lr": math.nan}, "lr=nan: must be finite"),
        (PAMAdamW, {"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\): must be two numbers in \[0, 1\)"),
        (PAMAdamW, {"eps": -1e-8}, "eps=-1e-08: must be finite and >= 0"),
        (PAMAdamW, {"weight_decay": -0.1}, "weight_decay=-0.1: must be"),
        (PAMAdamW, {"scalars": "float"}, "scalars='float': must be exact or pam"),
        (PAMSGD, {"momentum": 1.0}, r"momentum=1.0: must be in \[0, 1\)"),
        (PAMSGD, {"nesterov": True}, "momentum=0.0: must be > 0 for nesterov=True"),
    ],
)
def test_bad_settings_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(parameters(), **options)


@pytest.mark.parametrize("make", [PAMAdamW, PAMSGD])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64, torch.float16])
def test_other_dtypes_are_refused(make, dtype):
    with pytest.raises(TypeError, match=f"parameter of dtype {dtype}: must be float32 or float64"):
        make([nn.Parameter(torch.zeros(3, dtype=dtype))])


def test_sparse_gradients_and_foreign_variants_are_refused():
    param = nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match="must be dense"):
        PAMAdamW([param]).step()
    params = parameters()
    theirs = torch.optim.AdamW(params, amsgrad=True)
    ours = PAMAdamW(params, 0.5)
    with pytest.raises(ValueError, match="amsgrad=True: must be False"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.5


def test_nothing_to_do_is_fine():
    params = parameters()
    for optimizer in (PAMAdamW(params), PAMSGD(params)):
        assert optimizer.step() is None
    empty = nn.Parameter(torch.zeros(0, 3))
    empty.grad = torch.zeros(0, 3)
    PAMAdamW([empty]).step()
