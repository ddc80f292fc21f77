"""The convolutional networks of the paper's CIFAR-10 runs, and a small one for 8x8 images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

VGG13 = (64, 64, 0, 128, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)
"""Output channels of the convolutions; 0 is a pooling."""


class PlainConvNet(nn.Module):
    """3x3 convolutions with ReLU and no norm, poolings between them, a mean over positions and a linear head (VGG).

    Args:
        in_channels: of the images.
        classes: outputs.
        layout: output channels of the convolutions in order; 0 is a 2x2 max pooling.

    Input (B, in_channels, H, W), output (B, classes).
    """

    def __init__(self, in_channels: int = 1, classes: int = 10, layout: Sequence[int] = (16, 0, 32, 0, 64)) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for channels in layout:
            if channels:
                parts += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU()]
                in_channels = channels
            else:
                parts.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*parts)
        self.head = nn.Linear(in_channels, classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        return self.head(self.features(images).mean((2, 3)))


class _PreActivation(nn.Module):
    """Norm, ReLU, convolution, twice (thrice with a grouped one between), beside a shortcut (He et al. 2016)."""

    def __init__(self, c_in: int, c_out: int, stride: int, groups: int, width: int) -> None:
        super().__init__()
        grouped = groups > 1
        sizes = [(c_in, width, 1, 1, 1), (width, width, 3, stride, groups), (width, c_out, 1, 1, 1)]
        if not grouped:
            sizes = [(c_in, c_out, 3, stride, 1), (c_out, c_out, 3, 1, 1)]
        self.branch = nn.Sequential(
            *(
                nn.Sequential(nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, b, k, s, k // 2, groups=g, bias=False))
                for a, b, k, s, g in sizes
            )
        )
        same = stride == 1 and c_in == c_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.shortcut(x)


class PreActResNet(nn.Module):
    """Residual network for 32x32 images with three stages, batch norm before the convolutions.

    Args:
        in_channels, classes: of images and outputs.
        depth: layers; 6 n + 2 for plain blocks of two convolutions (20, 110), 9 n + 2 for grouped ones of three.
        channels: of the 3x3 convolutions in the first stage; doubled in each next one. Grouped blocks put out 4 times
            as many.
        groups: of the 3x3 convolution (ResNeXt's cardinality); 1 has plain blocks. 4 groups of 64 channels are
            ResNeXt's 4x16d.

    Input (B, in_channels, H, W), output (B, classes).
    """

    def __init__(
        self, in_channels: int = 3, classes: int = 10, depth: int = 20, channels: int = 16, groups: int = 1
    ) -> None:
        super().__init__()
        layers = 9 if groups > 1 else 6
        if (depth - 2) % layers:
            raise ValueError(f"model.depth={depth}: must be {layers} n + 2 for model.groups={groups}")
        blocks: list[nn.Module] = []
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        before, expansion = channels, 4 if groups > 1 else 1
        for stage in range(3):
            for i in range((depth - 2) // layers):
                width = channels * 2**stage
                stride = 2 if stage and not i else 1
                blocks.append(_PreActivation(before, width * expansion, stride, groups, width))
                before = width * expansion
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.Sequential(nn.BatchNorm2d(before), nn.ReLU())
        self.head = nn.Linear(before, classes)
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        return self.head(self.norm(self.blocks(self.stem(images))).mean((2, 3)))


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


class ConvMixer(nn.Module):
    """Depthwise and pointwise convolutions on patches (Trockman and Kolter 2022): ConvMixer-<channels>/<depth>.

    Args:
        in_channels, classes: of images and outputs.
        channels: width.
        depth: blocks.
        kernel_size: of the depthwise convolution, odd.
        patch_size: height and width of a patch.

    Input (B, in_channels, H, W), output (B, classes).
    """

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 10,
        channels: int = 256,
        depth: int = 8,
        kernel_size: int = 5,
        patch_size: int = 2,
    ) -> None:
        super().__init__()

        def normed(part: nn.Module) -> nn.Sequential:
            return nn.Sequential(part, nn.GELU(), nn.BatchNorm2d(channels))

        self.stem = normed(nn.Conv2d(in_channels, channels, patch_size, patch_size))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    _Residual(
                        normed(nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels))
                    ),
                    normed(nn.Conv2d(channels, channels, 1)),
                )
                for _ in range(depth)
            )
        )
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


def _initialise(module: nn.Module) -> None:
    """He's rule for convolutions (a network without norm does not start without it); the head keeps PyTorch's."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
