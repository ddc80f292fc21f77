"""A batch of named modalities: what is present, and inputs that are safe to compute on where it is not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from common.config import check

if TYPE_CHECKING:
    from multimodn.network import Network

Inputs = Mapping[str, Any]
"""Modality -> tensor or numpy array (..., B, F), (..., B, T, F) or (..., B, C, H, W)."""
Masks = Mapping[str, Any]
"""Modality -> (..., B) bool, True = present; None = all samples have it."""


class Batch(NamedTuple):
    """Inputs without a NaN where a modality is missing."""

    inputs: dict[str, Tensor]
    masks: dict[str, Tensor | None]
    """(..., B) bool, or None where every sample has the modality for sure."""
    shape: torch.Size
    """(..., B)."""


def observed(x: Tensor, lead: int = 1) -> Tensor:
    """Which samples have a modality: those without NaN in it. x: `lead` sample dimensions, then features -> bool."""
    return ~x.isnan().flatten(lead).any(-1) if x.ndim > lead else ~x.isnan()


def read_batch(model: Network, inputs: Inputs, masks: Masks | None = None) -> Batch:
    """Check a batch against a model and zero what is missing, so that no NaN reaches a value or a gradient.

    Args:
        model: has `encoders` (by modality) and `n_models` (None, or N for stacked models, whose inputs have a
            leading axis N).
        inputs: see `Inputs`; numpy arrays and integers are cast to the model's dtype.
        masks: see `Masks`; trusted where given.

    Raises:
        KeyError: a modality or mask of an unknown name.
        ValueError: an empty batch, or shapes that do not agree.
    """
    reference = next(model.parameters())
    lead: int = 1 if model.n_models is None else 2
    shape: torch.Size | None = None
    clean: dict[str, Tensor] = {}
    present: dict[str, Tensor | None] = {}
    for kind, given in (("inputs", inputs), ("masks", masks or {})):
        for name in given:
            if name not in model.encoders:
                raise KeyError(f"{kind}: {name!r} is not one of {', '.join(model.encoders) or 'no modality'}")
    for name, values in inputs.items():
        x = torch.as_tensor(values, device=reference.device)
        x = x if x.dtype == reference.dtype else x.to(reference.dtype)
        check(f"inputs.{name}.shape", tuple(x.shape), x.ndim > lead, f"of at least {lead + 1} dimensions")
        shape = x.shape[:lead] if shape is None else shape
        check(f"inputs.{name}.shape", tuple(x.shape), x.shape[:lead] == shape, f"{tuple(shape)} and features")
        if masks is not None and name in masks:
            given = masks[name]
            mask = None if given is None else torch.as_tensor(given, device=reference.device)
        else:
            mask = observed(x, lead)
        if mask is not None:
            fits = mask.dtype == torch.bool and mask.shape == shape
            check(f"masks.{name}", f"{mask.dtype} {tuple(mask.shape)}", fits, f"bool {tuple(shape)}")
            x = _zeroed(x, mask)
        clean[name], present[name] = x, mask
    if shape is None:
        raise ValueError("inputs={}: must hold at least one modality, to know the batch size")
    check("batch", tuple(shape), shape[-1] > 0, "a batch of at least one sample")
    check("models", shape[0], model.n_models is None or shape[0] == model.n_models, f"{model.n_models} models")
    return Batch(clean, present, shape)


def skip_batches(batch: Batch) -> Batch:
    """The official rule: a modality that one sample of the batch lacks is skipped for all of them."""
    masks = {
        name: None if mask is None else mask.all(-1, keepdim=True).expand_as(mask) for name, mask in batch.masks.items()
    }
    inputs = {name: _zeroed(x, masks[name]) for name, x in batch.inputs.items()}
    return Batch(inputs, masks, batch.shape)


def _zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x
    return torch.where(mask.view(*mask.shape, *[1] * (x.ndim - mask.ndim)), x, 0.0)
