"""Residual networks for images, several seeds in one stack.

One class spans the family: ResNet-20 for CIFAR (three stages of basic blocks), ResNet-18 for CIFAR, ResNet-50 for
ImageNet, with activations after (He et al. 2016a) or before (He et al. 2016b) the convolutions. Bottlenecks stride in
their 3x3 convolution (v1.5); shortcuts that change shape are 1x1 convolutions; He's normal initialisation by fan-out.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from common.models import stacked
from common.models.stacked import Linear
from common.models.stacked_conv import Conv2d, norm_factory

EXPANSION = {"basic": 1, "bottleneck": 4}
NewConv = Callable[..., Conv2d]
NewNorm = Callable[[int], nn.Module]


class Block(nn.Module):
    """One residual block on (B, M*C, H, W).

    Args:
        new_conv: makes a convolution (c_in, c_out, kernel, stride, padding).
        new_norm: makes a norm (channels).
        kind: "basic" (two 3x3) or "bottleneck" (1x1, 3x3, 1x1).
        c_in: input channels of one model.
        c_out: output channels of one model.
        stride: of the block's first 3x3 convolution.
        pre_activation: norm and ReLU before each convolution; otherwise norm after it, ReLU between and at the end.
    """

    def __init__(
        self, new_conv: NewConv, new_norm: NewNorm, kind: str, c_in: int, c_out: int, stride: int, pre_activation: bool
    ) -> None:
        super().__init__()
        self.pre_activation = pre_activation
        if kind == "basic":
            shapes = [(c_in, c_out, 3, stride, 1), (c_out, c_out, 3, 1, 1)]
        else:
            middle = c_out // EXPANSION[kind]
            shapes = [(c_in, middle, 1, 1, 0), (middle, middle, 3, stride, 1), (middle, c_out, 1, 1, 0)]
        self.convs = nn.ModuleList(new_conv(*shape) for shape in shapes)
        self.norms = nn.ModuleList(new_norm(shape[0] if pre_activation else shape[1]) for shape in shapes)
        self.shortcut: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            projection = new_conv(c_in, c_out, 1, stride, 0)
            self.shortcut = projection if pre_activation else nn.Sequential(projection, new_norm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, M*c_in, H, W) -> (B, M*c_out, H / stride, W / stride)."""
        return self._before(x) if self.pre_activation else self._after(x)

    def _after(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        last = len(self.convs) - 1
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x))
            x = F.relu(x + identity if i == last else x)
        return x

    def _before(self, x: Tensor) -> Tensor:
        identity = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(x))
            if i == 0 and self.shortcut is not None:
                identity = self.shortcut(x)
            x = conv(x)
        return x + identity


class ResNet(nn.Module):
    """Stack of len(seeds) residual networks.

    Args:
        seeds: one seed a model; len(seeds) is n_models.
        in_channels: image channels of one model.
        classes: outputs of one model.
        channels: output channels of the stem and of the first stage's 3x3 convolutions, before `width`.
        width: factor on `channels`, rounded down.
        stages: blocks a stage; each stage after the first doubles the channels and halves the resolution.
        block: "basic" or "bottleneck".
        stem: "cifar" (3x3, stride 1) or "imagenet" (7x7 and 3x3 max pooling, stride 2 each).
        pre_activation: norm and ReLU before each convolution, and at the end.
        norm: "bn", "ln" (GroupNorm with one group) or "none".
        weight_standardization: standardise the rows of every convolution's weight.
        keep_init_std: standardised rows keep their initial std; otherwise 1/sqrt(fan-in).
        standardize_head: with weight_standardization, standardise the head's rows as well.

    Input (B, n_models*in_channels, H, W), output logits (n_models, B, classes).
    """

    def __init__(
        self,
        seeds: Sequence[int],
        in_channels: int = 3,
        classes: int = 10,
        channels: int = 64,
        width: float = 1.0,
        stages: Sequence[int] = (2, 2, 2, 2),
        block: str = "basic",
        stem: str = "cifar",
        pre_activation: bool = False,
        norm: str = "bn",
        weight_standardization: bool = False,
        keep_init_std: bool = True,
        standardize_head: bool = False,
    ) -> None:
        super().__init__()
        self.n_models = len(seeds)
        base = max(1, int(channels * width))
        new_norm = partial(norm_factory(norm, dims=2), self.n_models)
        new_conv = partial(
            Conv2d, self.n_models, bias=norm == "none", init="normal",
            weight_standardization=weight_standardization, keep_init_std=keep_init_std,
        )  # fmt: skip
        self.stem = _stem(stem, new_conv, new_norm, in_channels, base, pre_activation)
        blocks: list[nn.Module] = []
        c_in = base
        for i, count in enumerate(stages):
            c_out = base * 2**i * EXPANSION[block]
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(Block(new_conv, new_norm, block, c_in, c_out, stride, pre_activation))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.final = nn.Sequential(new_norm(c_in), nn.ReLU()) if pre_activation else nn.Identity()
        head_options = {"weight_standardization": weight_standardization and standardize_head}
        self.head = Linear(self.n_models, c_in, classes, keep_init_std=keep_init_std, **head_options)
        stacked.init_stacked(self, seeds)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n_models, B, classes) of images (B, n_models*in_channels, H, W)."""
        x = self.final(self.blocks(self.stem(x)))  # (B, M*C, H', W')
        pooled = x.mean(dim=(2, 3)).unflatten(1, (self.n_models, -1))  # (B, M, C)
        return self.head(pooled.transpose(0, 1))  # (M, B, classes)


def _stem(
    stem: str, new_conv: NewConv, new_norm: NewNorm, c_in: int, c_out: int, pre_activation: bool
) -> nn.Sequential:
    conv = new_conv(c_in, c_out, 3, 1, 1) if stem == "cifar" else new_conv(c_in, c_out, 7, 2, 3)
    after = [] if pre_activation else [new_norm(c_out), nn.ReLU()]
    pool = [] if stem == "cifar" else [nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(conv, *after, *pool)
