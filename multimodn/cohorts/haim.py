"""MIMIC chest X-rays as HAIM embeddings (Soenksen et al. 2022; PhysioNet, credentialed): the paper's medical data.

`cohort.path` is the CSV of HAIM-MIMIC-MM, one row an image and event. Modalities in the official order: `de`
demographics (column 0 as it is, columns 1 to 5 as indicators without their first level), `vd` dense image embedding,
`n_ech` echo-note embedding, `ts_ce` statistics of chart events. Tasks: Enlarged Cardiomediastinum and Cardiomegaly.
Rows repeated in (img_id, img_charttime) are dropped, and rows where one of the labels is not 0 or 1. Rows of one
hospital stay (haim_id) never fall into different splits. Without `natural`, rows that lack a value are dropped too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.config import check
from multimodn.cohorts.base import Cohort, Task
from multimodn.cohorts.tables import renumbered

if TYPE_CHECKING:
    import pandas as pd

    from multimodn.cohorts.config import CohortConfig

DEFAULT_TASKS = 2
SOURCES = ("de", "vd", "n_ech", "ts_ce")
LABELS = {"enlarged_cardiomediastinum": "Enlarged Cardiomediastinum", "cardiomegaly": "Cardiomegaly"}
KEYS = ("haim_id", "img_id", "img_charttime")
INDICATORS = range(1, 6)


def load(config: CohortConfig) -> Cohort:
    """Read the CSV.

    Raises:
        ValueError: no path, or columns that are not there.
        FileNotFoundError: no such file.
    """
    import pandas as pd

    allowed = "the CSV of HAIM-MIMIC-MM (PhysioNet, credentialed access); cohort=nhefs needs no file"
    check("cohort.path", repr(config.path), bool(config.path), allowed)
    path = Path(config.path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    header = pd.read_csv(path, nrows=0).columns
    chosen = {source: _columns(header, source) for source in SOURCES}
    needed = [*KEYS, *LABELS.values()]
    lacking = [name for name in needed if name not in header] + [f"{s}_0 …" for s, found in chosen.items() if not found]
    if lacking:
        raise ValueError(f"cohort.path={path}: lacks the columns {', '.join(lacking)}")
    frame = pd.read_csv(path, usecols=[*needed, *(name for names in chosen.values() for name in names)])
    frame = frame.drop_duplicates(["img_id", "img_charttime"])
    frame = frame[frame[list(LABELS.values())].isin([0, 1]).all(axis=1)].reset_index(drop=True)
    modalities, features = {}, {}
    for source, names in chosen.items():
        modalities[source], features[source] = _demographics(frame, names) if source == "de" else _plain(frame, names)
    tasks = {
        name: Task("classes", torch.from_numpy(frame[column].to_numpy(dtype=np.int64)), 2, column)
        for name, column in LABELS.items()
    }
    stays = torch.from_numpy(np.unique(frame["haim_id"].to_numpy(), return_inverse=True)[1]).long()
    found = Cohort("haim", modalities, features, tasks, stays)
    if config.natural:
        return found
    whole = torch.stack([~x.isnan().any(1) for x in modalities.values()]).all(0)
    return renumbered(found.select(whole))


def _columns(header: pd.Index, source: str) -> list[str]:
    found = [name for name in header if re.fullmatch(rf"{source}_\d+", name)]
    return sorted(found, key=lambda name: int(name.rpartition("_")[2]))


def _plain(frame: pd.DataFrame, names: list[str]) -> tuple[Tensor, tuple[str, ...]]:
    return torch.from_numpy(frame[names].to_numpy(dtype=np.float32)), tuple(names)


def _demographics(frame: pd.DataFrame, names: list[str]) -> tuple[Tensor, tuple[str, ...]]:
    parts, labels = [], []
    for i, name in enumerate(names):
        values = frame[name].to_numpy(dtype=np.float64)
        if i not in INDICATORS:
            parts.append(values)
            labels.append(name)
            continue
        for level in np.unique(values[~np.isnan(values)])[1:]:
            parts.append(np.where(np.isnan(values), np.nan, values == level))
            labels.append(f"{name}={level:g}")
    return torch.from_numpy(np.stack(parts, 1)).float(), tuple(labels)
