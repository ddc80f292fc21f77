"""Derivatives of the primitives: `exact`, the slope of the segment; `approx`, the written formulas to the last bit."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from common.kernels.dispatch import forced
from mulfree_training import reference as r
from mulfree_training.bits import FLOAT32, offset
from mulfree_training.primitives import pam_div, pam_exp, pam_exp2, pam_log, pam_log2, pam_mul, pam_pow, pam_sqrt
from mulfree_training.tests.bitwise import (
    ALPHAS,
    INF,
    SHIFTS,
    SMALLEST,
    SPECIAL,
    assert_same,
    inside,
    mantissa,
    ordinary,
    pairs,
    random_patterns,
)

LOG2E, LN2 = math.log2(math.e), math.log(2)
RULES = ("approx", "exact")
UNARY = (pam_exp2, pam_log2, pam_exp, pam_log, pam_sqrt, lambda x, **o: pam_pow(x, 0.3, **o))
NAMES = ("exp2", "log2", "exp", "log", "sqrt", "pow")


@pytest.fixture(autouse=True)
def on_the_reference():
    with forced("reference"):
        yield


def filled(x, value):
    return torch.full_like(x, value)


def gradients(function, *operands, grad, **options):
    own = [x.detach().clone().requires_grad_() for x in operands]
    return torch.autograd.grad(function(*own, **options), own, grad)


def one(x):
    return torch.tensor([x])


# the exact rule


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("function", [pam_mul, pam_div])
def test_exact_slopes_of_two_operands_are_finite_differences(function, alpha):
    a, b = (ordinary(400, seed=seed, octaves=3, dtype=torch.float64) for seed in (1, 2))
    away = inside(mantissa(a)) & inside(mantissa(b)) & inside(mantissa(function(a, b, alpha=alpha)))
    a, b = a[away][:150], b[away][:150]
    assert {(x, y) for x, y in zip(a.sign().tolist(), b.sign().tolist(), strict=True)} == {
        *itertools.product((1, -1), repeat=2)
    }
    own = a.requires_grad_(), b.requires_grad_()
    assert gradcheck(lambda x, y: function(x, y, derivative="exact", alpha=alpha), own, eps=1e-6, atol=1e-7, rtol=1e-7)


def stages(name, x, alpha):
    """All intermediate results of a function: each has segments of its own."""
    scaled = {"exp": LOG2E}.get(name)
    if name in ("exp", "exp2"):
        u = x if scaled is None else pam_mul(x, scaled, alpha=alpha)
        return x, u, pam_exp2(u)
    if name == "sqrt":
        return x, pam_sqrt(x)
    u = pam_log2(x)
    if name == "log2":
        return (x,)
    if name == "log":
        return x, u, pam_div(u, LOG2E, alpha=alpha)
    v = pam_mul(u, 0.3, alpha=alpha)
    return x, u, v, pam_exp2(v)


@pytest.mark.parametrize("alpha", ALPHAS[:3])
@pytest.mark.parametrize("name, function", [*zip(NAMES, UNARY, strict=True)], ids=NAMES)
def test_exact_slopes_of_functions_are_finite_differences(name, function, alpha):
    x = ordinary(600, seed=1, octaves=3, dtype=torch.float64)
    x = x if name in ("exp", "exp2") else x.abs()
    away = torch.stack([inside(mantissa(y)) for y in stages(name, x, alpha)]).all(0)
    assert away.sum() >= 150
    own = x[away][:150].requires_grad_()
    assert gradcheck(lambda x: function(x, derivative="exact", alpha=alpha), own, eps=1e-6, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "function, operands, slopes",
    [
        (pam_mul, (1.5, 1.5), (2, 2)),  # the mantissas add up to 1
        (pam_mul, (1.5, -1.25), (-1, 1)),
        (pam_mul, (1.75, -1.25), (-2, 2)),
        (pam_mul, (1.0, 1.75), (1, 1)),
        (pam_mul, (-3.0, 5.0), (4, -2)),
        (pam_mul, (0.0, 3.0), (2, 0)),  # the mantissa of zero is zero
        (pam_mul, (0.0, -0.0), (0, 0)),
        (pam_div, (1.5, 1.5), (1, -1)),  # equal mantissas
        (pam_div, (1.5, 1.25), (1, -1)),
        (pam_div, (1.25, 1.5), (0.5, -0.5)),
        (pam_div, (1.2, -1.7), (-0.5, -0.5)),  # a negative divisor
        (pam_div, (-1.2, -1.7), (-0.5, 0.5)),
        (pam_div, (3.0, -4.0), (-0.25, -0.125)),  # y = -3/4
        (pam_div, (6.0, -5.0), (-0.25, -0.25)),
        (pam_div, (0.0, 3.0), (0.25, 0)),
        (pam_exp2, (3.0,), (8,)),
        (pam_exp2, (2.999,), (4,)),
        (pam_exp2, (-0.5,), (0.5,)),
        (pam_log2, (8.0,), (0.125,)),
        (pam_log2, (7.99,), (0.25,)),
        (pam_sqrt, (4.0,), (0.25,)),
        (pam_sqrt, (3.99,), (0.25,)),
        (pam_sqrt, (8.0,), (0.125,)),
        (pam_sqrt, (1.99,), (0.5,)),
    ],
)
def test_slopes_at_kinks_and_beside_them(function, operands, slopes):
    found = gradients(function, *map(one, operands), grad=one(1.0), derivative="exact")
    assert tuple(x.item() for x in found) == slopes


@pytest.mark.parametrize("function", [pam_mul, pam_exp2, pam_log2, pam_sqrt])
def test_at_a_kink_the_segment_on_the_right_counts(function):
    ends = {pam_mul: 1.5, pam_exp2: 2.0, pam_log2: 4.0, pam_sqrt: 4.0}
    rest = (one(1.5),) if function is pam_mul else ()
    here = one(ends[function])
    (slope, *_) = gradients(function, here, *rest, grad=one(1.0), derivative="exact")
    difference = (function(here + 2.0**-10, *rest) - function(here, *rest)) / 2.0**-10
    assert slope.item() == difference.item()


def test_a_quotient_at_equal_mantissas():
    """The dividend has the segment on the right, the divisor the one on the left: both with M_a >= M_b."""
    a, b = one(1.5), one(1.5)
    ga, gb = gradients(pam_div, a, b, grad=one(1.0), derivative="exact")
    step = 2.0**-10
    assert ga.item() == ((pam_div(a + step, b) - pam_div(a, b)) / step).item()
    assert gb.item() == ((pam_div(a, b) - pam_div(a, b - step)) / step).item()


@pytest.mark.parametrize("shift", SHIFTS)
def test_slopes_are_powers_of_two(shift):
    a, b = random_patterns(200_000, 1), random_patterns(200_000, 2)
    ones = torch.ones_like(a)
    slopes = [r.slope(a, b, shift), r.mul_grad(ones, a, b, shift), r.div_grad(ones, a, b, shift)]
    slopes += [r.exp2_grad(ones, a.clamp(-200, 200)), r.log2_grad(ones, a.abs()), r.sqrt_grad(ones, a.abs())]
    for number, slope in enumerate(slopes):
        pattern = slope[~slope.isnan()].view(torch.int32)
        assert len(pattern) > 100_000
        assert not (pattern & FLOAT32.mantissa).any(), number


@pytest.mark.parametrize("alpha", ALPHAS)
def test_slopes_equal_the_formula(alpha):
    """sign(b) 2^(E_b + carry), with alpha's mantissa among those that are carried."""
    a, b = ordinary(50_000, seed=1, octaves=30), ordinary(50_000, seed=2, octaves=30)
    m, n, s = (mantissa(a).numpy(), mantissa(b).numpy(), offset(alpha) / 2**23)
    exponent = np.floor(np.log2(b.abs().double().numpy()))
    carry = np.floor(m + n + s)
    assert set(carry) <= {-1, 0, 1, 2} and len(set(carry)) >= 2
    truth = np.sign(b.double().numpy()) * 2.0 ** (exponent + carry)
    assert_same(r.slope(a, b, offset(alpha)), torch.from_numpy(truth).float(), a, b)


def test_alpha_carries_into_the_slope():
    a, b = one(1.0), one(1.96875)  # 0.96875 + 0.0552 > 1
    assert gradients(pam_mul, a, b, grad=one(1.0), derivative="exact")[0].item() == 1
    assert gradients(pam_mul, a, b, grad=one(1.0), derivative="exact", alpha=1.0552)[0].item() == 2
    assert gradients(pam_mul, a, one(1.0), grad=one(1.0), derivative="exact", alpha=0.6)[0].item() == 0.5
    a, b = one(1.03125), one(1.0)  # 0.03125 - 0.0552 < 0
    found = gradients(pam_div, a, b, grad=one(1.0), derivative="exact", alpha=1.0552)
    assert tuple(x.item() for x in found) == (0.5, -0.5)


def test_special_slopes():
    value = torch.tensor
    b = value([0.0, -0.0, 2.0**-130, INF, -INF, 3.0])
    assert_same(r.slope(filled(b, 1.25), b), value([0.0, -0.0, 0.0, INF, -INF, 2.0]))
    a = value([0.0, INF, -INF, 2.0**-130, 2 - 2.0**-23])
    assert_same(r.slope(a, filled(a, 1.25)), value([1.0, 1.0, 1.0, 1.0, 2.0]))
    assert r.slope(value([math.nan, 1.0]), value([1.0, math.nan])).isnan().all()
    # nor does a carry, even one with alpha, bring a zero into range
    assert_same(r.slope(one(1.99), one(-0.0), offset(1.9)), one(-0.0))
    # a carry takes the largest octave out of range
    assert r.slope(one(1.5), one(1.5 * 2.0**127)).item() == INF
    assert r.log2_grad(one(1.0), one(0.0)).item() == INF
    assert r.log2_grad(one(1.0), one(-2.0)).isnan()
    assert r.exp2_grad(one(1.0), one(128.5)).item() == INF
    assert r.exp2_grad(one(1.0), one(-127.5)).item() == 0
    assert r.sqrt_grad(one(1.0), one(-2.0)).isnan()


@pytest.mark.parametrize("name", ["mul_grad", "div_grad"])
def test_slopes_shift_the_exponent_of_the_gradient_only(name):
    g, a, b = (ordinary(10_000, seed=seed, octaves=5) for seed in (1, 2, 3))
    slope = getattr(r, name)(torch.ones_like(a), a, b)
    assert_same(getattr(r, name)(g, a, b), g * slope, g, a, b)
    for name, x in (("exp2_grad", a), ("log2_grad", a.abs()), ("sqrt_grad", a.abs())):
        slope = getattr(r, name)(torch.ones_like(x), x)
        assert_same(getattr(r, name)(g, x), g * slope, g, x)


# which rule goes where


def written(name, grad, a, b, shift, rules):
    """Gradients of a product or quotient, operand by operand."""
    inverse = r.div(filled(b, 1.0), b, shift)
    first = {
        ("mul", "approx"): lambda: r.mul(grad, b, shift),
        ("mul", "exact"): lambda: r.mul_grad(grad, a, b, shift),
        ("div", "approx"): lambda: r.mul(inverse, grad, shift),
        ("div", "exact"): lambda: r.mul_grad(grad, a, inverse),
    }
    second = {
        ("mul", "approx"): lambda: r.mul(grad, a, shift),
        ("mul", "exact"): lambda: r.mul_grad(grad, b, a, shift),
        ("div", "approx"): lambda: -r.mul(r.div(r.div(a, b, shift), b, shift), grad, shift),
        ("div", "exact"): lambda: r.div_grad(grad, a, b, shift),
    }
    return first[name, rules[0]](), second[name, rules[1]]()


@pytest.mark.parametrize("alpha", ALPHAS[:3])
@pytest.mark.parametrize("rules", [*RULES, *itertools.product(RULES, repeat=2)])
@pytest.mark.parametrize("function, name", [(pam_mul, "mul"), (pam_div, "div")])
def test_rules_of_two_operands(function, name, rules, alpha):
    g, a, b = pairs(SPECIAL[::3], 3)
    g, a, b = (torch.cat([x, ordinary(2000, seed=i)]) for i, x in enumerate((g, a, b)))
    found = gradients(function, a, b, grad=g, derivative=rules, alpha=alpha)
    each = (rules, rules) if isinstance(rules, str) else rules
    for own, truth in zip(found, written(name, g, a, b, offset(alpha), each), strict=True):
        assert_same(own, truth, g, a, b)


def through(name, grad, x, shift, exact):
    """Gradient of a function of one operand."""
    u, scaled = r.log2(x), r.mul(x, filled(x, LOG2E), shift)
    if name == "exp2":
        slope = r.mul(r.exp2(x), filled(x, LN2), shift)
        return r.exp2_grad(grad, x) if exact else r.mul(slope, grad, shift)
    if name == "exp":
        whole = r.mul_grad(r.exp2_grad(grad, scaled), x, filled(x, LOG2E), shift) if exact else None
        return whole if exact else r.mul(r.exp2(scaled), grad, shift)
    if name == "log2":
        return r.log2_grad(grad, x) if exact else r.div(r.div(grad, x, shift), filled(x, LN2), shift)
    if name == "log":
        inverse = r.div(filled(x, 1.0), filled(x, LOG2E), shift)
        return r.log2_grad(r.mul_grad(grad, u, inverse), x) if exact else r.div(grad, x, shift)
    if name == "sqrt":
        return r.sqrt_grad(grad, x) if exact else r.div(r.mul(grad, filled(x, 0.5)), r.sqrt(x), shift)
    p = filled(x, 0.3)
    v = r.mul(u, p, shift)
    middle = through("exp2", grad, v, shift, exact)
    middle = r.mul_grad(middle, u, p, shift) if exact else r.mul(middle, p, shift)
    middle = through("log2", middle, x, shift, exact)
    return torch.where(x.abs() < SMALLEST, r.mul(grad, filled(x, INF)), middle)  # the slope of x^.3 at 0


@pytest.mark.parametrize("alpha", ALPHAS[:3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name, function", [*zip(NAMES, UNARY, strict=True)], ids=NAMES)
def test_rules_of_functions(name, function, rule, alpha):
    g, x = pairs(SPECIAL)
    g, x = torch.cat([g, ordinary(4000, seed=1)]), torch.cat([x, ordinary(4000, seed=2)])
    (found,) = gradients(function, x, grad=g, derivative=rule, alpha=alpha)
    assert_same(found, through(name, g, x, offset(alpha), rule == "exact"), g, x)


@pytest.mark.parametrize(
    "function, calculus, low, high",
    [
        (pam_exp2, lambda x: LN2 * 2**x, 8 / 9, 1.061476),
        (pam_log2, lambda x: 1 / (LN2 * x), 1, (9 / 8) ** 2),
        (pam_log, lambda x: 1 / x, 1, 9 / 8),
        (pam_sqrt, lambda x: 0.5 / x.sqrt(), 1 / 1.060661, 9 / 8),
    ],
)
def test_approximate_rules_are_calculus_within_the_error_of_their_operations(function, calculus, low, high):
    x = ordinary(5000, seed=1, octaves=2, dtype=torch.float64).abs()
    (found,) = gradients(function, x, grad=torch.ones_like(x))
    ratio = found / calculus(x)
    assert low - 1e-6 <= ratio.min() < ratio.max() <= high + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("p", [2.0, 3, 1.5, 1.0, 0.5, 0.3, -1.0])
def test_powers_have_the_slope_of_torch_at_zero(p, rule, dtype):
    x, g = torch.zeros(2, dtype=dtype), torch.tensor([2.0, -0.5], dtype=dtype)
    (found,), (truth,) = (
        gradients(lambda x: pam_pow(x, p, derivative=rule), x, grad=g),
        gradients(lambda x: x**p, x, grad=g),
    )
    assert torch.equal(found, truth) and torch.equal(pam_pow(x, p), x**p)


# autograd around them


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("function, name", [(pam_mul, "mul"), (pam_div, "div")])
def test_gradients_of_broadcast_operands_are_plain_sums(function, name, rule):
    a, b, g = ordinary(3, 1, seed=1), ordinary(4, seed=2), ordinary(3, 4, seed=3)
    wide = [x.contiguous() for x in torch.broadcast_tensors(a, b)]
    ga, gb = written(name, g, *wide, 0, (rule, rule))
    found = gradients(function, a, b, grad=g, derivative=rule)
    assert_same(found[0], ga.sum(1, keepdim=True))
    assert_same(found[1], gb.sum(0))


def test_a_number_has_no_gradient_and_an_operand_alone_its_own():
    x, g = ordinary(50, seed=1), ordinary(50, seed=2)
    assert_same(gradients(lambda x: pam_mul(x, 1.3), x, grad=g)[0], r.mul(g, filled(x, 1.3)))
    assert_same(gradients(lambda x: pam_mul(1.3, x), x, grad=g)[0], r.mul(g, filled(x, 1.3)))
    truth = written("div", g, filled(x, 1.3), x, 0, ("approx", "exact"))[1]
    assert_same(gradients(lambda x: pam_div(1.3, x, derivative="exact"), x, grad=g)[0], truth)


def test_both_operands_may_be_one_tensor():
    x, g = ordinary(50, seed=1), ordinary(50, seed=2)
    own = r.mul(g, x)
    assert_same(gradients(lambda x: pam_mul(x, x), x, grad=g)[0], own + own)


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_gradients(rule):
    a, b, g = (ordinary(500, seed=seed).bfloat16() for seed in (1, 2, 3))
    wide = written("mul", g.float(), a.float(), b.float(), 0, (rule, rule))
    for found, truth in zip(gradients(pam_mul, a, b, grad=g, derivative=rule), wide, strict=True):
        assert_same(found, truth.bfloat16())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("function", [pam_mul, pam_div, *UNARY])
def test_a_second_derivative_is_refused(function, rule):
    x = ordinary(5, seed=1).abs().requires_grad_()
    y = function(x, x, derivative=rule) if function in (pam_mul, pam_div) else function(x, derivative=rule)
    (g,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives of piecewise affine functions are not available"):
        g.sum().backward()
