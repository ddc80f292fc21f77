"""Softmax, log-softmax, layer norm, cross-entropy and dropout: their formulas, derivatives and invariants."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from common.kernels.dispatch import forced
from mulfree_training import reference
from mulfree_training.functional import (
    pam_dropout,
    pam_layer_norm,
    pam_log_softmax,
    pam_softmax,
)
from mulfree_training.primitives import pam_div, pam_exp2, pam_log2, pam_mul, pam_sqrt
from mulfree_training.tests.bitwise import ALPHAS, INF, assert_same, inside, mantissa, same_bits

LOG2E = math.log2(math.e)
RULES = ("approx", "exact")
N = 37


@pytest.fixture(autouse=True)
def on_the_reference():
    with forced("reference"):
        yield


def gaussian(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(function, *operands, grad):
    own = [x.detach().clone().requires_grad_() for x in operands]
    return torch.autograd.grad(function(*own), own, grad)


# independent compositions: the public primitives, their own derivatives, and sums in the one order of `row_sum`


class Sum(torch.autograd.Function):
    """(R, n) -> (R, 1)."""

    @staticmethod
    def forward(ctx, x):
        ctx.n = x.shape[-1]
        return reference.row_sum(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.expand(-1, ctx.n)


class Spread(torch.autograd.Function):
    """(R, 1) -> (R, n), whose derivative is the sum in that order."""

    @staticmethod
    def forward(ctx, x, n):
        return x.expand(-1, n)

    @staticmethod
    def backward(ctx, grad):
        return reference.row_sum(grad), None


def softmax(x, **o):
    u = pam_mul(x, LOG2E, **o)
    e = pam_exp2(u - u.detach().amax(-1, keepdim=True).floor(), **o)
    return pam_div(e, Spread.apply(Sum.apply(e), x.shape[-1]), **o)


def log_softmax(x, lse_log2=None, **o):
    u = pam_mul(x, LOG2E, **o)
    top = u.detach().amax(-1, keepdim=True).floor()
    total = Sum.apply(pam_exp2(u - top, **o))
    rule = {"derivative": lse_log2 or o["derivative"], "alpha": o["alpha"]}
    return x - Spread.apply(pam_div(top + pam_log2(total, **rule), LOG2E, **o), x.shape[-1])


def layer_norm(x, weight=None, bias=None, eps=1e-5, **o):
    n = x.shape[-1]
    z = x - Spread.apply(pam_div(Sum.apply(x), n, **o), n)
    y = z.clone()  # both gradients of the square meet here, before they meet the quotient's
    d = pam_sqrt(pam_div(Sum.apply(pam_mul(y, y, **o)), n, **o) + eps, **o)
    out = pam_div(z, Spread.apply(d, n), **o)
    out = out if weight is None else pam_mul(out, weight, **o)
    return out if bias is None else out + bias


def matches(ours, composed, *operands, grad):
    assert_same(ours(*operands), composed(*operands))
    truth = gradients(composed, *operands, grad=grad)
    for found, expected in zip(gradients(ours, *operands, grad=grad), truth, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("alpha", ALPHAS[:3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_softmax_is_its_composition(scale, rule, alpha):
    x, g, o = gaussian(20, N, scale=scale), gaussian(20, N, seed=1), {"derivative": rule, "alpha": alpha}
    matches(lambda x: pam_softmax(x, **o), lambda x: softmax(x, **o), x, grad=g)


@pytest.mark.parametrize("lse_log2", [None, *RULES])
@pytest.mark.parametrize("alpha", ALPHAS[:3])
@pytest.mark.parametrize("rule", RULES)
def test_log_softmax_is_its_composition(rule, alpha, lse_log2):
    x, g, o = gaussian(20, N, scale=3), gaussian(20, N, seed=1), {"derivative": rule, "alpha": alpha}
    if rule == "exact" and lse_log2 == "approx":
        lse_log2 = "exact"  # the exact rule is never made less exact
    matches(lambda x: pam_log_softmax(x, lse_log2=lse_log2, **o), lambda x: log_softmax(x, lse_log2, **o), x, grad=g)


@pytest.mark.parametrize("alpha", ALPHAS[:3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("parts", [0, 1, 2])
def test_layer_norm_is_its_composition(parts, rule, alpha):
    x, g, o = 1 + gaussian(20, N, scale=3), gaussian(20, N, seed=1), {"derivative": rule, "alpha": alpha}
    weights = [gaussian(N, seed=2), gaussian(N, seed=3)][:parts]
    matches(lambda x, *w: pam_layer_norm(x, (N,), *w, **o), lambda x, *w: layer_norm(x, *w, **o), x, *weights, grad=g)


def test_a_bias_alone():
    x, bias, g = gaussian(5, N), gaussian(N, seed=1), gaussian(5, N, seed=2)
    assert_same(pam_layer_norm(x, (N,), None, bias), pam_layer_norm(x, (N,)) + bias)
    found = gradients(lambda x, b: pam_layer_norm(x, (N,), None, b), x, bias, grad=g)
    assert_same(found[0], gradients(lambda x: pam_layer_norm(x, (N,)), x, grad=g)[0])
    assert_same(found[1], g.sum(0))


# exact derivatives are those of the functions themselves


def away_from_kinks(*stages):
    return torch.stack([inside(mantissa(x), 1e-4).all(-1) for x in stages]).all(0)


def rows_of(make, stages, wanted):
    """Rows none of whose intermediate results is near the end of a segment."""
    x = make()
    x = x[away_from_kinks(*stages(x))][:wanted]
    assert len(x) == wanted
    return x.requires_grad_()


def softmax_stages(x):
    u = pam_mul(x, LOG2E)
    e = pam_exp2(u - u.amax(-1, keepdim=True).floor())
    total = e.sum(-1, keepdim=True)
    return x, u, e, total, pam_div(torch.ones_like(total), total), pam_div(e, total)


def test_softmax_has_the_slope_of_its_segment():
    x = rows_of(lambda: gaussian(200, 5, dtype=torch.float64), softmax_stages, 10)
    assert gradcheck(lambda x: pam_softmax(x, derivative="exact"), (x,), eps=1e-7, atol=1e-6, rtol=1e-6)


def test_log_softmax_has_the_slope_of_its_segment():
    def stages(x):
        total = softmax_stages(x)[3]
        u = pam_mul(x, LOG2E)
        bits = u.amax(-1, keepdim=True).floor() + pam_log2(total)
        return *softmax_stages(x)[:4], bits, pam_div(bits, LOG2E)

    x = rows_of(lambda: gaussian(200, 5, dtype=torch.float64), stages, 10)
    assert gradcheck(lambda x: pam_log_softmax(x, derivative="exact"), (x,), eps=1e-7, atol=1e-6, rtol=1e-6)


def test_layer_norm_has_the_slope_of_its_segment():
    w, b = gaussian(5, seed=8, dtype=torch.float64), gaussian(5, seed=9, dtype=torch.float64)

    def stages(x):
        total = x.sum(-1, keepdim=True)
        z = x - pam_div(total, 5)
        squares = pam_mul(z, z).sum(-1, keepdim=True)
        variance = pam_div(squares, 5) + 1e-5
        d = pam_sqrt(variance)
        y = pam_div(z, d)
        return total, pam_div(total, 5), z, pam_mul(z, z), squares, variance - 1e-5, variance, d, y, pam_mul(y, w)

    x = rows_of(lambda: 1 + gaussian(200, 5, dtype=torch.float64), stages, 10)
    function = lambda *o: pam_layer_norm(o[0], (5,), *o[1:], derivative="exact")  # noqa: E731
    own = x, w.requires_grad_(), b.requires_grad_()
    assert gradcheck(function, own, eps=1e-7, atol=1e-6, rtol=1e-6)


# softmax


def test_integer_shifts_change_nothing():
    u = torch.randint(-4096, 4096, (50, N), generator=torch.Generator().manual_seed(1)) / 1024
    c = torch.tensor(LOG2E)
    for n in (1.0, -3.0, 17.0, 100.0):
        # what is shifted is PAM(x, log2 e); of these patterns there is an x for every u
        xs = [reference.div(v, c.expand_as(v)) for v in (u, u + n)]
        kept = (reference.mul(xs[1], c.expand_as(u)) == u + n) & (reference.mul(xs[0], c.expand_as(u)) == u)
        assert kept.all()
        assert_same(pam_softmax(xs[1]), pam_softmax(xs[0]))
        assert not same_bits(pam_softmax(reference.div(u + 0.5, c.expand_as(u))), pam_softmax(xs[0]))


@pytest.mark.parametrize("rule", RULES)
def test_masked_entries_are_zero_and_get_nothing(rule):
    x, g = gaussian(30, N), gaussian(30, N, seed=1)
    masked = gaussian(30, N, seed=2) > 0
    masked[4], masked[5], masked[5, 7] = True, True, False
    y = x.masked_fill(masked, -INF)
    for function in (pam_softmax, pam_log_softmax):
        (gx,) = gradients(lambda x, f=function: f(x, derivative=rule), y, grad=g)
        assert (gx[masked] == 0).all() and gx.isfinite().all() and gx[~masked].any()
    out = pam_softmax(y)
    assert (out[masked] == 0).all() and out.isfinite().all()
    assert_same(out[4], torch.zeros(N))
    assert out[5, 7] == 1 and out[5].sum() == 1
    # a row is what is left of it
    kept = ~masked[0]
    assert torch.allclose(out[0][kept], pam_softmax(x[0][kept]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("function", [pam_softmax, pam_log_softmax, lambda x, **o: pam_layer_norm(x, (N,), **o)])
@pytest.mark.parametrize("rule", RULES)
def test_rows_are_independent(function, rule):
    x, g = gaussian(6, N), gaussian(6, N, seed=1)
    others = torch.cat([x, 1e4 * gaussian(3, N, seed=2), torch.full((1, N), 1e4)])
    order = torch.tensor([5, 0, 9, 3, 1, 6, 2, 7, 4, 8])
    mixed, grad = others[order], torch.cat([g, gaussian(4, N, seed=3)])[order]
    place = order.argsort()[:6]
    assert_same(function(mixed)[place], function(x))
    found, truth = (
        gradients(lambda x: function(x, derivative=rule), *o[:1], grad=o[1])[0] for o in ((mixed, grad), (x, g))
    )
    assert_same(found[place], truth)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 100.0])
def test_rows_of_softmax_add_up_to_a_little_more_than_one(scale):
    sums = pam_softmax(gaussian(500, 64, scale=scale)).double().sum(-1)
    assert sums.min() >= 1 - 1e-6 and sums.max() <= 1.125
    if scale == 1.0:
        assert 1.03 < sums.mean() < 1.07


def test_softmax_of_far_values():
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [200.0, 0.0, 0.0], [3e38, 0.0, -3e38]])
    out = pam_softmax(x)
    assert out[0].tolist() == out[2].tolist() == [1, 0, 0] and out[1].sum() == pytest.approx(1, abs=0.125)
    assert pam_softmax(torch.tensor([0.0, float("nan")])).isnan().all()
    assert pam_softmax(torch.tensor([[3.0]])).item() == 1


@pytest.mark.parametrize("function", [pam_softmax, pam_log_softmax])
@pytest.mark.parametrize("rule", RULES)
def test_any_dimension(function, rule):
    x, g = gaussian(3, 4, 5), gaussian(3, 4, 5, seed=1)
    for dim in (0, 1, 2, -1, -2, -3):
        moved, grad = (y.movedim(dim, -1).contiguous() for y in (x, g))
        assert_same(function(x, dim), function(moved).movedim(-1, dim))
        (found,) = gradients(lambda x, d=dim: function(x, d, derivative=rule), x, grad=g)
        (truth,) = gradients(lambda x: function(x, derivative=rule), moved, grad=grad)
        assert_same(found, truth.movedim(-1, dim))
    assert function(torch.zeros(3, 0)).shape == (3, 0) and function(torch.zeros(0, 3)).shape == (0, 3)


def test_functions_are_near_those_of_torch():
    """Within the errors of their operations: quotient 1/8, exponential 6.15 %, its argument 1/9 of x."""
    x = gaussian(200, 64, scale=0.05)
    assert (pam_softmax(x) / torch.softmax(x, -1) - 1).abs().max() < 1 / 8 + 0.0615
    # log2 is at most .0861 low, the exponentials in the sum 6.15 % high, and the quotient 1/8 high
    assert (pam_log_softmax(x) / torch.log_softmax(x, -1) - 1).abs().max() < 1 / 8 + 0.0615
    y = gaussian(200, 256)
    ratio = pam_layer_norm(y, (256,)).square().mean().sqrt() / F.layer_norm(y, (256,)).square().mean().sqrt()
    assert ratio.item() == pytest.approx(1.033, abs=0.01)


def test_the_exact_logarithm_is_another_gradient():
    x, g = gaussian(20, N, scale=3), gaussian(20, N, seed=1)
    found = [gradients(lambda x, r=r: pam_log_softmax(x, lse_log2=r), x, grad=g)[0] for r in (None, *RULES)]
    assert_same(found[0], found[1])
    assert not same_bits(found[1], found[2])


# layer norm


@pytest.mark.parametrize("rule", RULES)
def test_powers_of_two_leave_a_layer_norm_without_eps_unchanged(rule):
    x, g, w = gaussian(20, N), gaussian(20, N, seed=1), gaussian(N, seed=2)

    def function(x, w):
        return pam_layer_norm(x, (N,), w, eps=0.0, derivative=rule)

    truth = function(x, w)
    for k in (-7, 1, 12):
        assert_same(function(torch.ldexp(x, torch.tensor(k)), w), truth)
        found = gradients(function, torch.ldexp(x, torch.tensor(k)), w, grad=g)
        gx, gw = gradients(function, x, w, grad=g)
        assert_same(found[0], torch.ldexp(gx, torch.tensor(-k)))
        assert_same(found[1], gw)
    assert not same_bits(function(1.5 * x, w), truth)


def test_eps_is_added_to_the_variance():
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0]])  # variance 1
    assert_same(pam_layer_norm(x, (4,), eps=3.0), x / 2)
    assert_same(pam_layer_norm(torch.zeros(1, 4), (4,)), torch.zeros(1, 4))
    assert pam_layer_norm(torch.zeros(1, 4), (4,), eps=0.0).isnan().all()


def test_several_dimensions_are_one_row():
    x, w, b = gaussian(3, 4, 5), gaussian(4, 5, seed=1), gaussian(4, 5, seed=2)
    flat = pam_layer_norm(x.view(3, 20), (20,), w.view(20), b.view(20))
    assert_same(pam_layer_norm(x, (4, 5), w, b), flat.view(3, 4, 5))
    assert_same(pam_layer_norm(x.mT.contiguous().mT, [4, 5], w, b), flat.view(3, 4, 5))
    assert_same(pam_layer_norm(x[0, 0], (5,)), pam_layer_norm(x[0, 0][None], (5,))[0])
    assert pam_layer_norm(torch.zeros(0, 5), (5,)).shape == (0, 5)
    assert pam_layer_norm(torch.zeros(3, 0), (0,)).shape == (3, 0)


@pytest.mark.parametrize("function", [pam_softmax, pam_log_softmax, lambda x: pam_layer_norm(x, (N,))])
def test_bfloat16_is_computed_in_float32_and_rounded_once(function):
    x, g = gaussian(20, N).bfloat16(), gaussian(20, N, seed=1).bfloat16()
    assert_same(function(x), function(x.float()).bfloat16())
    assert_same(gradients(function, x, grad=g)[0], gradients(function, x.float(), grad=g.float())[0].bfloat16())


def test_second_derivatives_are_refused():
    for function in (pam_softmax, pam_log_softmax, lambda x: pam_layer_norm(x, (N,))):
        x = gaussian(2, N).requires_grad_()
        (g,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives of piecewise affine functions are not available"):
            g.sum().backward()


# dropout


def test_dropout():
    x, g = gaussian(100, 100), gaussian(100, 100, seed=1)
    for p in (0.5, 0.75, 0.3):
        torch.manual_seed(5)
        kept = torch.rand_like(x) >= p
        scaled, of_scaled = pam_mul(x, 1 / (1 - p)), pam_mul(g, 1 / (1 - p))
        torch.manual_seed(5)
        assert_same(pam_dropout(x, p), scaled.where(kept, 0.0))
        torch.manual_seed(5)
        assert_same(gradients(lambda x, p=p: pam_dropout(x, p), x, grad=g)[0], of_scaled.where(kept, 0.0))
        assert kept.float().mean().item() == pytest.approx(1 - p, abs=0.02)
        if p != 0.3:
            assert_same(scaled, x / (1 - p))
    assert_same(pam_dropout(x, 0.5, training=False), x)
    assert_same(pam_dropout(x, 0.0), x)
