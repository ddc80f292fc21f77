"""From a `ModelConfig` and a seed to a network: the registry of `model.name`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from mulfree_training.networks.convolutional import ConvMixer, PlainConvNet, PreActResNet
from mulfree_training.networks.gpt import GPT
from mulfree_training.networks.translation import Translation
from mulfree_training.networks.vit import ViT

if TYPE_CHECKING:
    from mulfree_training.config import ModelConfig

REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "vit": ViT,
    "gpt": GPT,
    "translation": Translation,
    "plain_conv": PlainConvNet,
    "preact_resnet": PreActResNet,
    "conv_mixer": ConvMixer,
}


def build(config: ModelConfig, seed: int) -> nn.Module:
    """Make the network that `config` describes, its weights drawn with `seed`; torch's own generator stays as it was.

    Raises:
        ValueError: a key that this network does not read differs from its default, a value does not fit, or the number
            of parameters is not `model.expected_parameters`.
    """
    network = REGISTRY[config.name]
    read, defaults = list(inspect.signature(network).parameters), type(config)()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in (*read, "name", "expected_parameters") and value != getattr(defaults, field.name):
            raise ValueError(f"model.{field.name}={value}: {config.name} does not read it; it reads {', '.join(read)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(**{name: getattr(config, name) for name in read})
    count = sum(parameter.numel() for parameter in model.parameters())
    if config.expected_parameters not in (None, count):
        raise ValueError(f"model.expected_parameters={config.expected_parameters}: the network has {count} parameters")
    return model
