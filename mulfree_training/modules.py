"""PyTorch's layers with piecewise affine arithmetic: same constructors, same state dicts, weights load both ways.

Every module takes, as keywords, `derivative` (`approx` or `exact`), `alpha` (the compensation constant of section 2.7)
and `backend` (forces a face); see `primitives`. Under `torch.autocast` parameters follow the dtype of the input.
`convert` turns the layers of an existing network into these.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulfree_training.arguments import Rule, Rules, are_exact, is_exact
from mulfree_training.bits import offset
from mulfree_training.functional import (
    Smoothing,
    pam_cross_entropy,
    pam_dropout,
    pam_layer_norm,
    pam_log_softmax,
    pam_softmax,
)
from mulfree_training.operators import FACES
from mulfree_training.primitives import pam_div, pam_exp, pam_mul
from mulfree_training.products import pam_conv2d, pam_linear


class Arithmetic(nn.Module):
    """What all modules here share: how their operations are derived, compensated and run."""

    derivative: Rules = "approx"
    alpha: float | None = None
    backend: str = ""
    takes_pair: ClassVar[bool] = False
    """May `derivative` be a pair, a rule for the input and one for the weight?"""

    def set_arithmetic(self, *, derivative: Rules = "approx", alpha: float | None = None, backend: str = "") -> None:
        """Set all three.

        Raises:
            ValueError: an unknown rule or face, alpha not in (0.5, 2).
        """
        if self.takes_pair:
            are_exact(derivative)
        else:
            is_exact(derivative)  # type: ignore[arg-type]
        offset(alpha)
        if backend not in ("", *FACES):
            raise ValueError(f"backend={backend!r}: must be one of {', '.join(FACES)}, or empty")
        self.derivative, self.alpha, self.backend = derivative, alpha, backend

    @property
    def arithmetic(self) -> dict[str, Any]:
        """The three as keyword arguments."""
        return {"derivative": self.derivative, "alpha": self.alpha, "backend": self.backend}

    def extra_repr(self) -> str:
        """What the ordinary module shows, and the arithmetic where it is not the default."""
        shown = [super().extra_repr(), f"derivative={self.derivative!r}"]
        shown += [f"alpha={self.alpha}"] if self.alpha is not None else []
        shown += [f"backend={self.backend!r}"] if self.backend else []
        return ", ".join(filter(None, shown))


def cast(input: Tensor, *parameters: Tensor | None) -> tuple[Any, ...]:
    """Parameters in the input's dtype where autocast is on: what comes from an ordinary layer is bfloat16 there.

    Their gradients are in their own dtype.
    """
    on = isinstance(input, Tensor) and torch.amp.is_autocast_available(input.device.type)
    if not on or not input.is_floating_point() or not torch.is_autocast_enabled(input.device.type):
        return parameters
    return tuple(x if x is None else x.to(input.dtype) for x in parameters)


class PAMLinear(Arithmetic, nn.Linear):
    """`nn.Linear` with PAM: (…, in_features) -> (…, out_features).

    Args:
        in_features, out_features, bias, device, dtype: as in `nn.Linear`.
        derivative: a rule, or a pair: of the input and of the weight.
        alpha, backend: see the module.
    """

    takes_pair = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        derivative: Rules = "approx",
        alpha: float | None = None,
        backend: str = "",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.set_arithmetic(derivative=derivative, alpha=alpha, backend=backend)

    def forward(self, input: Tensor) -> Tensor:
        """(…, in_features) -> (…, out_features)."""
        weight, bias = cast(input, self.weight, self.bias)
        return pam_linear(input, weight, bias, **self.arithmetic)


class PAMConv1d(Arithmetic, nn.Conv1d):
    """`nn.Conv1d` with PAM, a convolution of images of height 1: (B, C, L) or (C, L) -> (B, C', L') or (C', L').

    Args as in `nn.Conv1d`; derivative, alpha, backend as in `PAMLinear`.
    """

    takes_pair = True

    def __init__(
        self,
        *args: Any,
        derivative: Rules = "approx",
        alpha: float | None = None,
        backend: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.set_arithmetic(derivative=derivative, alpha=alpha, backend=backend)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, L) or (C, L) -> (B, C', L') or (C', L')."""
        x, (padding,) = _padded(self, input if input.dim() == 3 else input[None])
        weight, bias = cast(x, self.weight, self.bias)
        out = pam_conv2d(
            x[:, :, None], weight[:, :, None], bias, stride=(1, self.stride[0]), padding=(0, padding),
            dilation=(1, self.dilation[0]), groups=self.groups, **self.arithmetic,
        )  # fmt: skip
        out = out[:, :, 0].contiguous()
        return out if input.dim() == 3 else out[0]


class PAMConv2d(Arithmetic, nn.Conv2d):
    """`nn.Conv2d` with PAM: (B, C, H, W) or (C, H, W) -> (B, C', H', W') or (C', H', W').

    Args as in `nn.Conv2d`; derivative, alpha, backend as in `PAMLinear`.
    """

    takes_pair = True

    def __init__(
        self,
        *args: Any,
        derivative: Rules = "approx",
        alpha: float | None = None,
        backend: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.set_arithmetic(derivative=derivative, alpha=alpha, backend=backend)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) or (C, H, W) -> (B, C', H', W') or (C', H', W')."""
        x, padding = _padded(self, input if input.dim() == 4 else input[None])
        weight, bias = cast(x, self.weight, self.bias)
        out = pam_conv2d(
            x, weight, bias, stride=_two(self.stride), padding=_two(padding),
            dilation=_two(self.dilation), groups=self.groups, **self.arithmetic,
        ).contiguous()  # fmt: skip
        return out if input.dim() == 4 else out[0]


def _two(x: tuple[int, ...]) -> tuple[int, int]:
    return x[0], x[1]


def _padded(conv: nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with what zero padding of equal sides cannot do already done, and the padding that is left."""
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        return x, tuple(conv.padding)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    # the amounts that PyTorch works out for "same" and "valid" too
    return F.pad(x, conv._reversed_padding_repeated_twice, mode), (0,) * len(conv.kernel_size)


class PAMLayerNorm(Arithmetic, nn.LayerNorm):
    """`nn.LayerNorm` of piecewise affine operations; see `functional.pam_layer_norm`.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as in `nn.LayerNorm`.
        derivative, alpha, backend: see the module.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        derivative: Rule = "approx",
        alpha: float | None = None,
        backend: str = "",
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.set_arithmetic(derivative=derivative, alpha=alpha, backend=backend)

    def forward(self, input: Tensor) -> Tensor:
        """(…, *normalized_shape), the same out."""
        weight, bias = cast(input, self.weight, self.bias)
        return pam_layer_norm(input, self.normalized_shape, weight, bias, self.eps, **self.arithmetic)


class PAMSoftmax(Arithmetic, nn.Softmax):
    """`nn.Softmax` of piecewise affine operations along `dim`; see `functional.pam_softmax`."""

    dim: int

    def __init__(
        self, dim: int = -1, *, derivative: Rule = "approx", alpha: float | None = None, backend: str = ""
    ) -> None:
        super().__init__(dim)
        self.set_arithmetic(derivative=derivative, alpha=alpha, backend=backend)

    def forward(self, input: Tensor) -> Tensor:
        """Any shape, the same out."""
        return pam_softmax(input, self.dim, **self.arithmetic)


class PAMLogSoftmax(Arithmetic, nn.LogSoftmax):
    """`nn.LogSoftmax` of piecewise affine operations along `dim`; see `functional.pam_log_softmax`."""

    dim: int

    def __init__(
        self, dim: int = -1, *, derivative: Rule = "approx", alpha: float | None = None, backend: str = ""
    ) -> None:
        super().__init__(dim)
        self.set_arithmetic(derivative=derivative, alpha=alpha, backend=backend)

    def forward(self, input: Tensor) -> Tensor:
        """Any shape, the same out."""
        return pam_log_softmax(input, self.dim, **self.arithmetic)


class PAMDropout(Arithmetic, nn.Dropout):
    """`nn.Dropout` whose factor is applied by PAM; never in place, whatever `inplace` says."""

    def __init__(
        self,
        p: float = 0.5,
        inplace: bool = False,
        *,
        derivative: Rule = "approx",
        alpha: float | None = None,
        backend: str = "",
    ) -> None:
        super().__init__(p, inplace)
        self.set_arithmetic(derivative=derivative, alpha=alpha, backend=backend)

    def forward(self, input: Tensor) -> Tensor:
        """Any shape, the same out."""
        if not self.training:
            return input
        if self.p == 1:  # nothing is kept, so there is no factor
            return input.masked_fill(torch.ones_like(input, dtype=torch.bool), 0.0)
        return pam_dropout(input, self.p, **self.arithmetic)


class PAMGELU(Arithmetic):
    """PAM(x, sigmoid(PAM(1.702, x))), the sigmoid made of piecewise affine operations.

    This is ours and not the paper's, which has ReLU in all multiplication-free networks. 1.702 is the usual constant of
    GELU's approximation by a sigmoid (Hendrycks and Gimpel 2016).
    """

    def __init__(self, *, derivative: Rule = "approx", alpha: float | None = None, backend: str = "") -> None:
        super().__init__()
        self.set_arithmetic(derivative=derivative, alpha=alpha, backend=backend)

    def forward(self, input: Tensor) -> Tensor:
        """Any shape, the same out."""
        options = self.arithmetic
        t = pam_mul(input, 1.702, **options)
        e = pam_exp(torch.where(t < 0, t, -t), **options)  # at most 1: nothing overflows
        sigmoid = pam_div(torch.where(t < 0, e, 1.0), 1 + e, **options)
        return pam_mul(input, sigmoid, **options)


class PAMCrossEntropy(Arithmetic):
    """`nn.CrossEntropyLoss` of class indices; see `functional.pam_cross_entropy`.

    In contrast to `nn.CrossEntropyLoss` there are no class weights, all options go by keyword, and label smoothing is
    by default fairseq's, which leaves the target out of those that share epsilon.

    Args:
        ignore_index: targets that do not count.
        reduction: `mean`, `sum` or `none`.
        label_smoothing: epsilon in [0, 1).
        smoothing: how epsilon is spread: `fairseq`, over the other classes, or `torch`, over all.
        lse_log2: `exact` derives the logarithm in log-softmax exactly; see `pam_log_softmax`.
        derivative, alpha, backend: see the module.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        smoothing: Smoothing = "fairseq",
        lse_log2: Rule | None = None,
        derivative: Rule = "approx",
        alpha: float | None = None,
        backend: str = "",
    ) -> None:
        super().__init__()
        self.set_arithmetic(derivative=derivative, alpha=alpha, backend=backend)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction={reduction!r}: must be one of mean, sum, none")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing}: must be in [0, 1)")
        if smoothing not in ("fairseq", "torch"):
            raise ValueError(f"smoothing={smoothing!r}: must be fairseq or torch")
        if lse_log2 is not None:
            is_exact(lse_log2, "lse_log2")
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing
        self.smoothing, self.lse_log2 = smoothing, lse_log2

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits (B, V, …) and class indices (B, …) -> scalar, or (B, …) for `none`."""
        return pam_cross_entropy(
            input, target, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing, smoothing=self.smoothing, lse_log2=self.lse_log2, **self.arithmetic,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """All that is set."""
        own = f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, label_smoothing={self.label_smoothing}"
        return f"{own}, smoothing={self.smoothing!r}, lse_log2={self.lse_log2!r}, {super().extra_repr()}"
