"""Every launcher gives the same records."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.launch import THREAD_POOLS, limit_threads
from common.tests.runs import OFF, PAPER, TRAIN, records, run

LAUNCHERS = {
    "basic": "hydra",
    "laptop": "hydra_plugins.hydra_joblib_launcher",
    "subprocesses": "hydra_plugins.hydra_submitit_launcher",
    "ray_local": "hydra_plugins.hydra_ray_launcher",
}
SWEEP = ["-m", OFF, "n_seeds=2", "steps=4", "optimizer.lr=0.1,0.3,5"]


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def sweep(launcher: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    done = run([*TRAIN, *SWEEP, f"hydra/launcher={launcher}"], folder)
    assert done.returncode == 0, done.stderr
    return records(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return sweep("basic", tmp_path_factory.mktemp("basic"))


@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if name != "basic"])
def test_a_launcher_gives_the_records_of_one_after_the_other(
    launcher: str, alone: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    if not installed(LAUNCHERS[launcher]):
        pytest.skip(f"{LAUNCHERS[launcher]} is not installed")
    assert len(alone) == 3 and any(row["diverged"] for rows in alone.values() for row in rows)
    assert sweep(launcher, tmp_path) == alone
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize("launcher", ["basic", "laptop"])
def test_a_value_may_refer_to_another_key(launcher: str, tmp_path: Path) -> None:
    done = run([*TRAIN, "-m", OFF, "seed=3,4", "steps=${seed}", f"hydra/launcher={launcher}"], tmp_path)
    assert done.returncode == 0, done.stderr
    configs = [yaml.safe_load(path.read_text()) for path in (tmp_path / PAPER / "trials").glob("*/config.yaml")]
    assert sorted((config["seed"], config["steps"]) for config in configs) == [(3, 3), (4, 4)]


def test_workers_inherit_one_thread_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in THREAD_POOLS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    limit_threads()
    assert [os.environ[name] for name in THREAD_POOLS] == ["3", "1", "1", "1", "1"]
