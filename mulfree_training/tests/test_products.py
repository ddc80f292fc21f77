"""Matrix products, linear layers and convolutions: shapes, order of sums, powers of two, and both derivatives."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from common.kernels.dispatch import forced
from mulfree_training import reference
from mulfree_training.bits import offset
from mulfree_training.primitives import pam_mul
from mulfree_training.products import pam_conv2d, pam_linear, pam_matmul
from mulfree_training.tests.bitwise import ALPHAS, INF, assert_same, ordinary, powers, same_bits

RULES = ("approx", "exact")


@pytest.fixture(autouse=True)
def on_the_reference():
    with forced("reference"):
        yield


def gradients(function, *operands, grad):
    own = [x.detach().clone().requires_grad_() for x in operands]
    return torch.autograd.grad(function(*own), own, grad)


def in_order(a, b, alpha=None):
    """Products of (…, M, K) and (…, K, P) by broadcasting, added one by one from 0."""
    terms = pam_mul(a[..., :, :, None], b[..., None, :, :], alpha=alpha)
    total = terms.new_zeros(*terms.shape[:-2], terms.shape[-1])
    for k in range(terms.shape[-2]):
        total = total + terms[..., k, :]
    return total


SHAPES = [
    ((5,), (5,)), ((3, 5), (5,)), ((5,), (5, 4)), ((3, 5), (5, 4)), ((2, 3, 5), (5, 4)), ((2, 3, 5), (5,)),
    ((5,), (2, 5, 4)), ((2, 3, 5), (2, 5, 4)), ((3, 5), (2, 5, 4)), ((2, 1, 3, 5), (6, 5, 4)),
    ((2, 1, 3, 5), (1, 6, 5, 4)), ((2, 6, 3, 5), (5, 4)), ((1, 1), (1, 1)), ((2, 3, 1), (2, 1, 4)),
    ((3, 0), (0, 4)), ((0,), (0,)), ((2, 3, 0), (2, 0, 4)), ((2, 3, 0), (0, 4)), ((0, 5), (5, 4)), ((3, 5), (5, 0)),
    ((0, 3, 5), (0, 5, 4)), ((0, 3, 5), (5, 4)), ((0, 0, 0), (0, 0, 0)), ((0, 3, 5), (1, 5, 4)), ((0, 5), (5,)),
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes_are_those_of_matmul(shapes, rule):
    a, b = ordinary(*shapes[0], seed=1).requires_grad_(), ordinary(*shapes[1], seed=2).requires_grad_()
    out = pam_matmul(a, b, derivative=rule)
    assert out.shape == torch.matmul(a, b).shape and out.dtype == torch.float32
    out.backward(torch.ones_like(out))
    assert a.grad.shape == a.shape and b.grad.shape == b.shape
    left, right = (a[None] if a.dim() == 1 else a), (b[:, None] if b.dim() == 1 else b)
    assert_same(out.flatten(), in_order(left, right).flatten())
    if 0 in shapes[0] + shapes[1]:
        assert not out.any() and not a.grad.any() and not b.grad.any()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_alpha_is_in_every_product(alpha):
    a, b = ordinary(7, 33, seed=1), ordinary(33, 6, seed=2)
    assert_same(pam_matmul(a, b, alpha=alpha), in_order(a, b, alpha))


def test_sums_run_in_the_order_of_the_inner_dimension():
    large = 2.0**24
    a, ones = torch.tensor([[1.0, 1.0, large], [large, 1.0, 1.0], [1.0, large, -large]]), torch.ones(3, 1)
    assert pam_matmul(a, ones)[:, 0].tolist() == [large + 2, large, 0.0]


def test_sums_start_at_plus_zero():
    assert_same(pam_matmul(torch.tensor([[-0.0]]), torch.ones(1, 1)), torch.zeros(1, 1))


def test_special_values():
    a = torch.tensor([[INF, 1.0], [1e30, 1.0], [1e-30, 1e-30], [INF, 1.0], [2.0**-130, 0.0]])
    b = torch.tensor([[1.5, 0.0, 1e20, 1e-20], [1.5, 1.0, -INF, 1e-20]])
    found = pam_matmul(a, b)
    assert found[0, 0] == INF and found[0, 1].isnan() and found[0, 2].isnan() and found[1, 2].isnan()
    assert found[1, 0] > 1e30 and found[2, 3] == 0 and found[4, 0] == 0
    assert pam_matmul(torch.tensor([[1e30]]), torch.tensor([[-1e20]])).item() == -INF


@pytest.mark.parametrize("view", ["transposed", "every other", "expanded"])
@pytest.mark.parametrize("rule", RULES)
def test_strides_do_not_matter(view, rule):
    a = {
        "transposed": ordinary(2, 5, 3, seed=1).mT,
        "every other": ordinary(2, 6, 10, seed=1)[:, ::2, 1::2],
        "expanded": ordinary(1, 3, 5, seed=1).expand(2, 3, 5),
    }[view]
    b, g = ordinary(2, 4, 5, seed=2).mT, ordinary(2, 4, 3, seed=3).mT

    def function(a, b):
        return pam_matmul(a, b, derivative=rule)

    plain = [x.contiguous() for x in (a, b, g)]
    assert_same(function(a, b), function(*plain[:2]))
    truth = gradients(function, *plain[:2], grad=plain[2])
    for found, expected in zip(gradients(function, a, b, grad=g), truth, strict=True):
        assert_same(found, expected)


# derivatives


@pytest.mark.parametrize("alpha", ALPHAS[:3])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_the_approximate_rule_is_two_more_products(lead, alpha):
    a, b, g = ordinary(*lead, 4, 7, seed=1), ordinary(*lead, 7, 5, seed=2), ordinary(*lead, 4, 5, seed=3)
    ga, gb = gradients(lambda a, b: pam_matmul(a, b, alpha=alpha), a, b, grad=g)
    assert_same(ga, pam_matmul(g, b.mT, alpha=alpha))
    assert_same(gb, pam_matmul(a.mT, g, alpha=alpha))


def test_one_matrix_for_a_batch_gets_one_sum_over_all_rows():
    a, b, g = ordinary(3, 4, 7, seed=1), ordinary(7, 5, seed=2), ordinary(3, 4, 5, seed=3)
    for rule in RULES:
        found = gradients(lambda a, b, r=rule: pam_matmul(a, b, derivative=r), a, b, grad=g)
        truth = gradients(lambda a, b, r=rule: pam_matmul(a, b, derivative=r), a.flatten(0, 1), b, grad=g.flatten(0, 1))
        assert_same(found[0].flatten(0, 1), truth[0])
        assert_same(found[1], truth[1])


def test_a_broadcast_batch_gets_a_plain_sum():
    a, b, g = ordinary(1, 4, 7, seed=1), ordinary(3, 7, 5, seed=2), ordinary(3, 4, 5, seed=3)
    for rule in RULES:
        found = gradients(lambda a, b, r=rule: pam_matmul(a, b, derivative=r), a, b, grad=g)
        each = gradients(lambda a, b, r=rule: pam_matmul(a, b, derivative=r), a.repeat(3, 1, 1), b, grad=g)
        assert_same(found[0], each[0].sum(0, keepdim=True))
        assert_same(found[1], each[1])


@pytest.mark.parametrize("alpha", ALPHAS[:3])
def test_the_exact_rule_is_that_of_every_product(alpha):
    """Against autograd of `pam_mul`; powers of two as gradients make every sum exact, whatever its order."""
    a, b, g = ordinary(2, 6, 7, seed=1, octaves=3), ordinary(2, 7, 5, seed=2, octaves=3), powers(2, 6, 5, seed=3)

    def product(a, b):
        return pam_matmul(a, b, derivative="exact", alpha=alpha)

    def elementwise(a, b):
        return pam_mul(a[..., :, :, None], b[..., None, :, :], derivative="exact", alpha=alpha).sum(-2)

    truth = gradients(elementwise, a, b, grad=g)
    for found, expected in zip(gradients(product, a, b, grad=g), truth, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("rules", [*itertools.product(RULES, repeat=2)])
def test_pairs_of_rules(rules):
    a, b, g = ordinary(4, 7, seed=1), ordinary(7, 5, seed=2), ordinary(4, 5, seed=3)
    found = gradients(lambda a, b: pam_matmul(a, b, derivative=rules), a, b, grad=g)
    for i, rule in enumerate(rules):
        each = gradients(lambda a, b, r=rule: pam_matmul(a, b, derivative=r), a, b, grad=g)
        assert_same(found[i], each[i])
    both = [gradients(lambda a, b, r=rule: pam_matmul(a, b, derivative=r), a, b, grad=g) for rule in RULES]
    assert not same_bits(both[0][0], both[1][0]) and not same_bits(both[0][1], both[1][1])


@pytest.mark.parametrize("rule", RULES)
def test_powers_of_two_give_the_ordinary_product_and_its_gradients(rule):
    """Every product is exact then; sums differ from float64 by at most a rounding a term."""
    a, b, g = powers(6, 40, seed=1), ordinary(40, 5, seed=2), powers(6, 5, seed=3)
    found = [pam_matmul(a, b), *gradients(lambda a, b: pam_matmul(a, b, derivative=rule), a, b, grad=g)]
    x, y, z = a.double(), b.double(), g.double()
    truths = [(x, y), (z, y.mT), (x.mT, z)]
    if rule == "exact":  # slopes with respect to the powers of two know b's exponent only, or the next one
        truths[1] = (z, torch.ldexp(torch.ones_like(y), torch.frexp(y)[1] - 1).mT * y.mT.sign())
    for out, (left, right) in zip(found, truths, strict=True):
        bound = left.shape[1] * 2.0**-24 * (left.abs() @ right.abs())
        assert ((out.double() - left @ right).abs() <= bound).all()


@pytest.mark.parametrize("rule", RULES)
def test_only_what_needs_a_gradient_gets_one(rule):
    a, b = ordinary(4, 7, seed=1), ordinary(7, 5, seed=2).requires_grad_()
    out = pam_matmul(a, b, derivative=rule)
    out.backward(torch.ones_like(out))
    assert a.grad is None and b.grad is not None
    assert not pam_matmul(a, b.detach(), derivative=rule).requires_grad


def test_a_second_derivative_is_refused():
    a = ordinary(4, 4, seed=1).requires_grad_()
    y = pam_matmul(a, a)
    (g,) = torch.autograd.grad((y * y).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives of piecewise affine functions are not available"):
        g.sum().backward()


# other dtypes


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_has_exact_products_float32_sums_and_one_rounding(rule):
    a, b, g = ordinary(5, 64, seed=1).bfloat16(), ordinary(64, 6, seed=2).bfloat16(), ordinary(5, 6, seed=3).bfloat16()
    wide = [x.float() for x in (a, b, g)]
    assert_same(pam_mul(a[:, :1], b[:1]).float(), pam_mul(wide[0][:, :1], wide[1][:1]))

    def function(a, b):
        return pam_matmul(a, b, derivative=rule)

    assert_same(function(a, b), function(*wide[:2]).bfloat16())
    truth = gradients(function, *wide[:2], grad=wide[2])
    for found, expected in zip(gradients(function, a, b, grad=g), truth, strict=True):
        assert_same(found, expected.bfloat16())


def test_float64():
    a, b = ordinary(5, 9, seed=1, dtype=torch.float64), ordinary(9, 6, seed=2, dtype=torch.float64)
    assert_same(pam_matmul(a, b), in_order(a, b))
    assert_same(pam_matmul(a, b, alpha=1.0552)[None], reference.matmul(a[None], b[None], offset(1.0552)))


# linear and convolution


def test_linear():
    x, w, b, g = ordinary(2, 3, 7, seed=1), ordinary(5, 7, seed=2), ordinary(5, seed=3), ordinary(2, 3, 5, seed=4)
    assert_same(pam_linear(x, w), pam_matmul(x, w.mT))
    assert_same(pam_linear(x, w, b), pam_matmul(x, w.mT) + b)
    assert_same(pam_linear(x[0, 0], w, b), pam_matmul(x[0, 0], w.mT) + b)
    assert_same(pam_linear(x, w, alpha=1.0552), pam_matmul(x, w.mT, alpha=1.0552))
    for rule in RULES:
        found = gradients(lambda x, w, b, r=rule: pam_linear(x, w, b, derivative=r), x, w, b, grad=g)
        truth = gradients(lambda x, w, r=rule: pam_matmul(x, w.mT, derivative=r), x, w, grad=g)
        for own, expected in zip(found, (*truth, g.sum((0, 1))), strict=True):
            assert_same(own, expected)


GEOMETRIES = [
    {}, {"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2},
    {"stride": (2, 1), "padding": (0, 2)},
    {"dilation": (1, 2), "padding": (2, 1), "stride": (1, 2)}, {"groups": 2}, {"groups": 4, "padding": 1},
    {"groups": 2, "stride": 2, "padding": (1, 0), "dilation": (2, 1)},
]  # fmt: skip


def whole(*shape, seed):
    """Whole numbers of a few bits, so that every sum of them is exact."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("filters", [(8, 3, 2), (4, 1, 1), (12, 2, 3)])
def test_convolutions_by_powers_of_two_are_ordinary_ones(geometry, filters):
    x = whole(2, 4, 7, 8, seed=1)
    w = powers(filters[0], 4 // geometry.get("groups", 1), *filters[1:], seed=2, octaves=2)
    b = whole(filters[0], seed=3)
    truth = F.conv2d(x, w, b, **geometry)
    assert torch.equal(pam_conv2d(x, w, b, **geometry), truth)
    assert torch.equal(pam_conv2d(x, w, **geometry), F.conv2d(x, w, **geometry))
    g = powers(*truth.shape, seed=4, octaves=2)
    found = gradients(lambda *o: pam_conv2d(*o, **geometry), x, w, b, grad=g)
    for own, expected in zip(found, gradients(lambda *o: F.conv2d(*o, **geometry), x, w, b, grad=g), strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("rule", RULES)
def test_a_convolution_adds_over_channels_rows_and_columns_in_order(rule):
    x, w, g = ordinary(2, 3, 4, 5, seed=1), ordinary(4, 3, 2, 3, seed=2), ordinary(2, 4, 3, 3, seed=3)
    found = pam_conv2d(x, w)
    total = torch.zeros(2, 4, 3, 3)
    for c, i, j in itertools.product(range(3), range(2), range(3)):
        total = total + pam_mul(x[:, c, None, i : i + 3, j : j + 3], w[:, c, i, j, None, None])
    assert_same(found, total)
    columns = F.unfold(x, (2, 3)).mT.flatten(0, 1)  # (images and positions, 18)
    rows = g.flatten(2).mT.flatten(0, 1)
    truth = gradients(lambda x, w: pam_matmul(x, w.mT, derivative=rule), columns, w.flatten(1), grad=rows)
    own = gradients(lambda x, w: pam_conv2d(x, w, derivative=rule), x, w, grad=g)
    assert_same(own[1], truth[1].view_as(w))
    assert_same(own[0], F.fold(truth[0].unflatten(0, (2, 9)).mT, (4, 5), (2, 3)))


def test_a_group_sees_its_channels_only():
    x, w = ordinary(2, 4, 5, 5, seed=1), ordinary(6, 2, 3, 3, seed=2)
    halves = [pam_conv2d(x[:, 2 * i : 2 * i + 2], w[3 * i : 3 * i + 3], alpha=1.0552) for i in range(2)]
    assert_same(pam_conv2d(x, w, groups=2, alpha=1.0552), torch.cat(halves, 1))


@pytest.mark.parametrize("multiple", [1, 2])
@pytest.mark.parametrize("rule", [*RULES, RULES, RULES[::-1]], ids=str)
def test_every_channel_may_have_filters_of_its_own(rule, multiple):
    x, w = ordinary(2, 4, 5, 6, seed=1), ordinary(4 * multiple, 1, 2, 3, seed=2)
    options = {"derivative": rule, "alpha": 1.0552, "stride": (2, 1), "padding": 1, "dilation": (1, 2)}
    out = pam_conv2d(x, w, groups=4, **options)
    g = ordinary(*out.shape, seed=3)
    found = gradients(lambda x, w: pam_conv2d(x, w, groups=4, **options), x, w, grad=g)
    each = [*zip(x.split(1, 1), w.split(multiple), g.split(multiple, 1), strict=True)]
    assert_same(out, torch.cat([pam_conv2d(x, w, **options) for x, w, _ in each], 1))
    alone = [gradients(lambda x, w: pam_conv2d(x, w, **options), x, w, grad=g) for x, w, g in each]
    for own, parts, dim in zip(found, zip(*alone, strict=True), (1, 0), strict=True):
        assert_same(own, torch.cat(parts, dim))


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (1, 3)])
@pytest.mark.parametrize("dilation", [1, (2, 3)])
def test_padding_by_a_word(shape, dilation):
    x, w = whole(2, 4, 9, 11, seed=1), powers(6, 4, *shape, seed=2, octaves=2)
    for padding in ("same", "valid"):
        truth = F.conv2d(x, w, padding=padding, dilation=dilation)
        assert torch.equal(pam_conv2d(x, w, padding=padding, dilation=dilation), truth)


def test_bad_words_for_the_padding():
    x, w = ordinary(2, 4, 5, 5, seed=1), ordinary(6, 4, 3, 3, seed=2)
    with pytest.raises(ValueError, match="padding='full': must be same, valid, a number or a pair of them"):
        pam_conv2d(x, w, padding="full")
    with pytest.raises(ValueError, match=r"padding='same': must go with a stride of 1, got \(2, 1\)"):
        pam_conv2d(x, w, None, (2, 1), "same")


def test_empty_batches_and_bfloat16_convolutions():
    x, w = ordinary(2, 4, 5, 5, seed=1), ordinary(6, 4, 3, 3, seed=2)
    assert pam_conv2d(x[:0], w).shape == (0, 6, 3, 3)
    assert_same(
        pam_conv2d(x.bfloat16(), w.bfloat16()), pam_conv2d(x.bfloat16().float(), w.bfloat16().float()).bfloat16()
    )
    assert pam_linear(torch.zeros(0, 3), torch.zeros(4, 3), torch.zeros(4)).shape == (0, 4)
    assert_same(pam_linear(torch.zeros(2, 0), torch.zeros(4, 0), torch.ones(4)), torch.ones(2, 4))
