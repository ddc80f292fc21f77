"""The clients' networks: layers, sizes, initial weights, and the official loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from clustered_pfl.models import VGG8, VGG16, build, count_parameters, mlp, neg_prob, vgg

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "hidden", "parameters"),
    [
        ("mlp", (1, 28, 28), 10, [200], 784 * 200 + 200 + 200 * 10 + 10),
        ("mlp", (1, 8, 8), 10, [32], 2_410),
        ("mlp", (3, 4, 4), 2, [], 48 * 2 + 2),
        ("vgg16", (3, 32, 32), 10, [32], 15_245_130),
        ("vgg8", (3, 32, 32), 100, [32], 1_264_388),
    ],
)
def test_number_of_parameters(
    name: str, shape: tuple[int, ...], classes: int, hidden: list[int], parameters: int
) -> None:
    network = build(name, shape, classes, hidden=hidden)
    assert count_parameters(network) == parameters
    assert network(torch.zeros(2, *shape)).shape == (2, classes)


def test_vgg16_has_13_convolutions_in_five_blocks() -> None:
    network = vgg(VGG16, (3, 32, 32), 10, dropout=0.5)
    widths = [layer.out_channels for layer in network if isinstance(layer, nn.Conv2d)]
    assert widths == [64, 64, 128, 128, *[256] * 3, *[512] * 6]
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in network) == 5
    heads = [layer for layer in network if isinstance(layer, nn.Linear)]
    assert [layer.in_features for layer in heads] == [512, 512, 512]
    assert [layer.p for layer in network if isinstance(layer, nn.Dropout)] == [0.5, 0.5]
    assert isinstance(network[-1], nn.Linear) and isinstance(network[-2], nn.ReLU)  # no dropout at the end


def test_vgg8_has_five_convolutions_each_pooled() -> None:
    layers = list(vgg(VGG8, (3, 32, 32), 100))
    kinds = [type(layer) for layer in layers[:15]]
    assert kinds == [nn.Conv2d, nn.ReLU, nn.MaxPool2d] * 5
    assert [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)] == [16, 32, 64, 128, 512]
    assert not any(isinstance(layer, nn.Dropout) for layer in layers)


def test_convolutions_start_at_two_over_their_fan_out() -> None:
    network = build("vgg16", (3, 32, 32), 10)
    for conv in (layer for layer in network if isinstance(layer, nn.Conv2d)):
        std = math.sqrt(2 / (9 * conv.out_channels))
        assert conv.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * conv.weight.numel()))
        assert abs(conv.weight.mean().item()) < 5 * std / math.sqrt(conv.weight.numel())
        assert conv.bias is not None and conv.bias.abs().max() == 0


def test_the_perceptron_is_relu_between_linear_layers_on_flat_images() -> None:
    network = mlp((1, 2, 2), 3, [5, 4])
    x = torch.randn(6, 1, 2, 2)
    first, second, last = (layer for layer in network if isinstance(layer, nn.Linear))
    expected = last(second(first(x.view(6, 4)).clamp_min(0)).clamp_min(0))
    torch.testing.assert_close(network(x), expected)


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, same, other = (build("mlp", (1, 8, 8), 10, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="name='resnet': must be one of mlp, vgg16, vgg8"):
        build("resnet", (3, 32, 32), 10)


def test_the_official_loss_is_nll_of_probabilities() -> None:
    """A softmax output under a loss that expects log-probabilities."""
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    target = torch.arange(7) % 5
    expected = nn.functional.nll_loss(logits.softmax(1), target)
    torch.testing.assert_close(neg_prob(logits, target), expected)
    (mine,), (theirs,) = (torch.autograd.grad(v, logits) for v in (neg_prob(logits, target), expected))
    torch.testing.assert_close(mine, theirs)
    # where the network is sure and wrong the gradient vanishes; that of the cross-entropy would be 2
    sure = torch.tensor([[30.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(neg_prob(sure, torch.tensor([1])), sure)
    assert gradient.abs().max() < 1e-9
