"""PyTorch's default dtype and device have no say in what float32 tensors give."""

import contextlib

import pytest
import torch
from torch import nn

from mulfree_training.attention import PAMAttention, pam_attention
from mulfree_training.functional import (
    pam_cross_entropy,
    pam_dropout,
    pam_layer_norm,
    pam_log_softmax,
    pam_softmax,
)
from mulfree_training.modules import (
    PAMGELU,
    PAMConv1d,
    PAMConv2d,
    PAMCrossEntropy,
    PAMDropout,
    PAMLayerNorm,
    PAMLinear,
    PAMLogSoftmax,
    PAMSoftmax,
)
from mulfree_training.operators import FACES, face
from mulfree_training.optim import PAMSGD, PAMAdamW
from mulfree_training.primitives import pam_div, pam_exp, pam_exp2, pam_log, pam_log2, pam_mul, pam_pow, pam_sqrt
from mulfree_training.products import pam_conv2d, pam_linear, pam_matmul
from mulfree_training.tests.bitwise import assert_same, ordinary

X = ordinary(6, 8, seed=1, octaves=2)
W = ordinary(8, 8, seed=2, octaves=2)
ROW = ordinary(8, seed=3, octaves=2)
COLUMNS = ordinary(8, 6, seed=4, octaves=2).mT  # strided: the kernels lay out the result anew
LONG = ordinary(2, 5000, seed=5, octaves=2)  # rows for which the kernels need memory of their own
SQUARES, KERNELS = ordinary(2, 4, 5, 5, seed=6, octaves=2), ordinary(4, 2, 3, 3, seed=7, octaves=2)
LABELS = torch.tensor([1, 0, 4, 2, 7, 7])

FUNCTIONS = {
    "mul": lambda **o: pam_mul(X, ROW, **o),
    "mul strided": lambda **o: pam_mul(COLUMNS, X, **o),
    "mul number": lambda **o: pam_mul(X, 1.7, **o),
    "div": lambda **o: pam_div(X, ROW, **o),
    "exp2": lambda **o: pam_exp2(X, **o),
    "log2": lambda **o: pam_log2(X.abs(), **o),
    "exp": lambda **o: pam_exp(X, **o),
    "log": lambda **o: pam_log(X.abs(), **o),
    "sqrt": lambda **o: pam_sqrt(X.abs(), **o),
    "pow": lambda **o: pam_pow(X.abs(), 0.3, **o),
    "matmul": lambda **o: pam_matmul(X, W, **o),
    "linear": lambda **o: pam_linear(COLUMNS, W, ROW, **o),
    "conv2d": lambda **o: pam_conv2d(SQUARES, KERNELS, groups=2, padding="same", **o),
    "softmax": lambda **o: pam_softmax(X, **o),
    "softmax of columns": lambda **o: pam_softmax(X, 0, **o),
    "log_softmax": lambda **o: pam_log_softmax(LONG, **o),
    "layer_norm": lambda **o: pam_layer_norm(COLUMNS, (8,), ROW, ROW, **o),
    "cross_entropy": lambda **o: pam_cross_entropy(X, LABELS, label_smoothing=0.1, **o),
    "dropout": lambda **o: pam_dropout(X, 0.3, **o),
    "attention": lambda **o: pam_attention(X, X, X, is_causal=True, **o),
}
MODULES = {
    "linear": lambda **o: PAMLinear(8, 3, dtype=torch.float32, **o)(X),
    "conv1d": lambda **o: PAMConv1d(6, 4, 3, padding="same", dtype=torch.float32, **o)(X[None]),
    "conv2d": lambda **o: PAMConv2d(4, 4, 3, groups=4, dtype=torch.float32, **o)(SQUARES),
    "layer_norm": lambda **o: PAMLayerNorm(8, dtype=torch.float32, **o)(X),
    "softmax": lambda **o: PAMSoftmax(**o)(X),
    "log_softmax": lambda **o: PAMLogSoftmax(**o)(X),
    "dropout": lambda **o: PAMDropout(0.3, **o)(X),
    "gelu": lambda **o: PAMGELU(**o)(X),
    "cross_entropy": lambda **o: PAMCrossEntropy(label_smoothing=0.1, **o)(X, LABELS),
    "attention": lambda **o: PAMAttention(8, 2, batch_first=True, dtype=torch.float32, **o)(X[None], X[None], X[None])[
        0
    ],
}
OPTIMIZERS = {
    "adamw": lambda p: PAMAdamW(p, 0.01),
    "adamw pam": lambda p: PAMAdamW(p, 0.01, scalars="pam"),
    "adamw one by one": lambda p: PAMAdamW(p, 0.01, foreach=False),
    "sgd": lambda p: PAMSGD(p, 0.01, 0.9, 0.1, nesterov=True),
}
INPUTS = (X, W, ROW, COLUMNS, LONG, SQUARES, KERNELS)


@contextlib.contextmanager
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def with_gradients():
    for x in INPUTS:
        x.requires_grad_()
    yield
    for x in INPUTS:
        x.requires_grad_(False)


def outcome(function, dtype, **options):
    """The result, and the gradients of everything that it depends on."""
    torch.manual_seed(0)
    with default(dtype):
        out = function(**options)
        found = torch.autograd.grad(out, INPUTS, torch.ones_like(out), allow_unused=True)
    return [out, *(x for x in found if x is not None)]


def step(make, dtype):
    params = [nn.Parameter(X.detach().clone()), nn.Parameter(SQUARES.detach().to(memory_format=torch.channels_last))]
    with default(dtype):
        optimizer = make(params)
        for _ in range(300):  # more than bfloat16 could count to
            for param in params:
                param.grad = torch.full_like(param, 0.3)
            optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values()]
    return [*params, *states]


def same(found, truth):
    assert len(found) == len(truth) > 0
    for own, expected in zip(found, truth, strict=True):
        assert_same(own, expected)


@pytest.mark.parametrize("rule", ["approx", "exact"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, rule):
    for backend in [x for x in FACES if x != "triton"]:
        if backend == "cpp" and face("cpp").refuses(X):
            continue
        options = {"derivative": rule, "alpha": 1.0552, "backend": backend}
        truth = outcome(FUNCTIONS[name], torch.float32, **options)
        for dtype in (torch.float64, torch.bfloat16):
            same(outcome(FUNCTIONS[name], dtype, **options), truth)


@pytest.mark.parametrize("rule", ["approx", "exact"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, rule):
    truth = outcome(MODULES[name], torch.float32, derivative=rule)
    for dtype in (torch.float64, torch.bfloat16):
        same(outcome(MODULES[name], dtype, derivative=rule), truth)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    truth = step(OPTIMIZERS[name], torch.float32)
    for dtype in (torch.float64, torch.bfloat16):
        same(step(OPTIMIZERS[name], dtype), truth)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_default_device(name):
    truth = outcome(FUNCTIONS[name], torch.float32)
    with torch.device("meta"):
        found = outcome(FUNCTIONS[name], torch.float32)
    same(found, truth)


def test_the_default_device_of_optimizers():
    truth = step(OPTIMIZERS["adamw pam"], torch.float32)
    with torch.device("meta"):
        found = step(OPTIMIZERS["adamw pam"], torch.float32)
    same(found, truth)
