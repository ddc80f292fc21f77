"""Vision transformer (Dosovitskiy et al. 2021; DeiT's training-free form, Touvron et al. 2021), seeds in one stack.

Patches by a strided convolution, a class token, learned positions, pre-LN blocks, a final LN and a linear head on the
class token.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models import stacked
from common.models.attention import INIT_STD, NormalLinear, PreNormBlock
from common.models.stacked import Embedding, LayerNorm
from common.models.stacked_conv import Conv2d

EPS = 1e-6


class ViT(nn.Module):
    """Stack of len(seeds) vision transformers.

    Args:
        seeds: one seed a model; len(seeds) is n_models.
        in_channels: image channels of one model.
        classes: outputs of one model.
        image_size: height and width in pixels, a multiple of patch_size.
        patch_size: height and width of a patch in pixels.
        d_model: d, width of the residual stream, a multiple of n_head.
        n_layer: transformer blocks.
        n_head: attention heads.
        gains: a learnable gain on every row of every linear layer.
        dropout: probability on attention weights, embeddings and residual branches.
        drop_path: probability to skip a branch in the last block, rising linearly from 0 in the first.

    Input (B, n_models*in_channels, image_size, image_size), output logits (n_models, B, classes).

    Raises:
        ValueError: patch_size does not divide image_size.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        in_channels: int = 3,
        classes: int = 1000,
        image_size: int = 224,
        patch_size: int = 16,
        d_model: int = 192,
        n_layer: int = 12,
        n_head: int = 3,
        gains: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size}: must be a multiple of patch_size={patch_size}")
        self.n_models, self.dropout = len(seeds), dropout
        self.patches = Conv2d(self.n_models, in_channels, d_model, patch_size, patch_size)
        # tables of one row a position, as bare parameters would be, but initialised model by model
        self.class_token = Embedding(self.n_models, 1, d_model, INIT_STD)
        self.position = Embedding(self.n_models, (image_size // patch_size) ** 2 + 1, d_model, INIT_STD)
        rates = [drop_path * i / max(1, n_layer - 1) for i in range(n_layer)]
        self.blocks = nn.Sequential(
            *(
                PreNormBlock(
                    self.n_models, d_model, n_head, causal=False, gains=gains, dropout=dropout, drop_path=rate, eps=EPS
                )
                for rate in rates
            )
        )
        self.norm = LayerNorm(self.n_models, d_model, eps=EPS)
        self.head = NormalLinear(self.n_models, d_model, classes, gain=gains)
        stacked.init_stacked(self, seeds)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (n_models, B, classes) of images (B, n_models*in_channels, H, W)."""
        patches = self.patches(x).flatten(2).unflatten(1, (self.n_models, -1))  # (B, M, d, T-1)
        patches = patches.permute(1, 0, 3, 2)  # (M, B, T-1, d)
        token = self.class_token.weight.view(self.n_models, 1, 1, -1).expand(-1, patches.shape[1], -1, -1)
        position = self.position.weight.view(self.n_models, 1, -1, patches.shape[-1])  # (M, 1, T, d)
        x = torch.cat([token, patches], dim=2) + position  # (M, B, T, d)
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.head(self.norm(self.blocks(x)[:, :, 0]))  # (M, B, classes)
