"""Convolutions and their norms for n_models networks side by side, one channel group a model (see `stacked`).

Signals are (B, n_models*C, L) or (B, n_models*C, H, W): model i owns channels i*C … (i+1)*C - 1.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.stacked import Weighted, chunk

NORMS = ("bn", "ln", "none")
INITS = ("uniform", "normal")


class _Conv(Weighted):
    """What both dimensions share: options of the weight and its initialisation."""

    def _build(
        self,
        n_models: int,
        gain: bool,
        weight_standardization: bool,
        keep_init_std: bool,
        init: str,
        gradient_scale: float,
    ) -> None:
        if init not in INITS:
            raise ValueError(f"init={init!r}: must be one of {', '.join(INITS)}")
        self._allocate(n_models)
        self.init = init
        self._add_options(gain, weight_standardization, keep_init_std)
        self.gradient_scale = gradient_scale

    def reset_model(self, index: int, generator: torch.Generator | None) -> None:
        """Draw one model's filters: torch.nn's uniform default, or He's normal by fan-out with zero biases."""
        if self.init == "uniform":
            return super().reset_model(index, generator)
        weight = chunk(self.weight, self.n_models, index)
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu", generator=generator)
        if self.bias is not None:
            nn.init.zeros_(chunk(self.bias, self.n_models, index))


class Conv1d(_Conv, nn.Conv1d):
    """`nn.Conv1d` for n_models networks.

    Args:
        n_models: networks in the stack, >= 1.
        in_channels: C, input channels of one model.
        out_channels: K, output channels of one model.
        kernel_size: taps k of a filter.
        stride: positions between outputs.
        padding: zeros at each end.
        bias: add a bias, (n_models*K,).
        gain: learnable factor on each filter, (n_models*K,), ones at first.
        weight_standardization: use the row-standardised weight.
        keep_init_std: standardised rows keep the std they were initialised with; otherwise 1/sqrt(fan-in).
        init: "uniform" (torch.nn's default) or "normal" (He: std sqrt(2 / fan-out), biases zero).
        gradient_scale: constant factor on the weight's gradient; the forward pass does not see it.

    Input (B, n_models*C, L), output (B, n_models*K, L'); weight (n_models*K, C, k).
    """

    def __init__(
        self,
        n_models: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        gain: bool = False,
        weight_standardization: bool = False,
        keep_init_std: bool = True,
        init: str = "uniform",
        gradient_scale: float = 1.0,
    ) -> None:
        nn.Conv1d.__init__(
            self, n_models * in_channels, n_models * out_channels, kernel_size, stride, padding,
            groups=n_models, bias=bias, device="meta",
        )  # fmt: skip
        self._build(n_models, gain, weight_standardization, keep_init_std, init, gradient_scale)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_models*C, L) -> (B, n_models*K, L')."""
        weight = self.effective_weight()
        if self.n_models > 1 and weight.shape[1] == 1 and not x.requires_grad:
            return self._single_channel(x, weight)
        return F.conv1d(x, weight, self.bias, self.stride, self.padding, groups=self.n_models)

    def _single_channel(self, x: Tensor, weight: Tensor) -> Tensor:
        # a grouped convolution with one channel a group leaves the fast path on CPU: windows and a batched product
        # take a sixth of its time
        batch, n_models = x.shape[:2]
        taps, padding = self.kernel_size[0], int(self.padding[0])
        windows = F.pad(x, (padding, padding)).unfold(2, taps, self.stride[0])  # (B, M, L', k)
        length = windows.shape[2]
        windows = windows.permute(1, 3, 0, 2).reshape(n_models, taps, batch * length)  # (M, k, B*L')
        y = torch.bmm(weight.view(n_models, -1, taps), windows)  # (M, K, B*L')
        y = y.view(n_models, -1, batch, length).permute(2, 0, 1, 3).reshape(batch, -1, length)  # (B, M*K, L')
        return y if self.bias is None else y + self.bias[:, None]


class Conv2d(_Conv, nn.Conv2d):
    """`nn.Conv2d` for n_models networks; arguments as in `Conv1d`.

    Input (B, n_models*C, H, W), output (B, n_models*K, H', W'); weight (n_models*K, C, k, k).
    """

    def __init__(
        self,
        n_models: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        gain: bool = False,
        weight_standardization: bool = False,
        keep_init_std: bool = True,
        init: str = "uniform",
    ) -> None:
        nn.Conv2d.__init__(
            self, n_models * in_channels, n_models * out_channels, kernel_size, stride, padding,
            groups=n_models, bias=bias, device="meta",
        )  # fmt: skip
        self._build(n_models, gain, weight_standardization, keep_init_std, init, gradient_scale=1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_models*C, H, W) -> (B, n_models*K, H', W')."""
        return F.conv2d(x, self.effective_weight(), self.bias, self.stride, self.padding, groups=self.n_models)


def norm_factory(norm: str, dims: int) -> Callable[[int, int], nn.Module]:
    """Return the constructor (n_models, channels of one model) -> norm layer on (B, n_models*C, …).

    Args:
        norm: "bn" (BatchNorm: its statistics are per channel, so stacked models do not mix), "ln" (GroupNorm with
            one group a model) or "none".
        dims: 1 or 2 position dimensions.

    Raises:
        ValueError: `norm` is none of these.
    """
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: must be one of {', '.join(NORMS)}")
    batch_norm = nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d
    factories: dict[str, Callable[[int, int], nn.Module]] = {
        "bn": lambda n_models, channels: batch_norm(n_models * channels),
        "ln": lambda n_models, channels: nn.GroupNorm(n_models, n_models * channels),
        "none": lambda n_models, channels: nn.Identity(),
    }
    return factories[norm]
