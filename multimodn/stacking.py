"""Several models side by side: one chain of batched matrix products trains all seeds or folds of an arm at once.

Small models are bound by call overhead. `stack` turns N models of one architecture into one that takes inputs with a
leading axis N, model i seeing slice i; nothing is summed across models. Linear layers become one batched product;
encoders of other kinds run one after the other. `unstack` gives the models back.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from common.models.stacked import Linear, chunk

M = TypeVar("M", bound=nn.Module)
PLAIN = (nn.ReLU, nn.Identity)
CONTAINERS = (nn.Sequential, nn.ModuleDict, nn.ModuleList)


def stack(models: Sequence[M], seeds: Sequence[int] | None = None) -> M:
    """One model that computes N models of the same architecture, with copies of their parameters.

    Args:
        models: N >= 1 models, `MultiModN` or `PFusion`, equal but for their parameters.
        seeds: N seeds of the dropout of each model, so that a model's draws do not depend on its neighbours; None:
            0 ... N-1.

    Raises:
        ValueError: no model, or architectures that differ (frozen parameters included), or a part with parameters of
            its own that it does not name in `stackable_parameters`; with the place named.
    """
    if not models:
        raise ValueError("models=[]: must hold at least one model")
    stacked = cast(M, _stack(list(models), type(models[0]).__name__))
    stacked.n_models = len(models)  # type: ignore[assignment]
    generators = [torch.Generator() for _ in models]
    for generator, seed in zip(generators, seeds or range(len(models)), strict=True):
        generator.manual_seed(seed)
    for module in stacked.modules():
        if isinstance(module, StackedDropout):
            module.generators = generators
    return stacked


def unstack(stacked: M) -> list[M]:
    """The N models of a stack, with copies of their parameters.

    Raises:
        ValueError: the model is not a stack.
    """
    n = getattr(stacked, "n_models", None)
    if n is None:
        raise ValueError(f"{type(stacked).__name__} is not a stack of models")
    models = [_unstack(stacked, i) for i in range(n)]
    for model in models:
        model.n_models = None  # type: ignore[assignment]
    return cast(list[M], models)


class StackedDropout(nn.Module):
    """Dropout of N models (N, ..., F), each with draws of its own generator (on the CPU)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generators: list[torch.Generator] = []

    def forward(self, x: Tensor) -> Tensor:
        """Drop entries in training mode."""
        if not self.training or self.p == 0:
            return x
        kept = torch.empty(x.shape)
        for own, generator in zip(kept, self.generators, strict=True):
            own.bernoulli_(1 - self.p, generator=generator)
        return x * kept.mul_(1 / (1 - self.p) if self.p < 1 else 0.0).to(x.device)


class OneByOne(nn.Module):
    """N modules of any kind, each on its slice of the inputs."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(copy.deepcopy(part) for part in parts)
        self.state_size = getattr(parts[0], "state_size", None)
        self.training = parts[0].training

    def forward(self, *inputs: Tensor) -> Tensor:
        """(N, ...) each -> (N, ...)."""
        return torch.stack([part(*(x[i] for x in inputs)) for i, part in enumerate(self.parts)])


def _stack(peers: list[nn.Module], where: str) -> nn.Module:
    first = peers[0]
    for peer in peers[1:]:
        if _describe(peer) != _describe(first):
            raise ValueError(f"{where}: {_describe(peer)} beside {_describe(first)}: must be of one architecture")
    if type(first) is nn.Linear:
        return _stack_linear(peers)  # type: ignore[arg-type]
    if isinstance(first, nn.Dropout):
        return StackedDropout(first.p).train(first.training)
    if not (isinstance(first, PLAIN + CONTAINERS) or getattr(first, "stackable", False)):
        return OneByOne(peers)
    named = getattr(first, "stackable_parameters", ())
    own = [name for part in (first._parameters, first._buffers) for name in part if name not in named]
    if own:
        raise ValueError(f"{where}: {type(first).__name__}.stackable_parameters must name {', '.join(own)}")
    stacked = _shallow(first)
    for name in first._modules:
        stacked._modules[name] = _stack([peer.get_submodule(name) for peer in peers], f"{where}.{name}")
    for name in named:
        values = torch.stack([getattr(peer, name).detach() for peer in peers])
        if isinstance(getattr(first, name), nn.Parameter):
            stacked._parameters[name] = nn.Parameter(values, getattr(first, name).requires_grad)
        else:
            stacked._buffers[name] = values
    return stacked


def _unstack(stacked: nn.Module, index: int) -> nn.Module:
    if isinstance(stacked, Linear):
        rows = stacked.out_features // stacked.n_models
        layer = nn.Linear(stacked.in_features, rows, stacked.bias is not None, device=stacked.weight.device)
        layer.to(stacked.weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(chunk(stacked.weight, stacked.n_models, index))
            if stacked.bias is not None:
                layer.bias.copy_(chunk(stacked.bias, stacked.n_models, index))
        return _treat_like(layer, stacked)
    if isinstance(stacked, StackedDropout):
        return nn.Dropout(stacked.p)
    if isinstance(stacked, OneByOne):
        return copy.deepcopy(stacked.parts[index])
    model = _shallow(stacked)
    for name, child in stacked._modules.items():
        model._modules[name] = _unstack(child, index)  # type: ignore[arg-type]
    for name in getattr(stacked, "stackable_parameters", ()):
        value = getattr(stacked, name)
        own = value[index].detach().clone()
        if isinstance(value, nn.Parameter):
            model._parameters[name] = nn.Parameter(own, value.requires_grad)
        else:
            model._buffers[name] = own
    model.train(stacked.training)
    return model


def _shallow(module: nn.Module) -> nn.Module:
    """A copy that shares no container of parts with the original."""
    twin = copy.copy(module)
    twin._modules, twin._parameters, twin._buffers = {}, dict(module._parameters), dict(module._buffers)
    return twin


def _stack_linear(peers: list[nn.Linear]) -> Linear:
    first = peers[0]
    with torch.device("meta"):
        layer = Linear(len(peers), first.in_features, first.out_features, bias=first.bias is not None)
    layer.to_empty(device=first.weight.device)
    layer.to(first.weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([peer.weight for peer in peers]))
        if first.bias is not None:
            layer.bias.copy_(torch.cat([peer.bias for peer in peers]))
    return cast(Linear, _treat_like(layer, first))


def _treat_like(layer: nn.Linear, other: nn.Linear) -> nn.Linear:
    for name, p in layer.named_parameters():
        p.requires_grad_(other.get_parameter(name).requires_grad)
    return layer.train(other.training)


def _describe(module: nn.Module) -> str:
    """What peers must share: class, arguments, names of parts, shapes and freezing of its own parameters."""
    shapes = {name: (tuple(p.shape), p.requires_grad) for name, p in module._parameters.items() if p is not None}
    return f"{type(module).__name__}({module.extra_repr()}) {list(module._modules)} {shapes}"
