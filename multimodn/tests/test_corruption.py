"""Simulators of missingness hide what they say, exactly, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodn import corruption


@given(st.lists(st.integers(0, 1), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 1), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_mnar_hides_an_exact_share_of_one_class(labels: list[int], share: float, hide: int, seed: int) -> None:
    y = torch.tensor(labels)
    before = y.clone()
    for order in ("random", "file"):
        visible = corruption.mnar(y, share, seed, hide=hide, order=order)
        assert int((~visible).sum()) == round(share * labels.count(hide))
        assert visible[y != hide].all() and torch.equal(y, before)
        assert torch.equal(visible, corruption.mnar(y, share, seed, hide=hide, order=order))
        if order == "file":
            assert visible[y == hide].int().diff().ge(0).all()  # the first ones of the class


def test_shares_round_half_to_even_as_python_does() -> None:
    assert int((~corruption.mnar(torch.ones(5, dtype=torch.long), 0.5)).sum()) == 2
    assert int((~corruption.mnar(torch.ones(7, dtype=torch.long), 0.5)).sum()) == 4


def test_random_order_is_random() -> None:
    y = torch.ones(50, dtype=torch.long)
    first, second = (corruption.mnar(y, 0.5, seed) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first, corruption.mnar(y, 0.5, order="file"))


@given(st.integers(1, 50), st.floats(0, 1), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_mcar_hides_an_exact_share(n: int, share: float, seed: int) -> None:
    visible = corruption.mcar(n, share, seed)
    assert visible.shape == (n,) and int((~visible).sum()) == round(share * n)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_mar_follows_its_driver(share: float) -> None:
    rng = torch.Generator().manual_seed(0)
    driver = torch.randn(20_000, 2, generator=rng) * torch.tensor([1.0, 100.0]) + 5  # columns of any scale
    visible = corruption.mar(driver, share, 1)
    assert (~visible).double().mean().item() == pytest.approx(share, abs=0.015)
    if 0 < share < 1:
        score = driver[:, 0] + driver[:, 1] / 100
        gap = score[~visible].mean() - score[visible].mean()
        assert gap > 1
        back = corruption.mar(driver, share, 1, strength=-2.0)
        assert score[~back].mean() - score[back].mean() < -1
        none = corruption.mar(driver, share, 1, strength=0.0)
        assert abs(score[~none].mean() - score[none].mean()) < 0.1


def test_mar_counts_what_is_not_recorded_as_the_mean() -> None:
    driver = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    driver[::2] = torch.nan
    visible = corruption.mar(driver, 0.5, 0)
    assert (~visible[::2]).double().mean().item() == pytest.approx(0.5, abs=0.07)
    constant = corruption.mar(torch.ones(1000, 3), 0.25, 0)
    assert (~constant).double().mean().item() == pytest.approx(0.25, abs=0.05)


def test_own_values_decide() -> None:
    x = torch.randn(5000, 1, generator=torch.Generator().manual_seed(0))
    visible = corruption.mnar_values(x, 0.4, 0)
    assert x[~visible].mean() > 0.5 > 0 > x[visible].mean()
    assert torch.equal(visible, corruption.mar(x, 0.4, 0))


def test_hide_writes_nan_into_copies() -> None:
    x = {"a": torch.randn(4, 2), "b": torch.randn(4, 3, 2), "c": torch.randn(4, 1)}
    before = {name: v.clone() for name, v in x.items()}
    visible = torch.tensor([True, False, True, False])
    found = corruption.hide(x, {"a": visible, "b": visible})
    for name in "ab":
        assert torch.equal(found[name][visible], x[name][visible]) and found[name][~visible].isnan().all()
    assert torch.equal(found["c"], x["c"]) and all(torch.equal(x[n], before[n]) for n in x)
    with pytest.raises(KeyError, match="'z' is not one of a, b, c"):
        corruption.hide(x, {"z": visible})


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_shares_that_are_refused(share: float) -> None:
    y = torch.zeros(4, dtype=torch.long)
    for call in (lambda: corruption.mcar(4, share, 0), lambda: corruption.mar(y.float(), share, 0),
                 lambda: corruption.mnar(y, share), lambda: corruption.mnar_values(y.float(), share, 0)):  # fmt: skip
        with pytest.raises(ValueError, match=r"share=.*must be in \[0, 1\]"):
            call()
    with pytest.raises(ValueError, match="order=up: must be one of random, file"):
        corruption.mnar(y, 0.5, order="up")
