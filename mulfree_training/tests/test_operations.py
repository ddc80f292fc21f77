"""Counts of operations against numbers worked out by hand, and the cost argument."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mulfree_training import formulas, reference
from mulfree_training.convert import convert_to_mulfree
from mulfree_training.functional import pam_layer_norm, pam_log_softmax, pam_softmax
from mulfree_training.operations import (
    CITATION,
    COSTS,
    FLOAT32,
    PAM,
    Counts,
    Work,
    cost,
    operation_count,
    ratios,
    savings,
)
from mulfree_training.operators import ops
from mulfree_training.optim import PAMAdamW
from mulfree_training.primitives import pam_div, pam_exp2, pam_log2, pam_mul, pam_sqrt
from mulfree_training.products import pam_conv2d, pam_linear, pam_matmul

B, K, H, V = 8, 16, 32, 10
X = torch.linspace(-1, 1, B * K).view(B, K)
NOTHING = Work()


def ones(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.ones(shape, requires_grad=grad)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(K, H), nn.ReLU(), nn.Linear(H, V))


FORWARD = B * K * H + B * H * V
WHOLE = 2 * B * K * H + 3 * B * H * V  # the input needs no gradient


@pytest.mark.parametrize("training", [False, True])
def test_a_perceptron_in_both_arithmetics(training):
    model = perceptron()
    before = [p.detach().clone() for p in model.parameters()]
    counts = operation_count(model, X, training=training)
    assert counts.standard == Work(products=WHOLE if training else FORWARD)
    assert counts.pam == NOTHING and not counts.unknown
    sums = B * (H + V)  # biases; their gradients are sums over the batch
    assert counts.additions == sums + ((B - 1) * (H + V) if training else 0)
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    convert_to_mulfree(model)
    affine = operation_count(model, X, training=training)
    assert affine.pam == counts.standard and affine.standard == NOTHING and affine.additions == counts.additions


def test_exact_derivatives_take_one_more_addition_each():
    model = perceptron()
    convert_to_mulfree(model, derivative="exact")
    assert operation_count(model, X).pam == Work(products=WHOLE, slopes=WHOLE - FORWARD)


def test_products_of_all_shapes():
    a, b, c = ones(3, 4, 5), ones(3, 5, 6), ones(5, 6)
    for product, count in ((torch.matmul, "standard"), (pam_matmul, "pam")):
        for operands, products in (
            ((a, b), 360),
            ((a, c), 360),
            ((a[0], c), 120),
            ((a[0], c[:, 0]), 20),
            ((c.T, c), 180),
        ):
            counts = operation_count(lambda x, y, f=product: f(x, y), *operands)
            assert getattr(counts, count) == Work(products=products) and counts.additions == 0
    assert operation_count(torch.dot, c[0], c[0]).standard.products == 6


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(groups):
    image, weight = ones(2, 4, 5, 5, grad=True), ones(4, 6, 2, 2, grad=True)
    counts = operation_count(
        lambda: F.conv_transpose2d(image, weight, ones(6 * groups), 2, groups=groups).sum().backward()
    )
    assert counts.standard == Work(products=3 * image.numel() * 6 * 4)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups):
    for function in (F.conv2d, pam_conv2d):
        image, bias = ones(2, 4, 6, 6, grad=True), ones(8, grad=True)
        weight = ones(8, 4 // groups, 3, 3, grad=True)
        counts = operation_count(lambda *x, f=function: f(*x, 1, 1, 1, groups).sum().backward(), image, weight, bias)
        work = counts.standard if function is F.conv2d else counts.pam
        assert work == Work(products=3 * 2 * 8 * 36 * (4 // groups) * 9)
        # biases and their derivative, and the sum; of ours also the sums of what patches share
        assert counts.additions - (3 * 2 * 8 * 36 - 8 - 1) == (0 if function is F.conv2d else 2 * 4 * 9 * 36)


def test_attention():
    q, k, v = ones(2, 3, 5, 8, grad=True), ones(2, 3, 7, 8, grad=True), ones(2, 3, 7, 8, grad=True)
    scores = 2 * 3 * 5 * 7
    forward = operation_count(F.scaled_dot_product_attention, q, k, v)
    assert forward.standard == Work(scores * 16, scores, scores, scores)
    whole = operation_count(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert whole.standard.products == scores * (16 + 40) and not whole.unknown


@pytest.mark.parametrize(
    ("function", "work", "additions"),
    [
        (lambda x: x * 2, Work(multiplications=128), 0),
        (lambda x: x * x[0], Work(multiplications=128), 0),
        (lambda x: x / 2, Work(divisions=128), 0),
        (lambda x: x**2, Work(multiplications=128), 0),
        (lambda x: x**3, Work(functions=128), 0),
        (lambda x: x.exp().log(), Work(functions=256), 0),
        (lambda x: x.sqrt(), Work(roots=128), 0),
        (lambda x: x.add(x, alpha=2), Work(multiplications=128), 128),
        (lambda x: x + 1 - x, NOTHING, 256),
        (lambda x: x.sum(1), NOTHING, 120),
        (lambda x: x.mean(0), Work(divisions=16), 128),
        (lambda x: x.clone().mul_(2).addcmul_(x, x), Work(multiplications=384), 128),
        (lambda x: torch._foreach_mul([x, x[0]], 2), Work(multiplications=144), 0),
        (lambda x: F.relu(x).where(x > 0, 1.0).view(16, 8).T[1:], NOTHING, 0),
        (lambda x: (x > 0).long() * 5, NOTHING, 0),
        (lambda x: x.softmax(-1), Work(functions=128, divisions=128), 256),
        (lambda x: F.layer_norm(x, (16,)), Work(multiplications=384), 512),
        (lambda x: F.gelu(x), Work(multiplications=384, functions=128), 128),
    ],
)
def test_elementwise_operators(function, work, additions):
    counts = operation_count(function, X)
    assert counts.standard == work and counts.additions == additions and not counts.unknown


def test_what_is_not_in_the_table_is_named():
    counts = operation_count(lambda x: torch.atan2(x, x) + x.erfinv(), X)
    assert counts.unknown == {"aten.atan2": 1, "aten.erfinv": 1} and counts.standard == NOTHING


@pytest.mark.parametrize(
    ("function", "work"),
    [
        (lambda x: pam_mul(x, 3.0), Work(multiplications=128)),
        (lambda x: pam_div(x, x[0]), Work(divisions=128)),
        (pam_exp2, Work(functions=128)),
        (pam_log2, Work(functions=128)),
        (pam_sqrt, Work(roots=128)),
        (lambda x: ops.mul_grad(x, x, x, 0), Work(multiplications=128, slopes=128)),
        (lambda x: pam_linear(x, x, x[:, 0]), Work(products=B * K * B)),
    ],
)
def test_our_primitives(function, work):
    counts = operation_count(function, X)
    assert counts.pam == work and counts.standard == NOTHING


class Spy:
    """The reference, with the number of elements of every call."""

    def __init__(self):
        self.calls = {}

    def __getattr__(self, name):
        def primitive(x, *others):
            self.calls[name] = self.calls.get(name, 0) + x.numel()
            return getattr(reference, name)(x, *others)

        return primitive


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        (pam_softmax, lambda p: formulas.softmax(p, X, 0)),
        (pam_log_softmax, lambda p: formulas.log_softmax(p, X, 0)),
        (lambda x: pam_layer_norm(x, (K,), x[0], x[1]), lambda p: formulas.layer_norm(p, X, X[0], X[1], 1e-5, 0)),
    ],
)
def test_fused_operators_count_their_formulas(function, formula):
    spy = Spy()
    formula(spy)
    pam = operation_count(function, X).pam
    assert pam.multiplications == spy.calls.get("mul", 0) and pam.divisions == spy.calls.get("div", 0)
    assert pam.functions == spy.calls.get("exp2", 0) + spy.calls.get("log2", 0)
    assert pam.roots == spy.calls.get("sqrt", 0) and pam.products == pam.slopes == 0
    assert pam.functions or pam.roots


def test_derivatives_of_fused_operators_count():
    x = X.clone().requires_grad_()
    for rule in ("approx", "exact"):
        forward = operation_count(lambda r=rule: pam_softmax(x, derivative=r))
        whole = operation_count(lambda r=rule: pam_softmax(x, derivative=r).sum().backward())
        assert whole.pam.multiplications > 2 * forward.pam.multiplications
        assert bool(whole.pam.slopes) == (rule == "exact")


def test_a_whole_step_with_its_optimizer():
    model = perceptron()
    convert_to_mulfree(model)
    optimizer = PAMAdamW(model.parameters(), weight_decay=0.1, scalars="exact")

    def step():
        model(X).sum().backward()
        optimizer.step()

    counts, size = operation_count(step), sum(p.numel() for p in model.parameters())
    # both moments twice, the square, the decay, the step
    assert counts.pam == Work(WHOLE, 7 * size, size, roots=size) and counts.standard == NOTHING
    fused = torch.optim.AdamW(perceptron().parameters(), fused=True)
    for p in fused.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    assert operation_count(fused.step).standard == Work(0, 6 * size, 2 * size, roots=size)


def test_costs_of_one_operation():
    assert COSTS["float32 multiply"] == (3.7, 7700) and COSTS["int32 add"] == (0.1, 137)
    assert COSTS["float32 add"] == (0.9, 4184) and "widely quoted" in CITATION
    saved = savings()
    assert saved["multiplication"] == pytest.approx((37, 56.2), abs=0.05)
    assert saved["accumulate"] == pytest.approx((4.6, 2.75), abs=0.005)
    assert set(FLOAT32) == set(PAM) == set(vars(Work()))


def test_cost_of_counts():
    counts = Counts(Work(products=1000, divisions=10), Work(products=2000, functions=5, slopes=100), additions=50)
    products, rest, sums = cost(counts).values()
    assert products == pytest.approx((1000 * 4.6 + 2000 * 1.0) * 1e-6)
    assert rest == pytest.approx((10 * 3.7 + 5 * 1.9 + 100 * 0.1) * 1e-6) and sums == pytest.approx(45e-6)
    assert list(cost(counts)) == ["energy_uj_matrix_products", "energy_uj_elementwise", "energy_uj_additions"]
    assert sum(cost(counts, "float32").values()) == pytest.approx((3000 * 4.6 + 15 * 3.7 + 45) * 1e-6)
    assert sum(cost(counts, "pam").values()) == pytest.approx((3000 + 1 + 9.5 + 10 + 45) * 1e-6)
    with pytest.raises(ValueError, match="arithmetic='int8': must be None, float32 or pam"):
        cost(counts, "int8")


def test_ratios():
    pure = ratios(Counts(Work(products=7)))
    assert pure["cost_ratio_step"] == pytest.approx(4.6) == pytest.approx(pure["cost_ratio_accumulate"])
    assert ratios(Counts(Work(multiplications=7)))["cost_ratio_step"] == pytest.approx(37)
    assert ratios(Counts(additions=7))["cost_ratio_step"] == 1
    assert math.isnan(ratios(Counts())["cost_ratio_step"])
    model = perceptron()
    standard = ratios(operation_count(model, X))
    assert 4 < standard["cost_ratio_step"] < 4.6
    convert_to_mulfree(model)
    assert ratios(operation_count(model, X)) == standard
