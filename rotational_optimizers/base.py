"""What all rotational optimizers share: which tensors rotate, their state, and the choice of the fastest correct path.

A parameter is `rotational` or follows the base optimizer unchanged. The group's key `rotational` decides; None means
every tensor of two or more axes whose group has weight decay. Tensors that have no angle (fan-in 1, all zero, constant
rows under zero mean) fall back to the base optimizer with a warning, or are refused if the group says
`rotational=True`. The decision falls at a tensor's first step and stays.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from rotational_optimizers.kernels import foreach, native
from rotational_optimizers.update import prepare_rows_, rotational_update_, row_dims, row_dtype

Group = dict[str, Any]
MODES = ("equilibrium", "exact", "paper")
ROTATION_DEFAULTS: dict[str, Any] = {
    "rotation": "equilibrium",
    "update_norm_decay": 0.9,
    "per_neuron": True,
    "zero_mean": True,
    "rotational": None,
    "neuron_dim": 0,
    "neuron_speed": None,
}


class Turn(NamedTuple):
    """One rotational tensor in one step."""

    param: Tensor
    weight: Tensor  # the parameter, or its float32 master copy
    grad: Tensor
    moments: tuple[Tensor, ...]
    step: Tensor  # () steps done before this one
    norm: Tensor  # (K,)
    update_norm_sq: Tensor  # (K,)
    speed: Tensor | None  # (K,)
