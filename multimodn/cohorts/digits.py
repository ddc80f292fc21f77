"""Handwritten digits (scikit-learn's, 8×8): an image in four quadrants, or in eight rows, as modalities.

Tasks: at least five; has a closed loop (0, 6, 8, 9); when asked for, odd, and which of the ten digits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from multimodn.cohorts.base import Cohort, Task

if TYPE_CHECKING:
    from multimodn.cohorts.config import CohortConfig

DEFAULT_TASKS = 2
LOOPS = (0, 6, 8, 9)
QUADRANTS = {"top_left": (0, 0), "top_right": (0, 4), "bottom_left": (4, 0), "bottom_right": (4, 4)}


def load(config: CohortConfig) -> Cohort:
    """`digits`: quadrants (n, 16); `digits_rows`: rows (n, 8); `digits_images`: quadrants (n, 1, 4, 4); in [0, 1]."""
    from common.data.config import DataConfig
    from common.data.load import load as load_data

    rows = load_data(DataConfig(name="digits", classes=10, validation=0, test=0))["train"].with_format("numpy")
    images = torch.from_numpy(np.asarray(rows["x"], dtype=np.float32)).view(-1, 8, 8) / 16
    digit = torch.from_numpy(np.asarray(rows["y"], dtype=np.int64))
    modalities = _modalities(config.name, images)
    tasks = {
        "at_least_five": Task("classes", (digit >= 5).long(), 2, "5 to 9"),
        "loop": Task("classes", torch.isin(digit, torch.tensor(LOOPS)).long(), 2, "0, 6, 8 or 9"),
        "odd": Task("classes", digit % 2, 2, "odd"),
        "digit": Task("classes", digit, 10, "the digit 1"),
    }
    features = {name: tuple(f"pixel{i}" for i in range(x.shape[-1])) for name, x in modalities.items()}
    return Cohort(config.name, modalities, features, tasks, torch.arange(len(digit)))


def _modalities(name: str, images: Tensor) -> dict[str, Tensor]:
    if name == "digits_rows":
        return {f"row{i}": images[:, i].contiguous() for i in range(8)}
    parts = {key: images[:, i : i + 4, j : j + 4] for key, (i, j) in QUADRANTS.items()}
    if name == "digits_images":
        return {key: x[:, None].contiguous() for key, x in parts.items()}
    return {key: x.flatten(1) for key, x in parts.items()}
