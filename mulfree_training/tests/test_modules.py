"""Modules: torch's state dicts, exactness for powers of two, the functions they stand for, their options."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulfree_training import functional, products
from mulfree_training.attention import PAMAttention
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
from mulfree_training.primitives import pam_div, pam_exp, pam_mul

ALPHA = 1.0552


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def powers_of_two(*shape: int) -> Tensor:
    sign = torch.randint(2, shape) * 2 - 1
    return sign * 2.0 ** torch.randint(-2, 3, shape)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


LINEAR = [{}, {"bias": False}]
CONV1D = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"dilation": 2, "padding": 2, "groups": 2},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "circular"},
]
CONV2D = [
    {},
    {"stride": (2, 1), "padding": (0, 1), "bias": False},
    {"dilation": (1, 2), "padding": 2, "groups": 2},
    {"kernel_size": (2, 3), "padding": "same"},
    {"kernel_size": 2, "stride": 2},
    {"padding": (1, 2), "padding_mode": "reflect"},
]


def pairs():
    for options in LINEAR:
        yield nn.Linear, PAMLinear, {"in_features": 5, "out_features": 3, **options}, (2, 7, 5)
    for options in CONV1D:
        shape = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
        yield nn.Conv1d, PAMConv1d, {**shape, **options}, (2, 4, 9)
    for options in CONV2D:
        shape = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
        yield nn.Conv2d, PAMConv2d, {**shape, **options}, (2, 4, 7, 6)


@pytest.mark.parametrize(("ordinary", "ours", "options", "shape"), list(pairs()))
@pytest.mark.parametrize("rule", ["approx", "exact"])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_powers_of_two_give_the_ordinary_layer_and_all_its_gradients(ordinary, ours, options, shape, rule):
    a, b = ordinary(**options), ours(**options, derivative=rule)
    with torch.no_grad():
        for parameter in a.parameters():
            parameter.copy_(powers_of_two(*parameter.shape))
    b.load_state_dict(a.state_dict())
    x = powers_of_two(*shape).requires_grad_()
    own = x.detach().clone().requires_grad_()
    out, expected = b(own), a(x)
    assert out.is_contiguous()
    # small integers and halves: both sums are exact
    assert torch.equal(out, expected)
    grad = powers_of_two(*out.shape)
    out.backward(grad)
    expected.backward(grad)
    assert torch.equal(own.grad, x.grad)
    for parameter, other in zip(b.parameters(), a.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


@pytest.mark.parametrize(("ours", "shape"), [(PAMConv1d, (4, 9)), (PAMConv2d, (4, 7, 6))])
def test_convolution_without_batch(ours, shape):
    layer, x = ours(4, 6, 3, padding=1), normal(*shape)
    assert same_bits(layer(x), layer(x[None])[0])


MODULES = [
    (nn.Linear, PAMLinear, (5, 3), (4, 5)),
    (nn.Conv1d, PAMConv1d, (2, 3, 3), (2, 2, 6)),
    (nn.Conv2d, PAMConv2d, (2, 3, 3), (2, 2, 6, 5)),
    (nn.LayerNorm, PAMLayerNorm, (8,), (4, 8)),
    (nn.Softmax, PAMSoftmax, (1,), (4, 8)),
    (nn.LogSoftmax, PAMLogSoftmax, (1,), (4, 8)),
    (nn.Dropout, PAMDropout, (0.3,), (4, 8)),
    (nn.GELU, PAMGELU, (), (4, 8)),
]


@pytest.mark.parametrize(("ordinary", "ours", "arguments", "shape"), MODULES)
def test_state_dicts_load_both_ways(ordinary, ours, arguments, shape):
    a, b = ordinary(*arguments), ours(*arguments)
    b.load_state_dict(a.state_dict())
    assert list(b.state_dict()) == list(a.state_dict())
    for key, value in b.state_dict().items():
        assert torch.equal(value, a.state_dict()[key])
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.add_(1)
    a.load_state_dict(b.state_dict())
    for key, value in b.state_dict().items():
        assert torch.equal(value, a.state_dict()[key])


def _trained(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    out = layer(x)
    out.backward(normal(*out.shape, seed=2))
    return out.detach(), x.grad


@pytest.mark.parametrize(("ordinary", "ours", "arguments", "shape"), MODULES)
def test_every_option_reaches_the_arithmetic(ordinary, ours, arguments, shape):
    layer = ours(*arguments)
    x = normal(*shape, seed=1)
    out, grad = _trained(layer, x)
    for options in ({"derivative": "exact"}, {"alpha": ALPHA}):
        other = ours(*arguments, **options)
        other.load_state_dict(layer.state_dict())
        other_out, other_grad = _trained(other, x)
        assert same_bits(out, other_out) == ("derivative" in options)
        assert not same_bits(grad, other_grad)
    wished = ours(*arguments, backend="triton")
    with pytest.raises(ValueError, match="backend='triton'"):
        wished.double()(x.double())  # which that face does not serve


@pytest.mark.parametrize(("ordinary", "ours", "arguments", "shape"), MODULES)
def test_values_stay_near_the_ordinary_module(ordinary, ours, arguments, shape):
    a, b = ordinary(*arguments).eval(), ours(*arguments).eval()
    b.load_state_dict(a.state_dict())
    x = normal(64, *shape[1:], seed=3)
    # products are at most 1/9 small, quotients 1/8 large, powers 6 % large; they add up where there are several
    assert (b(x) - a(x)).std() < 0.12 * a(x).std()


@pytest.mark.parametrize(("ordinary", "ours", "arguments", "shape"), MODULES)
def test_copies_and_pickles_compute_the_same(ordinary, ours, arguments, shape):
    layer = ours(*arguments, alpha=ALPHA)
    x = normal(*shape)
    expected = _trained(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(map(same_bits, _trained(other, x), expected))


def test_linear_is_its_function_and_takes_a_pair_of_rules():
    x, grad = normal(4, 5), normal(4, 3, seed=1)
    results = {}
    for rule in ("approx", "exact", ("exact", "approx")):
        torch.manual_seed(0)
        layer = PAMLinear(5, 3, derivative=rule)
        own = x.clone().requires_grad_()
        out = layer(own)
        assert same_bits(out, products.pam_linear(x, layer.weight, layer.bias))
        out.backward(grad)
        results[rule] = own.grad, layer.weight.grad, layer.bias.grad
    mixed = results["exact", "approx"]
    assert same_bits(mixed[0], results["exact"][0])
    assert same_bits(mixed[1], results["approx"][1])
    assert same_bits(mixed[2], grad.sum(0))


@pytest.mark.parametrize("options", [{}, {"elementwise_affine": False}, {"bias": False}, {"eps": 0.5}])
def test_layer_norm_is_its_function(options):
    layer = PAMLayerNorm([3, 4], **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(normal(3, 4, seed=parameter.numel()))
    x = normal(2, 3, 4)
    assert same_bits(layer(x), functional.pam_layer_norm(x, (3, 4), layer.weight, layer.bias, layer.eps))


@pytest.mark.parametrize("k", [-5, 1, 8])
def test_layer_norm_without_eps_does_not_see_a_power_of_two(k):
    layer, x = PAMLayerNorm(16, eps=0.0), normal(8, 16)
    # the variance has the square of the factor, an even power of two, and the root keeps its mantissa
    assert same_bits(layer(x), layer(x * 2.0**k))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax_and_log_softmax_go_along_dim(dim):
    x = normal(3, 4, 5)
    assert same_bits(PAMSoftmax(dim)(x), functional.pam_softmax(x, dim))
    assert same_bits(PAMLogSoftmax(dim)(x), functional.pam_log_softmax(x, dim))
    sums = PAMSoftmax(dim)(x).sum(dim)
    assert (sums > 0.999).all() and (sums <= 1.125 + 1e-6).all()


def test_dropout_scales_exactly_by_powers_of_two_and_only_in_training():
    x = normal(50, 40)
    layer = PAMDropout(0.5)
    out = layer(x)
    kept = out != 0
    assert torch.equal(out[kept], 2 * x[kept])
    assert 0.45 < kept.float().mean() < 0.55
    assert torch.equal(layer.eval()(x), x)


def test_dropout_of_everything_gives_zeros_and_no_gradient():
    x = normal(3, 4).requires_grad_()
    out = PAMDropout(1.0)(x)
    out.sum().backward()
    assert not out.any() and not x.grad.any()
    assert torch.equal(PAMDropout(1.0).eval()(x), x)


def test_gelu_is_the_documented_composition():
    x = normal(200)
    t = pam_mul(x, 1.702)
    e = pam_exp(-t.abs())
    expected = pam_mul(x, pam_div(torch.where(t < 0, e, torch.ones_like(e)), 1 + e))
    assert same_bits(PAMGELU()(x), expected)
    assert (PAMGELU()(x) - F.gelu(x)).abs().max() < 0.12


@pytest.mark.parametrize("rule", ["approx", "exact"])
def test_gelu_far_out_is_x_or_zero_with_finite_gradients(rule):
    x = torch.tensor([20.0, 1e4, 1e30, -200.0, -1e4, -1e30, 0.0], requires_grad=True)
    out = PAMGELU(derivative=rule)(x)
    assert out.tolist() == [20.0, torch.tensor(1e4), torch.tensor(1e30), 0.0, 0.0, 0.0, 0.0]
    out.sum().backward()
    assert x.grad[:3].tolist() == [1.0] * 3
    assert x.grad[3:6].abs().max() == 0
    assert x.grad[6] == 0.5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignore_index": 2},
        {"reduction": "sum", "label_smoothing": 0.1},
        {"reduction": "none", "label_smoothing": 0.1, "smoothing": "torch"},
        {"lse_log2": "exact"},
        {"derivative": "exact", "alpha": ALPHA, "label_smoothing": 0.2},
    ],
)
def test_cross_entropy_is_its_function(options):
    target = torch.tensor([0, 2, 5, 2])
    losses, grads = [], []
    for loss in (PAMCrossEntropy(**options), lambda x, y: functional.pam_cross_entropy(x, y, **options)):
        x = normal(4, 6).requires_grad_()
        value = loss(x, target)
        value.sum().backward()
        losses.append(value.detach())
        grads.append(x.grad)
    assert same_bits(*losses)
    assert same_bits(*grads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "max"}, "reduction='max': must be one of mean, sum, none"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1.0: must be in \[0, 1\)"),
        ({"smoothing": "keras"}, "smoothing='keras': must be fairseq or torch"),
        ({"lse_log2": "both"}, "lse_log2='both': must be one of approx, exact"),
    ],
)
def test_cross_entropy_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        PAMCrossEntropy(**options)


@pytest.mark.parametrize("make", [lambda **o: PAMLinear(2, 2, **o), lambda **o: PAMAttention(4, 2, **o), PAMGELU])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"derivative": "true"}, "derivative='true': must be one of approx, exact"),
        ({"alpha": 2.0}, r"alpha=2.0: must be in \(0.5, 2\)"),
        ({"backend": "cuda"}, "backend='cuda': must be one of cpp, triton, torch, reference"),
    ],
)
def test_bad_arithmetic_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_representation_shows_the_arithmetic():
    shown = repr(PAMLinear(3, 2, derivative="exact", alpha=ALPHA, backend="reference"))
    assert "in_features=3" in shown and "derivative='exact', alpha=1.0552, backend='reference'" in shown
    assert "smoothing='torch'" in repr(PAMCrossEntropy(smoothing="torch"))
    assert "num_heads=2" in repr(PAMAttention(4, 2)) and "normaliser='pam'" in repr(PAMAttention(4, 2))


def test_bfloat16_layers_keep_their_dtype():
    layer = PAMLinear(6, 4, dtype=torch.bfloat16)
    x = normal(3, 6).bfloat16()
    out = layer(x)
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, products.pam_linear(x, layer.weight, layer.bias))


AUTOCAST = {
    "linear": (lambda: nn.Linear(6, 6), lambda: PAMLinear(6, 6), (4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 6), lambda: PAMLinear(6, 6, bias=False), (4, 6)),
    "norm": (lambda: nn.Linear(6, 6), lambda: PAMLayerNorm(6), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(2, 2, 1), lambda: PAMConv1d(2, 4, 3, padding="same"), (3, 2, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 2, 1), lambda: PAMConv2d(2, 4, 3, padding=1), (3, 2, 6, 5)),
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_parameters_follow_the_input_under_autocast(name):
    first, ours, shape = AUTOCAST[name][0](), AUTOCAST[name][1](), AUTOCAST[name][2]
    x = normal(*shape)
    with torch.autocast("cpu", torch.bfloat16):
        middle = first(x)
        out = ours(middle)
        wide = ours(x)  # what is float32 stays so
    assert out.dtype is middle.dtype is torch.bfloat16 and wide.dtype is torch.float32
    assert torch.equal(wide, ours(x))
    narrow = copy.deepcopy(ours).bfloat16()
    assert torch.equal(out, narrow(middle.detach()))
    out.float().sum().backward()
    narrow(middle.detach()).float().sum().backward()
    for p, q in zip(ours.parameters(), narrow.parameters(), strict=True):
        assert p.grad.dtype is torch.float32 and torch.equal(p.grad, q.grad.float())
    assert all(p.grad.dtype is torch.float32 for p in first.parameters())
    with pytest.raises(TypeError, match="of dtype torch.float32: must be torch.bfloat16"):
        ours(middle.detach())


def test_compiled_layers_give_the_same_bits():
    net = nn.Sequential(PAMLinear(6, 5), nn.ReLU(), PAMLayerNorm(5), PAMLinear(5, 3, derivative="exact"))
    x, grad = normal(4, 6), normal(4, 3, seed=1)
    results = []
    for run in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.zero_grad()
        out = run(x)
        out.backward(grad)
        results.append([out.detach(), *(p.grad.clone() for p in net.parameters())])
    assert all(map(same_bits, *results))
