"""Weather2K (Zhu et al. 2023): Chinese ground stations, the paper's weather data.

`cohort.path` is the published array (stations, 23, time) as .npy, read by memory map; three of the variables are the
station's position, constant in time. Which variable stands where, and which tasks the paper has, is not established:
`cohort.columns` names the 23 variables in the file's order, and the tasks are those of our embedded twin. Steps are
three hours. Time is cut into blocks of four weeks, all stations together, dealt to the splits as in `weather`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.config import check
from multimodn.cohorts.base import Cohort, Task
from multimodn.cohorts.tables import renumbered
from multimodn.decoders import MISSING

if TYPE_CHECKING:
    from multimodn.cohorts.config import CohortConfig

DEFAULT_TASKS = 4
VARIABLES = 23
DAY = 8  # steps of three hours
LAGS = (0, 1, 2, 4, 8)
BLOCK = 28 * DAY
MILES = 16_093.0  # metres in ten miles
GROUPS = {
    "position": ("lat", "lon", "alt"),
    "temperature": ("temperature", "dew_point"),
    "humidity_pressure": ("humidity", "pressure"),
    "wind": ("wind_speed", "wind_direction"),
    "rain_visibility": ("rain", "visibility"),
}


def load(config: CohortConfig) -> Cohort:
    """Read every `cohort.stride`-th station, one row a day.

    Raises:
        ValueError: no path, not an array, one of another shape, or variables without a name.
        FileNotFoundError: no such file.
    """
    allowed = "the .npy array of Weather2K; cohort=weather needs no file"
    check("cohort.path", repr(config.path), bool(config.path), allowed)
    path = Path(config.path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:  # numpy's message names neither the file nor what it should be
        raise ValueError(f"cohort.path={path}: must be {allowed}") from error
    check("cohort.path", path, isinstance(array, np.ndarray), allowed)
    fits = array.ndim == 3 and array.shape[1] == VARIABLES and array.shape[2] > BLOCK
    check("cohort.path", f"{path} of shape {array.shape}", fits, f"(stations, {VARIABLES}, more than {BLOCK} steps)")
    check("cohort.columns", len(config.columns), len(config.columns) == VARIABLES, f"the {VARIABLES} variables' names")
    lacking = [name for group in GROUPS.values() for name in group if name not in config.columns]
    check("cohort.columns", config.columns, not lacking, f"with {', '.join(lacking)}")
    values = np.asarray(array[:: config.stride], dtype=np.float32)  # (stations, 23, time)
    return _cohort(config, values)


def _cohort(config: CohortConfig, values: np.ndarray) -> Cohort:
    stations, _, steps = values.shape
    at = np.arange(0, steps - DAY, DAY)
    at = at[(at % BLOCK >= DAY) & (at % BLOCK + DAY < BLOCK)]
    station, step = (grid.reshape(-1) for grid in np.meshgrid(np.arange(stations), at, indexing="ij"))

    def read(name: str, offset: int = 0) -> np.ndarray:
        return values[station, config.columns.index(name), step + offset]

    sequence = config.name == "weather2k_sequence"
    offsets = range(DAY, -1, -1) if sequence else LAGS
    modalities, features = {}, {}
    for group, members in GROUPS.items():
        if group == "position":
            x = np.stack([read(name) for name in members], 1)  # (n, 3)
        else:
            x = np.stack([np.stack([read(name, -lag) for name in members], 1) for lag in offsets], 1)  # (n, T, F)
            x = x if sequence else x.reshape(len(x), -1)
        recorded = torch.from_numpy(np.ascontiguousarray(x)).float()
        recorded[recorded.flatten(1).isnan().any(1)] = torch.nan  # lacking one value, a modality is missing as a whole
        modalities[group] = recorded
        own = members if sequence or group == "position" else tuple(f"{m}-{3 * lag}h" for lag in LAGS for m in members)
        features[group] = own
    angle = 2 * np.pi * step / DAY
    year = 2 * np.pi * step / (365.25 * DAY)
    clock = np.stack([np.sin(year), np.cos(year), np.sin(angle), np.cos(angle)], 1)
    modalities["clock"] = torch.from_numpy(clock).float()
    features["clock"] = ("year_sin", "year_cos", "day_sin", "day_cos")
    soon = range(1, DAY // 2 + 1)
    change, wind = read("temperature", DAY) - read("temperature"), read("wind_speed", DAY)
    rain = np.max([read("rain", k) for k in soon], 0)  # NaN where one is: the label is not known then
    sight = np.min([read("visibility", k) for k in soon], 0)
    tasks = {
        "warmer": _task("warmer in 24 hours", change, change > 0),
        "rain": _task("rain within 12 hours", rain, rain > 0),
        "low_visibility": _task("below 10 miles within 12 hours", sight, sight < MILES),
        "windy": _task("wind above the median in 24 hours", wind, wind > np.nanmedian(wind)),
    }
    found = Cohort(config.name, modalities, features, tasks, torch.from_numpy(step // BLOCK))
    if not config.natural:
        found = found.select(torch.stack([~x.flatten(1).isnan().any(1) for x in modalities.values()]).all(0))
    return renumbered(found)


def _task(positive: str, value: np.ndarray, label: np.ndarray) -> Task:
    return Task("classes", torch.from_numpy(np.where(np.isnan(value), MISSING, label)).long(), 2, positive)
