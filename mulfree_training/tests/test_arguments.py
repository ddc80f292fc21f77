"""What is refused, with which error, and that the error names the key, the value and what is allowed."""

import math
import re

import pytest
import torch

from common.kernels.dispatch import forced
from mulfree_training import arguments
from mulfree_training.functional import (
    pam_cross_entropy,
    pam_dropout,
    pam_layer_norm,
    pam_log_softmax,
    pam_softmax,
)
from mulfree_training.operators import pick
from mulfree_training.primitives import pam_div, pam_exp, pam_exp2, pam_log, pam_log2, pam_mul, pam_pow, pam_sqrt
from mulfree_training.products import pam_conv2d, pam_linear, pam_matmul

X, Y = torch.ones(4, 4), torch.zeros(4, dtype=torch.int64)
IMAGE, FILTERS = torch.ones(1, 4, 5, 5), torch.ones(6, 4, 3, 3)
UNARY = (pam_exp2, pam_log2, pam_exp, pam_log, pam_sqrt, lambda x, **o: pam_pow(x, 0.5, **o))
ROWS = (pam_softmax, pam_log_softmax, pam_dropout)
BINARY = (pam_mul, pam_div, pam_matmul, pam_linear)
ONE_RULE = (
    *(lambda f=f, **o: f(X, **o) for f in (*UNARY, *ROWS)),
    lambda **o: pam_layer_norm(X, (4,), **o),
    lambda **o: pam_cross_entropy(X, Y, **o),
)
TWO_RULES = (*(lambda f=f, **o: f(X, X, **o) for f in BINARY), lambda **o: pam_conv2d(IMAGE, FILTERS, **o))
REFUSED = (torch.int64, torch.int32, torch.bool, torch.float16, torch.complex64)


@pytest.fixture(autouse=True)
def on_the_reference():
    with forced("reference"):
        yield


def refuses(kind, message, call, *arguments, **options):
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        call(*arguments, **options)


@pytest.mark.parametrize("dtype", REFUSED)
def test_dtypes(dtype):
    x = torch.ones(4, 4).to(dtype)
    allowed = f"of dtype {dtype}: must be float32, bfloat16 or float64"
    for function in (*UNARY, *ROWS):
        refuses(TypeError, f"x {allowed}", function, x)
    for function, names in zip(BINARY, ("ab", "ab", "AB", ("input", "weight")), strict=True):
        refuses(TypeError, f"{names[0]} {allowed}", function, x, X)
        refuses(TypeError, f"{names[1]} {allowed}", function, X, x)
    refuses(TypeError, f"a {allowed}", pam_mul, x, 2.0)
    refuses(TypeError, f"b {allowed}", pam_mul, 2.0, x)
    refuses(TypeError, f"input {allowed}", pam_layer_norm, x, (4,))
    refuses(TypeError, f"input {allowed}", pam_cross_entropy, x, Y)
    refuses(TypeError, f"input {allowed}", pam_conv2d, IMAGE.to(dtype), FILTERS.to(dtype))


def test_what_is_no_tensor():
    for function in (*UNARY, *ROWS):
        refuses(TypeError, "x=1.0: must be a tensor", function, 1.0)
    refuses(TypeError, "B=[1]: must be a tensor", pam_matmul, X, [1])
    refuses(TypeError, "input=None: must be a tensor", pam_layer_norm, None, (4,))
    for value in (True, 1j, "2", None):
        refuses(TypeError, f"b={value!r}: must be a tensor or a number", pam_mul, X, value)
        refuses(TypeError, f"a={value!r}: must be a tensor or a number", pam_div, value, X)
    refuses(TypeError, "a=1.0: one of a and b must be a tensor", pam_mul, 1.0, 2.0)
    for value in (True, None, X):
        refuses(TypeError, f"p={value!r}: must be a number", pam_pow, X, value)


def test_two_dtypes_or_two_devices():
    other = "of dtype torch.float64: must be torch.float32, as"
    for function, names in zip(BINARY, ("ab", "ab", "AB", ("input", "weight")), strict=True):
        refuses(TypeError, f"{names[1]} {other} {names[0]}", function, X, X.double())
        refuses(ValueError, f"{names[1]} on meta: must be on cpu, as {names[0]}", function, X, X.to("meta"))
        refuses(ValueError, f"{names[1]} on cpu: must be on meta, as {names[0]}", function, X.to("meta"), X)
    refuses(TypeError, f"weight {other} input", pam_conv2d, IMAGE, FILTERS.double())
    refuses(TypeError, f"bias {other} weight", pam_linear, X, X, X[0].double())
    refuses(TypeError, f"bias {other} weight", pam_conv2d, IMAGE, FILTERS, torch.ones(6).double())
    refuses(TypeError, "weight of dtype torch.float64: must be torch.float32, as the input", pam_layer_norm, X, (4,),
            X[0].double())  # fmt: skip
    message = "bias of dtype torch.float64: must be torch.float32, as the input"
    refuses(TypeError, message, pam_layer_norm, X, (4,), None, X[0].double())
    refuses(ValueError, "target on meta: must be on cpu, as input", pam_cross_entropy, X, Y.to("meta"))


def test_shapes():
    for function in (pam_mul, pam_div):
        refuses(ValueError, "b of shape (3,): must broadcast with a of shape (4, 4)", function, X, torch.ones(3))
    refuses(ValueError, "B of shape (3, 4): must have 4 rows for A of (4, 4)", pam_matmul, X, torch.ones(3, 4))
    refuses(ValueError, "B of shape (3,): must have 4 rows for A of (4, 4)", pam_matmul, X,
            torch.ones(3))  # fmt: skip
    refuses(ValueError, "A of shape (), B of shape (4, 4): must have dimensions", pam_matmul, torch.ones(()), X)
    refuses(ValueError, "A of shape (4, 4), B of shape (): must have dimensions", pam_matmul, X, torch.ones(()))
    refuses(ValueError, "B of shape (3, 4, 5): must broadcast with A of shape (2, 4, 4)", pam_matmul,
            torch.ones(2, 4, 4), torch.ones(3, 4, 5))  # fmt: skip
    refuses(ValueError, "weight of shape (4,): must be (P, K)", pam_linear, X, X[0])
    refuses(ValueError, "bias of shape (1,): must be (4,)", pam_linear, X, X, torch.ones(1))
    refuses(ValueError, "bias of shape (5,): must be (6,)", pam_conv2d, IMAGE, FILTERS, torch.ones(5))
    refuses(ValueError, "input of shape (4, 5, 5), weight of (6, 4, 3, 3): must have 4 dimensions", pam_conv2d,
            IMAGE[0], FILTERS)  # fmt: skip
    refuses(ValueError, "weight of shape (6, 4, 3, 3): must be (a multiple of groups=2, 4 / groups, h, w)", pam_conv2d,
            IMAGE, FILTERS, groups=2)  # fmt: skip
    refuses(ValueError, "weight of shape (5, 2, 3, 3): must be (a multiple of groups=2, 4 / groups, h, w)", pam_conv2d,
            IMAGE, FILTERS[:5, :2], groups=2)  # fmt: skip
    refuses(ValueError, "weight of shape (6, 4, 3, 3): must fit into input of shape (1, 4, 2, 5)", pam_conv2d,
            IMAGE[:, :, :2], FILTERS)  # fmt: skip
    for name, value, least in (("stride", 0, 1), ("padding", -1, 0), ("dilation", 0, 1)):
        for pair in (value, (1, value), (value, 1)):
            shown = (value, value) if isinstance(pair, int) else pair
            refuses(ValueError, f"{name}={shown}: must be >= {least}", pam_conv2d, IMAGE, FILTERS, **{name: pair})
    refuses(ValueError, "groups=0: must be >= 1", pam_conv2d, IMAGE, FILTERS, groups=0)


def test_dimensions_of_rows():
    for function in (pam_softmax, pam_log_softmax):
        refuses(ValueError, "x of shape (): must have a dimension", function, torch.ones(()))
        for dim in (2, -3):
            refuses(ValueError, f"dim={dim}: must be in [-2, 1]", function, X, dim)
    end = "must be the end of the input's shape (4, 4)"
    for shape in ((3,), (), (4, 4, 4), (3, 4)):
        refuses(ValueError, f"normalized_shape={shape}: {end}", pam_layer_norm, X, shape)
    refuses(ValueError, "weight of shape (1,): must be (4,)", pam_layer_norm, X, (4,), torch.ones(1))
    refuses(ValueError, "bias of shape (4, 4): must be (4,)", pam_layer_norm, X, (4,), X[0], X)


def test_rules():
    for call in (*ONE_RULE, *TWO_RULES):
        refuses(ValueError, "derivative='true': must be one of approx, exact", call, derivative="true")
    for call in TWO_RULES:
        either = "must be one of approx, exact, or a pair of them"
        for rules in (("exact",), ("exact",) * 3, ["exact", "approx"], None, 1):
            refuses(ValueError, f"derivative={rules!r}: {either}", call, derivative=rules)
        refuses(ValueError, "derivative='no': must be one of approx, exact", call, derivative=("exact", "no"))
        refuses(ValueError, "derivative='no': must be one of approx, exact", call, derivative=("no", "exact"))
    for call in ONE_RULE:
        if call is not ONE_RULE[8]:  # dropout multiplies: it takes a pair
            message = "derivative=('exact', 'exact'): must be one of approx, exact"
            refuses(ValueError, message, call, derivative=("exact", "exact"))
    for call in (pam_log_softmax, lambda x, **o: pam_cross_entropy(x, Y, **o)):
        refuses(ValueError, "lse_log2='true': must be one of approx, exact", call, X, lse_log2="true")
    assert arguments.is_exact("exact") and not arguments.is_exact("approx")
    assert arguments.are_exact(("exact", "approx")) == (True, False)
    assert arguments.are_exact("exact") == (True, True) and arguments.are_exact("approx") == (False, False)


@pytest.mark.parametrize("alpha", [0.5, 2.0, -1, 0, math.nan, math.inf, "1.1"])
def test_alpha(alpha):
    for call in (*ONE_RULE, *TWO_RULES):
        refuses(ValueError, f"alpha={alpha!r}: must be in (0.5, 2), or None", call, alpha=alpha)


def test_backends():
    for call in (*ONE_RULE, *TWO_RULES):
        with pytest.raises(ValueError, match=r"^backend='cuda': must be None or one of cpp, triton, torch, reference$"):
            call(backend="cuda")
    wide = X.double()
    for name in ("cpp", "torch"):
        refuses(ValueError, f"backend={name!r}: needs float32, got torch.float64", pam_mul, wide, wide, backend=name)
    with forced(None):
        assert pick(wide) == "reference" and pick(X, "torch") == "torch"
    with forced("torch"):
        assert pick(X) == "torch" and pick(X, "reference") == "reference"
        refuses(ValueError, "backend='torch': needs float32, got torch.float64", pam_mul, wide, wide)


def test_numbers():
    for p in (1.0, -0.1, math.nan, 2):
        refuses(ValueError, f"p={p}: must be in [0, 1)", pam_dropout, X, p)
    for eps in (-1e-9, math.nan):
        refuses(ValueError, f"eps={eps}: must be >= 0", pam_layer_norm, X, (4,), eps=eps)


def test_targets():
    for epsilon in (1.0, -0.1, math.nan):
        message = f"label_smoothing={epsilon}: must be in [0, 1)"
        refuses(ValueError, message, pam_cross_entropy, X, Y, label_smoothing=epsilon)
    refuses(ValueError, "reduction='max': must be one of mean, sum, none", pam_cross_entropy, X, Y, reduction="max")
    refuses(ValueError, "smoothing='x': must be fairseq or torch", pam_cross_entropy, X, Y, smoothing="x")
    refuses(ValueError, "input with 1 class: must have >= 2 for label_smoothing of fairseq", pam_cross_entropy,
            X[:, :1], Y, label_smoothing=0.1)  # fmt: skip
    assert pam_cross_entropy(X[:, :1], Y, label_smoothing=0.1, smoothing="torch").item() == 0
    refuses(TypeError, "target of dtype torch.int32: must be int64, class indices", pam_cross_entropy, X, Y.int())
    for x, y in ((X, Y[:3]), (X, Y[:, None]), (X[0], Y), (X[None], Y)):
        message = f"target of shape {tuple(y.shape)}: must be (B, …) for input (B, V, …) of shape {tuple(x.shape)}"
        refuses(ValueError, message, pam_cross_entropy, x, y)
    for wrong in (4, -1):
        target = Y.clone()
        target[2] = wrong
        refuses(IndexError, f"target={wrong}: must be in [0, 4) or -100", pam_cross_entropy, X, target)
        assert pam_cross_entropy(X, target, ignore_index=wrong).isfinite()
    target[1] = -100
    refuses(IndexError, "target=-100: must be in [0, 4) or -1", pam_cross_entropy, X, target, ignore_index=-1)


def test_tensors_without_elements_or_dimensions():
    none, single = torch.zeros(0), torch.tensor(1.5)
    for function in UNARY:
        assert function(none).shape == (0,) and function(single).shape == ()
    assert (
        pam_mul(none, 2.0).shape == (0,) and pam_mul(single, single).item() == 2 and pam_mul(none, single).shape == (0,)
    )
    assert pam_dropout(none).shape == (0,)


def test_meta_tensors_have_shapes_only():
    x = X.to("meta")
    for function in (*UNARY, *ROWS):
        assert function(x).is_meta and function(x).shape == x.shape
    assert pam_matmul(x, x[0]).shape == (4,)
    assert pam_conv2d(IMAGE.to("meta"), FILTERS.to("meta")).shape == (1, 6, 3, 3)
