"""Crops of single images of any size (ImageNet), timm's for DeiT, and a loader that reads them by worker processes."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common.config import check

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

Crop = Callable[["Image", int], Tensor]
"""Maps an image and a seed to a tensor (3, size, size), uint8 or normalised float32."""
Items = list[tuple[int, int]]
"""(row, seed of its crop) of the images that are read at once."""

AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random resized crop (Szegedy et al. 2015)
TRIES = 10
EVAL_RESIZE = 8 / 7  # 256 pixels on the short side for a crop of 224
ERASING_MODES = ("const", "rand", "pixel")


@dataclass(frozen=True)
class DeiTConfig:
    """timm's augmentation of images; without values it mirrors and crops."""

    auto_augment: str | None = None
    """timm's words for RandAugment, e.g. `rand-m9-mstd0.5-inc1`; null is none."""
    color_jitter: float = 0.0
    """Most change of brightness, contrast and saturation (where there is no RandAugment)."""
    erasing: float = 0.0
    """Probability to erase a random box."""
    erasing_mode: str = "pixel"
    """What a box is filled with: `const` (zeros), `rand` (one colour) or `pixel` (noise)."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is none."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 is none."""

    def __post_init__(self) -> None:
        for key in ("color_jitter", "mixup", "cutmix"):
            check(f"task.deit.{key}", getattr(self, key), getattr(self, key) >= 0, ">= 0")
        check("task.deit.erasing", self.erasing, 0 <= self.erasing <= 1, "in [0, 1]")
        known = self.erasing_mode in ERASING_MODES
        check("task.deit.erasing_mode", self.erasing_mode, known, f"one of {', '.join(ERASING_MODES)}")


@dataclass
class CroppedImages:
    """Rows of a split for a DataLoader: a cropped image and its label, by row and seed."""

    split: Dataset
    inputs: str
    label: str
    crop: Crop

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        row, seed = item
        found = self.split[row]
        return self.crop(found[self.inputs], seed), found[self.label]


def loader(images: CroppedImages, plan: Iterable[Items], workers: int, device: torch.device) -> DataLoader:
    """Images (n, 3, size, size) and labels (n,) of each element of the plan, read ahead by `workers` processes."""
    # a generator of its own: the loader would draw from the one that dropout uses
    return DataLoader(
        images,  # type: ignore[arg-type]
        batch_sampler=plan,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
    )


def normalised(x: Tensor, mean: Sequence[float], std: Sequence[float], device: torch.device) -> Tensor:
    """uint8 images (n, C, H, W) on the device, normalised there to float32; float ones (timm's) are so already."""
    x = x.to(device, non_blocking=True)
    if x.is_floating_point():
        return x
    centre, scale = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
    return (x.float() / 255 - centre) / scale


def random_box(width: int, height: int, rng: torch.Generator) -> tuple[int, int, int, int]:
    """A random crop (left, top, right, bottom): 8 to 100 % of the area, aspect ratio 3/4 to 4/3, log-uniform.

    Where ten draws do not fit into the image, the largest centred crop of an allowed aspect ratio.
    """
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for _ in range(TRIES):
        area, aspect = torch.rand(2, generator=rng).tolist()
        area, aspect = width * height * (AREA[0] + area * (AREA[1] - AREA[0])), math.exp(low + aspect * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(torch.randint(width - w + 1, (), generator=rng))
            top = int(torch.randint(height - h + 1, (), generator=rng))
            return left, top, left + w, top + h
    w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_crop(image: Image, seed: int, size: int) -> Tensor:
    """A random resized crop, mirrored half of the time: (3, size, size) uint8."""
    rng = torch.Generator().manual_seed(seed)
    found = _resized(image, random_box(*image.size, rng), size)
    return found.flip(2) if torch.rand((), generator=rng) < 0.5 else found


def centre_crop(image: Image, seed: int, size: int) -> Tensor:
    """The middle of the image, 7/8 of its short side: (3, size, size) uint8. `seed` is not used."""
    side = min(image.size) / EVAL_RESIZE
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return _resized(image, (left, top, left + side, top + side), size)


def _resized(image: Image, box: tuple[float, float, float, float], size: int) -> Tensor:
    import numpy as np
    from PIL.Image import Resampling

    crop = image.convert("RGB").resize((size, size), Resampling.BICUBIC, box=box)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1).contiguous()


def deit_crop(size: int, mean: list[float], std: list[float], c: DeiTConfig) -> Crop:
    """timm's transform, float32.

    Raises:
        ValueError: timm is not installed.
    """
    transform = _timm().create_transform(
        size,
        is_training=True,
        interpolation="bicubic",
        mean=tuple(mean),
        std=tuple(std),
        auto_augment=c.auto_augment,
        color_jitter=c.color_jitter,
        re_prob=c.erasing,
        re_mode=c.erasing_mode,
    )
    return partial(_transformed, transform)


def deit_mix(classes: int, c: DeiTConfig) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """timm's mixup and cutmix: images (B, 3, H, W), B even, and labels -> mixed, (B, K); None where both are 0."""
    if not (c.mixup or c.cutmix):
        return None
    return _timm().Mixup(mixup_alpha=c.mixup, cutmix_alpha=c.cutmix, label_smoothing=0.0, num_classes=classes)


def _transformed(transform: Callable[[Image], Tensor], image: Image, seed: int) -> Tensor:
    with seeded(seed):
        return transform(image.convert("RGB"))


def _timm() -> Any:
    try:
        import timm.data
    except ImportError as error:
        raise ValueError("task.augment=deit: needs the package timm (pip install timm)") from error
    return timm.data


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start Python's, NumPy's and PyTorch's global CPU generators at `seed`, as timm draws from them; put them back."""
    import numpy as np

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
