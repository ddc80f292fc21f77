"""VGG networks for small images (Simonyan and Zisserman 2015), several seeds in one stack.

The 13-layer form for CIFAR: five stages of 3x3 convolutions, each ended by max pooling, then two 1x1 convolutions in
place of the large fully connected layers, and a linear head. Trainable without any normalisation.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from common.models import stacked
from common.models.attention import NormalLinear
from common.models.stacked_conv import Conv2d, norm_factory

HEAD_STD = 0.01


class VGG(nn.Module):
    """Stack of len(seeds) VGG networks.

    Args:
        seeds: one seed a model; len(seeds) is n_models.
        in_channels: image channels of one model.
        classes: outputs of one model.
        channels: channels of the first stage, before `width`; they double up to eight times that.
        width: factor on `channels`, rounded down.
        stages: convolutions a stage; each stage ends with 2x2 max pooling.
        norm: "bn", "ln" (GroupNorm with one group) or "none", after each 3x3 convolution.
        weight_standardization: standardise the rows of every weight, the head's included.
        keep_init_std: standardised rows keep their initial std; otherwise 1/sqrt(fan-in).
        gains: a learnable gain on every row of every weight.

    Input (B, n_models*in_channels, H, W) with H and W multiples of 2**len(stages), output (n_models, B, classes).
    """

    def __init__(
        self,
        seeds: Sequence[int],
        in_channels: int = 3,
        classes: int = 10,
        channels: int = 64,
        width: float = 1.0,
        stages: Sequence[int] = (2, 2, 2, 2, 2),
        norm: str = "none",
        weight_standardization: bool = False,
        keep_init_std: bool = True,
        gains: bool = False,
    ) -> None:
        super().__init__()
        self.n_models = len(seeds)
        base = max(1, int(channels * width))
        new_norm = partial(norm_factory(norm, dims=2), self.n_models)
        options: dict[str, Any] = {
            "weight_standardization": weight_standardization, "keep_init_std": keep_init_std, "gain": gains,
        }  # fmt: skip
        new_conv: Callable[..., nn.Module] = partial(Conv2d, self.n_models, init="normal", **options)
        layers: list[nn.Module] = []
        c_in = in_channels
        for i, count in enumerate(stages):
            c_out = base * min(2**i, 8)
            for _ in range(count):
                layers += [new_conv(c_in, c_out, 3, padding=1), new_norm(c_out), nn.ReLU()]
                c_in = c_out
            layers.append(nn.MaxPool2d(2))
        for _ in range(2):
            layers += [new_conv(c_in, c_in, 1), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = NormalLinear(self.n_models, c_in, classes, HEAD_STD, **options)
        stacked.init_stacked(self, seeds)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n_models, B, classes) of images (B, n_models*in_channels, H, W)."""
        x = self.features(x)  # (B, M*C, H', W')
        pooled = x.mean(dim=(2, 3)).unflatten(1, (self.n_models, -1))  # (B, M, C)
        return self.head(pooled.transpose(0, 1))  # (M, B, classes)
