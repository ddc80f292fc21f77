"""The C step is the plain step to rounding, over every row length, without touching what is not its own."""

import math

import pytest
import torch
from torch import nn

from rotational_optimizers.adamw import RotationalAdamW
from rotational_optimizers.kernels import native
from rotational_optimizers.lion import RotationalLion
from rotational_optimizers.sgd import RotationalSGD

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(native.library() is None, reason="no C compiler")
RULES = {
    "adamw": (RotationalAdamW, {}),
    "adam l2": (RotationalAdamW, {"second_moment_l2": 0.1}),
    "sgd": (RotationalSGD, {}),
    "sgdm": (RotationalSGD, {"momentum": 0.9, "dampening": 0.1}),
    "nesterov": (RotationalSGD, {"momentum": 0.9, "nesterov": True}),
    "lion": (RotationalLion, {}),
}
# around every boundary of the kernel's layouts: vector width, short rows, summing blocks, long rows
LENGTHS = (3, 9, 16, 17, 63, 64, 65, 2047, 2049, 16384, 16385, 40000)


def data(k: int, n: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(k, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


def run(rule, k: int, n: int, *, dtype=torch.float32, steps: int = 6, grad=None, weight=None, **form) -> nn.Parameter:
    cls, extra = RULES[rule]
    param = nn.Parameter((data(k, n, 0, torch.float32) if weight is None else weight.clone()).to(dtype))
    optimizer = cls([param], **{"lr": 1e-2, "weight_decay": 0.1} | extra | form)
    for t in range(1, steps + 1):
        g = data(k, n, t, torch.float32) if grad is None else grad(t, param)
        param.grad = g.to(dtype)
        optimizer.step()
    return param


def errors(rule, k: int, n: int, **kwargs) -> tuple[float, float]:
    """Largest distance from float64 of the C step, and of plain PyTorch at float32."""
    exact = run(rule, k, n, dtype=torch.float64, foreach=False, **kwargs)
    plain = run(rule, k, n, foreach=False, **kwargs)
    fast = run(rule, k, n, fused=True, **kwargs)
    return tuple((p.double() - exact).abs().max().item() for p in (fast, plain))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("rule", RULES)
def test_error_is_at_most_twice_that_of_plain_pytorch(rule, n):
    fast, plain = errors(rule, 19 if n < 100 else 3, n)
    # the floor: half a rounding of weights of size about 4, once a step
    assert fast <= 2 * plain + 6 * 4 * torch.finfo(torch.float32).eps / 2


@pytest.mark.parametrize("n", [9, 384, 20000])
@pytest.mark.parametrize("key", ["maximize", "zero_mean", "neuron_speed", "update_norm_decay", "per_neuron"])
def test_every_key_reaches_the_kernel(key, n):
    changed = {
        "maximize": True, "zero_mean": False, "neuron_speed": lambda p: torch.arange(1.0, p.shape[0] + 1).double(),
        "update_norm_decay": 1 - 1e-10, "per_neuron": False,
    }  # fmt: skip
    fast, plain = errors("adamw", 5, n, **{key: changed[key]})
    assert fast <= 2 * plain + 6 * 4 * torch.finfo(torch.float32).eps / 2
    assert not torch.allclose(run("adamw", 5, n, fused=True), run("adamw", 5, n, fused=True, **{key: changed[key]}))


def test_it_is_the_kernel_that_runs(monkeypatch):
    calls = []
    monkeypatch.setattr(native.Batch, "run", lambda self: calls.append(self._count))
    before = data(3, 9, 0, torch.float32)
    for form in ({}, {"fused": True}):
        param = run("adamw", 3, 9, steps=1, **form)
        torch.testing.assert_close(param.mean(1), torch.zeros(3), rtol=0, atol=1e-6)
        torch.testing.assert_close(param.norm(dim=1), before.norm(dim=1))
    assert calls == [1, 1]
    run("adamw", 3, 9, steps=1, foreach=True)
    assert calls == [1, 1, 0]


@pytest.mark.parametrize("n", [9, 60, 64, 2049, 16384, 20000])
def test_norms_and_means_stay(n):
    param = run("adamw", 5, n, steps=30, fused=True)
    ulp = torch.finfo(torch.float32).eps
    norm = run("adamw", 5, n, steps=0).detach().double().norm(dim=1)
    assert ((param.double().norm(dim=1) / norm - 1).abs() < 4 * ulp).all()
    assert (param.double().mean(1).abs() < 4 * ulp * norm / math.sqrt(n)).all()


@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("n", [9, 64, 16385])
def test_a_weight_pushed_off_its_mean_and_norm_comes_back_in_one_step(n, form):
    param = nn.Parameter(data(5, n, 0, torch.float32))
    optimizer = RotationalSGD([param], 1e-2, weight_decay=0.1, **form)
    norm = param.detach().double().norm(dim=1)
    for t in (1, 2):
        param.grad = data(5, n, t, torch.float32)
        optimizer.step()
        if t == 1:
            with torch.no_grad():
                param.mul_(1.1).add_(0.01)
    ulp = torch.finfo(torch.float32).eps
    assert ((param.double().norm(dim=1) / norm - 1).abs() < 4 * ulp).all()
    assert (param.double().mean(1).abs() < 4 * ulp * norm / math.sqrt(n)).all()


@pytest.mark.parametrize("n", [5, 40, 100, 3000, 20000])
def test_nearly_radial_or_constant_gradients_lose_no_digits(n):
    """1e-3 of the gradient is news, the rest must vanish in the projections: nothing may cancel in float32."""

    def grad(t, param):
        noise = data(4, n, t, torch.float32)
        return 1e-3 * noise.double() + param.detach().double() * 2 + 3

    fast, plain = errors("sgd", 4, n, grad=grad)
    assert fast <= 2 * plain + 4 * torch.finfo(torch.float32).eps
    param = run("sgd", 4, n, grad=grad, fused=True)
    norm = run("sgd", 4, n, steps=0).detach().double().norm(dim=1)
    assert ((param.double().norm(dim=1) / norm - 1).abs() < 1e-6).all()


@pytest.mark.parametrize("n", [5, 40, 100, 3000, 20000])
def test_purely_radial_and_constant_gradients_turn_nothing(n):
    for grad in (lambda t, p: 0.3 * p.detach(), lambda t, p: torch.full((4, n), 0.7), lambda t, p: torch.zeros(4, n)):
        assert torch.equal(run("sgd", 4, n, grad=grad, fused=True), run("sgd", 4, n, steps=0))


@pytest.mark.parametrize("n", [5, 40, 100, 5000, 20000])
@pytest.mark.parametrize("row", [0, 7, 18])
@pytest.mark.parametrize("rule", RULES)
def test_only_rows_with_non_finite_gradients_are_left_out(rule, n, row):
    k = 19 if n < 1000 else 3
    row = min(row, k - 1)

    def grad(t, param):
        g = data(k, n, t, torch.float32)
        if t == 3:
            g[row, n - 1] = math.nan
        return g

    hit, spared = run(rule, k, n, grad=grad, fused=True, steps=3), run(rule, k, n, fused=True, steps=3)
    assert torch.equal(hit[row], run(rule, k, n, fused=True, steps=2)[row])
    others = [r for r in range(k) if r != row]
    torch.testing.assert_close(hit[others], spared[others], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [7, 64, 1000, 20000])
def test_rows_of_norm_zero_take_the_plain_step(n):
    weight = data(5, n, 0, torch.float32)
    weight[3] = 0
    with pytest.warns(UserWarning, match="1 of 5 rows"):
        fast = run("adamw", 5, n, weight=weight, fused=True)
    with pytest.warns(UserWarning, match="1 of 5 rows"):
        plain = run("adamw", 5, n, weight=weight, foreach=False)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
    assert fast[3].abs().max() > 0


@pytest.mark.parametrize("n", [9, 33, 64, 700, 20000])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_threads(n):
    """Bit by bit: every row is summed in one fixed order, whatever else is in the call."""
    whole = run("adamw", 37 if n < 1000 else 4, n, fused=True)
    alone = whole.shape[0] - 2
    part = run(
        "adamw", 2, n, weight=data(whole.shape[0], n, 0, torch.float32)[alone:], fused=True,
        grad=lambda t, p: data(whole.shape[0], n, t, torch.float32)[alone:],
    )  # fmt: skip
    assert torch.equal(whole[alone:], part)
    torch.set_num_threads(2)
    try:
        assert torch.equal(run("adamw", whole.shape[0], n, fused=True), whole)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("n", [3, 9, 63, 65, 2049, 16385])
@pytest.mark.parametrize("rule", RULES)
def test_nothing_outside_the_tensors_is_written(rule, n):
    cls, extra = RULES[rule]
    k, guard = 17, 64
    frame = torch.full((k * n + 2 * guard,), math.nan)
    param = nn.Parameter(frame[guard:-guard].view(k, n))
    with torch.no_grad():
        param.copy_(data(k, n, 0, torch.float32))
    optimizer = cls([param], lr=1e-2, weight_decay=0.1, fused=True, **extra)
    frames = []
    for t in (1, 2):
        g = torch.full((k * n + 2 * guard,), math.nan)
        g[guard:-guard] = data(k, n, t, torch.float32).flatten()
        param.grad = g[guard:-guard].view(k, n)
        optimizer.step()
        for name, value in optimizer.state[param].items():
            if t == 1 and value.ndim > 0:
                held = torch.full((value.numel() + 2 * guard,), math.nan)
                held[guard:-guard] = value.flatten()
                optimizer.state[param][name] = held[guard:-guard].view(value.shape)
                frames.append(held)
    assert torch.isfinite(param).all()
    for held in (frame, *frames):
        assert held[:guard].isnan().all()
        assert held[-guard:].isnan().all()
        assert held[guard:-guard].isfinite().all()


def test_many_tensors_of_many_shapes_go_in_one_call():
    shapes = [(17, 3), (1, 20000), (5, 64), (300, 27), (2, 16384), (64, 576), (3, 5, 3, 3)]
    runs = []
    for form in ({"fused": True}, {"foreach": False}):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        groups = [{"params": params[:3], "lr": 0.03}, {"params": params[3:], "betas": (0.8, 0.9)}]
        optimizer = RotationalAdamW(groups, 1e-2, weight_decay=0.1, **form)
        for t in range(4):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i))
            if t == 2:
                params[4].grad = None
            optimizer.step()
        runs.append(params)
    for fast, plain in zip(*runs, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=4e-6)


def test_without_a_compiler_the_step_is_done_by_pytorch(monkeypatch):
    fast = run("adamw", 5, 40, fused=True)
    monkeypatch.setattr(native, "library", lambda: None)
    for form in ({}, {"fused": True}):
        torch.testing.assert_close(run("adamw", 5, 40, **form), fast, rtol=1e-5, atol=2e-6)
