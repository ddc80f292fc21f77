"""The public primitives: what they compose, broadcast and round, and the error law of the paper."""

import fractions
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.kernels.dispatch import forced
from mulfree_training import reference
from mulfree_training.bits import offset
from mulfree_training.primitives import pam_div, pam_exp, pam_exp2, pam_log, pam_log2, pam_mul, pam_pow, pam_sqrt
from mulfree_training.tests.bitwise import ALPHAS, INF, NAN, SPECIAL, assert_same, ordinary, pairs, same_bits

LOG2E = math.log2(math.e)
UNARY = {pam_exp2: reference.exp2, pam_log2: reference.log2, pam_sqrt: reference.sqrt}
BINARY = {pam_mul: reference.mul, pam_div: reference.div}


@pytest.fixture(autouse=True)
def on_the_reference():
    with forced("reference"):
        yield


def filled(x, value):
    return torch.full_like(x, value)


@pytest.mark.parametrize("public", BINARY)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_products_and_quotients(public, alpha):
    a, b = pairs(SPECIAL)
    assert_same(public(a, b, alpha=alpha), BINARY[public](a, b, offset(alpha)), a, b)


@pytest.mark.parametrize("public", UNARY)
def test_functions(public):
    assert_same(public(SPECIAL), UNARY[public](SPECIAL), SPECIAL)
    x = ordinary(1000, seed=1).abs()
    # a number has no product to compensate
    assert_same(public(x, alpha=1.0552), UNARY[public](x), x)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("derivative", ["approx", "exact"])
def test_compositions(alpha, derivative):
    x = torch.cat([SPECIAL, ordinary(2000, seed=1)])
    shift, options = offset(alpha), {"alpha": alpha, "derivative": derivative}
    assert_same(pam_exp(x, **options), reference.exp2(reference.mul(x, filled(x, LOG2E), shift)), x)
    assert_same(pam_log(x, **options), reference.div(reference.log2(x), filled(x, LOG2E), shift), x)
    for p in (0.3, -2.0, 0.5, 3):
        inner = reference.mul(reference.log2(x), filled(x, p), shift)
        assert_same(pam_pow(x, p, **options), reference.exp2(inner), x)


def test_powers_of_zero_and_of_negative_numbers():
    x = torch.tensor([0.0, -0.0, 2.0**-140, -1.0, INF, NAN])
    assert_same(pam_pow(x, 0.5), torch.tensor([0.0, 0.0, 0.0, NAN, INF, NAN]))
    assert_same(pam_pow(x, -1.0), torch.tensor([INF, INF, INF, NAN, 0.0, NAN]))


def test_exponentials_and_logarithms_of_infinities():
    x = torch.tensor([-INF, INF, NAN, 0.0])
    assert_same(pam_exp(x), torch.tensor([0.0, INF, NAN, 1.0]))
    assert_same(pam_log(x), torch.tensor([NAN, INF, NAN, -INF]))


@pytest.mark.parametrize("public", BINARY)
@pytest.mark.parametrize("shapes", [((3, 1), (4,)), ((2, 1, 5), (3, 1)), ((), (3,)), ((0, 3), (1, 3)), ((4,), ())])
def test_broadcasting(public, shapes):
    a, b = (ordinary(*shape, seed=i) for i, shape in enumerate(shapes))
    wide = [x.contiguous() for x in torch.broadcast_tensors(a, b)]
    assert_same(public(a, b), BINARY[public](*wide))


@pytest.mark.parametrize("public", BINARY)
def test_strides_do_not_matter(public):
    a, b = ordinary(6, 8, seed=1), ordinary(8, 6, seed=2).T
    assert_same(public(a, b), BINARY[public](a, b.contiguous()))
    assert_same(public(a[:, ::2], b[:, 1::2]), BINARY[public](a[:, ::2].contiguous(), b[:, 1::2].contiguous()))
    for function, truth in UNARY.items():
        assert_same(function(a.abs().T), truth(a.abs().T.contiguous()))


@pytest.mark.parametrize("public", BINARY)
def test_python_numbers_are_rounded_to_float32(public):
    x = ordinary(100, seed=1)
    for number in (0.1, LOG2E, 3, -7, 1 / 3):
        assert_same(public(x, number), public(x, filled(x, number)))
        assert_same(public(number, x), public(filled(x, number), x))
    y = x.bfloat16()
    assert_same(public(y, 0.1), public(y, filled(y, 0.1)))
    z = x.double()
    assert_same(public(z, 0.1), public(z, filled(z, 0.1)))


@pytest.mark.parametrize("public", [*BINARY, *UNARY, pam_exp, pam_log])
def test_bfloat16_is_computed_in_float32_and_rounded_once(public):
    a, b = ordinary(2000, seed=1).bfloat16(), ordinary(2000, seed=2).bfloat16()
    operands = (a, b) if public in BINARY else (a.abs(),)
    found, wide = public(*operands), public(*(x.float() for x in operands))
    assert_same(found, wide.bfloat16())
    if public in BINARY:  # and their sums of patterns need no rounding
        assert_same(found.float(), wide)


def test_a_power_in_bfloat16_is_rounded_once():
    x = ordinary(2000, seed=1, octaves=40).abs().bfloat16()
    assert_same(pam_pow(x, 0.3), pam_pow(x.float(), 0.3).bfloat16())


def test_float64():
    a, b = ordinary(1000, seed=1, dtype=torch.float64), ordinary(1000, seed=2, dtype=torch.float64)
    assert_same(pam_mul(a, b), reference.mul(a, b))
    with forced(None):  # no face wished for: there is one only
        assert_same(pam_div(a, b), reference.div(a, b))
        assert_same(pam_exp2(a), reference.exp2(a))


@given(st.floats(2.0**-29, 2.0**29, width=32))
@settings(deadline=None, max_examples=200)
def test_the_root_is_the_composition_without_its_rounding(x):
    x = torch.tensor([x])
    assert (pam_sqrt(x) / pam_pow(x, 0.5) - 1).abs().item() <= 1e-5


@given(st.integers(-20, 20), st.integers(-7, 7))
@settings(deadline=None, max_examples=100)
def test_powers_of_two_are_exact(k, p):
    x = torch.tensor([2.0**k])
    assert pam_log2(x).item() == k
    assert pam_exp2(torch.tensor([float(k)])).item() == 2.0**k
    # a whole number times another is not exact in general: it is as far as the mantissas allow
    assert same_bits(pam_pow(x, p), pam_exp2(pam_mul(torch.tensor([float(k)]), float(p))))
    assert pam_sqrt(x * x).item() == 2.0**k


# the error law (section 2)

GRID = 2048


def grid(points=GRID):
    """Numbers of one octave, mantissas equally spaced; exact in float32."""
    return 1 + torch.arange(points) / points


def square_grid():
    return pairs(grid())


def relative(found, truth):
    return (found.double() / truth.double() - 1).numpy()


def law(errors, low, high, tolerance=1e-6):
    assert errors.min() == pytest.approx(low, abs=tolerance)
    assert errors.max() == pytest.approx(high, abs=tolerance)


def means(errors, a, b):
    """Over mantissas equally likely, and over logarithms equally likely."""
    weight = (1 / (a.double() * b.double())).numpy()
    return errors.mean(), (errors * weight).sum() / weight.sum()


def test_error_of_products():
    a, b = square_grid()
    errors = relative(pam_mul(a, b), a.double() * b.double())
    law(errors, -1 / 9, 0)
    worst = errors.argmin()
    assert a[worst].item() == b[worst].item() == 1.5
    uniform, logarithmic = means(errors, a, b)
    assert uniform == pytest.approx(-0.0385, abs=1e-4) and logarithmic == pytest.approx(-0.0382, abs=1e-4)


def test_error_of_quotients():
    a, b = square_grid()
    errors = relative(pam_div(a, b), a.double() / b.double())
    law(errors, 0, 1 / 8)
    worst = errors.argmax()
    assert (a[worst].item(), b[worst].item()) == (1, 1.5)
    uniform, logarithmic = means(errors, a, b)
    assert uniform == pytest.approx(0.0410, abs=1e-4) and logarithmic == pytest.approx(0.0407, abs=1e-4)


def test_error_of_squares():
    x = grid(2**16)
    errors = relative(pam_mul(x, x), x.double() ** 2)
    law(errors, -1 / 9, 0)
    assert x[errors.argmin()].item() == 1.5
    assert errors.mean() == pytest.approx(-0.0383, abs=1e-4)


def test_error_of_exponentials():
    x = grid(2**16) - 1
    errors = relative(pam_exp2(x), torch.exp2(x.double()))
    law(errors, 0, 0.061476)
    assert x[errors.argmax()].item() == pytest.approx(1 / math.log(2) - 1, abs=1e-4)
    assert errors.mean() == pytest.approx(0.0407, abs=1e-4)


def test_error_of_logarithms():
    x = grid(2**16)
    errors = (pam_log2(x).double() - torch.log2(x.double())).numpy()
    law(errors, -0.086071, 0)
    assert x[errors.argmin()].item() == pytest.approx(1 / math.log(2), abs=1e-4)
    assert errors.mean() == pytest.approx(-0.0573, abs=1e-4)


def test_error_of_roots():
    x = torch.cat([grid(2**15), 2 * grid(2**15)])
    errors = relative(pam_sqrt(x), torch.sqrt(x.double()))
    law(errors, 0, 1.5 / math.sqrt(2) - 1)
    assert x[errors.argmax()].item() == 2


def test_alpha_centres_the_error_of_products():
    a, b = square_grid()
    errors = relative(pam_mul(a, b, alpha=1.0552), a.double() * b.double())
    law(errors, -0.0775, 0.0552, 1e-4)
    assert means(errors, a, b)[1] == pytest.approx(-0.0007, abs=1e-4)
    x, y = (torch.randn(1_000_000, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    for alpha, gain in ((None, 0.9623), (1.0552, 0.9998), (1.04, 0.989)):
        found, truth = pam_mul(x, y, alpha=alpha).double(), x.double() * y.double()
        assert ((found * truth).sum() / (truth * truth).sum()).item() == pytest.approx(gain, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_numpy_are_numbers(dtype):
    x = ordinary(50, seed=1).to(dtype)
    for number in (
        np.float32(1.7),
        np.float64(1.7),
        np.float16(1.7),
        np.int64(3),
        np.uint8(3),
        fractions.Fraction(3, 8),
    ):
        assert_same(pam_mul(x, number), pam_mul(x, float(number)))
        assert_same(pam_div(number, x), pam_div(float(number), x))
        assert_same(pam_pow(x, number), pam_pow(x, float(number)))
    with pytest.raises(TypeError, match="must be a tensor or a number"):
        pam_mul(x, np.bool_(True))
