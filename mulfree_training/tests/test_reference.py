"""The reference primitives against the paper's formulas for real numbers, and the laws that they keep."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mulfree_training import reference
from mulfree_training.bits import FLOAT32, FLOAT64, offset
from mulfree_training.primitives import pam_div, pam_mul
from mulfree_training.tests.bitwise import (
    ALPHAS,
    INF,
    NAN,
    SHIFTS,
    SMALLEST,
    SPECIAL,
    assert_same,
    logarithm,
    ordinary,
    pairs,
    power,
    product,
    quotient,
    random_patterns,
    root,
    rounded,
    same_bits,
)

normal = st.floats(2.0**-126, 2.0**127, width=32).flatmap(lambda x: st.sampled_from([x, -x]))
middle = st.floats(2.0**-20, 2.0**20, width=32).flatmap(lambda x: st.sampled_from([x, -x]))
exponents = st.integers(-20, 20)


def one(x):
    return torch.tensor([x], dtype=torch.float32)


def wide(*tensors):
    """As float64 arrays."""
    return tuple(x.double().numpy() for x in tensors)


def by_cases(a, b, divided):
    """Product or quotient of two float32 numbers, special values case by case."""
    a, b = (math.copysign(0.0, x) if abs(x) < SMALLEST else x for x in (a, b))
    sign = math.copysign(1.0, a) * math.copysign(1.0, b)
    if math.isnan(a) or math.isnan(b):
        return NAN
    if divided:
        if (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
            return NAN
        if a == 0 or math.isinf(b):
            return sign * 0.0
        if math.isinf(a) or b == 0:
            return sign * INF
        return rounded(quotient(np.float64(a), np.float64(b))).item()
    if (a == 0 and math.isinf(b)) or (math.isinf(a) and b == 0):
        return NAN
    if math.isinf(a) or math.isinf(b):
        return sign * INF
    if a == 0 or b == 0:
        return sign * 0.0
    return rounded(product(np.float64(a), np.float64(b))).item()


@pytest.mark.parametrize("name", ["mul", "div"])
def test_special_values_case_by_case(name):
    a, b = pairs(SPECIAL)
    truth = [by_cases(x, y, name == "div") for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert_same(getattr(reference, name)(a, b), torch.tensor(truth), a, b)


@pytest.mark.parametrize("name, oracle", [("mul", product), ("div", quotient)])
def test_products_and_quotients_are_the_formulas_to_the_last_bit(name, oracle):
    a, b = random_patterns(500_000, 1), random_patterns(500_000, 2)
    kept = [x.isfinite() & (x.abs() >= SMALLEST) for x in (a, b)]
    a, b = a[kept[0] & kept[1]], b[kept[0] & kept[1]]
    assert_same(getattr(reference, name)(a, b), rounded(oracle(*wide(a, b))), a, b)


@pytest.mark.parametrize(
    "a, b, result", [(1.5, 1.5, 2), (1.3, -1.3, -1.6), (4.5, 3, 13), (-6, 3, -16), (-3.5, -3.5, 12), (7, -0.25, -1.75)]
)
def test_examples_of_products(a, b, result):
    assert reference.mul(one(a), one(b)).item() == pytest.approx(result, rel=1e-6)


@pytest.mark.parametrize("a, b, result", [(1, 1.5, 0.75), (2, 1.5, 1.5), (3, -1.5, -2), (13, 3, 4.5), (-7, -4, 1.75)])
def test_examples_of_quotients(a, b, result):
    assert reference.div(one(a), one(b)).item() == result


@pytest.mark.parametrize("dtype, form", [(torch.float32, FLOAT32), (torch.float64, FLOAT64)])
def test_a_product_in_range_is_one_integer_addition(dtype, form):
    a, b = (ordinary(10_000, seed=seed, octaves=50, dtype=dtype) for seed in (1, 2))
    i, j = a.view(form.integer), b.view(form.integer)
    assert_same(reference.mul(a, b), (i + (j - form.one)).view(dtype), a, b)


def test_float64_agrees_with_float32():
    """Of float32 operands the float64 result is exact, thus its rounding is the float32 result."""
    a, b = ordinary(50_000, seed=1, octaves=40), ordinary(50_000, seed=2, octaves=40)
    x = ordinary(50_000, seed=3, octaves=6)
    for shift in (0, offset(1.0552), offset(0.6)):
        for name in ("mul", "div", "slope"):
            operation = getattr(reference, name)
            assert_same(operation(a.double(), b.double(), shift).float(), operation(a, b, shift), a, b)
        for name in ("mul_grad", "div_grad"):
            operation = getattr(reference, name)
            assert_same(operation(x.double(), a.double(), b.double(), shift).float(), operation(x, a, b, shift), a, b)
    assert_same(reference.log2(a.abs().double()).float(), reference.log2(a.abs()), a)
    assert_same(reference.exp2(a.floor().clamp(-99, 99).double()).float(), reference.exp2(a.floor().clamp(-99, 99)), a)


@pytest.mark.parametrize("alpha", ALPHAS[1:])
def test_alpha_is_one_more_product_or_quotient(alpha):
    a, b = ordinary(50_000, seed=1, octaves=40), ordinary(50_000, seed=2, octaves=40)
    factor = torch.full_like(a, alpha)
    assert_same(reference.mul(a, b, offset(alpha)), reference.mul(reference.mul(a, b), factor), a, b)
    assert_same(reference.div(a, b, offset(alpha)), reference.div(reference.div(a, b), factor), a, b)


@pytest.mark.parametrize("alpha", [1.0, *ALPHAS[1:]])
def test_the_range_is_that_of_the_result_with_alpha(alpha):
    """Near the ends of the range a factor above 1 brings a product back, or one below 1 takes it out."""
    shift, factor = offset(alpha), np.float64(np.float32(alpha))
    for far, near in ((2.0**-63, 2.0**-63), (2.0**64, 2.0**64)):
        a, b = pairs(torch.tensor([1.0, 0.75, 0.6, 1.1, 1.9]))
        a, b = a * far, b * near
        results = rounded(product(product(*wide(a, b)), factor)), rounded(quotient(quotient(*wide(a, 1 / b)), factor))
        assert_same(reference.mul(a, b, shift), results[0], a, b)
        assert_same(reference.div(a, 1 / b, shift), results[1], a, b)
    for x in (0.0, INF):
        assert reference.mul(one(x), one(1.5), shift).item() == reference.div(one(x), one(1.5), shift).item() == x


@given(normal, normal, st.sampled_from(SHIFTS))
@settings(deadline=None, max_examples=200)
def test_products_commute(a, b, shift):
    assert same_bits(reference.mul(one(a), one(b), shift), reference.mul(one(b), one(a), shift))


@given(middle, middle, middle)
@settings(deadline=None, max_examples=200)
def test_products_are_associative_and_divisions_their_inverse(a, b, c):
    a, b, c = one(a), one(b), one(c)
    assert same_bits(reference.mul(reference.mul(a, b), c), reference.mul(a, reference.mul(b, c)))
    assert same_bits(reference.div(reference.mul(a, b), b), a)
    assert same_bits(reference.mul(reference.div(a, b), b), a)


@given(middle, middle, exponents, exponents)
@settings(deadline=None, max_examples=200)
def test_powers_of_two_are_exact_factors(a, b, i, j):
    x, y = one(a), one(b)
    assert same_bits(reference.mul(x, one(-(2.0**i))), x * -(2.0**i))
    assert same_bits(reference.div(x, one(2.0**i)), x / 2.0**i)
    assert same_bits(reference.mul(x * 2.0**i, y * 2.0**j), reference.mul(x, y) * 2.0 ** (i + j))
    assert same_bits(reference.div(x * 2.0**i, y * 2.0**j), reference.div(x, y) * 2.0 ** (i - j))


@given(middle, middle, middle)
@settings(deadline=None, max_examples=200)
def test_order_is_kept(a, b, c):
    a, b = sorted((abs(a), abs(b)))
    c = abs(c)
    assert reference.mul(one(a), one(c)) <= reference.mul(one(b), one(c))
    assert reference.div(one(a), one(c)) <= reference.div(one(b), one(c))
    assert reference.div(one(c), one(a)) >= reference.div(one(c), one(b))
    for name in ("log2", "sqrt"):
        assert getattr(reference, name)(one(a)) <= getattr(reference, name)(one(b))
    assert reference.exp2(one(a)) <= reference.exp2(one(b))


def test_products_do_not_distribute_over_sums():
    a, b, c = one(1.5), one(1.0), one(0.5)
    assert reference.mul(a, b + c).item() == 2.0
    assert (reference.mul(a, b) + reference.mul(a, c)).item() == 2.25


def test_operands_below_the_normal_numbers_count_as_zero():
    assert reference.mul(one(2.0**-127), one(2.0**100)).item() == 0
    assert reference.div(one(1.0), one(2.0**-127)).item() == INF
    assert reference.div(one(2.0**-127), one(0.0)).isnan()
    assert reference.log2(one(2.0**-127)).item() == -INF
    assert same_bits(reference.sqrt(one(-(2.0**-127))), one(-0.0))


def test_nothing_is_written_into_the_operands():
    a, b = SPECIAL.clone(), SPECIAL.flip(0).clone()
    for name in ("mul", "div", "slope"):
        getattr(reference, name)(a, b)
    for name in ("exp2", "log2", "sqrt"):
        getattr(reference, name)(a)
    assert_same(a, SPECIAL)
    assert_same(b, SPECIAL.flip(0))


# exp2, log2 and sqrt


def test_exp2_equals_its_formula():
    whole = torch.arange(-126, 128)[:, None]
    x = (whole + torch.arange(0, 1 << 14) / 2**14).flatten()  # no rounding here
    assert_same(reference.exp2(x), rounded(power(*wide(x))), x)
    x = torch.cat([ordinary(200_000, seed=1, octaves=6), ordinary(20_000, seed=2, octaves=40).clamp(-120, 120)])
    exact = power(*wide(x))
    assert np.all(np.abs(wide(reference.exp2(x))[0] - exact) <= 2.0**-23 * exact)
    t = np.float32(1) + (x.numpy() - np.floor(x.numpy()))  # the two roundings, in this order
    assert_same(reference.exp2(x), torch.from_numpy(np.ldexp(t, np.floor(x.numpy()).astype(int))), x)


def test_exp2_saturates():
    x = torch.tensor(
        [-INF, -1e30, -(2.0**31), -254.5, -126 - 2.0**-16, 127.5, 128 - 2.0**-16, 128.0, 300.0, 1e30, INF, NAN]
    )
    truth = [0.0, 0.0, 0.0, 0.0, 0.0, 1.5 * 2.0**127, 2.0**128 - 2.0**111, INF, INF, INF, INF, NAN]
    assert_same(reference.exp2(x), torch.tensor(truth), x)
    assert_same(reference.exp2(torch.tensor([-0.0, 0.0, -1e-30, -(2.0**-24)])), torch.ones(4))
    x = torch.tensor([-1022.0, -1022.1, 1023.75, 1024.0, INF, -INF, NAN], dtype=torch.float64)
    truth = [2.0**-1022, 0.0, 1.75 * 2.0**1023, INF, INF, 0.0, NAN]
    assert_same(reference.exp2(x), torch.tensor(truth, dtype=torch.float64), x)


def test_log2_equals_its_formula():
    x = random_patterns(500_000, 1).abs()
    x = x[x.isfinite() & (x >= SMALLEST)]
    assert_same(reference.log2(x), rounded(logarithm(*wide(x))), x)
    special = torch.tensor([0.0, -0.0, 2.0**-140, -(2.0**-140), -1.0, -INF, INF, NAN])
    truth = [-INF, -INF, -INF, -INF, NAN, NAN, INF, NAN]
    assert_same(reference.log2(special), torch.tensor(truth), special)
    # the formula is 0 at 1 and not -0
    assert_same(reference.log2(one(1.0)), one(0.0))


def test_sqrt_equals_its_formula():
    x = random_patterns(500_000, 1).abs()
    x = x[x.isfinite() & (x >= SMALLEST)]
    exact = wide(x)[0]
    exact = root(exact)
    # half a mantissa may have one bit more than fits: it is cut off
    even = torch.from_numpy(exact.astype(np.float32).astype(np.float64) == exact)
    found = reference.sqrt(x)
    assert 0.4 < even.double().mean() < 0.6
    assert_same(found[even], rounded(exact)[even], x[even])
    below = (exact - wide(found)[0]) / exact
    assert below.min() >= 0 and below.max() < 2.0**-23
    special = torch.tensor([0.0, -0.0, 2.0**-140, -(2.0**-140), -1.0, -INF, INF, NAN])
    truth = [0.0, -0.0, 0.0, -0.0, NAN, NAN, INF, NAN]
    assert_same(reference.sqrt(special), torch.tensor(truth), special)


def test_log2_and_exp2_are_inverses():
    x = ordinary(100_000, seed=1, octaves=2).abs()
    assert_same(reference.exp2(reference.log2(x)), x, x)
    x = ordinary(100_000, seed=2, octaves=100).abs()
    assert ((reference.exp2(reference.log2(x)) / x - 1).abs() <= 2.0**-17).all()


@given(st.integers(-(2**20), 2**20), st.integers(-60, 60))
@settings(deadline=None, max_examples=200)
def test_exp2_of_a_sum_with_an_integer_is_scaled(thousandths, n):
    x = one(thousandths / 2**14)
    assert same_bits(reference.exp2(x + n), reference.exp2(x) * 2.0**n)


@given(st.floats(2.0**-20, 2.0**20, width=32), st.integers(-20, 20))
@settings(deadline=None, max_examples=200)
def test_roots_and_logarithms_of_scaled_numbers(x, k):
    assert same_bits(reference.sqrt(one(x) * 4.0**k), reference.sqrt(one(x)) * 2.0**k)
    assert reference.log2(one(x) * 2.0**k).item() == pytest.approx(reference.log2(one(x)).item() + k, abs=1e-5)


def test_functions_are_continuous_at_the_ends_of_octaves():
    for k in range(-20, 21):
        for end in (2.0**k, 4.0**k):
            below = torch.nextafter(one(end), one(0.0))
            assert (reference.log2(one(end)) - reference.log2(below)).abs() <= 2.0**-18
            assert reference.sqrt(below) < reference.sqrt(one(end)) <= reference.sqrt(below) * (1 + 2.0**-22)
        if k:
            below = torch.nextafter(one(float(k)), one(-INF))
            assert reference.exp2(below) <= reference.exp2(one(float(k))) <= reference.exp2(below) * (1 + 2.0**-17)


def test_a_root_squared_is_the_number_itself():
    x = ordinary(10_000, seed=1, octaves=30).abs()
    x = x[(x.view(torch.int32) - FLOAT32.one) % 2 == 0]
    s = reference.sqrt(x)
    assert_same(reference.mul(s, s), x, x)


# matrix products and sums


@pytest.mark.parametrize("shift", SHIFTS[:3])
def test_products_of_matrices_are_sums_in_order(shift):
    a, b = ordinary(2, 3, 5, seed=1), ordinary(2, 5, 4, seed=2)
    found = reference.matmul(a, b, shift)
    for n, i, j in itertools.product(range(2), range(3), range(4)):
        total = torch.zeros(1)
        for k in range(5):
            total = total + reference.mul(a[n, i, k, None], b[n, k, j, None], shift)
        assert same_bits(found[n, i, j, None], total)


@pytest.mark.parametrize("shift", SHIFTS[:3])
def test_derivatives_of_products_of_matrices_are_sums_in_order(shift):
    g, a, b = ordinary(2, 3, 4, seed=1), ordinary(2, 3, 5, seed=2), ordinary(2, 5, 4, seed=3)
    found = reference.matmul_grad(g, a, b, shift)
    for n, i, k in itertools.product(range(2), range(3), range(5)):
        total = torch.zeros(1)
        for j in range(4):
            total = total + reference.mul_grad(g[n, i, j, None], a[n, i, k, None], b[n, k, j, None], shift)
        assert same_bits(found[n, i, k, None], total)


@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 32, 50, 100])
def test_row_sums_in_sixteen_lanes(n):
    x = ordinary(7, n, seed=n) if n else torch.zeros(7, 0)
    lanes = np.zeros((7, 16), np.float32)
    for i in range(n):
        lanes[:, i % 16] += x[:, i].numpy()
    for half in (8, 4, 2, 1):
        for i in range(half):
            lanes[:, i] += lanes[:, i + half]
    assert_same(reference.row_sum(x), torch.from_numpy(lanes[:, :1].copy()))
    assert reference.row_sum(x.double().reshape(7, 1, n)).shape == (7, 1, 1)


@pytest.mark.parametrize("name, true, sign", [("mul", np.multiply, 1), ("div", np.divide, -1)])
def test_the_official_rule_gives_the_same_bits_where_it_gives_numbers(name, true, sign):
    """Official: guarded by the true result in float32, +0 below 1e-37, NaN from 1e37 on, else one wrapping addition."""
    a, b = random_patterns(1_000_000, 5), random_patterns(1_000_000, 6)
    kept = [x.isfinite() & (x.abs() >= SMALLEST) for x in (a, b)]
    a, b = (x[kept[0] & kept[1]] for x in (a, b))
    i, j = (x.numpy().view(np.int32) for x in (a, b))
    with np.errstate(over="ignore", under="ignore"):
        size = np.abs(true(a.numpy(), b.numpy()))
        pattern = i + sign * (j - np.int32(FLOAT32.one))
    inside = torch.from_numpy((size >= np.float32(1e-37)) & (size < np.float32(1e37)))
    assert inside.sum() > 500_000
    official = torch.from_numpy(pattern).view(torch.float32)
    ours = {"mul": pam_mul, "div": pam_div}[name](a, b)
    for found in (ours, getattr(reference, name)(a, b)):
        assert_same(found[inside], official[inside], a[inside], b[inside])
