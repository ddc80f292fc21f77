"""Crops of images of any size, and the loader that reads them."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from common.data.crops import (
    CroppedImages,
    DeiTConfig,
    centre_crop,
    deit_crop,
    deit_mix,
    loader,
    normalised,
    random_box,
    random_crop,
)
from common.streams import generator


def test_random_crops_cover_8_to_100_percent_at_moderate_aspect_ratios() -> None:
    boxes = torch.tensor([random_box(300, 200, generator(s, 0)) for s in range(400)])
    left, top, right, bottom = boxes.T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 300 and bottom.max() <= 200
    width, height = right - left, bottom - top
    area, aspect = width * height / 60_000, width / height
    # sides are rounded to pixels: at most half a pixel on the shortest side, 60 pixels
    slack = 0.5 / math.sqrt(0.08 * 60_000 * 3 / 4) * 2
    assert 0.08 * (1 - slack) <= area.min() < 0.15 and 0.8 < area.max() <= 1
    assert 3 / 4 * (1 - slack) <= aspect.min() < 0.8 and 1.25 < aspect.max() <= 4 / 3 * (1 + slack)
    assert 0.3 < area.mean() < 0.6  # large crops of large aspect ratio do not fit


@pytest.mark.parametrize(("width", "height"), [(1000, 3), (3, 1000), (1, 1)])
def test_crops_of_narrow_images_stay_inside(width: int, height: int) -> None:
    for seed in range(20):
        left, top, right, bottom = random_box(width, height, generator(seed, 0))
        assert 0 <= left < right <= width and 0 <= top < bottom <= height


def test_centre_crop_is_the_middle_seven_eighths_of_the_short_side() -> None:
    picture = Image.new("RGB", (320, 256))
    picture.paste((255, 0, 0), (32 + 16, 16, 320 - 32 - 16, 256 - 16))  # 224 x 224 in the middle
    crop = centre_crop(picture, 0, 56)
    red, green, blue = crop.float()
    assert green.max() == blue.max() == 0
    assert red[1:-1, 1:-1].min() == 255  # bicubic resampling blurs the outermost pixel only
    picture.paste((0, 255, 0), (160, 0, 320, 256))
    assert (centre_crop(picture, 0, 56)[1, :, 30:-1] == 255).all() and (
        centre_crop(picture, 0, 56)[1, :, :26] == 0
    ).all()


def test_a_random_crop_is_a_function_of_its_seed_and_mirrors_half_of_the_time() -> None:
    ramp = Image.linear_gradient("L").rotate(90)  # brighter from left to right, or the other way
    crops = [random_crop(ramp, seed, 16) for seed in range(60)]
    assert all(torch.equal(crop, random_crop(ramp, seed, 16)) for seed, crop in enumerate(crops[:5]))
    mirrored = [bool(crop[0, 8, 0] > crop[0, 8, -1]) for crop in crops]
    assert 15 < sum(mirrored) < 45  # within 4 standard deviations of 30


def pictures() -> datasets.Dataset:
    """One grey value a picture, of a size of its own; every third picture has a single channel."""
    images = []
    for i in range(12):
        size = (20 + i % 5, 24 - i % 3)
        images.append(Image.new("L", size, 9 * i) if i % 3 == 0 else Image.new("RGB", size, (9 * i,) * 3))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images, "label": list(range(12))}, features=features)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_follows_its_plan_and_draws_from_nobody(workers: int) -> None:
    images = CroppedImages(pictures(), "image", "label", lambda image, seed: random_crop(image, seed, 8))
    state, plan = torch.get_rng_state(), [[(3, 1), (0, 2)], [(11, 5)], [(2, 0), (1, 1), (5, 2)]]
    found = list(loader(images, plan, workers, torch.device("cpu")))
    assert torch.equal(torch.get_rng_state(), state)
    assert [y.tolist() for _, y in found] == [[3, 0], [11], [2, 1, 5]]
    for x, y in found:
        assert x.shape == (len(y), 3, 8, 8) and x.dtype is torch.uint8
        assert torch.equal(x.amin((1, 2, 3)), x.amax((1, 2, 3))) and torch.equal(x[:, 0, 0, 0].long(), 9 * y)


def test_bytes_are_normalised_and_floats_are_taken_as_they_are() -> None:
    x = torch.arange(24, dtype=torch.uint8).view(1, 2, 3, 4)
    out = normalised(x, [0.5, 0.25], [0.5, 2.0], torch.device("cpu"))
    assert torch.allclose(out[0, 0], (x[0, 0] / 255 - 0.5) / 0.5) and torch.allclose(
        out[0, 1], (x[0, 1] / 255 - 0.25) / 2
    )
    assert torch.equal(normalised(out, [9.0], [9.0], torch.device("cpu")), out)


def test_deit_without_timm_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "timm.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"task.augment=deit: needs the package timm .pip install timm."):
        deit_crop(8, [0.5] * 3, [0.5] * 3, DeiTConfig())


def test_timm_gets_the_values_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(create_transform=lambda size, **options: (size, options), Mixup=lambda **options: options)
    monkeypatch.setattr("common.data.crops._timm", lambda: fake)
    c = DeiTConfig("rand-m3", color_jitter=0.1, erasing=0.2, erasing_mode="const", mixup=0.4, cutmix=0.6)
    size, options = deit_crop(8, [0.5] * 3, [0.25] * 3, c).args[0]  # type: ignore[attr-defined]
    assert size == 8 and options == {
        "is_training": True, "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.25,) * 3,
        "auto_augment": "rand-m3", "color_jitter": 0.1, "re_prob": 0.2, "re_mode": "const",
    }  # fmt: skip
    wanted = {"mixup_alpha": 0.4, "cutmix_alpha": 0.6, "label_smoothing": 0.0, "num_classes": 9}
    assert deit_mix(9, c) == wanted
    assert deit_mix(9, DeiTConfig()) is None and deit_mix(9, DeiTConfig(cutmix=1.0)) is not None


@pytest.mark.parametrize(("values", "message"), [
    ({"mixup": -1.0}, "task.deit.mixup=-1.0: must be >= 0"),
    ({"erasing": 1.5}, r"task.deit.erasing=1.5: must be in \[0, 1\]"),
    ({"erasing_mode": "noise"}, "task.deit.erasing_mode=noise: must be one of const, rand, pixel"),
])  # fmt: skip
def test_values_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeiTConfig(**values)
