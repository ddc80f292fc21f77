"""Measured times are kept a repetition at a time: a kill or a lost record does not change a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.trials import Trial
from sparse_flash_attention.tasks import runtime, step, timing
from sparse_flash_attention.tests.trials import config

CPU = torch.device("cpu")
SMALL = ["device=cpu", "task=runtime", "task.length=32", "tracking.mode=disabled"]


def trial(folder: Path, seeds: list[int]) -> Trial:
    scratch = folder / "scratch" / "key"
    scratch.mkdir(parents=True, exist_ok=True)
    return Trial(scratch, seeds)


def counted(calls: list[bool], value: float) -> Any:
    def measure(warm: bool) -> dict[str, float]:
        calls.append(warm)
        return {"dense_ms": value}

    return measure


def test_what_is_known_is_read_back_exactly(tmp_path: Path) -> None:
    calls: list[bool] = []
    first = timing.Measurements(trial(tmp_path, [1, 2]), CPU)
    rows = [first.row(seed, counted(calls, seed / 3)) for seed in (1, 2)]
    assert rows == [{"seed": 1, "dense_ms": 1 / 3}, {"seed": 2, "dense_ms": 2 / 3}] and calls == [False, True]
    again = timing.Measurements(trial(tmp_path, [1, 2, 3]), CPU)
    assert [again.row(seed, counted(calls, 9.0)) for seed in (1, 2)] == rows and len(calls) == 2
    # a process that has only read back is cold
    assert again.row(3, counted(calls, 9.0))["dense_ms"] == 9.0 and calls[2:] == [False]
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"rows": {"1": {"dense_ms": 5}}}', '{"machine": {}, "rows": {"1": {}}}']
)
def test_a_torn_file_or_another_machine_is_measured_anew(content: str, tmp_path: Path) -> None:
    path = tmp_path / "timings" / "key.json"
    path.parent.mkdir()
    path.write_text(content)
    found = timing.Measurements(trial(tmp_path, [1]), CPU).row(1, counted([], 7.0))
    assert found == {"seed": 1, "dense_ms": 7.0}
    assert json.loads(path.read_text())["rows"] == {"1": {"dense_ms": 7.0}}


def test_a_trial_outside_a_store_keeps_nothing(tmp_path: Path) -> None:
    measurements = timing.Measurements(Trial(tmp_path, [1]), CPU)
    assert measurements.row(1, counted([], 1.0)) == measurements.row(1, counted([], 2.0))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "overrides"),
    [
        (runtime, []),
        (step, ["task=step", "model.context=32", "model.d_model=16", "model.n_head=2", "task.drops=[0.3]"]),
    ],
)
def test_a_trial_run_again_reports_the_same_times(module: Any, overrides: list[str], tmp_path: Path) -> None:
    made = config(*SMALL, *overrides)
    first = module.run(made, trial(tmp_path, [20, 21]))
    assert module.run(made, trial(tmp_path, [20, 21])) == first
    assert module.run(made, trial(tmp_path, [21, 22]))[0] == first[1]
