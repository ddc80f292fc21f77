"""Files of the paper's own data: what is missing in them stays missing, what does not fit is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from multimodn.cohorts import weather2k
from multimodn.cohorts.config import CohortConfig, read

COLUMNS = [
    *("lat", "lon", "alt", "temperature", "dew_point", "humidity", "pressure", "wind_speed", "wind_direction"),
    *("rain", "visibility"),
    *(f"other{i}" for i in range(12)),
]
LABELS = ("Enlarged Cardiomediastinum", "Cardiomegaly")


def stations(path: Path, **holes: tuple[int, int]) -> np.ndarray:
    """Two stations of five blocks; `rain=(first, last)` is not recorded at station 0 in these steps."""
    array = np.random.default_rng(0).uniform(1, 2, size=(2, 23, 5 * weather2k.BLOCK)).astype(np.float32)
    for name, (first, last) in holes.items():
        array[0, COLUMNS.index(name), first : last + 1] = np.nan
    np.save(path, array)
    return array


def test_weather2k_label_of_unrecorded_hours_is_unknown(tmp_path: Path) -> None:
    """Rain is not known to be absent where it was not measured."""
    path, day = tmp_path / "w.npy", weather2k.DAY
    stations(path, rain=(day + 3, day + 3), temperature=(2 * day, 2 * day))
    options = {"name": "weather2k", "path": str(path), "columns": COLUMNS}
    cohort = read(CohortConfig(natural=True, **options))
    labels = {name: task.labels for name, task in cohort.tasks.items()}
    # row 0 is station 0 at step `day`: rain is unknown ahead of it, and so is the temperature a day later
    assert labels["rain"][0] == -100 and labels["warmer"][0] == -100
    assert labels["low_visibility"][0] == 1 and labels["windy"][0] in (0, 1)
    assert labels["rain"][1] == 1 and labels["warmer"][1] == -100  # row 1: today's temperature is missing
    assert cohort.modalities["temperature"][1].isnan().all()  # one of ten values: the modality is missing as a whole
    assert not cohort.modalities["temperature"][0].isnan().any() and not cohort.modalities["wind"].isnan().any()
    complete = read(CohortConfig(**options))
    assert all(not x.isnan().any() for x in complete.modalities.values()) and len(complete) < len(cohort)


def test_weather2k_rows_see_one_block(tmp_path: Path) -> None:
    path = tmp_path / "w.npy"
    array = stations(path)
    block, i = weather2k.BLOCK, COLUMNS.index("temperature")
    before = read(CohortConfig(name="weather2k", path=str(path), columns=COLUMNS))
    array[:, i, 2 * block : 3 * block] = 100.0
    np.save(path, array)
    cohort = read(CohortConfig(name="weather2k", path=str(path), columns=COLUMNS))
    others = cohort.groups != 2
    assert cohort.tasks["warmer"].labels[others].tolist() == before.tasks["warmer"].labels[others].tolist()
    hot = (cohort.modalities["temperature"][:, ::2] == 100).numpy()
    assert (hot.all(1) == hot.any(1)).all() and ((cohort.groups == 2).numpy() == hot.all(1)).all()
    assert not cohort.tasks["warmer"].labels[cohort.groups == 2].any()  # nothing after the block warms or cools it


@pytest.mark.parametrize("kind", ["text", "pickle", "npz", "empty"])
def test_weather2k_of_another_kind(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.npy"
    with path.open("wb") as handle:
        if kind == "text":
            handle.write(b"station,temperature\n1,2\n")
        elif kind == "pickle":
            np.save(handle, np.array([{"a": 1}], dtype=object), allow_pickle=True)
        elif kind == "npz":
            np.savez(handle, a=np.zeros(3))
    with pytest.raises(ValueError, match=r"cohort.path=.*w.npy: must be the .npy array of Weather2K"):
        read(CohortConfig(name="weather2k", path=str(path), columns=COLUMNS))


def test_haim_with_gaps(tmp_path: Path) -> None:
    rng, n, path = np.random.default_rng(0), 30, tmp_path / "haim.csv"
    names = [*(f"de_{i}" for i in range(6)), "vd_0", "vd_1", "n_ech_0", "ts_ce_0"]
    frame = pd.DataFrame(rng.integers(0, 3, (n, len(names))).astype(float), columns=names)
    frame[["haim_id", "img_id", "img_charttime"]] = np.stack([np.arange(n) // 2, np.arange(n) // 3, np.arange(n)], 1)
    frame[list(LABELS)] = rng.integers(0, 2, (n, 2))
    frame.loc[[4, 5], "vd_1"] = np.nan
    frame.to_csv(path, index=False)
    natural = read(CohortConfig(name="haim", path=str(path), natural=True))
    assert len(natural) == n and natural.modalities["vd"].isnan().any(1).nonzero().flatten().tolist() == [4, 5]
    complete = read(CohortConfig(name="haim", path=str(path)))
    assert len(complete) == n - 2 and complete.groups.unique().tolist() == list(range(14))
    # an image is a row once per time, a stay may have several images
    frame.loc[1, ["img_id", "img_charttime"]] = frame.loc[0, ["img_id", "img_charttime"]]
    frame.to_csv(path, index=False)
    assert len(read(CohortConfig(name="haim", path=str(path), natural=True))) == n - 1


def test_edu_labels_must_be_zero_or_one(tmp_path: Path) -> None:
    path = tmp_path / "edu.csv"
    pd.DataFrame({"clicks__a": [1.0, 2.0, 3.0], "task__passed": [0, 1, 2]}).to_csv(path, index=False)
    with pytest.raises(ValueError, match=r"edu.csv task__passed=\[0, 1, 2\]: must be 0, 1 or empty in every row"):
        read(CohortConfig(name="edu", path=str(path)))
