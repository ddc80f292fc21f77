"""The registry: known parameter counts on the meta device, and what it refuses."""

from itertools import pairwise

import pytest
import torch

from common.models import ModelConfig, build, count_parameters

IMAGENET = {"in_channels": 3, "classes": 1000}
CIFAR = {"in_channels": 3, "channels": 64}
RESNET50 = {"channels": 64, "stages": [3, 4, 6, 3], "block": "bottleneck", "stem": "imagenet"}
GPT2 = {"name": "gpt", "vocab": 50257, "d_model": 768, "n_layer": 12, "n_head": 12, "context": 1024}


def vgg13_count() -> int:
    """VGG-13's parameters, layer by layer."""
    widths = [3, 64, 64, 128, 128, 256, 256, 512, 512, 512, 512]
    convolutions = sum(9 * a * b + b for a, b in pairwise(widths))
    return convolutions + 2 * (512 * 512 + 512) + 512 * 10 + 10


KNOWN = {
    "resnet20": (ModelConfig("resnet", 3, channels=16, stages=[3, 3, 3]), 272_474),
    "resnet18": (ModelConfig("resnet", **CIFAR), 11_173_962),
    "resnet50": (ModelConfig("resnet", **IMAGENET, **RESNET50), 25_557_032),
    "resnet50_v2": (ModelConfig("resnet", **IMAGENET, **RESNET50, pre_activation=True), 25_549_352),
    "deit_tiny": (ModelConfig("vit", **IMAGENET, d_model=192, n_layer=12, n_head=3), 5_717_416),
    "gpt2_124m": (ModelConfig(**GPT2), 124_439_808),
    "transformer_iwslt": (
        ModelConfig("translation", source_vocab=8848, vocab=6632, d_model=512, d_hidden=1024, n_layer=6),
        39_469_056,
    ),
    "vgg13": (ModelConfig("vgg", **CIFAR, stages=[2] * 5, norm="none"), vgg13_count()),
}


@pytest.mark.parametrize(("config", "count"), KNOWN.values(), ids=KNOWN.keys())
def test_architecture_has_its_known_number_of_parameters(config: ModelConfig, count: int) -> None:
    config.expected_parameters = count
    with torch.device("meta"):
        model = build(config, [0])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert count_parameters(model) == count


def test_gains_add_one_parameter_a_row_and_standardization_none() -> None:
    with torch.device("meta"):
        plain, gains = build(ModelConfig(**GPT2), [0]), build(ModelConfig(**GPT2, gains=True), [0])
        both = build(ModelConfig(**GPT2, gains=True, weight_standardization=True), [0])
    rows = 12 * (3 + 1 + 4 + 1) * 768 + 50257
    assert count_parameters(gains) - count_parameters(plain) == rows
    assert count_parameters(both) == count_parameters(gains)


def test_width_scales_every_layer_but_input_and_output() -> None:
    half = build(ModelConfig("resnet", **CIFAR, width=0.5, stages=[1, 1]), [0])
    full = build(ModelConfig("resnet", **CIFAR, stages=[1, 1]), [0])
    shapes = [(h.shape, f.shape) for h, f in zip(half.parameters(), full.parameters(), strict=True)]
    assert shapes[0] == ((32, 3, 3, 3), (64, 3, 3, 3))
    assert shapes[-2] == ((10, 64), (10, 128))
    assert all(h[0] * 2 == f[0] for h, f in shapes[:-2])


def test_expected_parameters_count_one_model_of_the_stack() -> None:
    count = 16 * 5 + 3 * 16 * 16 * 3 + 4 * 2 * 16 + 10 * 17
    config = ModelConfig(channels=16, expected_parameters=count)
    assert count_parameters(build(config, [0, 1, 2])) == 3 * count
    config.expected_parameters = count + 1
    with pytest.raises(ValueError, match=rf"model\.expected_parameters={count + 1}: this network has {count}"):
        build(config, [0])


def test_a_key_that_the_network_does_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.gains=True: convnet1d does not read it; it reads in_channels"):
        build(ModelConfig(gains=True), [0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "lenet"}, r"model\.name=lenet: must be one of convnet1d"),
        ({"norm": "rms"}, r"model\.norm=rms: must be one of bn, ln, none"),
        ({"channels": 0}, r"model\.channels=0: must be >= 1"),
        ({"width": 0.0}, r"model\.width=0\.0: must be > 0"),
        ({"dropout": 1.0}, r"model\.dropout=1\.0: must be in \[0, 1\)"),
        ({"stages": []}, r"model\.stages=\[\]: must be a list"),
        ({"d_model": 10}, r"model\.d_model=10: must be a multiple of model\.n_head=4"),
        ({"init_scale": -1.0}, r"model\.init_scale=-1\.0: must be > 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_values_out_of_range_are_refused_by_name(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(depth=5), "depth=5: must be an even number >= 4"),
        (ModelConfig(depth=6, block_scales=[1.0, 1.0]), "block_scales=.*must have 1 entries"),
        (ModelConfig(gradient_scales=[1.0]), "gradient_scales=.*must have 4 entries"),
        (ModelConfig("vit", image_size=30), "image_size=30: must be a multiple of patch_size=16"),
    ],
    ids=["depth", "block_scales", "gradient_scales", "image_size"],
)
def test_shapes_that_do_not_fit_are_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config, [0])
