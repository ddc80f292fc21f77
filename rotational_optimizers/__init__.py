"""Rotational equilibrium and its optimizers (Kosson, Messmer, Jaggi, ICML 2024, arXiv 2305.17212).

Optimizers that keep every neuron's weight norm fixed and turn it by the angle that weight decay would lead to in
equilibrium, the formulas behind that angle, and the tools to measure it in any network.
"""

from rotational_optimizers.adamw import RotationalAdamW
from rotational_optimizers.equilibrium import (
    equilibrium_norm,
    equilibrium_rotation,
    equilibrium_time,
    norm_trajectory,
)
from rotational_optimizers.groups import rotational_param_groups
from rotational_optimizers.layers import (
    GainLinear,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSLinear,
    center_rows_,
    convert_gains,
    convert_weight_standardization,
)
from rotational_optimizers.lion import RotationalLion
from rotational_optimizers.sgd import RotationalSGD
from rotational_optimizers.tracker import RotationTracker
from rotational_optimizers.wrapper import RotationalWrapper

__all__ = [
    "GainLinear",
    "RotationTracker",
    "RotationalAdamW",
    "RotationalLion",
    "RotationalSGD",
    "RotationalWrapper",
    "WSConv1d",
    "WSConv2d",
    "WSConv3d",
    "WSLinear",
    "center_rows_",
    "convert_gains",
    "convert_weight_standardization",
    "equilibrium_norm",
    "equilibrium_rotation",
    "equilibrium_time",
    "norm_trajectory",
    "rotational_param_groups",
]
