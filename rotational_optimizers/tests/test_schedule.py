"""The schedule's shape, and what a rotational variant feels of it."""

import math

import pytest

from rotational_optimizers.schedule import lr_factor


def test_warmup_climbs_linearly_to_one() -> None:
    assert [lr_factor(s, 100, "constant", warmup=0.05) for s in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


@pytest.mark.parametrize(("name", "middle"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_decay_starts_at_one_and_passes_its_midpoint(name: str, middle: float) -> None:
    assert lr_factor(0, 100, name) == 1.0
    assert lr_factor(50, 100, name) == pytest.approx(middle)


def test_decay_ends_above_zero_because_step_is_counted_from_zero() -> None:
    assert 0 < lr_factor(99, 100, "cosine") < 1e-3


def test_power_two_gives_a_rotation_of_sqrt_lr_the_plain_cosine() -> None:
    assert math.sqrt(lr_factor(30, 100, "cosine", power=2.0)) == pytest.approx(lr_factor(30, 100, "cosine"))


def test_power_leaves_warmup_linear() -> None:
    assert lr_factor(0, 100, "cosine", warmup=0.1, power=2.0) == pytest.approx(0.1)
