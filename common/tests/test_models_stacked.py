"""A stack of n models is n separate networks: same initial bits, same outputs and gradients, no leak between them."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models import ModelConfig, build
from common.models.stacked import WS_EPS, Embedding, LayerNorm, Linear, init_stacked, standardize
from common.models.stacked_conv import Conv1d, Conv2d, norm_factory

torch.set_num_threads(1)
SEEDS = [3, 11]
BATCH = 4

IMAGE = {"in_channels": 2, "classes": 3, "channels": 4, "stages": [1, 1]}
TINY = {
    "convnet1d": ModelConfig(channels=6),
    "convnet1d_no_norm": ModelConfig(channels=6, norm="none", classes=3),
    "convnet1d_ln_ws": ModelConfig(channels=6, norm="ln", weight_standardization=True, in_channels=2),
    "convnet1d_deep": ModelConfig(channels=6, depth=8, block_scales=[0.5, 0.1], init_scale=0.5),
    "mlp_bn": ModelConfig(name="mlp", in_channels=7, channels=6, depth=2),
    "mlp_ln": ModelConfig(name="mlp", in_channels=7, channels=6, depth=2, norm="ln"),
    "gpt": ModelConfig(name="gpt", vocab=13, d_model=8, n_head=2, context=6),
    "gpt_gains_ws_untied": ModelConfig(
        name="gpt", vocab=13, d_model=8, n_head=2, context=6, gains=True, weight_standardization=True, tied=False,
        bias=False,
    ),
    "resnet": ModelConfig(name="resnet", **IMAGE),
    "resnet_pre_ln_ws": ModelConfig(
        name="resnet", **IMAGE, pre_activation=True, norm="ln", weight_standardization=True, standardize_head=True
    ),
    "resnet_bottleneck": ModelConfig(name="resnet", **IMAGE, block="bottleneck", stem="imagenet"),
    "vgg": ModelConfig(name="vgg", **IMAGE, norm="none", weight_standardization=True, keep_init_std=False, gains=True),
    "vit": ModelConfig(
        name="vit", in_channels=2, classes=3, image_size=8, patch_size=4, d_model=8, n_head=2, gains=True
    ),
    "translation": ModelConfig(
        name="translation", source_vocab=9, vocab=13, d_model=8, d_hidden=12, n_head=2, gains=True
    ),
}  # fmt: skip
FAMILIES = pytest.mark.parametrize("config", TINY.values(), ids=TINY.keys())


def inputs_of_each_model(config: ModelConfig) -> list[tuple[Tensor, ...]]:
    """One random input a model, in the shape that a single network takes."""
    g = torch.Generator().manual_seed(0)
    out: list[tuple[Tensor, ...]] = []
    for _ in SEEDS:
        if config.name == "gpt":
            out.append((torch.randint(config.vocab, (1, BATCH, config.context), generator=g),))
        elif config.name == "translation":
            ids = torch.randint(2, config.source_vocab, (2, 1, BATCH, 5), generator=g)
            ids[0, :, :2, 3:] = 1
            out.append((ids[0], ids[1]))
        else:
            shape = {"convnet1d": (40,), "mlp": ()}.get(config.name, (8, 8))
            out.append((torch.randn(BATCH, config.in_channels, *shape, generator=g, dtype=torch.float64),))
    return out


def joined(parts: list[tuple[Tensor, ...]], name: str) -> list[Tensor]:
    """The stack's input from its models': tokens along axis 0, channels along axis 1."""
    axis = 0 if name in ("gpt", "translation") else 1
    return [torch.cat(column, dim=axis) for column in zip(*parts, strict=True)]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    # a few hundred float64 roundings of sums of order one
    tolerance = 1000 * torch.finfo(torch.float64).eps * max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= tolerance


@FAMILIES
def test_model_i_of_a_stack_starts_bit_for_bit_as_the_single_network_of_its_seed(config: ModelConfig) -> None:
    stack = build(config, SEEDS).state_dict()
    for i, seed in enumerate(SEEDS):
        single = build(config, [seed]).state_dict()
        assert list(stack) == list(single)
        for name, value in single.items():
            own = stack[name].chunk(len(SEEDS))[i] if value.dim() else stack[name]
            assert torch.equal(own, value), name


@FAMILIES
def test_initialisation_depends_on_the_seeds_alone(config: ModelConfig) -> None:
    torch.manual_seed(0)
    first = build(config, SEEDS).state_dict()
    torch.manual_seed(1)
    second, other = build(config, SEEDS).state_dict(), build(config, [4, 5]).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@FAMILIES
def test_outputs_and_gradients_of_a_stack_are_those_of_its_models(config: ModelConfig) -> None:
    parts = inputs_of_each_model(config)
    stack = build(config, SEEDS).double()
    logits = stack(*joined(parts, config.name))
    weights = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * weights).sum().backward()
    for i, seed in enumerate(SEEDS):
        single = build(config, [seed]).double()
        expected = single(*parts[i])
        (expected * weights).sum().backward()
        assert_close(logits[i : i + 1], expected)
        for (name, own), parameter in zip(stack.named_parameters(), single.parameters(), strict=True):
            assert own.grad is not None and parameter.grad is not None, name
            assert parameter.grad.any() or "gain" not in name, name
            assert_close(own.grad.chunk(len(SEEDS))[i], parameter.grad)


@FAMILIES
def test_a_diverged_model_leaves_its_neighbour_untouched(config: ModelConfig) -> None:
    x = joined(inputs_of_each_model(config), config.name)
    healthy = build(config, SEEDS).double()
    broken = deepcopy(healthy)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter.chunk(len(SEEDS))[0].fill_(float("nan"))
    expected, actual = healthy(*x), broken(*x)
    assert actual[0].isnan().all()
    assert torch.equal(actual[1], expected[1])
    expected[1].sum().backward()
    actual[1].sum().backward()
    for a, b in zip(broken.parameters(), healthy.parameters(), strict=True):
        assert torch.equal(a.grad.chunk(2)[1], b.grad.chunk(2)[1])


def torch_network(norm: str) -> nn.Sequential:
    """The laptop network spelt with torch.nn."""
    layers: list[nn.Module] = []
    for c_in, kernel, stride in ((1, 5, 2), (6, 3, 1), (6, 3, 2), (6, 3, 1)):
        layers += [
            nn.Conv1d(c_in, 6, kernel, stride, 1, bias=norm == "none"),
            {"bn": nn.BatchNorm1d(6), "ln": nn.GroupNorm(1, 6), "none": nn.Identity()}[norm],
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 10))


@pytest.mark.parametrize("norm", ["bn", "ln", "none"])
def test_convnet1d_of_one_seed_is_the_plain_torch_network(norm: str) -> None:
    torch.manual_seed(5)
    plain = torch_network(norm)
    ours = build(ModelConfig(channels=6, norm=norm), [5])
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    x = torch.randn(3, 1, 40, dtype=torch.float64)
    assert_close(ours.double()(x)[0], plain.double()(x))


def test_layers_of_one_model_are_their_torch_namesakes() -> None:
    x, ids = torch.randn(1, 3, 4, 8), torch.randint(9, (1, 3, 4))
    for ours, plain, value in (
        (lambda: Linear(1, 8, 5), lambda: nn.Linear(8, 5), x),
        (lambda: Conv1d(1, 3, 5, 3, 2, 1), lambda: nn.Conv1d(3, 5, 3, 2, 1), x[0, :, :3]),
        (lambda: Conv2d(1, 3, 5, 3, 2, 1), lambda: nn.Conv2d(3, 5, 3, 2, 1), x),
        (lambda: Embedding(1, 9, 5), lambda: nn.Embedding(9, 5), ids),
        (lambda: LayerNorm(1, 8), lambda: nn.LayerNorm(8), x),
    ):
        torch.manual_seed(2)
        a = ours()
        torch.manual_seed(2)
        b = plain()
        assert [p.shape for p in a.parameters()] == [p.shape for p in b.parameters()]
        assert torch.equal(a(value), b(value))


def test_a_gain_multiplies_the_row_of_its_neuron() -> None:
    layer = Linear(2, 4, 3, gain=True)
    gain = torch.tensor([1.0, 2.0, -1.0, 0.5, 0.0, 3.0])
    x = torch.randn(2, 5, 4)
    before = layer(x) - layer.bias.view(2, 1, 3)
    with torch.no_grad():
        layer.gain.copy_(gain)
    torch.testing.assert_close(layer(x) - layer.bias.view(2, 1, 3), before * gain.view(2, 1, 3))


@pytest.mark.parametrize("scale", [0.5, torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)], ids=["one", "each"])
def test_standardized_rows_have_mean_zero_and_the_asked_unbiased_std(scale: float | Tensor) -> None:
    weight = torch.randn(3, 2, 5, dtype=torch.float64) * 7 + 3
    rows = standardize(weight, scale).flatten(1)
    own = ((weight.flatten(1) - weight.flatten(1).mean(1, keepdim=True)).square().sum(1) / 9).sqrt()
    expected = scale * torch.ones(3, 1, dtype=torch.float64)
    assert_close(rows.mean(1), torch.zeros(3, dtype=torch.float64))
    assert_close(rows.std(1), expected[:, 0] * own / (own + WS_EPS))


def test_the_gradient_of_a_standardized_weight_has_no_mean_and_no_radial_part() -> None:
    layer = Conv1d(2, 3, 4, 3, weight_standardization=True).double()
    layer(torch.randn(5, 6, 9, dtype=torch.float64)).square().sum().backward()
    rows, grad = layer.weight.detach().flatten(1), layer.weight.grad.flatten(1)
    assert_close(grad.mean(1), torch.zeros(8, dtype=torch.float64))
    cosine = F.cosine_similarity(rows - rows.mean(1, keepdim=True), grad)
    # what the epsilon leaves of the radial part
    assert cosine.abs().max() < 10 * WS_EPS / rows.std(1).min()


def test_keep_init_std_keeps_the_initial_function_and_otherwise_rows_get_fan_in_scale() -> None:
    keep, fan_in = (
        Linear(1, 16, 4, weight_standardization=True, keep_init_std=keep).double() for keep in (True, False)
    )
    centred = keep.weight - keep.weight.mean(1, keepdim=True)
    keep.finish_reset()
    assert_close(keep.effective_weight(), centred)
    with torch.no_grad():
        keep.weight.mul_(10)
    ratio = (keep.effective_weight() / centred).mean().item()
    assert ratio == pytest.approx(1, abs=2 * WS_EPS / centred.std(1).min().item())
    assert fan_in.effective_weight().std(1).mean().item() == pytest.approx(0.25, rel=1e-3)


def test_a_row_of_one_input_cannot_be_standardized() -> None:
    with pytest.raises(ValueError, match="fan-in 1"):
        Linear(1, 1, 4, weight_standardization=True)


def test_norms_see_their_own_model_only() -> None:
    x = torch.randn(6, 4, 5)
    for norm in ("bn", "ln"):
        together = norm_factory(norm, 1)(2, 2)(x)
        alone = norm_factory(norm, 1)(1, 2)(x[:, 2:])
        torch.testing.assert_close(together[:, 2:], alone)


@pytest.mark.parametrize(
    ("seeds", "message"), [([], "non-empty"), ([1, -2], ">= 0"), ([1, 2, 3], "stacks 2 models")], ids=str
)
def test_seeds_that_do_not_fit_are_refused(seeds: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init_stacked(nn.Sequential(Linear(2, 3, 3)), seeds)
