"""A trial's record is whole or absent, and its key names everything that can change its numbers."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from common.config import CommonConfig, TrackingConfig
from common.trials import HASHED, Trial, TrialStore, trial_key

QUIET = TrackingConfig(mode="disabled")
CALLS: list[int] = []


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A stand-in entry module whose `run` a test replaces."""
    module = types.ModuleType("stand_in")
    CALLS.clear()

    def run(config: CommonConfig, trial: Trial) -> list[dict[str, object]]:
        CALLS.append(config.seed)
        trial.log({"loss": np.array([1.0, 2.0][: config.n_seeds])}, step=0)
        trial.log({"loss": np.array([0.5, math.nan][: config.n_seeds])}, step=10)
        return [
            {"seed": seed, "score": np.float64(seed / 3), "curve": [0.1, math.nan], "name": "x", "ok": True}
            for seed in trial.seeds
        ]

    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in", module)
    monkeypatch.setattr("common.trials.fingerprint_of", lambda name: "f")
    return module


def config(**changes: object) -> CommonConfig:
    return CommonConfig(tracking=QUIET, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "label", [{"experiment": "x"}, {"arm": "x"}, {"scale": "gpu"}, {"results_dir": "x"}, {"tracking": TrackingConfig()}]
)
def test_labels_do_not_change_the_key(label: dict[str, object]) -> None:
    base = {"tracking": QUIET}
    assert trial_key(CommonConfig(**(base | label)), "f") == trial_key(config(), "f")  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_seeds": 2}, {"threads": 2}, {"precision": "bf16"}])
def test_everything_else_changes_the_key(change: dict[str, object]) -> None:
    assert trial_key(config(**change), "f") != trial_key(config(), "f")


def test_other_sources_change_the_key() -> None:
    assert trial_key(config(), "f") != trial_key(config(), "g")


def test_a_record_reads_back_what_was_returned_and_logged(entry: types.ModuleType, tmp_path: Path) -> None:
    store = TrialStore(tmp_path)
    given = config(seed=4, n_seeds=2)
    record = store.run("k", given, "stand_in")
    assert record is not None
    assert [row["seed"] for row in record.rows] == [4, 5]
    assert [row["score"] for row in record.rows] == [4 / 3, 5 / 3]  # to the last bit
    assert record.rows[0]["curve"][0] == 0.1 and math.isnan(record.rows[0]["curve"][1])
    assert record.rows[0]["diverged"] is False
    assert record.config["seed"] == 4 and record.config["tracking"]["mode"] == "disabled"
    history = record.history
    assert list(history["step"]) == [0, 0, 10, 10] and list(history["seed"]) == [4, 5, 4, 5]
    assert list(history["loss"])[:3] == [1.0, 2.0, 0.5] and math.isnan(history["loss"].iloc[3])
    assert {"commit", "dirty", "fingerprint", "versions", "device", "threads", "wall_s", "peak_memory_mb"} <= set(
        record.provenance
    )


def test_a_recorded_trial_is_not_trained_again(entry: types.ModuleType, tmp_path: Path) -> None:
    store = TrialStore(tmp_path)
    first, second = (store.run("k", config(), "stand_in") for _ in range(2))
    assert (
        CALLS == [0] and first is not None and second is not None and first.rows[0]["score"] == second.rows[0]["score"]
    )


@pytest.mark.parametrize("name", [*HASHED, "provenance.json"])
@pytest.mark.parametrize("damage", ["truncated", "one byte changed", "missing"])
def test_a_torn_record_is_none_and_trained_again(
    entry: types.ModuleType, tmp_path: Path, name: str, damage: str
) -> None:
    store = TrialStore(tmp_path)
    store.run("k", config(), "stand_in")
    path = tmp_path / "trials" / "k" / name
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(whole[:7])
    else:
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert store.load("k") is None
    assert store.run("k", config(), "stand_in") is not None
    assert CALLS == [0, 0] and store.load("k") is not None
    assert [p.name for p in (tmp_path / "trials").iterdir()] == ["k"]
    assert not list((tmp_path / "scratch").iterdir()) and not list((tmp_path / "locks").iterdir())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_metric_is_recorded_as_diverged(entry: types.ModuleType, tmp_path: Path, value: float) -> None:
    entry.run = lambda config, trial: [{"seed": 0, "loss": value}, {"seed": 1, "loss": 1.0}]  # type: ignore[attr-defined]
    record = TrialStore(tmp_path).run("k", config(n_seeds=2), "stand_in")
    assert record is not None and [row["diverged"] for row in record.rows] == [True, False]
    assert math.isnan(record.rows[0]["loss"])


def test_a_floating_point_error_is_recorded_as_diverged(entry: types.ModuleType, tmp_path: Path) -> None:
    def run(config: CommonConfig, trial: Trial) -> list[dict[str, object]]:
        raise FloatingPointError("overflow")

    entry.run = run  # type: ignore[attr-defined]
    record = TrialStore(tmp_path).run("k", config(), "stand_in")
    assert record is not None and record.rows == [{"seed": 0, "diverged": True}]


@pytest.mark.parametrize("rows", [None, [], [{"seed": 1}], [{"seed": 0}, {"seed": 0}]])
def test_rows_must_be_one_a_seed(entry: types.ModuleType, tmp_path: Path, rows: object) -> None:
    entry.run = lambda config, trial: rows  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"one dict a seed, for seeds \[0\]"):
        TrialStore(tmp_path).run("k", config(), "stand_in")
    assert TrialStore(tmp_path).load("k") is None


def test_a_failure_keeps_checkpoints_and_writes_no_record(entry: types.ModuleType, tmp_path: Path) -> None:
    def run(config: CommonConfig, trial: Trial) -> list[dict[str, object]]:
        (trial.folder / "checkpoint").write_text("half way")
        raise RuntimeError("stop")

    entry.run = run  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="stop"):
        TrialStore(tmp_path).run("k", config(), "stand_in")
    assert (tmp_path / "scratch" / "k" / "checkpoint").exists()
    assert TrialStore(tmp_path).load("k") is None and not list((tmp_path / "locks").iterdir())


def test_a_resumed_trial_replaces_the_steps_it_repeats(tmp_path: Path) -> None:
    first = Trial(tmp_path, [0])
    for step in range(4):
        first.log({"loss": float(step)}, step)
    with open(tmp_path / "history.jsonl", "a") as file:
        file.write('[4, {"lo')  # killed in mid-line
    resumed = Trial(tmp_path, [0])
    for step in (2, 3, 4):
        resumed.log({"loss": 10.0 + step}, step)
    expected = [(0, 0.0), (1, 1.0), (2, 12.0), (3, 13.0), (4, 14.0)]
    assert [(row["step"], row["loss"]) for row in resumed.history_rows()] == expected
    again = Trial(tmp_path, [0])  # killed once more: the file itself says the same
    assert [(row["step"], row["loss"]) for row in again.history_rows()] == expected


def test_metrics_of_one_step_may_be_logged_one_by_one(tmp_path: Path) -> None:
    trial = Trial(tmp_path, [0, 1])
    trial.log({"loss": [1, 2]}, 0)
    trial.log({"lr": 0.5}, 0)
    assert trial.history_rows() == [
        {"step": 0, "seed": 0, "loss": 1.0, "lr": 0.5},
        {"step": 0, "seed": 1, "loss": 2.0, "lr": 0.5},
    ]


def test_a_vector_metric_must_have_one_value_a_seed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss: has 3 values, must have one a seed \\(2\\)"):
        Trial(tmp_path, [0, 1]).log({"loss": [1, 2, 3]}, 0)


def test_nothing_personal_is_in_a_record(
    entry: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-0123")
    record = TrialStore(tmp_path).run("k", config(), "stand_in")
    assert record is not None
    written = b"".join(path.read_bytes() for path in record.folder.iterdir())
    assert b"secret-0123" not in written
    json.loads((record.folder / "summary.json").read_text(), parse_constant=pytest.fail)  # strict JSON, no NaN
