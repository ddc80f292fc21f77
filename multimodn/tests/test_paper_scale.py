"""`scale=paper` on the paper's own data: networks of the official sizes, and trials that run on files of the schema."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from common.compose import Composer
from common.trials import Trial
from multimodn.cohorts import weather2k
from multimodn.cohorts.base import Cohort, Task
from multimodn.config import TrialConfig
from multimodn.tasks import fusion, tabular
from multimodn.tasks.networks import build
from multimodn.tests.test_paper_files import COLUMNS, haim

MIMIC = {"de": 11, "vd": 1024, "n_ech": 768, "ts_ce": 99}
SMALL = ["scale=paper", "device=cpu", "max_steps=3", "n_seeds=2", "tracking.mode=disabled"]


def parameters(overrides: list[str]) -> int:
    """Of a network for the MIMIC shapes, built on the meta device."""
    config = Composer("multimodn", TrialConfig).config(["scale=paper", "cohort=haim", "task=mimic", *overrides])
    with torch.device("meta"):
        tasks = {name: Task("classes", torch.zeros(1)) for name in ("enlarged_cardiomediastinum", "cardiomegaly")}
        cohort = Cohort("haim", {n: torch.empty(1, f) for n, f in MIMIC.items()}, {}, tasks, torch.zeros(1))
        network = build(config, cohort, 0)
    assert all(p.is_meta for p in network.parameters())
    return sum(p.numel() for p in network.parameters())


def layers(*widths: int) -> int:
    return sum((a + 1) * b for a, b in pairwise(widths))


def test_networks_of_the_official_sizes() -> None:
    decoder = layers(50, 32, 32, 2)
    encoders = sum(layers(f + 50, 32, 32, 50) for f in MIMIC.values())
    assert parameters(["network=multimodn_official"]) == 50 + encoders + 2 * decoder == 83_774
    alone = sum(layers(f, 32, 32, 50) for f in MIMIC.values())
    assert parameters(["network=pfusion"]) == alone + 2 * layers(200, 32, 32, 2)
    assert parameters(["network=pfusion_raw"]) == 2 * layers(sum(MIMIC.values()), 32, 32, 2)


def trial(tmp_path: Path, overrides: list[str]) -> list[dict]:
    config = Composer("multimodn", TrialConfig).config([*SMALL, *overrides])
    tmp_path.mkdir(exist_ok=True)
    module = tabular if config.task.name == "tabular" else fusion
    return module.run(config, Trial(tmp_path, [20, 21]))


@pytest.mark.parametrize(
    "overrides",
    [
        ["task=mimic", "network=multimodn_official", "missing=batch", "cohort.leaky_scaler=true", "corruption=mnar"],
        ["task=mimic", "network=pfusion_raw", "network.link=sigmoid", "corruption=mnar"],
        ["task=logistic"],
    ],
)
def test_mimic_on_a_file_of_its_schema(tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "haim.csv"
    haim(240).to_csv(path, index=False)
    rows = trial(tmp_path / "trial", ["cohort=haim", f"cohort.path={path}", *overrides])
    assert len(rows) == 2 and all(0 <= row["auroc_full"] <= 1 for row in rows)
    if "corruption=mnar" in overrides:
        assert all(0 <= row["auroc_flip"] <= 1 for row in rows)


def test_weather2k_on_a_file_of_its_schema(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(4, 23, weather2k.BLOCK * 14)).astype(np.float32)
    np.save(tmp_path / "w.npy", values)
    common = [f"cohort.path={tmp_path / 'w.npy'}", f"cohort.columns=[{','.join(COLUMNS)}]", "cohort.stride=1"]
    rows = trial(tmp_path / "a", ["cohort=weather2k", *common])
    assert rows[0]["task_names"] == ["warmer", "rain", "low_visibility", "windy"]
    rows = trial(tmp_path / "b", ["cohort=weather2k_sequence", "network.encoder=gru", *common])
    assert rows[0]["loss_full"] > 0


def test_edu_on_a_file_of_its_convention(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({f"{m}__{i}": rng.normal(size=300) for m in ("clicks", "forum", "quiz") for i in range(3)})
    frame["task__passed"], frame["task__dropout"] = rng.integers(0, 2, 300), rng.integers(0, 2, 300)
    frame.to_csv(tmp_path / "edu.csv", index=False)
    rows = trial(tmp_path / "a", ["cohort=edu", f"cohort.path={tmp_path / 'edu.csv'}", "task.contributions=true"])
    assert rows[0]["task_names"] == ["passed", "dropout"] and len(rows[0]["subsets"]) == 8
