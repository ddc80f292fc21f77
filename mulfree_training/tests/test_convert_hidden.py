"""Conversion of modules that compute more than the forward of their class shows: replaced forwards, hooks, subclasses,
quantised layers, and products between the children of a module."""

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune, spectral_norm, weight_norm

from mulfree_training.attention import PAMAttention
from mulfree_training.convert import convert_to_mulfree
from mulfree_training.modules import PAMLinear
from mulfree_training.proof import forbid_multiplications


def replaced(module: nn.Module) -> nn.Module:
    old = module.forward
    module.forward = lambda *args: old(*args)
    return module


def test_a_forward_replaced_on_the_instance_is_left():
    net = nn.Sequential(replaced(nn.Linear(3, 3)), nn.Linear(3, 3), replaced(nn.Sequential(nn.Linear(3, 3))))
    report = convert_to_mulfree(net)
    assert report.left == {
        "0": "Linear, forward replaced on the instance; convert before",
        "2": "Sequential, forward replaced on the instance; convert before",
    }
    assert list(report.converted) == ["1", "2.0"] and type(net[0]) is nn.Linear
    attention = nn.Sequential(replaced(nn.MultiheadAttention(4, 2)))
    assert "forward replaced" in convert_to_mulfree(attention).left["0"]
    assert type(attention[0]) is nn.MultiheadAttention


def test_converted_before_its_forward_is_replaced_it_stays_converted():
    layer = nn.Linear(3, 3)
    convert_to_mulfree(layer)
    report = convert_to_mulfree(replaced(layer), strict=True)
    assert not report.left
    x = torch.randn(2, 3)
    with forbid_multiplications():
        layer(x)


def test_hooks_of_accelerate_are_left():
    accelerate = pytest.importorskip("accelerate")
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    accelerate.dispatch_model(net, {"": "cpu"}, main_device="cpu", force_hooks=True)
    with pytest.raises(ValueError, match="strict=True: .*0: Linear, forward replaced on the instance"):
        convert_to_mulfree(net, strict=True)


def test_a_compiled_model_is_read_inside():
    report = convert_to_mulfree(torch.compile(nn.Sequential(nn.Linear(3, 3))), strict=True)
    assert list(report.converted) == ["_orig_mod.0"]


def old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still found in models
        return weight_norm(module)


def doubles(module, args):
    return (torch.mul(args[0], 2),)


def halves(module, args, output):
    return output / 2


def with_hook(kind: str, hook) -> nn.Module:
    module = nn.Linear(3, 3)
    getattr(module, kind)(hook)
    return module


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: old_weight_norm(nn.Linear(3, 3)), "Linear with a hook WeightNorm, which computes its weight"),
        (lambda: spectral_norm(nn.Linear(3, 3)), "Linear with a hook SpectralNorm, which computes its weight"),
        (lambda: prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5), "Linear with a hook L1Unstructured"),
        (lambda: with_hook("register_forward_pre_hook", doubles), "Linear with a hook that has mul"),
        (lambda: with_hook("register_forward_hook", halves), "Linear with a hook that has /"),
    ],
)
def test_hooks_that_multiply_are_left(make, why):
    net = nn.Sequential(make())
    report = convert_to_mulfree(net)
    assert report.left["0"].startswith(why) and not report.converted
    with pytest.raises(ValueError, match="strict=True"):
        convert_to_mulfree(net, strict=True)


def test_other_hooks_do_not_hinder_and_unreadable_ones_are_mentioned():
    seen: list[Tensor] = []

    def collects(seen, module, args):
        seen.append(args[0])

    net = nn.Sequential(with_hook("register_forward_pre_hook", functools.partial(collects, seen)))
    assert not convert_to_mulfree(net, strict=True).warnings and type(net[0]) is PAMLinear
    net = nn.Sequential(with_hook("register_forward_hook", print))
    assert convert_to_mulfree(net).warnings == ["0: hooks of Linear cannot be read"]


class Between(nn.Module):
    """Products of its own between its children."""

    def __init__(self):
        super().__init__()
        self.queries, self.keys = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.scaled_dot_product_attention(self.queries(x), self.keys(x), x) @ x.mT


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x) * x.shape[-1]


def test_products_between_children_are_left_and_operators_warned_of():
    net = nn.Sequential(Between(), Scaled())
    with pytest.raises(ValueError, match="0: Between, its forward calls @, scaled_dot_product_attention"):
        convert_to_mulfree(net, strict=True)
    report = convert_to_mulfree(net)
    assert list(report.left) == ["0"] and list(report.converted) == ["0.queries", "0.keys", "1.inner"]
    assert report.warnings == ["1: forward of Scaled has *"]


def test_quantised_layers_are_left():
    quantised = torch.ao.nn.quantized
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.Sequential(quantised.Linear(3, 3), quantised.Quantize(0.1, 0, torch.quint8), quantised.Softmax(-1))
    left = convert_to_mulfree(net).left
    assert list(left) == ["0", "1", "2"] and all("of torch.ao, quantised arithmetic" in why for why in left.values())


class MyLinear(nn.Linear):
    """Another constructor."""

    def __init__(self, size):
        super().__init__(size, size)


class MyAttention(nn.MultiheadAttention):
    pass


class MyNorm(nn.BatchNorm1d):
    pass


class MyRelu(nn.ReLU):
    pass


class WithMethod(nn.Linear):
    def largest(self):
        return self.weight.max()


class Positions(nn.Embedding):
    """As in OPT and BART."""

    def forward(self, mask, offset=2):
        positions = (torch.cumsum(mask, 1) * mask - 1).long()
        return super().forward(positions + offset)


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) * 4.0


def test_subclasses_that_add_nothing_count_as_their_base():
    net = nn.Sequential(MyLinear(3), MyAttention(4, 2), MyRelu(), Positions(8, 3))
    report = convert_to_mulfree(net, strict=True)
    assert report.converted["0"] == "MyLinear -> PAMLinear" and type(net[0]) is PAMLinear
    assert type(net[1]) is PAMAttention and not report.left
    left = convert_to_mulfree(nn.Sequential(MyNorm(3), WithMethod(3, 3), ScaledEmbedding(3, 3))).left
    assert left == {
        "0": "MyNorm, no piecewise affine version here",
        "1": "WithMethod, a Linear with code of its own",
        "2": "ScaledEmbedding, an Embedding with code of its own",
    }
    renormed = Positions(8, 3, max_norm=1.0)
    assert convert_to_mulfree(nn.Sequential(renormed)).left == {"0": "Positions with max_norm or scale_grad_by_freq"}


def test_torchs_relu_is_no_product():
    layer = nn.TransformerEncoderLayer(8, 2, 8, activation=torch.relu, batch_first=True).eval()
    convert_to_mulfree(layer, strict=True)
    x = torch.randn(2, 3, 8)
    with forbid_multiplications(), torch.no_grad():
        layer(x)


class Alias(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        self.head = self.body[1]


@pytest.mark.parametrize("skip", ["head", "body.1", ("h*",)])
def test_a_shared_module_is_skipped_by_any_of_its_paths(skip):
    net = Alias()
    report = convert_to_mulfree(net, skip=skip)
    assert report.left == {"body.1": "skipped"} and list(report.converted) == ["body.0"]
    assert type(net.head) is nn.Linear
