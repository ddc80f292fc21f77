"""From a `ModelConfig` and seeds to a network: the registry of `model.name`."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields

from torch import nn

from common.models.config import ModelConfig
from common.models.convnet1d import ConvNet1d
from common.models.gpt import GPT
from common.models.mlp import MLP
from common.models.resnet import ResNet
from common.models.translation import TranslationTransformer
from common.models.vgg import VGG
from common.models.vit import ViT

REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "convnet1d": ConvNet1d,
    "mlp": MLP,
    "gpt": GPT,
    "resnet": ResNet,
    "vgg": VGG,
    "vit": ViT,
    "translation": TranslationTransformer,
}
_OF_ALL = ("name", "expected_parameters")


def build(config: ModelConfig, seeds: Sequence[int]) -> nn.Module:
    """Make the network that `config` describes, one model a seed in a stack (see `stacked`).

    Args:
        config: the network and its shape; its keys are the arguments of the network's class.
        seeds: one seed a model, each >= 0.

    Returns: a network whose output is (n_models, B, …). Under `torch.device("meta")` it has shapes, but no values.

    Raises:
        ValueError: a key that this network does not read differs from its default, a value does not fit the network,
            or the number of parameters of one model is not `config.expected_parameters`.
    """
    network = REGISTRY[config.name]
    arguments = [name for name in inspect.signature(network).parameters if name != "seeds"]
    defaults = ModelConfig()
    for field in fields(ModelConfig):
        value = getattr(config, field.name)
        if field.name not in (*arguments, *_OF_ALL) and value != getattr(defaults, field.name):
            raise ValueError(
                f"model.{field.name}={value}: {config.name} does not read it; it reads {', '.join(arguments)}"
            )
    model = network(seeds, **{name: getattr(config, name) for name in arguments})
    expected, count = config.expected_parameters, count_parameters(model) // len(seeds)
    if expected is not None and count != expected:
        raise ValueError(f"model.expected_parameters={expected}: this network has {count} parameters")
    return model


def count_parameters(model: nn.Module) -> int:
    """Number of entries of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
