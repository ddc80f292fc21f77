"""The trial on joint piecewise affinity measures what it says, on functions whose answers are known."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from common.claims import REPRODUCED, judge
from common.tests.report_fakes import FakeRecords
from mulfree_training.claims import CLAIMS
from mulfree_training.config import AffineConfig
from mulfree_training.tasks import affine
from mulfree_training.tasks.affine import Line, curvature, draw, piecewise, slopes, standard
from mulfree_training.tests.trials import config, run

FAST = ["task=affine", "device=cpu", "threads=1", "tracking.mode=disabled"]
PAM = ["arithmetic=norm", "arithmetic.derivative=exact"]
TASK = AffineConfig()


def one(origin: float, direction: float) -> Line:
    """A line of one number."""
    return Line({"x": torch.tensor([origin]).double()}, {"x": torch.tensor([direction]).double()})


def test_a_line_moves_inputs_and_all_weights_at_once() -> None:
    line = draw(3, TASK)
    assert set(line.origin) == {"x", "weight", "gain", "bias", "query", "key", "value"} == set(line.direction)
    at = line.at(torch.tensor([0.0, 0.5], dtype=torch.float64))
    for name, x in line.origin.items():
        assert x.dtype == torch.float64 and at[name].shape == (2, *x.shape) and torch.equal(at[name][0], x)
        assert torch.allclose(at[name][1], x + 0.5 * line.direction[name]) and (line.direction[name] != 0).all()
    again, other = draw(3, TASK), draw(4, TASK)
    assert all(torch.equal(again.origin[name], x) for name, x in line.origin.items())
    assert not any(torch.equal(other.origin[name], x) for name, x in line.origin.items())


@pytest.mark.parametrize("h", [1e-3, 1e-2])
def test_curvature_is_the_second_over_the_first_difference(h: float) -> None:
    t = torch.tensor([0.5, 1.0, -2.0], dtype=torch.float64)
    line = one(0.0, 2.0)  # x = 2 t
    ratio, difference = curvature(lambda w: w["x"].pow(2).sum(-1), line, t, h)
    # f = 4 t^2: second difference 8 h^2, first 16 t h
    assert torch.allclose(ratio, h / (2 * t.abs())) and torch.allclose(difference, 8 * t)
    ratio, difference = curvature(lambda w: 3 * w["x"].sum(-1) - 1, line, t, h)
    assert (ratio < 1e-9).all() and torch.allclose(difference, torch.full_like(t, 6))


def test_slopes_run_through_inputs_and_weights() -> None:
    origin, direction = {"a": 2.0, "b": 3.0}, {"a": 1.0, "b": -1.0}
    line = Line(*({k: torch.tensor([v]).double() for k, v in x.items()} for x in (origin, direction)))
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = slopes(lambda w: (w["a"] * w["b"]).sum(-1), line, t)
    assert found.tolist() == [3 - 2, 2 - 3]  # b - a at (2, 3) and (3, 2)


def test_both_networks_are_the_same_but_for_the_arithmetic() -> None:
    line, t = draw(0, TASK), torch.linspace(-1, 1, 50, dtype=torch.float64)
    a, b = standard(line.at(t)), piecewise(line.at(t), "exact")
    assert a.shape == b.shape == (50,) and not torch.equal(a, b)
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.95
    scale = torch.linalg.norm(a)
    assert torch.linalg.norm(a - b) < 0.5 * scale


def test_points_do_not_see_each_other() -> None:
    line, t = draw(1, TASK), torch.linspace(-1, 1, 7, dtype=torch.float64)
    for network in (standard, partial(piecewise, derivative="exact")):
        alone = torch.cat([network(line.at(x[None])) for x in t])
        assert torch.allclose(network(line.at(t)), alone, rtol=1e-12)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Three seeds and all points of all arms."""
    words = {"standard": [], "pam": PAM, "pam_approx": PAM[:1]}
    return {
        arm: run(tmp_path_factory.mktemp(arm), config(*FAST, *own, "seed=10", "n_seeds=3"))[0]
        for arm, own in words.items()
    }


def test_the_piecewise_affine_network_has_no_curvature_but_kinks(rows: dict[str, list[dict[str, Any]]]) -> None:
    for own, other in zip(rows["pam"], rows["standard"], strict=True):
        assert own["curvature_1e-06"] < 1e-3 * other["curvature_1e-06"]
        assert own["affine_1e-07"] > own["affine_1e-06"] > 0.5 > other["affine_1e-06"]
        assert other["curvature_1e-05"] > 5 * other["curvature_1e-06"] > 25 * other["curvature_1e-07"]
        assert 0.6 < own["gradient_right"] <= 1 and other["gradient_right"] > 0.9
    for own, other in zip(rows["pam"], rows["pam_approx"], strict=True):
        assert other == own | {"gradient_right": 0}  # the same function, and nowhere its slope
    assert [row["seed"] for row in rows["pam"]] == [10, 11, 12]
    assert len({row["curvature_1e-06"] for row in rows["pam"]}) == 3


def test_what_is_measured_is_judged_reproduced(rows: dict[str, list[dict[str, Any]]]) -> None:
    frame = pd.DataFrame([{"arm": arm} | row for arm, found in rows.items() for row in found])
    (claim,) = [claim for claim in CLAIMS if claim.id == "C7"]
    assert judge(claim, FakeRecords({"affine": frame})).verdict == REPRODUCED


def test_a_wrong_slope_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = affine.slopes
    monkeypatch.setattr(affine, "slopes", lambda *args: right(*args) * (1 + 3e-6))
    (row,), _ = run(tmp_path, config(*FAST, *PAM, "max_steps=1"))
    assert row["gradient_right"] < 0.3


def test_a_smooth_product_among_piecewise_affine_ones_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def smooth(a: Tensor, b: Any, **options: Any) -> Tensor:
        return a * b

    monkeypatch.setattr(affine, "pam_mul", smooth)
    (row,), _ = run(tmp_path, config(*FAST, *PAM, "max_steps=1"))
    assert row["curvature_1e-06"] > 1e-9 and row["affine_1e-06"] < 0.5


def test_max_steps_cuts_the_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[int] = []

    def watched(network: Any, line: Line, t: Tensor, h: float) -> tuple[Tensor, Tensor]:
        seen.append(len(t))
        return torch.ones_like(t), torch.ones_like(t)

    monkeypatch.setattr(affine, "curvature", watched)
    run(tmp_path / "a", config(*FAST))
    run(tmp_path / "b", config(*FAST, "max_steps=1"))
    assert seen == [200] * 3 + [20] * 3
