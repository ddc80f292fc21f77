"""Splits: disjoint, stratified, of one size for every seed, never through a group, and new with every repetition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodn.cohorts.base import RARE, Cohort, Split, Task, split
from multimodn.cohorts.config import CohortConfig, read

PARTS = ("train", "validation", "test")


def made(labels: list[np.ndarray], groups: np.ndarray | None = None) -> Cohort:
    n = len(labels[0])
    tasks = {f"t{i}": Task("classes", torch.from_numpy(y).long()) for i, y in enumerate(labels)}
    own = torch.arange(n) if groups is None else torch.from_numpy(groups).long()
    return Cohort("made", {"m": torch.zeros(n, 1)}, {"m": ("x",)}, tasks, own)


def sizes(parts: Split) -> tuple[int, ...]:
    return tuple(len(getattr(parts, part)) for part in PARTS)


def disjoint(parts: Split) -> bool:
    rows = torch.cat([getattr(parts, part) for part in PARTS])
    return len(rows.unique()) == len(rows)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(40, 300),
    folds=st.integers(2, 6),
    validation=st.sampled_from([0.0, 0.05, 0.1, 0.12, 0.15, 0.3, 0.45]),
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
)
def test_independent_rows_are_stratified(n: int, folds: int, validation: float, weights: list[int], seed: int) -> None:
    share = np.array(weights) / sum(weights)
    y = np.random.default_rng(seed).choice(len(share), size=n, p=share)
    cohort, first = made([y]), seed - seed % folds
    splits = [split(cohort, first + fold, folds=folds, validation=validation) for fold in range(folds)]
    assert all(map(disjoint, splits))
    wanted = round(validation * n)
    assert {sizes(parts) for parts in splits} == {(n - -(-n // folds) - wanted, wanted, n // folds)}
    tested = torch.cat([parts.test for parts in splits])
    assert len(tested.unique()) == folds * (n // folds)  # every row is tested once, but for the surplus
    for label in np.unique(y):
        if (count := (y == label).sum()) < RARE:
            continue
        for parts in splits:
            found = int((y[parts.test] == label).sum())
            # dealt in turn; rare labels share one code, a surplus row of the fold is left out
            assert count // folds - 1 <= found <= -(-count // folds)
            rest = count - found
            held = int((y[parts.validation] == label).sum())
            assert abs(held - rest * wanted / (n - len(parts.test))) < 2.5


def test_two_equal_classes_in_an_even_number_of_folds() -> None:
    """Every other row: a period of the labels must not meet the folds' period."""
    y = np.arange(80) % 2
    for folds in (2, 4, 5, 8, 10):
        for seed in range(folds):
            parts = split(made([y]), seed, folds=folds)
            assert int(y[parts.test].sum()) * 2 == len(parts.test) == 80 // folds


def test_joint_labels_are_stratified_not_only_each_task() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, 1000)
    b = np.where(rng.random(1000) < 0.9, a, 1 - a)
    for seed in range(5):
        parts = split(made([a, b]), seed)
        assert abs(int((a != b)[parts.test].sum()) - (a != b).sum() / 5) <= 2


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(30, 60),
    largest=st.integers(2, 7),
    folds=st.integers(2, 4),
    validation=st.sampled_from([0.0, 0.15, 0.25]),
    seed=st.integers(0, 10**6),
)
def test_groups_stay_whole(count: int, largest: int, folds: int, validation: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = rng.integers(1, largest + 1, count)
    size[0] = largest
    groups = rng.permutation(np.repeat(rng.permutation(count) * 3, size))  # numbers with gaps, rows in any order
    y = rng.integers(0, 2, len(groups))
    cohort, first = made([y], groups), seed - seed % folds
    splits = [split(cohort, first + fold, folds=folds, validation=validation) for fold in range(folds)]
    assert len({sizes(parts) for parts in splits}) == 1
    for parts in splits:
        owners = [set(groups[getattr(parts, part)].tolist()) for part in PARTS]
        assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
        assert disjoint(parts) and (len(parts.validation) > 0) == (validation > 0)
    tested = [set(groups[parts.test].tolist()) for parts in splits]
    assert sum(map(len, tested)) == len(set().union(*tested))


@pytest.mark.parametrize("name", ["weather", "star"])
def test_repetitions_draw_other_folds(name: str) -> None:
    """Seeds 0, 5, 10 … are folds of unrelated partitions: they share about one group in five, not all of them."""
    cohort = read(CohortConfig(name=name))

    def tested(seed: int) -> set[int]:
        return set(cohort.groups[split(cohort, seed).test].tolist())

    common = [len(tested(0) & tested(seed)) / len(tested(0)) for seed in range(5, 40, 5)]
    assert np.mean(common) == pytest.approx(0.2, abs=0.1) and max(common) < 0.7


@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("name", ["weather", "weather_sequence", "star", "pbc"])
def test_every_seed_gives_the_same_sizes(name: str, natural: bool) -> None:
    cohort = read(CohortConfig(name=name, natural=natural))
    found = {sizes(split(cohort, seed)) for seed in range(15)}
    assert len(found) == 1
    train, validation, test = np.array(found.pop()) / len(cohort)
    assert train > 0.6 and validation > 0.06 and test > 0.15


def test_folds_of_groups_have_the_labels_alike() -> None:
    """Better balanced than groups dealt blindly (about 0.05 for the share of warmer days)."""
    cohort = read(CohortConfig(name="weather"))
    y = (cohort.tasks["warmer"].labels == 1).float()
    off = [(y[split(cohort, seed).test].mean() - y.mean()).item() for seed in range(20)]
    assert np.sqrt(np.mean(np.square(off))) < 0.035


def test_split_is_a_function_of_the_seed_alone() -> None:
    cohort = made([np.arange(60) % 3])
    first = split(cohort, 7)
    torch.manual_seed(3)
    np.random.seed(3)
    again = split(cohort, 7)
    for part in PARTS:
        rows = getattr(first, part)
        assert torch.equal(rows, getattr(again, part)) and torch.equal(rows, rows.sort().values)
        assert rows.dtype == torch.int64
    # two folds of one repetition share their validation rows only by chance
    assert not torch.equal(first.validation, split(cohort, 8).validation)


def test_missing_labels_and_regressions_are_no_obstacle() -> None:
    cohort = made([np.where(np.arange(100) % 4 == 0, -100, np.arange(100) % 2)])
    parts = split(cohort, 0)
    assert int((cohort.tasks["t0"].labels[parts.test] == -100).sum()) == 5
    change = {"change": Task("regression", torch.full((100,), torch.nan), 0)}
    for groups in (torch.arange(100), torch.arange(100) // 2):
        assert disjoint(split(Cohort("r", {"m": torch.zeros(100, 1)}, {}, change, groups), 1))


def test_what_cannot_be_split_is_refused() -> None:
    cohort = made([np.zeros(60, dtype=np.int64)])
    for options, message in (
        ({"seed": -1}, "seed=-1: must be >= 0"),
        ({"seed": 0, "folds": 1}, "folds=1: must be >= 2"),
        ({"seed": 0, "validation": 0.8}, r"validation=0.8: must be in \[0, 0.8\)"),
        ({"seed": 0, "folds": 31}, "cohort=60 groups: must be at least 62 groups"),
    ):
        with pytest.raises(ValueError, match=message):
            split(cohort, **options)
    lumpy = made([np.zeros(60, dtype=np.int64)], np.minimum(np.arange(60), 20))  # one group of 40 rows
    with pytest.raises(ValueError, match="60 rows in 21 groups: must be more rows, or smaller groups"):
        split(lumpy, 0)
