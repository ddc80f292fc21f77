"""Metrics agree with scikit-learn, over leading axes, with ties and missing labels; never a silent number."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from multimodn import metrics

samples = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1)), min_size=2, max_size=30)


@given(samples)
@settings(max_examples=100, deadline=None)
def test_binary_metrics_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    p = torch.tensor([a / 5 for a, _ in pairs])
    y = torch.tensor([b for _, b in pairs])
    known = torch.cat([y, torch.tensor([-100, -100])])
    extended = torch.cat([p, torch.tensor([0.0, 1.0])])  # samples without a label do not count
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if 0 < y.sum() < len(y):
            assert metrics.auroc(extended, known).item() == pytest.approx(reference.roc_auc_score(y, p))
            balanced = reference.balanced_accuracy_score(y, p > 0.5)
            assert metrics.balanced_accuracy(extended, known).item() == pytest.approx(balanced)
            assert metrics.sensitivity(extended, known).item() == pytest.approx(reference.recall_score(y, p > 0.5))
            specificity = reference.recall_score(1 - y, p <= 0.5)
            assert metrics.specificity(extended, known).item() == pytest.approx(specificity)
        else:
            assert metrics.auroc(extended, known).isnan() and metrics.balanced_accuracy(extended, known).isnan()
        assert metrics.accuracy(extended, known).item() == pytest.approx(reference.accuracy_score(y, p > 0.5))
        if y.any() or (p > 0.5).any():
            expected = reference.f1_score(y, p > 0.5, zero_division=0)
            assert metrics.f1(extended, known).item() == pytest.approx(expected)


def test_leading_axes_are_independent() -> None:
    p, y = torch.rand(4, 3, 50), torch.randint(2, (4, 1, 50))
    found = metrics.auroc(p, y)
    assert found.shape == (4, 3)
    for i in range(4):
        for k in range(3):
            assert found[i, k].item() == pytest.approx(reference.roc_auc_score(y[i, 0], p[i, k]))


def test_several_classes_one_against_the_rest() -> None:
    p, y = torch.rand(60, 3).softmax(-1).double(), torch.randint(3, (60,))
    expected = reference.roc_auc_score(y, p, multi_class="ovr")
    assert metrics.auroc_ovr(p, y).item() == pytest.approx(expected)
    more = torch.cat([y, torch.tensor([-100])])
    assert metrics.auroc_ovr(torch.cat([p, p[:1]]), more).item() == pytest.approx(expected)


def test_r2() -> None:
    y, guess = torch.randn(40), torch.randn(40)
    expected = reference.r2_score(y, guess)
    known, more = torch.cat([y, torch.tensor([torch.nan])]), torch.cat([guess, torch.tensor([9.0])])
    assert metrics.r2(more, known).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["auroc", "balanced_accuracy", "sensitivity", "f1", "accuracy"])
def test_an_undefined_metric_warns_and_is_nan(name: str) -> None:
    y = torch.full((4,), -100) if name == "accuracy" else torch.zeros(4, dtype=torch.long)
    with pytest.warns(UserWarning, match="not defined"):
        assert getattr(metrics, name)(torch.zeros(4), y).isnan()


@given(samples)
@settings(max_examples=50, deadline=None)
def test_log_loss_and_rmse_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    p = torch.tensor([a / 5 for a, _ in pairs], dtype=torch.float64)
    y = torch.tensor([b for _, b in pairs])
    expected = reference.log_loss(y, p, labels=[0, 1])
    more, known = torch.cat([p, torch.tensor([0.9])]), torch.cat([y, torch.tensor([-100])])
    assert metrics.log_loss(more, known).item() == pytest.approx(expected, rel=1e-9)
    real = torch.cat([y.double(), torch.tensor([torch.nan])])
    assert metrics.rmse(more, real).item() == pytest.approx(reference.root_mean_squared_error(y, p))
    stacked = torch.stack([more, more.flip(0)])
    for name, target in (("log_loss", known), ("rmse", real)):
        own = [getattr(metrics, name)(row, target) for row in stacked]
        assert torch.equal(getattr(metrics, name)(stacked, target), torch.stack(own))


def test_only_the_row_that_is_undefined_is_nan() -> None:
    y = torch.tensor([[0, 1], [1, 1]])
    with pytest.warns(UserWarning, match="AUROC is not defined"):
        assert metrics.auroc(torch.tensor([0.1, 0.9]).expand(2, 2), y).isnan().tolist() == [False, True]
    for call in (metrics.log_loss, metrics.rmse):
        empty = torch.tensor([-100, -100]) if call is metrics.log_loss else torch.full((2,), torch.nan)
        with pytest.warns(UserWarning, match="not defined"):
            assert call(torch.tensor([0.1, 0.9]), empty).isnan()


def test_a_score_that_is_nan_makes_the_auroc_nan_unless_it_does_not_count() -> None:
    scores, y = torch.tensor([torch.nan, 0.0, 1.0]), torch.tensor([1, 0, 1])
    assert metrics.auroc(scores, y).isnan()
    assert metrics.auroc(scores, torch.tensor([-100, 0, 1])) == 1


def test_infinite_scores_tie_with_each_other_only() -> None:
    inf = torch.inf
    assert metrics.auroc(torch.tensor([inf, 0.0, 1.0]), torch.tensor([1, 0, -100])) == 1
    assert metrics.auroc(torch.tensor([inf, inf, 1.0]), torch.tensor([1, 0, -100])) == 0.5
    assert metrics.auroc(torch.tensor([-inf, inf, -inf, 5.0]), torch.tensor([1, 0, 0, -100])) == 0.25


def test_one_half_is_class_zero_and_thresholds_can_be_moved() -> None:
    p, y = torch.tensor([0.5, 0.5000001, 0.2, 0.9]), torch.tensor([1, 1, 0, 0])
    assert [int(c) for c in metrics.confusion(p, y)] == [1, 1, 1, 1]
    assert [int(c) for c in metrics.confusion(p, y, 0.1)] == [2, 2, 0, 0]
    assert [int(c) for c in metrics.confusion(p, y, 0.95)] == [0, 0, 2, 2]
