"""A small 1-D convolutional classifier, several seeds in one stack.

Four blocks [Conv1d → norm → ReLU], mean over positions, linear head: the network of the MNIST-1D experiments. Past
four convolutions, residual blocks of two convolutions follow at the last resolution.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models import stacked
from common.models.stacked import Linear
from common.models.stacked_conv import Conv1d, norm_factory

KERNELS = (5, 3, 3, 3)
STRIDES = (2, 1, 2, 1)


class Block(nn.Module):
    """Conv1d followed by its norm, (B, M*C, L) -> (B, M*K, L'); the activation is the caller's."""

    def __init__(self, conv: Conv1d, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        """Return norm(conv(x))."""
        return self.norm(self.conv(x))


class Residual(nn.Module):
    """relu(x + scale * block2(relu(block1(x)))), the post-activation residual block; `scale` is a constant."""

    def __init__(self, first: Block, second: Block, scale: float) -> None:
        super().__init__()
        self.first, self.second, self.scale = first, second, scale

    def forward(self, x: Tensor) -> Tensor:
        """(B, M*C, L) -> (B, M*C, L)."""
        return F.relu(torch.add(x, self.second(F.relu(self.first(x))), alpha=self.scale))


class ConvNet1d(nn.Module):
    """Stack of len(seeds) one-dimensional convolutional networks.

    Args:
        seeds: one seed a model; len(seeds) is n_models.
        in_channels: input channels of one model.
        channels: output channels of each convolution of one model, before `width`.
        classes: outputs of one model.
        norm: "bn" (BatchNorm), "ln" (GroupNorm with one group: normalises channels and positions) or "none";
            convolutions have a bias only with "none", since a norm brings its own.
        weight_standardization: standardise the rows of every convolution's weight (the head's with
            `standardize_head`).
        keep_init_std: standardised rows keep their initial std; otherwise 1/sqrt(fan-in).
        standardize_head: with weight_standardization, standardise the head's rows as well.
        width: factor on `channels`, rounded down.
        depth: convolutions, 4 or an even number above it (the rest in residual blocks).
        init_scale: factor on the initial weights of the convolutions (biases and head stay).
        block_scales: one constant a residual block, factor on its branch; shrinks the branch's gradients likewise.
        gradient_scales: one constant a convolution, factor on its weight's gradient alone. (A constant in front of a
            norm changes neither function nor gradient, hence this argument for layers of unequal gradient size.)

    Input (B, n_models*in_channels, L) with L >= 3, output logits (n_models, B, classes).

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        in_channels: int = 1,
        channels: int = 32,
        classes: int = 10,
        norm: str = "bn",
        weight_standardization: bool = False,
        keep_init_std: bool = True,
        standardize_head: bool = False,
        width: float = 1.0,
        depth: int = 4,
        init_scale: float = 1.0,
        block_scales: Sequence[float] | None = None,
        gradient_scales: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if depth < len(KERNELS) or depth % 2:
            raise ValueError(f"depth={depth}: must be an even number >= {len(KERNELS)}")
        n_residual = (depth - len(KERNELS)) // 2
        scales = _factors("gradient_scales", gradient_scales, depth)
        branch_scales = _factors("block_scales", block_scales, n_residual)
        self.n_models = len(seeds)
        features = max(1, int(channels * width))
        new_norm = norm_factory(norm, dims=1)

        def block(c_in: int, kernel: int, stride: int, index: int) -> Block:
            conv = Conv1d(
                self.n_models, c_in, features, kernel, stride, padding=1, bias=norm == "none",
                weight_standardization=weight_standardization, keep_init_std=keep_init_std,
                gradient_scale=scales[index],
            )  # fmt: skip
            return Block(conv, new_norm(self.n_models, features))

        inputs = (in_channels, *[features] * (len(KERNELS) - 1))
        self.blocks = nn.ModuleList(
            block(c_in, k, s, i) for i, (c_in, k, s) in enumerate(zip(inputs, KERNELS, STRIDES, strict=True))
        )
        starts = range(len(KERNELS), depth, 2)
        self.residual = nn.Sequential(
            *(
                Residual(block(features, 3, 1, i), block(features, 3, 1, i + 1), scale)
                for i, scale in zip(starts, branch_scales, strict=True)
            )
        )
        standardized_head = weight_standardization and standardize_head
        self.head = Linear(
            self.n_models, features, classes, weight_standardization=standardized_head, keep_init_std=keep_init_std
        )
        stacked.init_stacked(self, seeds)
        self._scale_convolutions(init_scale)

    def _scale_convolutions(self, init_scale: float) -> None:
        if not init_scale > 0:
            raise ValueError(f"init_scale={init_scale}: must be > 0")
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, Conv1d):
                    module.weight.mul_(init_scale)
        stacked.finish_reset(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n_models, B, classes) of x (B, n_models*in_channels, L), floating point."""
        for block in self.blocks:
            x = F.relu(block(x))  # (B, M*C, L')
        x = self.residual(x)
        pooled = x.mean(dim=2).view(x.shape[0], self.n_models, -1)  # (B, M, C)
        return self.head(pooled.transpose(0, 1))  # (M, B, classes)


def _factors(name: str, values: Sequence[float] | None, count: int) -> list[float]:
    factors = [1.0] * count if values is None else [float(value) for value in values]
    if len(factors) != count:
        raise ValueError(f"{name}={factors}: must have {count} entries at this depth")
    return factors
