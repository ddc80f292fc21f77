"""Layers around rotational optimizers: learnable gains, and Weight Standardization.

A rotational optimizer holds the norm of every row, so a layer without an affine norm behind it can no longer scale its
outputs; a gain per row gives that freedom back (section 3.2, the experiments' "SLinear"):

    y = (g ⊙ W) x + b,      g ∈ R^K, ones at first.

Weight Standardization makes every row scale-invariant and centred, and so each *neuron* balanced even under LayerNorm
(section 3.3):  ŵ = (w − mean w)·s₀/(std w + 1e-5)·g,  with s₀ the row's own std at the first forward ("keep_init") or
1/√n ("fan_in"), n the fan-in. Cost beyond the plain layer: one pass over the weights a forward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5
MODES = ("keep_init", "fan_in")


@torch.no_grad()
def center_rows_(param: Tensor, neuron_dim: int = 0, name: str = "param") -> Tensor:
    """Subtract each row's mean in place, keeping its norm: x ← (x − mean x)·‖x‖/‖x − mean x‖.

    Rows whose mean is already zero to rounding stay as they are, bit for bit, so centring twice is centring once.

    Args:
        param: (K, …) floating point, with at least two coordinates a row.
        neuron_dim: the axis that counts the K rows.
        name: what to call the tensor in an error.

    Returns: `param`.

    Raises:
        ValueError: a row is constant: nothing is left of it, so it has no direction.

    Source: paper's code, construction of the optimizer (section 3.2).
    """
    dims = tuple(axis for axis in range(param.ndim) if axis != neuron_dim)
    eps = torch.finfo(param.dtype).eps
    rows = param.double()
    mean = rows.mean(dims, keepdim=True)
    centred = rows - mean
    # a second pass takes what rounding left behind a mean far larger than the spread
    centred -= centred.mean(dims, keepdim=True)
    norm = torch.linalg.vector_norm(rows, dim=dims, keepdim=True)
    left = torch.linalg.vector_norm(centred, dim=dims, keepdim=True)
    constant = (left <= 4 * eps * norm).flatten()
    if bool(constant.any()):
        bad = constant.nonzero().flatten().tolist()
        raise ValueError(f"{name}: rows {bad[:8]} are constant, so centring leaves nothing; must vary within each row")
    rms = norm * (norm.numel() / param.numel()) ** 0.5
    return param.copy_(torch.where(mean.abs() <= 4 * eps * rms, rows, centred * (norm / left)))


class GainLinear(nn.Linear):
    """`nn.Linear` with a learnable factor on each row: y = (gain ⊙ weight) x + bias.

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.

    Attributes: `gain` (out_features,), ones at first; give it weight decay 0 (`rotational_param_groups` does).

    Source: section 3.2 ("SLinear" of the paper's code).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, bias, **kwargs)
        self.gain = nn.Parameter(torch.ones_like(self.weight[:, 0]))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        return F.linear(x, self.weight * self.gain[:, None], self.bias)


class _Standardized(nn.Module):
    """Mixin ahead of a torch layer: its `weight` is standardised on use."""

    weight: Tensor
    gain: nn.Parameter | None
    initial_std: Tensor | None

    def _standardize(self, mode: str, gain: bool) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
        fan_in = self.weight[0].numel()
        if fan_in < 2:
            raise ValueError(f"weight of shape {tuple(self.weight.shape)}: fan-in {fan_in} has no std; must be >= 2")
        self.fan_in_std = fan_in**-0.5
        rows = self.weight.detach().flatten(1)[:, 0]
        self.gain = nn.Parameter(torch.ones_like(rows)) if gain else None
        # s_0 belongs to the state: NaN until the first forward has seen the initial weights
        self.register_buffer("initial_std", torch.full_like(rows, torch.nan) if mode == "keep_init" else None)
        self._unseen = mode == "keep_init"

    def standardized_weight(self) -> Tensor:
        """The weight that the layer applies, of the shape of `weight`."""
        rows = self.weight.flatten(1)  # (K, n)
        std, mean = torch.std_mean(rows, dim=1)  # unbiased
        std = std + EPS
        if self._unseen and self.initial_std is not None:
            self.initial_std.copy_(std.detach())
            self._unseen = False
        scale = (self.fan_in_std if self.initial_std is None else self.initial_std) / std
        if self.gain is not None:
            scale = scale * self.gain
        return ((rows - mean[:, None]) * scale[:, None]).view_as(self.weight)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._unseen = self.initial_std is not None and bool(self.initial_std.isnan().any())


class WSLinear(_Standardized, nn.Linear):
    """`nn.Linear` on standardised rows.

    Args:
        in_features: n ≥ 2.
        out_features, bias, device, dtype: as in `nn.Linear`.
        mode: std of the rows in use: "keep_init" (their std at the first forward) or "fan_in" (1/√n).
        gain: with a learnable factor on each row, ones at first.

    Raises:
        ValueError: unknown mode, fan-in below 2.

    Source: section 3.3; Qiao et al. 2019 (arXiv 1903.10520).
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, mode: str = "keep_init", gain: bool = False,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, **kwargs)
        self._standardize(mode, gain)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        return F.linear(x, self.standardized_weight(), self.bias)


class _WSConv(_Standardized):
    """What the three convolutions share."""

    def __init__(self, *args: Any, mode: str = "keep_init", gain: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._standardize(mode, gain)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, …) -> (B, out_channels, …)."""
        return self._conv_forward(x, self.standardized_weight(), self.bias)  # type: ignore[operator]


class WSConv1d(_WSConv, nn.Conv1d):
    """`nn.Conv1d` on standardised filters; arguments of `nn.Conv1d`, and `mode` and `gain` of `WSLinear`."""


class WSConv2d(_WSConv, nn.Conv2d):
    """`nn.Conv2d` on standardised filters; arguments of `nn.Conv2d`, and `mode` and `gain` of `WSLinear`."""


class WSConv3d(_WSConv, nn.Conv3d):
    """`nn.Conv3d` on standardised filters; arguments of `nn.Conv3d`, and `mode` and `gain` of `WSLinear`."""


def convert_gains(model: nn.Module, *, exclude: Sequence[str] = ()) -> nn.Module:
    """Give every `nn.Linear` of a model a gain, in place; its function does not change.

    Parameters, biases and hooks stay the very objects they were (tied weights stay tied, an optimizer stays valid but
    must be told of the gains). Subclasses of nn.Linear are left alone: a MultiheadAttention reads the weight of its
    output projection directly, and would ignore a gain.

    Args:
        model: any module; itself an nn.Linear is fine.
        exclude: names of modules, with all that lies below them.

    Returns: `model`.

    Raises:
        ValueError: an entry of `exclude` names no module.

    Source: section 3.2.
    """

    def convert(layer: Any) -> None:
        layer.__class__ = GainLinear
        layer.gain = nn.Parameter(torch.ones_like(layer.weight[:, 0]))

    return _convert(model, (nn.Linear,), convert, exclude)


def convert_weight_standardization(
    model: nn.Module, *, mode: str = "keep_init", gain: bool = False, exclude: Sequence[str] = ()
) -> nn.Module:
    """Turn every `nn.Linear` and `nn.Conv1d/2d/3d` of a model into its weight-standardised form, in place.

    Parameters and hooks stay the objects they were; with "keep_init" an already centred network computes what it did
    before. Layers of fan-in 1 and subclasses of the four are left alone.

    Args:
        model: any module.
        mode: "keep_init" or "fan_in", see `WSLinear`.
        gain: with a learnable factor on each row.
        exclude: names of modules, with all that lies below them.

    Returns: `model`.

    Raises:
        ValueError: unknown mode, or an entry of `exclude` names no module.

    Source: section 3.3.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
    kinds = {nn.Linear: WSLinear, nn.Conv1d: WSConv1d, nn.Conv2d: WSConv2d, nn.Conv3d: WSConv3d}

    def convert(layer: Any) -> None:
        if layer.weight[0].numel() > 1:
            layer.__class__ = kinds[type(layer)]
            layer._standardize(mode, gain)

    return _convert(model, tuple(kinds), convert, exclude)


def _convert(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], convert: Callable[[Any], None], exclude: Sequence[str]
) -> nn.Module:
    """Apply `convert` once to every module whose type is exactly one of `kinds`."""
    names = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    known = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in known:
            raise ValueError(f"exclude={name!r}: names no module; allowed: a name such as {list(known)[-1]!r}")
    kept = {id(m) for name in names for m in known[name].modules()}
    for module in list(model.modules()):
        if type(module) in kinds and id(module) not in kept:
            convert(module)
        # torch's fused encoder layer reads weights past the layers' forward; zero switches it off
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model
