"""Augmentation of image batches in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

PAD = 4  # pixels around a CIFAR image before the random crop


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift by up to 4 pixels and random mirror of each image, (B, C, H, W) -> the same shape."""
    count, _, height, width = images.shape
    padded = F.pad(images, (PAD,) * 4)
    top, left = torch.randint(2 * PAD + 1, (2, count), generator=generator)
    rows = top[:, None] + torch.arange(height)  # (B, H)
    columns = left[:, None] + torch.arange(width)  # (B, W)
    mirror = torch.rand(count, generator=generator) < 0.5
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    batch = torch.arange(count)[:, None, None]
    index = tuple(i.to(images.device) for i in (batch, rows[:, :, None], columns[:, None, :]))
    return padded.permute(0, 2, 3, 1)[index].permute(0, 3, 1, 2)
