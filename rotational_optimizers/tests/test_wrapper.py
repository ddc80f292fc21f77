"""RotationalWrapper turns any optimizer of torch into a rotational one, equal to the native classes to rounding."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from rotational_optimizers.adamw import RotationalAdamW
from rotational_optimizers.equilibrium import equilibrium_rotation
from rotational_optimizers.lion import RotationalLion
from rotational_optimizers.relatives import LAMB, Lion
from rotational_optimizers.sgd import RotationalSGD
from rotational_optimizers.wrapper import RotationalWrapper, reads_weights

torch.set_num_threads(1)
PAIRS = {
    "adamw": (torch.optim.AdamW, RotationalAdamW, {"lr": 0.01, "betas": (0.8, 0.95)}),
    "adamw fused": (torch.optim.AdamW, RotationalAdamW, {"lr": 0.01, "fused": True}),
    "sgd": (torch.optim.SGD, RotationalSGD, {"lr": 0.1}),
    "sgdm": (torch.optim.SGD, RotationalSGD, {"lr": 0.1, "momentum": 0.9}),
    "nesterov": (torch.optim.SGD, RotationalSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "lion": (Lion, RotationalLion, {"lr": 0.003}),
}


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 4)).to(dtype)


def groups(model: nn.Module) -> list[dict]:
    plain = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": plain, "weight_decay": 0.0},
    ]


def train(model: nn.Module, optimizer, steps: int, first: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    for t in range(first, first + steps):
        x = torch.randn(16, 7, generator=torch.Generator().manual_seed(t), dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pair", PAIRS)
def test_it_equals_the_native_class_to_rounding(pair, dtype):
    base, native, keys = PAIRS[pair]
    a, b, c = net(dtype), net(dtype), net(dtype)
    train(a, native(groups(a), **keys), 8)
    train(b, RotationalWrapper(base(groups(b), **keys)), 8)
    train(c, RotationalWrapper(base, params=groups(c), **keys), 8)
    tolerance = 100 * torch.finfo(dtype).eps
    for x, y, z in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)
        assert torch.equal(y, z)


@pytest.mark.parametrize("pair", ["adamw", "sgdm"])
def test_tiny_gradients_keep_their_digits(pair):
    """The base steps from zero: from a weight of size one, a gradient of 1e-9 would vanish in float32."""
    base, native, keys = PAIRS[pair]
    x, y = (nn.Parameter(torch.randn(4, 20, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    for param, optimizer in (
        (x, native([x], weight_decay=0.1, **keys)), (y, RotationalWrapper(base([y], weight_decay=0.1, **keys))),
    ):  # fmt: skip
        for t in range(4):
            param.grad = 1e-9 * torch.randn(4, 20, generator=torch.Generator().manual_seed(t))
            optimizer.step()
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pair", ["adamw", "sgdm", "lion"])
def test_other_parameters_follow_the_base_bit_for_bit(pair):
    base, _, keys = PAIRS[pair]
    a, b = (nn.Parameter(torch.arange(1.0, 6)) for _ in range(2))
    weight = nn.Parameter(torch.randn(3, 5))
    wrapped = RotationalWrapper(base([{"params": [weight]}, {"params": [a]}], weight_decay=0.3, **keys))
    plain = base([b], weight_decay=0.3, **keys)
    for t in range(5):
        a.grad = b.grad = torch.randn(5, generator=torch.Generator().manual_seed(t))
        weight.grad = torch.randn(3, 5)
        wrapped.step()
        plain.step()
    assert torch.equal(a, b)


@pytest.mark.parametrize("base", [torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adam, torch.optim.AdamW])
def test_known_bases_turn_by_their_formula(base):
    weight = nn.Parameter(torch.randn(5, 50, dtype=torch.float64))
    keys = {"lr": 0.01, "weight_decay": 0.3, "betas": (0.8, 0.9)}
    optimizer = RotationalWrapper(base([weight], **keys), update_norm_decay=0.0)
    before = weight.detach().clone()
    weight.grad = torch.randn(5, 50, dtype=torch.float64)
    optimizer.step()
    turned = 2 * torch.asin((before - weight.detach()).norm(dim=1) / before.norm(dim=1) / 2)
    rule = {torch.optim.NAdam: "nadam"}.get(base, "adamw")
    expected = math.atan(equilibrium_rotation(rule, **keys))
    torch.testing.assert_close(turned, torch.full_like(turned, expected), rtol=1e-6, atol=0)


def test_an_unknown_base_needs_a_rotation_and_then_turns_by_it():
    weight = nn.Parameter(torch.randn(4, 6))
    base = torch.optim.Adagrad([weight], lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="rotation=None: Adagrad"):
        RotationalWrapper(base)
    optimizer = RotationalWrapper(base, 0.05, update_norm_decay=0.0)
    before = weight.detach().clone()
    weight.grad = torch.randn(4, 6)
    optimizer.step()
    chord = (before - weight.detach()).norm(dim=1) / before.norm(dim=1)
    torch.testing.assert_close(2 * torch.asin(chord / 2), torch.full((4,), math.atan(0.05)), rtol=1e-4, atol=0)


def test_parameters_without_gradient_are_passed_over():
    used, unused = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(3, 5))
    optimizer = RotationalWrapper(torch.optim.AdamW([used, unused], weight_decay=0.1))
    before = unused.detach().clone()
    used.grad = torch.randn(3, 5)
    optimizer.step()
    assert torch.equal(unused, before)
    unused.grad = torch.randn(3, 5)
    optimizer.step()
    assert not torch.equal(unused, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_from_a_checkpoint_is_bit_exact(dtype):
    straight, resumed = net(dtype), net(dtype)
    train(straight, RotationalWrapper(torch.optim.AdamW(groups(straight), 0.01)), 7)
    first = RotationalWrapper(torch.optim.AdamW(groups(resumed), 0.01))
    train(resumed, first, 3)
    file = io.BytesIO()
    torch.save({"model": resumed.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = net(dtype)
    again.load_state_dict(saved["model"])
    second = RotationalWrapper(torch.optim.AdamW(groups(again), 0.01))
    second.load_state_dict(saved["optimizer"])
    train(again, second, 4, 3)
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), straight.parameters(), strict=True))


def test_a_deep_copy_goes_on_by_itself():
    model = net()
    optimizer = RotationalWrapper(torch.optim.SGD(groups(model), 0.1, 0.9))
    train(model, optimizer, 3)
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3, 3)
    train(twin_model, twin, 3, 3)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), twin_model.parameters(), strict=True))
    assert twin.base is not optimizer.base
    assert twin.base.param_groups is twin.param_groups


@pytest.mark.parametrize("pair", ["adamw", "sgdm", "nesterov"])
@pytest.mark.parametrize("shadow", [True, False])
def test_decay_and_learning_rate_stay_out_of_the_direction(pair, shadow):
    """The learning rate jumps: a direction that carried it would jump against its own running mean."""
    base, native, keys = PAIRS[pair]
    a, b = net(), net()
    runs = (a, native(groups(a), **keys)), (b, RotationalWrapper(base(groups(b), **keys), shadow=shadow))
    for model, optimizer in runs:
        for t, factor in enumerate((1.0, 0.01, 3.0)):
            for group in optimizer.param_groups:
                group["lr"] = factor * keys["lr"]
            train(model, optimizer, 2, 2 * t)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


def test_schedulers_hooks_closures_and_zero_grad_work_through_it():
    model = net()
    optimizer = RotationalWrapper(torch.optim.SGD(groups(model), 0.1, 0.9))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    seen = []
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(opt.param_groups[0]["lr"]))
    x = torch.randn(8, 7, dtype=torch.float64)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - x[:, :4]).square().mean()
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert seen == [0.1, 0.05, 0.025]
    assert losses[2] < losses[0]
    assert optimizer.base.param_groups[0]["lr"] == 0.0125


def test_groups_added_later_rotate_by_their_own_keys():
    a, b = nn.Parameter(torch.randn(3, 8)), nn.Parameter(torch.randn(3, 8) + 1)
    optimizer = RotationalWrapper(torch.optim.SGD([a], 0.1, weight_decay=0.1))
    optimizer.add_param_group({"params": [b], "weight_decay": 0.4, "update_norm_decay": 0.0})
    assert (b.mean(1).abs() < 1e-6).all()
    before = b.detach().clone()
    a.grad, b.grad = torch.randn(3, 8), torch.randn(3, 8)
    optimizer.step()
    chord = (before - b.detach()).norm(dim=1) / before.norm(dim=1)
    expected = torch.full((3,), math.atan(math.sqrt(2 * 0.1 * 0.4)))
    torch.testing.assert_close(2 * torch.asin(chord / 2), expected, rtol=1e-4, atol=0)


def test_a_row_with_a_nan_gradient_sits_out_and_recovers():
    weight = nn.Parameter(torch.randn(4, 9))
    optimizer = RotationalWrapper(torch.optim.AdamW([weight], weight_decay=0.1))
    for t in range(4):
        before, grad = weight.detach().clone(), torch.randn(4, 9)
        if t == 1:
            grad[2, 3] = math.nan
        weight.grad = grad
        optimizer.step()
        assert weight.grad is grad
        assert torch.equal(weight[2], before[2]) == (t == 1)
        assert not torch.equal(weight[0], before[0])
    assert torch.isfinite(weight).all()


def test_optimizers_that_read_the_weights_are_refused_unless_they_are_shown():
    weight = nn.Parameter(torch.randn(4, 9))
    base = LAMB([{"params": [weight], "rotational": True}], lr=0.01, weight_decay=0.1)
    assert reads_weights(base)
    assert not reads_weights(torch.optim.AdamW([weight]))
    with pytest.raises(ValueError, match="shadow=True: LAMB reads the weights"):
        RotationalWrapper(base, 0.01)
    optimizer = RotationalWrapper(base, 0.01, shadow=False)
    norm = weight.detach().norm(dim=1)
    weight.grad = torch.randn(4, 9)
    optimizer.step()
    torch.testing.assert_close(weight.detach().norm(dim=1), norm)


def test_what_cannot_be_wrapped_is_refused_by_name():
    weight = nn.Parameter(torch.randn(4, 9))
    with pytest.raises(TypeError, match="LBFGS: must not need a closure"):
        RotationalWrapper(torch.optim.LBFGS([weight]), 0.1)
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer"):
        RotationalWrapper("adam")
    with pytest.raises(ValueError, match="params=None"):
        RotationalWrapper(torch.optim.AdamW, lr=0.1)
    with pytest.raises(ValueError, match="is an instance already"):
        RotationalWrapper(torch.optim.AdamW([weight]), momentum=0.1)
    with pytest.raises(ValueError, match="no tensor rotates"):
        RotationalWrapper(torch.optim.Adam([weight]))
    with pytest.raises(ValueError, match=r"update_norm_decay=1\.0"):
        RotationalWrapper(torch.optim.AdamW([weight]), update_norm_decay=1.0)


def test_a_tensor_that_starts_at_zero_follows_the_base_for_good():
    a, b = nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(3, 5))
    weight = nn.Parameter(torch.randn(3, 5))
    with pytest.warns(UserWarning, match="parameter 0 of group 0"):
        wrapped = RotationalWrapper(torch.optim.SGD([a, weight], 0.1, weight_decay=0.1))
    plain = torch.optim.SGD([b], 0.1, weight_decay=0.1)
    for _ in range(3):
        a.grad = b.grad = torch.randn(3, 5)
        weight.grad = torch.randn(3, 5)
        wrapped.step()
        plain.step()
    assert torch.equal(a, b)
