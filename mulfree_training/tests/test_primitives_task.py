"""The error-law trial measures what it says: extremes on the grid, means over its own random numbers, pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from common.claims import REPRODUCED, judge
from common.kernels.dispatch import forced
from common.tests.report_fakes import FakeRecords
from mulfree_training.bits import offset
from mulfree_training.claims import CLAIMS
from mulfree_training.judging import arithmetic
from mulfree_training.tasks import primitives
from mulfree_training.tests.trials import config, run
from mulfree_training.tests.worlds import error_law

FAST = ["task=primitives", "device=cpu", "threads=1", "tracking.mode=disabled", "n_seeds=2", "seed=4"]
ALPHA = ["arithmetic=matmul", "arithmetic.alpha=1.0552"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two seeds, a grid of 8 bits, 200,000 pairs."""
    chosen = config(*FAST, "task.mantissa_bits=8", "task.pairs=200000")
    return run(tmp_path_factory.mktemp("a"), chosen)[0]


@pytest.fixture(scope="module")
def compensated(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same with alpha."""
    chosen = config(*FAST, *ALPHA, "task.mantissa_bits=6", "task.pairs=200000")
    return run(tmp_path_factory.mktemp("b"), chosen)[0]


def test_extremes_and_means_are_those_of_the_closed_forms(rows: list[dict[str, Any]]) -> None:
    law = error_law()
    assert [row["seed"] for row in rows] == [4, 5] and law.keys() <= rows[0].keys()
    for row in rows:
        for name, value in law.items():
            tolerance = 1e-6 if name.endswith(("_min", "_max")) else 4e-4
            assert row[name] == pytest.approx(value, abs=tolerance), name


def test_a_seed_draws_its_own_numbers_and_shares_the_grid(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    first, second = rows
    drawn = {name for name in first if first[name] != second[name]} - {"seed"}
    kinds = [f"{op}_mean_{kind}" for op in ("mul", "div", "square") for kind in ("uniform", "logarithmic")]
    assert drawn == {*kinds, "gain", "residual"}
    chosen = config(*FAST[:-2], "n_seeds=1", "seed=5", "task.mantissa_bits=8", "task.pairs=200000")
    assert run(tmp_path, chosen)[0] == [second]


def test_random_means_are_over_the_stated_distributions() -> None:
    with forced("reference"):
        found = primitives.on_random(3, 100_000, offset(None))
    rng = np.random.default_rng(0)
    uniform, powers = 1 + rng.random((2, 100_000)), 2 ** rng.random((2, 100_000))
    for kind, (a, b) in (("uniform", uniform), ("logarithmic", powers)):
        product = np.where(a + b < 3, a + b - 1, 2 * (a + b - 2)) / (a * b) - 1
        assert found[f"mul_mean_{kind}"] == pytest.approx(product.mean(), abs=6e-4)
    x, y = rng.standard_normal((2, 100_000))
    (m, e), (n, f) = np.frexp(x), np.frexp(y)
    s = 2 * (abs(m) + abs(n)) - 2  # sum of the mantissas less 1
    product = np.sign(x * y) * np.where(s < 1, 1 + s, 2 * s) * 2.0 ** (e + f - 2)
    gain = (product * x * y).sum() / (x * y * x * y).sum()
    residual = math.sqrt(((product - gain * x * y) ** 2).mean() / ((x * y) ** 2).mean())
    assert found["gain"] == pytest.approx(gain, abs=1e-3) and found["residual"] == pytest.approx(residual, rel=0.05)


def test_alpha_takes_the_gain_to_1_and_shifts_the_range(
    rows: list[dict[str, Any]], compensated: list[dict[str, Any]]
) -> None:
    for plain, row in zip(rows, compensated, strict=True):
        assert plain["gain"] == pytest.approx(0.9623, abs=5e-4) and row["gain"] == pytest.approx(1, abs=2e-3)
        assert row["mul_min"] == pytest.approx(-0.0775, abs=2e-3) and row["mul_max"] == pytest.approx(0.0552, abs=1e-4)
        for own in ("exp2", "log2", "sqrt"):  # not products
            assert row[f"{own}_max"] == plain[f"{own}_max"] and row[f"{own}_min"] == plain[f"{own}_min"]


def test_pictures_are_a_map_over_mantissas_and_densities(rows: list[dict[str, Any]]) -> None:
    found = np.array(rows[0]["map"])
    x = 1 + (np.arange(primitives.MAP) + 0.5) / primitives.MAP
    a, b = x[:, None], x[None]
    expected = np.where(a + b < 3, a + b - 1, 2 * (a + b - 2)) / (a * b) - 1
    assert found.shape == (primitives.MAP, primitives.MAP) and np.allclose(found, expected, atol=1e-6)
    for operation, low, high in (("mul", -1 / 9, 0.0), ("div", 0.0, 1 / 8)):
        edges, density = (np.array(rows[0][f"{operation}_{x}"]) for x in ("edges", "density"))
        assert len(edges) == len(density) + 1 and (density * np.diff(edges)).sum() == pytest.approx(1)
        assert edges[0] == pytest.approx(low, abs=2e-3) and edges[-1] == pytest.approx(high, abs=2e-3)
        mean = (density * np.diff(edges) * (edges[:-1] + edges[1:]) / 2).sum()
        assert mean == pytest.approx(rows[0][f"{operation}_mean_uniform"], abs=1e-3)


def test_max_steps_cuts_grid_and_pairs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(primitives, "on_grid", lambda bits, shift: seen.append(("bits", bits)) or {})
    monkeypatch.setattr(primitives, "on_random", lambda seed, count, shift: seen.append(("pairs", count)) or {})
    monkeypatch.setattr(primitives, "pictures", lambda shift: {})
    run(tmp_path / "a", config(*FAST))
    assert seen == [("bits", 11), ("pairs", 1_000_000), ("pairs", 1_000_000)]
    seen.clear()
    run(tmp_path / "b", config(*FAST, "max_steps=1"))
    assert seen == [("bits", 6), ("pairs", 4096), ("pairs", 4096)]


def test_the_forced_backend_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = ["arithmetic=matmul", "max_steps=1", "n_seeds=1"]
    found = [
        run(tmp_path / name, config(*FAST, *small, f"arithmetic.backend={name}"))[0] for name in ("reference", "torch")
    ]
    assert found[0] == found[1]  # bit for bit


def test_what_is_measured_is_judged_reproduced(
    rows: list[dict[str, Any]], compensated: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claims read what the trial writes; means over fewer pairs need more tolerance."""
    monkeypatch.setattr(arithmetic, "MEAN", 4e-4)
    arms = {"pam": rows, "alpha": compensated}
    frame = pd.DataFrame([{"arm": arm} | row for arm, found in arms.items() for row in found])
    for name in ("C6", "C6.alpha"):
        (claim,) = [claim for claim in CLAIMS if claim.id == name]
        verdict = judge(claim, FakeRecords({"primitives": frame}))
        assert verdict.verdict == REPRODUCED, [(p.label, p.outcome) for p in verdict.parts]
