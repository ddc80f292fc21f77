"""Vision transformer (Dosovitskiy et al. 2021; sizes of DeiT, Touvron et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mulfree_training.networks.blocks import Block, initialise


class ViT(nn.Module):
    """Patches by a strided convolution, a class token, learned positions, pre-LN blocks, a linear head.

    Args:
        in_channels: of the images.
        classes: outputs.
        image_size: height and width in pixels, a multiple of patch_size.
        patch_size: height and width of a patch.
        d_model: width, a multiple of n_head.
        n_layer: blocks.
        n_head: attention heads.
        d_hidden: width of the hidden layers.
        activation: `relu` or `gelu`.
        dropout: on every branch.
        drop_path: probability to skip a branch in the last block, rising linearly from 0.
        eps: of the layer norms.
        std: of the initial weights.

    Input images (B, in_channels, image_size, image_size), output logits (B, classes).
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 10,
        image_size: int = 8,
        patch_size: int = 2,
        d_model: int = 64,
        n_layer: int = 2,
        n_head: int = 4,
        d_hidden: int = 128,
        activation: str = "relu",
        dropout: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"model.patch_size={patch_size}: must divide model.image_size={image_size}")
        self.patches = nn.Conv2d(in_channels, d_model, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, d_model))
        self.position = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2 + 1, d_model))
        self.dropout = nn.Dropout(dropout)
        rates = [drop_path * i / max(n_layer - 1, 1) for i in range(n_layer)]
        self.blocks = nn.ModuleList(
            Block(d_model, n_head, d_hidden, activation, dropout=dropout, drop_path=rate, eps=eps) for rate in rates
        )
        self.norm = nn.LayerNorm(d_model, eps)
        self.head = nn.Linear(d_model, classes)
        initialise(self, std)
        nn.init.trunc_normal_(self.class_token, std=std, a=-2 * std, b=2 * std)
        nn.init.trunc_normal_(self.position, std=std, a=-2 * std, b=2 * std)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes)."""
        x = self.patches(images).flatten(2).transpose(1, 2)  # (B, T - 1, d)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.position  # (B, T, d)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))
