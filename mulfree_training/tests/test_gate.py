"""The gate beyond plain operators: compiled code, other packages' operators, subclasses, functions of functions."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_rows
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.masked import masked_tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from mulfree_training.primitives import pam_mul
from mulfree_training.proof import MultiplicationError, count_multiplications, forbid_multiplications
from mulfree_training.tests.bitwise import ordinary

X, Y = ordinary(4, 4, seed=1, octaves=1).abs(), ordinary(4, 4, seed=2, octaves=1)
INFINITY = float("inf")


def findings(call, **options):
    with count_multiplications(**options) as found:
        call()
    return dict(found)


# compiled code


def out_of_sight(graph, inputs):
    """A backend whose code is out of the sight of a dispatch mode, as that of generated kernels is."""

    def run(*operands):
        with torch._C._DisableTorchDispatch():
            return graph(*operands)

    return run


def test_a_compiled_step_of_an_optimizer_is_seen():
    torch.compiler.reset()
    parameter = nn.Parameter(X.clone())
    parameter.grad = Y.clone()
    step = torch.compile(torch.optim.AdamW([parameter]).step, backend=out_of_sight)
    step()
    assert "aten.sqrt" in findings(step)
    with pytest.raises(MultiplicationError), forbid_multiplications():
        step()


def test_a_compiled_function_without_operands_is_seen():
    torch.compiler.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return out_of_sight(graph, inputs)

    @torch.compile(backend=backend)
    def make():
        return torch.ones(3) * 2.5

    make()
    assert findings(make) == {"aten.mul": 1}
    make()
    torch.compile(lambda x: x + 3, backend=backend)(X)
    assert len(compiled) == 2  # behind the block functions are compiled as ever, and what was compiled is kept


def test_a_compiled_function_may_hold_a_block():
    torch.compiler.reset()

    @torch.compile(backend="eager")
    def function(x):
        with count_multiplications() as found:
            y = x * 2
        return y, found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, found = function(X)
    assert torch.equal(y, X + X) and found == {"aten.mul": 1}


# other packages, quantised numbers


def test_an_operator_of_another_package_is_found_whatever_type_its_tensors_claim():
    with torch.library._scoped_library("another_package", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.define("make(int n) -> Tensor")
        library.impl("twice", lambda x: (x.view(torch.float32) * 2).view(torch.int32), "CPU")
        library.impl("make", lambda n: torch.ones(n, dtype=torch.int32), "CompositeExplicitAutograd")
        bits = X.view(torch.int32)
        twice, make = torch.ops.another_package.twice, torch.ops.another_package.make
        assert torch.equal(twice(bits).view(torch.float32), X + X)
        assert findings(lambda: twice(bits)) == {"another_package.twice": 1}
        assert findings(lambda: make(3)) == {"another_package.make": 1}
        assert not findings(lambda: twice(bits), allow=["another_package.twice"])
        with pytest.raises(MultiplicationError, match="another_package"), forbid_multiplications():
            twice(bits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("quantized.mul", lambda q: torch.ops.quantized.mul(q, q, 0.1, 0)),
        ("quantized.softmax", lambda q: torch.ops.quantized.softmax(q, -1, 0.1, 0)),
        ("aten.relu", F.relu),
        ("aten.view", lambda q: q.view(16)),
        ("aten.int_repr", lambda q: q.int_repr()),
        ("aten.dequantize", lambda q: q.dequantize()),
        ("aten.quantize_per_tensor", lambda q: torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)),
    ],
)
def test_quantised_numbers_are_found(name, call):
    q = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)
    assert name in findings(lambda: call(q))
    with pytest.raises(MultiplicationError), forbid_multiplications():
        call(q)


def test_a_mark_in_time_is_none():
    def mark():
        with torch.profiler.record_function("mark"):
            return X + 1

    assert not findings(mark)


# tensor subclasses


class Wrapped(Tensor):
    """Runs each operator on what it wraps."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        own = [x.inner if isinstance(x, Wrapped) else x for x in args]
        return cls(cls.run(function, own))

    @classmethod
    def run(cls, function, own):
        return function(*own)


class Doubled(Wrapped):
    """Multiplies whatever it is asked for."""

    @classmethod
    def run(cls, function, own):
        return function(*own) * 2.0


class Affine(Wrapped):
    """Multiplies without a multiplication."""

    @classmethod
    def run(cls, function, own):
        return pam_mul(*own) if function is torch.ops.aten.mul.Tensor else function(*own)


class Hidden(Wrapped):
    """Switches dispatch off before it runs an operator."""

    @classmethod
    def run(cls, function, own):
        with torch._C._DisableTorchDispatch():
            return function(*own)


class Thin(Tensor):
    """Passes operators on to its base class, where no mode sees them."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return super().__torch_dispatch__(function, types, args, kwargs or {})


@pytest.mark.parametrize(
    ("make", "of_sum", "of_product"),
    [
        (Wrapped, {}, {"aten.mul": 1}),
        (Doubled, {"aten.mul": 1}, {"aten.mul": 2}),
        (Affine, {}, {}),
        (Hidden, {}, {"aten.mul": 1}),
        (lambda x: x.as_subclass(Thin), {}, {"aten.mul": 1}),
        (lambda x: Wrapped(Hidden(x)), {}, {"aten.mul": 1}),
        (lambda x: Doubled(Hidden(x)), {"aten.mul": 1}, {"aten.mul": 2}),
    ],
    ids=["Wrapped", "Doubled", "Affine", "Hidden", "Thin", "Wrapped Hidden", "Doubled Hidden"],
)
def test_what_a_subclass_calls_is_seen(make, of_sum, of_product):
    x = make(X)
    for call, expected in ((lambda: x + x, of_sum), (lambda: x * x, of_product), (lambda: [x] and X + 1, {})):
        with count_multiplications() as outer:
            assert findings(call) == expected
        assert outer == expected
        if expected:
            with pytest.raises(MultiplicationError), forbid_multiplications():
                call()
    assert not findings(lambda: x * x, allow=["aten.mul"])


def test_a_subclass_as_a_parameter_and_in_a_list_is_seen():
    parameter = nn.Parameter(Doubled(X), requires_grad=False)
    assert findings(lambda: parameter + 1) == {"aten.mul": 1}
    assert not findings(lambda: nn.Parameter(X) + 1)
    with pytest.raises(MultiplicationError), forbid_multiplications(), torch.inference_mode():
        F.linear(Wrapped(X), Y)


def test_function_transforms_pass():
    add = lambda x: x + x.sum()  # noqa: E731
    calls = [
        lambda: torch.func.vmap(add)(X),
        lambda: torch.func.grad(lambda x: add(x).sum())(X),
        lambda: torch.func.jacrev(add)(X),
        lambda: torch.func.functionalize(lambda x: x.clone().add_(1))(X),
        lambda: torch.func.jvp(torch.neg, (X,), (Y,)),
        lambda: torch.func.vmap(lambda x: pam_mul(x, x))(X),
    ]
    assert not any(findings(call) for call in calls)
    assert findings(lambda: torch.func.vmap(lambda x: x * x)(X)) == {"aten.mul": 1}
    assert "aten.mul" in findings(lambda: torch.func.functionalize(lambda x: x.clone().mul_(2))(X))


class Recording(TorchDispatchMode):
    """A mode between the gate and its operators."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_other_modes_are_no_subclasses():
    with forbid_multiplications(), Recording():
        assert torch.equal(X + 1, 1 + X)
    with Recording():
        assert findings(lambda: X * 2) == {"aten.mul": 1}


@pytest.mark.filterwarnings("ignore")
def test_nested_and_masked_tensors():
    nested = torch.nested.nested_tensor([X[:2], X[:3]], layout=torch.jagged)
    linear = nn.Linear(4, 3)
    assert not findings(lambda: F.relu(nested + nested))
    assert findings(lambda: nested * 2) == {"aten.mul": 1}
    assert findings(lambda: linear(nested)) == {"aten.addmm": 1}
    found = findings(lambda: linear(nested).values().sum().backward())
    assert found == {"aten.addmm": 1, "aten.mm": 1} and linear.weight.grad is not None
    masked = masked_tensor(X, X > 1)
    assert not findings(lambda: masked.sum())
    assert findings(lambda: masked.mean()) == {"aten.div": 1}


# functions of functions

PREDICATE = torch.tensor(True)
STEP = torch.tensor(0)
HIGHER = {
    "cond": lambda f, x: torch.cond(PREDICATE, lambda x: (f(x),), lambda x: (x + 1,), (x,))[0],
    "map": lambda f, x: map_rows(lambda row: (f(row),), x)[0],
    "scan": lambda f, x: scan(lambda carry, row: (f(carry), carry + row), x[0], x)[1],
}


@pytest.mark.parametrize("name", HIGHER)
@pytest.mark.parametrize(
    ("function", "expected"),
    [(lambda x: x + 2, set()), (lambda x: x * 2, {"aten.mul"}), (lambda x: pam_mul(x, 1.5), set())],
    ids=["sum", "product", "ours"],
)
def test_what_a_given_function_calls_is_seen_with_its_derivative(name, function, expected):
    x = X.clone().requires_grad_()
    call = lambda: HIGHER[name](function, x).sum().backward()  # noqa: E731
    with count_multiplications() as outer:
        found = findings(call)
    assert set(found) == expected and outer == found and x.grad.isfinite().all()
    if expected:
        with pytest.raises(MultiplicationError, match=r"aten\.mul"), forbid_multiplications():
            HIGHER[name](function, X)


def test_loops_are_seen():
    def loop(function):
        return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, function(x)), (STEP, X))

    assert not findings(lambda: loop(lambda x: x + 2))
    assert findings(lambda: loop(lambda x: x * 2)) == {"aten.mul": 3}


def test_a_product_planted_in_the_derivative_of_a_condition_is_found():
    class Planted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.0

    x = X.clone().requires_grad_()
    assert findings(lambda: HIGHER["cond"](Planted.apply, x).sum().backward()) == {"aten.mul": 1}


def test_other_higher_order_operators_are_findings():
    query = X[None, None]
    call = lambda: flex_attention(query, query, query)  # noqa: E731
    assert findings(call) == {"higher_order.flex_attention": 1}
    assert not findings(call, allow=["higher_order.flex_attention"])
    with pytest.raises(MultiplicationError, match="flex_attention on float32"), forbid_multiplications():
        call()


# the list, the level


def test_sparse_tensors_may_be_taken_apart():
    sparse = X.to_sparse()
    weight = nn.Parameter(X.clone())
    with forbid_multiplications():
        assert torch.equal(X.to_sparse()._values(), X.flatten()) and sparse._indices().shape == (2, 16)
        assert sparse._coalesced_(True).is_coalesced() and torch._neg_view(X).sum() == -X.sum()
        F.embedding(STEP[None], weight, sparse=True).sum().backward()
    assert torch.equal(weight.grad._values(), torch.ones(1, 4))


@pytest.mark.parametrize("order", [1, INFINITY, -INFINITY])
def test_norms_that_add_or_compare_pass(order):
    with forbid_multiplications():
        found = torch.linalg.vector_norm(Y, order), *torch._foreach_norm([Y], order)
    expected = Y.abs().sum() if order == 1 else Y.abs().max() if order > 0 else Y.abs().min()
    assert all(x == pytest.approx(expected.item()) for x in found)


@pytest.mark.parametrize("order", [2, 0.5, 3])
def test_other_norms_are_found(order):
    assert findings(lambda: torch.linalg.vector_norm(Y, order)) == {"aten.linalg_vector_norm": 1}
    assert "aten._foreach_norm" in findings(lambda: torch._foreach_norm([Y], order))


def test_the_level_of_a_count():
    assert findings(lambda: X * 2, mode="aten") == {"aten.mul": 1}
    with pytest.raises(ValueError, match="mode='hlo': must be 'aten'"), count_multiplications(mode="hlo"):
        pass
