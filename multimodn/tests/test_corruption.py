"""Simulators of missingness hide what they say, exactly, and nothing else."""

from __future__ import annotations

import math

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


def logistic(strength: float, share: float, z: torch.Tensor) -> torch.Tensor:
    """sigmoid(strength · z + b) with the b of a fine grid whose mean is nearest to the share."""
    curves = torch.sigmoid(strength * z + torch.linspace(-15, 15, 3001, dtype=z.dtype)[:, None])
    return curves[curves.mean(1).sub(share).abs().argmin()]


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize(("strength", "share"), [(2.0, 0.3), (-1.5, 0.6), (0.0, 0.5), (5.0, 0.1)])
def test_mar_is_logistic_in_the_standardised_mean_of_the_columns(strength: float, share: float, columns: int) -> None:
    values = torch.randn(8, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values[::3, 1:] = math.nan  # counts as the column's mean, and not in its deviation
    mean = values.nanmean(0)
    z = ((values - mean) / (values - mean).square().nanmean(0).sqrt()).nan_to_num().mean(1)
    z = (z - z.mean()) / z.std(correction=0)
    driver = (7 + values * torch.tensor([3.0, 1000.0, 0.01])[:columns]).repeat(2000, 1)
    hidden = ~corruption.mar(driver, share, 0, strength=strength).view(2000, 8)
    assert hidden.double().mean(0).sub(logistic(strength, share, z)).abs().max() < 4 * math.sqrt(0.25 / 2000) + 0.003


def test_missing_values_of_a_driver_count_as_the_mean_of_the_others() -> None:
    driver = torch.tensor([2.0, 6.0, math.nan, 4.0]).repeat(3000)
    hidden = (~corruption.mar(driver, 0.5, 0)).view(3000, 4).double().mean(0)
    z = torch.tensor([-1.0, 1.0, 0.0, 0.0], dtype=torch.float64) * math.sqrt(2)  # its deviation is that of all rows
    assert hidden.sub(logistic(2.0, 0.5, z)).abs().max() < 4 * math.sqrt(0.25 / 3000) + 0.003
    assert driver.isnan().sum() == 3000  # still missing


@pytest.mark.parametrize("strength", [20.0, 200.0, -200.0])
def test_the_share_holds_at_any_strength(strength: float) -> None:
    driver = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    visible = corruption.mar(driver, 0.02, 0, strength=strength)
    assert (~visible).double().mean().item() == pytest.approx(0.02, abs=0.003)


def test_every_draw_depends_on_the_seed_and_nothing_else() -> None:
    driver = torch.randn(200, generator=torch.Generator().manual_seed(0))
    for call in (lambda s: corruption.mcar(200, 0.5, s), lambda s: corruption.mar(driver, 0.5, s)):
        assert torch.equal(call(3), call(3)) and not torch.equal(call(3), call(4))


def test_mcar_hides_every_row_equally_often() -> None:
    hidden = ~torch.stack([corruption.mcar(10, 0.3, seed) for seed in range(4000)])
    assert hidden.float().mean(0).sub(0.3).abs().max() < 5 * math.sqrt(0.21 / 4000)


def test_mcar_masks_draw_each_modality_on_its_own() -> None:
    masks = {"a": torch.ones(4000, dtype=torch.bool), "b": torch.arange(4000) % 2 == 0}
    before = {name: mask.clone() for name, mask in masks.items()}
    found = corruption.mcar_masks(masks, 0.5, 1)
    assert (~found["a"]).sum() == 2000 and not found["b"][1::2].any()
    assert abs(found["b"].sum().item() - 1000) < 5 * math.sqrt(500)
    both = (found["a"][::2] & found["b"][::2]).double().mean().item()
    assert both == pytest.approx(0.25, abs=5 * math.sqrt(0.19 / 2000))
    assert all(torch.equal(masks[name], mask) for name, mask in before.items())
    assert torch.equal(found["a"], corruption.mcar_masks(masks, 0.5, 1)["a"])
    with pytest.raises(ValueError, match="share=2"):
        corruption.mcar_masks(masks, 2, 0)


def test_hide_gives_tensors_of_their_own() -> None:
    x = {"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}
    for values in corruption.hide(x, {"a": torch.ones(2, dtype=torch.bool)}).values():
        values.fill_(1.0)
    assert not any(values.any() for values in x.values())


def test_the_training_pattern_and_its_flip_share_no_row() -> None:
    y = torch.tensor([0, 1, 1, -100] * 10)
    for share in (0.0, 0.4, 1.0):
        assert (corruption.mnar(y, share, 0, hide=1) | corruption.mnar(y, share, 0, hide=0)).all()
    assert corruption.mnar(y, 0.0).all() and torch.equal(corruption.mnar(y, 1.0), y != 1)


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_drivers_that_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="driver.shape=.*must be"):
        corruption.mar(torch.zeros(shape), 0.5, 0)
    with pytest.raises(ValueError, match="driver=inf: must be finite"):
        corruption.mar(torch.tensor([1.0, -math.inf]), 0.5, 0)
    assert corruption.mar(torch.zeros(0), 0.5, 0).shape == (0,)
