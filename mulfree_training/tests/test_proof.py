"""The gate: what multiplies floats is found wherever it runs, what does not passes, and so does all that is ours."""

from __future__ import annotations

import inspect
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulfree_training import formulas, reference
from mulfree_training.functional import pam_cross_entropy, pam_dropout, pam_layer_norm, pam_softmax
from mulfree_training.kernels import torch_face
from mulfree_training.operators import pick
from mulfree_training.optim import PAMSGD, PAMAdamW
from mulfree_training.primitives import pam_div, pam_exp, pam_log, pam_mul, pam_pow, pam_sqrt
from mulfree_training.products import pam_conv2d, pam_linear, pam_matmul
from mulfree_training.proof import (
    ALLOWED,
    MultiplicationError,
    count_multiplications,
    forbid_multiplications,
    is_allowed,
)
from mulfree_training.tests.bitwise import SPECIAL, assert_same, ordinary

X, Y = ordinary(4, 4, seed=1, octaves=1).abs(), ordinary(4, 4, seed=2, octaves=1)
IDS = torch.tensor([[0, 1, 3], [2, 2, 0]])
IMAGE = ordinary(1, 2, 6, 6, seed=3, octaves=1)
FILTER = ordinary(2, 2, 3, 3, seed=4, octaves=1)
SIGN = torch.complex(X, Y)

FOUND = {
    "aten.mul": [
        lambda: X * Y, lambda: 2 * X, lambda: torch.tensor([3, 4]) * 0.5,
        lambda: X.double() * 2, lambda: X.bfloat16() * 2, lambda: SIGN * 2,
    ],
    "aten.mul_": [lambda: X.clone().mul_(2)],
    "aten.div": [lambda: X / 2, lambda: X / Y, lambda: torch.div(X, 2, rounding_mode="floor")],
    "aten.mm": [lambda: X @ Y, lambda: F.linear(X, Y)],
    "aten.bmm": [lambda: X[None] @ Y[None], lambda: torch.einsum("bij,bjk->bik", X[None], Y[None])],
    "aten.addmm": [lambda: F.linear(X, Y, X[0])],
    "aten.mv": [lambda: X @ Y[0]],
    "aten.dot": [lambda: X[0] @ Y[0]],
    "aten.convolution": [lambda: F.conv2d(IMAGE, FILTER)],
    "aten.pow": [lambda: X**2, lambda: 2**X],
    "aten.add": [lambda: X.add(Y, alpha=0.3), lambda: X.add(Y, alpha=2), lambda: SIGN + 1],
    "aten.sub": [lambda: X.sub(Y, alpha=0.5)],
    "aten.rsub": [lambda: torch.rsub(X, Y, alpha=3)],
    "aten.addcmul": [lambda: torch.addcmul(X, X, Y)],
    "aten.addcdiv": [lambda: torch.addcdiv(X, X, Y)],
    "aten.lerp": [lambda: X.lerp(Y, 0.5)],
    "aten.mean": [lambda: X.mean(), lambda: IDS.float().mean(0)],
    "aten.var": [lambda: X.var()],
    "aten.prod": [lambda: X.prod()],
    "aten.cumprod": [lambda: X.cumprod(0)],
    "aten.reciprocal": [lambda: 1 / X],
    "aten.remainder": [lambda: X % 2],
    "aten.floor_divide": [lambda: X // 2],
    "aten.exp": [lambda: X.exp()],
    "aten.exp2": [lambda: X.exp2()],
    "aten.log2": [lambda: X.log2()],
    "aten.sqrt": [lambda: X.sqrt(), lambda: IDS.sqrt()],
    "aten.rsqrt": [lambda: X.rsqrt()],
    "aten.sigmoid": [lambda: X.sigmoid()],
    "aten.tanh": [lambda: X.tanh()],
    "aten._softmax": [lambda: X.softmax(-1)],
    "aten._log_softmax": [lambda: F.cross_entropy(X, IDS[0, 0].expand(4))],
    "aten.logsumexp": [lambda: X.logsumexp(0)],
    "aten.gelu": [lambda: F.gelu(X)],
    "aten.leaky_relu": [lambda: F.leaky_relu(X)],
    "aten.native_layer_norm": [lambda: F.layer_norm(X, (4,))],
    "aten.div_": [lambda: F.dropout(X)],
    "aten.ldexp": [lambda: torch.ldexp(X, IDS[0, 0])],
    "aten.mse_loss": [lambda: F.mse_loss(X, Y)],
    "aten.avg_pool2d": [lambda: F.avg_pool2d(IMAGE, 2)],
    "aten.linalg_vector_norm": [lambda: X.norm()],
    "aten._foreach_mul": [lambda: torch._foreach_mul([X, Y], 2)],
    "aten._foreach_add": [lambda: torch._foreach_add([X], [Y], alpha=0.5)],
    "aten.round": [lambda: X.round(decimals=2)],
    "aten.scatter": [lambda: X.scatter(0, IDS, 2.0, reduce="multiply")],
    "aten.scatter_reduce": [lambda: X.scatter_reduce(0, IDS, Y, "prod"), lambda: X.scatter_reduce(0, IDS, Y, "mean")],
    "aten.uniform_": [lambda: torch.empty(3).uniform_(0, 2)],
    "aten.randn": [lambda: torch.randn(3)],
    "aten.arange": [lambda: torch.arange(0.0, 1.0, 0.1)],
    "aten._embedding_bag_forward_only": [lambda: F.embedding_bag(IDS, X, mode="mean")],
}  # fmt: skip
CALLS = [(name, call) for name, calls in FOUND.items() for call in calls]


@pytest.mark.parametrize(("name", "call"), CALLS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CALLS)])
def test_what_multiplies_is_stopped_and_counted(name, call):
    with pytest.raises(MultiplicationError) as error, forbid_multiplications():
        call()
    assert error.value.operator == name
    with count_multiplications() as found:
        call()
    assert found[name] >= 1


def test_attention_is_found():
    with count_multiplications() as found:
        F.scaled_dot_product_attention(X[None, None], X[None, None], X[None, None])
    assert found


PASSES = {
    "views": lambda x: x.view(2, 8)[:, 1:].T.unsqueeze(0).expand(3, -1, -1).flatten().unfold(0, 3, 2),
    "indexing": lambda x: x[IDS[0]][:, IDS[1]] + x[x > 0][0] + x.gather(0, IDS.T[:, :2]).sum(),
    "joining": lambda x: torch.cat([torch.stack([x, x]).flatten(0, 1), x.repeat(2, 1)]).roll(1, 0).flip(0),
    "sums": lambda x: x + 1 - x.sum(0) - x.cumsum(1) + (1 - x) + (-x),
    "selection": lambda x: (
        torch.where(x > 1, x, 0).masked_fill(x < 0.5, -1.0) + x.clamp(0.1, 2.0) + x.max(1)[0].floor()
    ),
    "order": lambda x: x.sort().values + x.topk(4).values + x.max(0).values + x.argmax() + x.median(0).values,
    "rectifiers": lambda x: F.relu(x) + F.relu6(x) + F.hardtanh(x) + F.threshold(x, 0.5, 0.0),
    "types": lambda x: x.double().to(torch.bfloat16).float() + IDS.sum().to(x.dtype),
    "pools": lambda x: F.max_pool2d(F.pad(x[None, None], (1, 1, 1, 1)), 2),
    "columns": lambda x: F.fold(F.unfold(x[None, None], 2), 4, 2),
    "mirrors": lambda x: F.pad(x[None], (1, 1), "reflect") + F.pad(x[None], (1, 1), "replicate"),
    "nearest": lambda x: F.interpolate(x[None, None], scale_factor=2, mode="nearest"),
    "places": lambda x: x.index_add(0, IDS[0], x[:3]).scatter_add(0, IDS, x[:2, :3]).index_put((IDS[0],), x[0], True),
    "rows": lambda x: F.embedding(IDS, x) + F.embedding_bag(IDS, x, mode="sum").sum(),
    "masks": lambda x: x.where(torch.rand_like(x) > 0.5, 0.0) + torch.bernoulli(torch.full((4,), 0.5)),
    "triangles": lambda x: x.triu(1) + x.tril() + torch.eye(4) + torch.zeros(4) + torch.ones_like(x).trunc(),
}


@pytest.mark.parametrize("name", PASSES)
def test_what_does_not_multiply_passes_with_its_derivative(name):
    x = X.clone().requires_grad_()
    with forbid_multiplications():
        out = PASSES[name](x)
        torch.autograd.backward(out, torch.ones_like(out))
    assert out.isfinite().all() and x.grad.isfinite().all()


def test_signs_and_conditions():
    with forbid_multiplications():
        assert torch.equal(X.add(Y, alpha=-1), X - Y) and torch.equal(X.sub(Y, alpha=-1), X + Y)
        assert torch.equal(torch._foreach_sub([X], [Y], alpha=-1)[0], X + Y)
        assert X.abs().sign().sum() == 16 and X.amax() == X.max() == X.flatten().sort().values[-1]
        assert X.round().frac().abs().sum() == 0
        torch.empty(3).uniform_()
        X.scatter(0, IDS, 2.0).scatter_reduce(0, IDS, Y, "sum").scatter_reduce(0, IDS, Y, "amax")
        X.scatter(0, IDS, 2.0, reduce="add")
    bits = torch.tensor([1, 2])
    assert is_allowed(torch.ops.aten.__lshift__.Scalar, bits, 1)
    assert not is_allowed(torch.ops.aten.__lshift__.Scalar, X, 1)


def test_integers_may_multiply_unless_they_are_watched_too():
    positions = torch.arange(6)
    with forbid_multiplications():
        assert (positions * 4 + positions // 2 % 3).sum() == 66
        assert (positions @ positions).item() == 55 and (positions > 2).logical_and(positions < 5).sum() == 2
        assert (positions << 1)[1] == 2
    on_integers = r"aten\.mul\.Tensor on int64 \(6,\)"
    with pytest.raises(MultiplicationError, match=on_integers), forbid_multiplications(integers=True):
        positions * 4
    with forbid_multiplications(integers=True):
        assert ((positions << 1) & 4 | positions.abs()).sum() > 0


class Planted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.0


def test_a_product_planted_in_a_backward_pass_is_found():
    x = X.clone().requires_grad_()
    with forbid_multiplications():
        loss = Planted.apply(x).sum()
    on_gradients = r"aten\.mul\.Tensor on float32 \(4, 4\)"
    with pytest.raises(MultiplicationError, match=on_gradients) as error, forbid_multiplications():
        loss.backward()
    assert f"{__file__}:" in str(error.value) and "grad * 1.0" in str(error.value)
    assert x.grad is None
    with count_multiplications() as found:
        Planted.apply(x).sum().backward()
    assert found == {"aten.mul": 1}


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("aten.mul", lambda x: x.abs()),  # times the sign
        ("aten.div", lambda x: x.amax()),  # shared between equals
        ("aten.embedding_dense_backward", lambda x: F.embedding(IDS, x, scale_grad_by_freq=True)),
    ],
)
def test_derivatives_that_multiply_are_found(name, function):
    x = X.clone().requires_grad_()
    with forbid_multiplications():
        loss = function(x).sum()
    with count_multiplications() as found:
        loss.backward()
    assert found[name]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, foreach=True), lambda p: torch.optim.AdamW(p, foreach=False),
        lambda p: torch.optim.AdamW(p, fused=True), lambda p: torch.optim.SGD(p, momentum=0.9),
    ],
)  # fmt: skip
def test_optimizers_are_found(make):
    parameter = nn.Parameter(X.clone())
    parameter.grad = Y.clone()
    optimizer = make([parameter])
    with pytest.raises(MultiplicationError), forbid_multiplications():
        optimizer.step()


def test_an_error_shows_few_of_many_operands():
    shown = r"_foreach_mul\.Scalar on (float32 \(4, 4\)(, )?){4} and 3 more may"
    with pytest.raises(MultiplicationError, match=shown), forbid_multiplications():
        torch._foreach_mul([X] * 7, 2)


def test_nothing_runs_after_a_finding():
    x = X.clone()
    with pytest.raises(MultiplicationError), forbid_multiplications():
        x.mul_(2)
    assert torch.equal(x, X)


def test_allowances():
    with forbid_multiplications(allow=["aten.mean", "aten.mul_"]):
        X.mean() + X.clone().mul_(2).sum()
    with pytest.raises(MultiplicationError), forbid_multiplications(allow=["aten.mul_"]):
        X * 2
    for wrong in (["mean"], [3], "mul"):
        with pytest.raises(ValueError, match="allow=.*: must be names of operators"), forbid_multiplications(wrong):
            pass


def test_managers_nest():
    with count_multiplications() as outer:
        X * 2
        with count_multiplications() as inner:
            X / 2
        with pytest.raises(MultiplicationError), forbid_multiplications():
            X @ X
    assert inner == {"aten.div": 1} and outer == {"aten.mul": 1, "aten.div": 1}
    X * 2
    assert outer.total() == 2


def test_another_thread_is_not_seen():
    thread = threading.Thread(target=lambda: X * 2)
    with count_multiplications() as found:
        thread.start()
        thread.join()
    assert not found


def test_whole_operators_of_inference_are_taken_apart():
    with torch.inference_mode(), count_multiplications() as found:
        X.reshape(2, 8).flatten().contiguous().chunk(2)
        F.relu6(X).to(torch.float64)
        F.linear(X, Y)
    assert found == {"aten.mm": 1}


def test_compiled_functions_run_operator_by_operator():
    def hidden(graph, inputs):
        return lambda *x: (torch.from_numpy(x[0].numpy() * 2),)

    torch._dynamo.reset()
    double = torch.compile(lambda x: x * 2, backend=hidden)
    assert torch.equal(double(X), X + X)
    with count_multiplications() as found:
        double(X)
    assert found == {"aten.mul": 1}


def test_the_list_names_operators_and_reasons():
    for name, reason in ALLOWED.items():
        space, _, short = name.partition(".")
        known = getattr(torch.ops, space)
        assert short == "*" or hasattr(known, short) or hasattr(known, f"{short}_"), name
        assert len(reason) > 10, name


OPERANDS = torch.cartesian_prod(SPECIAL[::3], SPECIAL[::3]).unbind(1)
PRIMITIVES = ["mul", "div", "slope", "mul_grad", "div_grad"]
PRIMITIVES += [f"{x}{y}" for x in ("exp2", "log2", "sqrt") for y in ("", "_grad")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [0, 451000])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_no_primitive_of_the_reference_multiplies_not_even_integers(name, shift, dtype):
    function = getattr(reference, name)
    names = list(inspect.signature(function).parameters)
    a, b = (x.to(dtype) for x in OPERANDS)
    operands = [a, b, b.flip(0)][: len([n for n in names if n != "shift"])]
    rest = (shift,) if "shift" in names else ()
    expected = function(*operands, *rest)
    with forbid_multiplications(integers=True):
        found = function(*operands, *rest)
    if dtype is torch.float32:
        assert_same(found, expected)


@pytest.mark.parametrize("face", [reference, torch_face])
def test_no_product_of_the_reference_multiplies_not_even_integers(face):
    a, b = ordinary(2, 3, 5, seed=5), ordinary(2, 5, 4, seed=6)
    with forbid_multiplications(integers=True):
        out = face.matmul(a, b)
        face.matmul_grad(out, a, b, 451000)
        face.matmul(torch.zeros_like(a), b)
        reference.row_sum(out)


@pytest.mark.parametrize("exact", [False, True])
def test_no_formula_multiplies_not_even_integers(exact):
    x, grad, weight = ordinary(3, 20, seed=7, octaves=1), ordinary(3, 20, seed=8), ordinary(20, seed=9)
    numbers = formulas.AdamWNumbers(0.9, 0.1, 0.99, 0.01, 1e-8, 0.01, 0.1)
    with forbid_multiplications(integers=True):
        formulas.softmax(reference, x, 0)
        formulas.softmax_grad(reference, grad, x, 0, exact)
        formulas.log_softmax(reference, x, 0)
        formulas.log_softmax_grad(reference, grad, x, 0, exact, not exact)
        formulas.layer_norm(reference, x, weight, weight, 1e-5, 0)
        formulas.layer_norm_grad(reference, grad, x, weight, 1e-5, 0, exact)
        formulas.adamw(reference, x, grad, torch.zeros_like(x), torch.zeros_like(x), numbers)


FACES = list(dict.fromkeys(["reference", "torch", pick(X)]))


@pytest.mark.parametrize("backend", FACES)
@pytest.mark.parametrize("derivative", ["approx", "exact"])
def test_our_functions_pass_with_their_derivatives(derivative, backend):
    options = {"derivative": derivative, "backend": backend}
    x, w = X.clone().requires_grad_(), Y.clone().requires_grad_()
    image, filters = IMAGE.clone().requires_grad_(), FILTER.clone().requires_grad_()
    with forbid_multiplications():
        y = pam_div(pam_mul(x, w, **options), pam_sqrt(x, **options), **options)
        y = y + pam_exp(pam_log(x, **options), **options) + pam_pow(x, 1.5, **options)
        y = y + pam_matmul(x, w, **options) + pam_mul(x, 0.7, **options) + pam_dropout(x, 0.3, **options)
        y = y + pam_layer_norm(x, (4,), w[0], w[1], **options) + pam_softmax(x, **options)
        y = y.sum() + pam_conv2d(image, filters, stride=2, padding=1, **options).sum()
        y.backward()
    assert all(t.grad.isfinite().all() for t in (x, w, image, filters)) and math.isfinite(y.item())


class Perceptron(nn.Module):
    def __init__(self, affine: bool):
        super().__init__()
        self.first, self.second = (nn.Parameter(ordinary(*shape, seed=10, octaves=1)) for shape in ((8, 4), (5, 8)))
        self.affine = affine

    def forward(self, x: Tensor) -> Tensor:
        linear = pam_linear if self.affine else F.linear
        return linear(F.relu(linear(x, self.first)), self.second)


@pytest.mark.parametrize("scalars", ["exact", "pam"])
def test_a_whole_step_has_no_finding_where_all_is_ours_and_many_where_not(scalars):
    target = torch.tensor([0, 4, 2, -100])
    for affine in (True, False):
        model = Perceptron(affine)
        optimizer = PAMAdamW(model.parameters(), scalars=scalars) if affine else torch.optim.AdamW(model.parameters())
        loss_of = pam_cross_entropy if affine else F.cross_entropy
        before = [p.detach().clone() for p in model.parameters()]
        with count_multiplications() as found:
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(model(X), target, label_smoothing=0.1).backward()
                optimizer.step()
        assert not found if affine else found.total() > 20
        assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_plain_descent_of_ours_passes():
    parameter = nn.Parameter(X.clone())
    parameter.grad = Y.clone()
    optimizer = PAMSGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)
    with forbid_multiplications():
        optimizer.step()
        optimizer.step()
    assert not torch.equal(parameter, X)
