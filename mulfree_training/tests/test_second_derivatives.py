"""Differentiating twice is an error, first derivatives are silent however they are asked for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

from mulfree_training.functional import pam_cross_entropy, pam_layer_norm, pam_log_softmax, pam_softmax
from mulfree_training.modules import PAMLayerNorm, PAMLinear
from mulfree_training.primitives import pam_div, pam_exp, pam_exp2, pam_log, pam_log2, pam_mul, pam_pow, pam_sqrt
from mulfree_training.products import pam_conv2d, pam_matmul
from mulfree_training.tests.bitwise import assert_same, ordinary

X = ordinary(3, 4, seed=1, octaves=2).abs()
ROW = ordinary(4, seed=2, octaves=2)
FUNCTIONS = {
    "mul": lambda x, **o: pam_mul(x, x, **o),
    "div": lambda x, **o: pam_div(x, x, **o),
    "exp2": pam_exp2,
    "log2": pam_log2,
    "exp": pam_exp,
    "log": pam_log,
    "sqrt": pam_sqrt,
    "pow": lambda x, **o: pam_pow(x, 0.3, **o),
    "matmul": lambda x, **o: pam_matmul(x, x.mT, **o),
    "conv2d": lambda x, **o: pam_conv2d(x[None, None], x[None, None, :2, :2], **o),
    "softmax": pam_softmax,
    "log_softmax": pam_log_softmax,
    "layer_norm": lambda x, **o: pam_layer_norm(x, (4,), ROW, **o),
    "cross_entropy": lambda x, **o: pam_cross_entropy(x, torch.tensor([1, 0, 3]), **o),
}
NAMES = pytest.mark.parametrize("name", FUNCTIONS)
RULES = pytest.mark.parametrize("rule", ["approx", "exact"])


def refused():
    return pytest.raises(RuntimeError, match="^second derivatives of piecewise affine functions are not available")


def total(name, rule="approx"):
    return lambda x: FUNCTIONS[name](x, derivative=rule).sum()


@RULES
@NAMES
def test_what_ends_in_a_sum_is_refused_too(name, rule):
    x = X.clone().requires_grad_()
    (first,) = grad(total(name, rule)(x) + (x**3).sum(), x, create_graph=True)
    with refused():
        grad(first.sum(), x)
    with refused():
        torch.autograd.functional.hessian(total(name, rule), X)


@RULES
@NAMES
def test_transforms_of_transforms_are_refused(name, rule):
    first = torch.func.grad(total(name, rule))
    with refused():
        torch.func.jacrev(first)(X)
    with refused():
        torch.vmap(torch.func.jacrev(first))(torch.stack([X, X]))
    with refused():
        torch.func.grad(lambda x: torch.vmap(first)(x).sum())(torch.stack([X, X]))
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.hessian(total(name, rule))(X)


def test_one_operand_may_be_the_first_and_another_the_second():
    with refused():
        torch.func.grad(lambda w: torch.func.grad(lambda x: pam_mul(x, w).sum())(X).sum())(X)


def test_a_gradient_penalty_is_refused():
    layer, x = PAMLinear(4, 2), X.clone().requires_grad_()
    (first,) = grad(layer(torch.tanh(x)).sum(), x, create_graph=True)
    with refused():
        first.square().sum().backward()
    # also where the network's input needs no gradient
    (first,) = grad(F.relu(layer(X)).sum(), layer.weight, create_graph=True)
    with refused():
        first.square().sum().backward()


@RULES
@NAMES
def test_first_derivatives_are_silent_and_the_same(name, rule):
    function = total(name, rule)
    x = X.clone().requires_grad_()
    (truth,) = grad(function(x), x)
    (kept,) = grad(function(x), x, create_graph=True)
    assert_same(kept, truth)
    assert_same(torch.func.grad(function)(X), truth)
    assert_same(torch.vmap(torch.func.grad(function))(torch.stack([X, X]))[1], truth)
    assert_same(torch.func.jacrev(function)(X), truth)
    assert_same(grad(function(x * 1), x, create_graph=True)[0], truth)
    for reentrant in (False, True):
        own = X.clone().requires_grad_()
        checkpoint(function, own, use_reentrant=reentrant).backward(create_graph=True)
        assert_same(own.grad, truth)


def test_other_ways_to_a_second_derivative_stay_open():
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    first, other = grad(pam_mul(x, x).sum() + (y**3).sum(), (x, y), create_graph=True)
    assert_same(grad(other.sum(), y)[0], 6 * X)
    assert first.requires_grad


def test_gradients_that_keep_their_graph_are_ordinary_gradients():
    net = nn.Sequential(PAMLinear(4, 4), PAMLayerNorm(4), PAMLinear(4, 2))
    net(X).sum().backward(create_graph=True)
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert all(not x.grad.requires_grad and not x.grad.any() for x in net.parameters())


def test_compiled_first_derivatives_are_silent():
    torch.compiler.reset()
    function = total("mul")
    compiled = torch.compile(torch.func.grad(function), fullgraph=True, backend="aot_eager")
    assert_same(compiled(X), torch.func.grad(function)(X))
