"""The paper's own data sets, read from files of their schema; without a file, one clear line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from multimodn.cohorts import weather2k
from multimodn.cohorts.base import split
from multimodn.cohorts.config import CohortConfig, read

COLUMNS = [
    *("lat", "lon", "alt", "temperature", "dew_point", "humidity", "pressure", "wind_speed", "wind_direction"),
    *("rain", "visibility"),
    *(f"other{i}" for i in range(12)),
]


def haim(rows: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"haim_id": np.arange(rows) // 3, "img_id": np.arange(rows), "img_charttime": np.arange(rows)})
    frame["de_0"] = rng.normal(60, 10, rows)
    for i in range(1, 6):
        frame[f"de_{i}"] = rng.integers(0, 3, rows)
    for source, width in (("vd", 12), ("n_ech", 8), ("ts_ce", 11)):
        values = {f"{source}_{i}": rng.normal(size=rows) for i in range(width)}
        frame = pd.concat([frame, pd.DataFrame(values)], axis=1)
    frame["Enlarged Cardiomediastinum"] = rng.integers(0, 2, rows).astype(float)
    frame["Cardiomegaly"] = rng.integers(0, 2, rows).astype(float)
    return frame


def test_haim(tmp_path: Path) -> None:
    frame = haim()
    frame.loc[4, "Cardiomegaly"] = -1  # uncertain
    frame.loc[5, "Enlarged Cardiomediastinum"] = np.nan
    path = tmp_path / "haim.csv"
    pd.concat([frame, frame.iloc[[7]]]).to_csv(path, index=False)  # one row twice
    cohort = read(CohortConfig(name="haim", path=str(path)))
    assert len(cohort) == 58 and list(cohort.modalities) == ["de", "vd", "n_ech", "ts_ce"]
    assert [x.shape[1] for x in cohort.modalities.values()] == [1 + 5 * 2, 12, 8, 11]
    assert cohort.features["vd"] == tuple(f"vd_{i}" for i in range(12))  # by number, not by letters
    assert cohort.features["de"][:3] == ("de_0", "de_1=1", "de_1=2")
    kept = frame.drop(index=[4, 5]).reset_index(drop=True)
    assert cohort.tasks["cardiomegaly"].labels.tolist() == kept["Cardiomegaly"].astype(int).tolist()
    assert torch.equal(cohort.modalities["de"][:, 1], torch.tensor((kept["de_1"] == 1).to_numpy()).float())
    parts = split(cohort, 0)
    assert not set(cohort.groups[parts.train].tolist()) & set(cohort.groups[parts.test].tolist())


def test_haim_without_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "haim.csv"
    haim().drop(columns=["Cardiomegaly", *(f"vd_{i}" for i in range(12))]).to_csv(path, index=False)
    with pytest.raises(ValueError, match="lacks the columns Cardiomegaly, vd_0 …"):
        read(CohortConfig(name="haim", path=str(path)))


@pytest.mark.parametrize("name", ["weather2k", "weather2k_sequence"])
def test_weather2k(tmp_path: Path, name: str) -> None:
    rng, steps = np.random.default_rng(0), weather2k.BLOCK * 12
    array = rng.normal(size=(3, 23, steps)).astype(np.float32)
    array[:, COLUMNS.index("rain")] = np.maximum(0, array[:, COLUMNS.index("rain")] - 1)
    path = tmp_path / "weather2k.npy"
    np.save(path, array)
    cohort = read(CohortConfig(name=name, path=str(path), columns=COLUMNS, stride=2))
    assert list(cohort.modalities) == [
        "position",
        "temperature",
        "humidity_pressure",
        "wind",
        "rain_visibility",
        "clock",
    ]
    assert list(cohort.tasks) == ["warmer", "rain", "low_visibility", "windy"]
    wide = (9, 2) if name.endswith("sequence") else (10,)
    assert cohort.modalities["temperature"].shape == (len(cohort), *wide)
    step = weather2k.DAY  # the first row: station 0
    now = array[0, COLUMNS.index("temperature"), step]
    row = cohort.modalities["temperature"][0]
    assert (row[-1, 0] if name.endswith("sequence") else row[0]).item() == pytest.approx(now)
    later = array[0, COLUMNS.index("temperature"), step + weather2k.DAY]
    assert cohort.tasks["warmer"].labels[0].item() == int(later > now)
    assert cohort.groups.unique().numel() == 12 and len(split(cohort, 1).test) > 0


def test_weather2k_of_another_shape(tmp_path: Path) -> None:
    path = tmp_path / "weather2k.npy"
    np.save(path, np.zeros((3, 20, 400), dtype=np.float32))
    with pytest.raises(ValueError, match=r"\(stations, 23, more than 224 steps\)"):
        read(CohortConfig(name="weather2k", path=str(path), columns=COLUMNS))
    np.save(path, np.zeros((3, 23, 400), dtype=np.float32))
    with pytest.raises(ValueError, match="cohort.columns=2: must be the 23 variables' names"):
        read(CohortConfig(name="weather2k", path=str(path), columns=["lat", "lon"]))
    with pytest.raises(ValueError, match="with rain"):
        read(CohortConfig(name="weather2k", path=str(path), columns=[c if c != "rain" else "r" for c in COLUMNS]))


def test_edu(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "edu.csv"
    frame = pd.DataFrame({"clicks__week1": rng.normal(size=60), "clicks__week2": rng.normal(size=60),
                          "quiz__score": rng.normal(size=60), "task__passed": rng.integers(0, 2, 60),
                          "task__dropout": rng.integers(0, 2, 60), "group": np.arange(60) // 4})  # fmt: skip
    frame.loc[3, "clicks__week2"] = np.nan
    frame.loc[9, "task__passed"] = np.nan
    frame.to_csv(path, index=False)
    cohort = read(CohortConfig(name="edu", path=str(path), natural=True, tasks=["passed", "dropout"]))
    assert list(cohort.modalities) == ["clicks", "quiz"] and len(cohort) == 60
    assert cohort.modalities["clicks"][3].isnan().all() and cohort.tasks["passed"].labels[9] == -100
    assert cohort.groups.unique().numel() == 15
    assert len(read(CohortConfig(name="edu", path=str(path)))) == 59
    pd.DataFrame({"a": [1]}).to_csv(path, index=False)
    with pytest.raises(ValueError, match="a CSV with columns <modality>__<feature> and task__<name>"):
        read(CohortConfig(name="edu", path=str(path)))


@pytest.mark.parametrize("name", ["haim", "weather2k", "edu"])
def test_without_a_file_the_message_names_what_is_needed_and_what_is_embedded(name: str) -> None:
    with pytest.raises(ValueError, match=r"cohort.path='': must be .*; cohort=\w+ needs no file"):
        read(CohortConfig(name=name))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(CohortConfig(name=name, path="/nowhere/file"))
