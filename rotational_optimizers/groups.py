"""Which tensors rotate, and along which axis their neurons lie: parameter groups for rotational optimizers.

In the paper every decayed tensor of two or more axes rotates, one neuron a slice of axis 0. Here modules decide: a
transposed convolution and Hugging Face's Conv1D have their neurons on axis 1, learned positions held as bare parameters
have none, and a row that cannot turn (too few coordinates, or all zeros) is left to the base optimizer.
"""

import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

_Named = tuple[str, nn.Parameter]

# by class name along the line of ancestors: other libraries' namesakes (stacked layers, Hugging Face) are neurons alike
_NEURON_DIM = {
    "Linear": 0,
    "Bilinear": 0,
    "Conv1d": 0,
    "Conv2d": 0,
    "Conv3d": 0,
    "ConvTranspose1d": 1,
    "ConvTranspose2d": 1,
    "ConvTranspose3d": 1,
    "Conv1D": 1,
    "Embedding": 0,
    "EmbeddingBag": 0,
    "MultiheadAttention": 0,
    "RNNBase": 0,
    "RNNCellBase": 0,
}
_EMBEDDINGS = ("Embedding", "EmbeddingBag")


def as_rows(tensor: Tensor, neuron_dim: int = 0) -> Tensor:
    """(K, n) matrix with one neuron a row, from a tensor whose axis `neuron_dim` counts the K neurons.

    A view where the strides allow it (always for contiguous tensors and neuron_dim = 0), else a copy.
    """
    if tensor.ndim < 2:
        return tensor.reshape(-1, 1)
    return (tensor.movedim(neuron_dim, 0) if neuron_dim else tensor).flatten(1)


def neuron_axes(model: nn.Module) -> dict[str, int]:
    """Name → neuron axis of every parameter that known modules use as a matrix of neurons; tied weights once.

    Weights of Linear, Bilinear, Conv*, Embedding*, recurrent cells and MultiheadAttention (packed: 3E rows) have it on
    axis 0, ConvTranspose* (one group) and Hugging Face's Conv1D on axis 1. Names are those of `named_parameters()`.
    """
    found: dict[int, int] = {}
    for module in model.modules():
        axis = _axis_of(module)
        for name, parameter in module.named_parameters(recurse=False):
            if axis is not None and "weight" in name and parameter.ndim > 1:
                found.setdefault(id(parameter), axis)
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def rotational_param_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    exclude: Sequence[str] = (),
    include_embeddings: bool = True,
    include_head: bool = True,
    rotational: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups {params, rotational, weight_decay, neuron_dim}, every trainable parameter exactly once.

    Weights whose slices are neurons (see `neuron_axes`) rotate and carry `weight_decay`. Weights that `exclude`,
    `include_embeddings` or `include_head` take out keep it, but do not rotate. All else has weight decay 0: tensors of
    one axis (biases, norm parameters, gains), fan-in 1 or 2 (a centred row of two coordinates cannot turn), tensors
    that start at zero, and matrices in modules without a known neuron axis, which a warning names. Frozen parameters
    (requires_grad=False) are in no group.

    Args:
        model: any module; it is not changed.
        weight_decay: λ of the weights, ≥ 0.
        exclude: parameter names, dotted prefixes of them ("head", "blocks.0") or patterns ("*.proj.weight").
        include_embeddings: False: Embedding and EmbeddingBag tables do not rotate, nor what is tied to them.
        include_head: False: the output layer does not rotate: `get_output_embeddings()` where the model has it, else
            the last linear module in order of registration.
        rotational: names, prefixes or patterns → neuron axis; these rotate whatever the rules say.

    Returns:
        Groups without empty ones: rotational (one for each axis), decayed, plain.

    Raises:
        ValueError: weight_decay < 0; an entry of `exclude` or `rotational` matches no parameter, or the axis does not
            fit it.

    Source: paper, experimental set-up (every decayed matrix rotates); the exceptions: derivation.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay}: must be >= 0")
    # a tied weight has several names
    aliases = list(model.named_parameters(remove_duplicate=False))
    forced = _forced(rotational or {}, aliases)
    patterns = (exclude,) if isinstance(exclude, str) else exclude
    kept_out = {id(p) for pattern in patterns for _, p in _matching("exclude", pattern, aliases)}
    for module in model.modules():
        if not include_embeddings and _is(module, _EMBEDDINGS):
            kept_out |= {id(p) for p in module.parameters(recurse=False)}
    kept_out |= set() if include_head else _head(model)
    axes, unknown = neuron_axes(model), []
    groups: dict[tuple[bool, float, int], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        axis = forced.get(id(p), axes.get(name))
        if axis is None and p.ndim > 1 and id(p) not in kept_out:
            unknown.append(f"{name} {tuple(p.shape)}")
        if id(p) in forced:
            key = (True, weight_decay, forced[id(p)])
        elif axis is None or not _can_turn(p, axis):
            key = (False, 0.0, 0)
        else:
            key = (id(p) not in kept_out, weight_decay, axis)
        groups.setdefault(key, []).append(p)
    _report(unknown)
    names = ("rotational", "weight_decay", "neuron_dim")
    ordered = sorted(groups.items(), key=lambda item: (not item[0][0], -item[0][1], item[0][2]))
    return [{"params": params, **dict(zip(names, key, strict=True))} for key, params in ordered]


def _report(unknown: list[str]) -> None:
    if unknown:
        warnings.warn(
            f"rotational_param_groups: no neuron axis is known for {', '.join(unknown)}; the base optimizer trains "
            "them, without weight decay. Name them in rotational={name: axis}, or in exclude to silence this.",
            stacklevel=3,
        )


def _is(module: nn.Module, names: Sequence[str]) -> bool:
    return any(base.__name__ in names for base in type(module).__mro__)


def _axis_of(module: nn.Module) -> int | None:
    name = next((base.__name__ for base in type(module).__mro__ if base.__name__ in _NEURON_DIM), None)
    # with groups, axis 1 of a transposed convolution cuts across neurons of different groups
    if name is None or (name.startswith("ConvTranspose") and getattr(module, "groups", 1) > 1):
        return None
    return _NEURON_DIM[name]


def _can_turn(parameter: Tensor, axis: int, least: int = 3) -> bool:
    """At least `least` coordinates a neuron, and not all zeros (a zero vector has no direction)."""
    fan_in = parameter.numel() // max(1, parameter.shape[axis])
    return fan_in >= least and (parameter.is_meta or bool(parameter.detach().any()))


def _hits(pattern: str, name: str) -> bool:
    return name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern)


def _matching(argument: str, pattern: str, aliases: list[_Named]) -> list[_Named]:
    hits = [(name, p) for name, p in aliases if _hits(pattern, name)]
    if not hits:
        raise ValueError(f"{argument}={pattern!r}: matches no parameter; allowed: a name such as {aliases[0][0]!r}")
    return hits


def _forced(rotational: Mapping[str, int], aliases: list[_Named]) -> dict[int, int]:
    forced: dict[int, int] = {}
    for pattern, axis in rotational.items():
        for name, p in _matching("rotational", pattern, aliases):
            if not 0 <= axis < p.ndim or p.ndim < 2 or not _can_turn(p, axis, least=2):
                shape = tuple(p.shape)
                raise ValueError(
                    f"rotational[{pattern!r}]={axis}: {name} of shape {shape} cannot turn along it; must be an axis in "
                    f"[0, {p.ndim}) that leaves more than one coordinate a neuron, of a tensor that is not zero"
                )
            forced[id(p)] = axis
    return forced


def _head(model: nn.Module) -> set[int]:
    """The output layer's parameters."""
    known = getattr(model, "get_output_embeddings", None)
    layer = known() if callable(known) else None
    if layer is None:
        linear = [m for m in model.modules() if _is(m, ("Linear", "Conv1D")) and list(m.parameters(recurse=False))]
        layer = linear[-1] if linear else None
    return {id(p) for p in layer.parameters(recurse=False)} if isinstance(layer, nn.Module) else set()
