"""Trials: what is hidden from whom, what is measured, and records that mean what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from common.compose import Composer
from common.streams import key
from common.trials import Trial
from multimodn.cohorts.config import read
from multimodn.config import TrialConfig
from multimodn.stacking import stack
from multimodn.tasks import fusion, tabular
from multimodn.tasks.folds import folds
from multimodn.tasks.networks import build
from multimodn.training import fit

SHORT = ["max_steps=30", "task.epochs=2", "n_seeds=2", "seed=3", "cohort.rows=400", "tracking.mode=disabled"]


def config(*overrides: str) -> TrialConfig:
    tables = any("logistic" in o or "boosting" in o for o in overrides)
    short = [o for o in SHORT if not (tables and o.startswith("task."))]
    return Composer("multimodn", TrialConfig).config([*short, *overrides])


def run(tmp_path: Path, *overrides: str) -> list[dict[str, Any]]:
    c = config(*overrides)
    tmp_path.mkdir(exist_ok=True)
    module = tabular if c.task.name == "tabular" else fusion
    return module.run(c, Trial(tmp_path, list(range(c.seed, c.seed + c.n_seeds))))


def test_mnar_hides_one_modality_from_one_class_and_the_flip_from_the_other() -> None:
    c = config("cohort.tasks=[reading]", "corruption=mnar", "corruption.modality=2")
    cohort = read(c.cohort)
    data = folds(c, cohort, [3, 4], torch.device("cpu"))
    name = list(cohort.modalities)[2]
    for i in range(2):
        y, visible = data.train.targets["reading"][i], data.train.masks[name][i]
        assert int((~visible).sum()) == round(0.8 * int((y == 1).sum())) and visible[y == 0].all()
        assert not data.train.inputs[name][i][~visible].any()
        others = [m for n, m in data.train.masks.items() if n != name]
        assert all(m[i].all() for m in others)
        y = data.targets["reading"][i]
        same, flip = (data.patterns[p][name][i] for p in ("same", "flip"))
        assert data.patterns["full"][name][i].all()
        assert same[y == 0].all() and int((~same).sum()) == round(0.8 * int((y == 1).sum()))
        assert flip[y == 1].all() and int((~flip).sum()) == round(0.8 * int((y == 0).sum()))
    # the scale is that of the visible training rows
    seen = data.train.inputs[name][0][data.train.masks[name][0]]
    assert seen.mean(0).abs().max() < 1e-4 and (seen.std(0, correction=0) - 1).abs().max() < 1e-4


def test_other_mechanisms() -> None:
    cohort = read(config().cohort)
    hidden = {}
    for mechanism in ("mcar", "mar", "mnar_values"):
        data = folds(config(f"corruption={mechanism}", "corruption.share=0.5"), cohort, [3], torch.device("cpu"))
        hidden[mechanism] = {n: (~m).float().mean().item() for n, m in data.train.masks.items()}
        assert set(data.patterns) == {"full", "same"} | ({"flip"} if mechanism != "mcar" else set())
    assert all(share == pytest.approx(0.5, abs=0.01) for share in hidden["mcar"].values())
    for mechanism in ("mar", "mnar_values"):
        shares = list(hidden[mechanism].values())
        assert shares[1] == pytest.approx(0.5, abs=0.1) and sum(shares) == shares[1]
    with pytest.raises(ValueError, match=r"corruption.modality=7: must be in \[0, 3\]"):
        folds(config("corruption=mnar", "corruption.modality=7"), cohort, [3], torch.device("cpu"))
    with pytest.raises(ValueError, match="is not binary"):
        c = config("cohort=digits", "cohort.tasks=[digit]", "corruption=mnar")
        folds(c, read(c.cohort), [3], torch.device("cpu"))


def test_scores_are_those_of_scikit_learn(tmp_path: Path) -> None:
    """The record against a training by hand with the same seeds."""
    rows = run(tmp_path, "corruption=mnar", "cohort.tasks=[reading]")
    c = config("corruption=mnar", "cohort.tasks=[reading]")
    cohort, seeds = read(c.cohort), [3, 4]
    data = folds(c, cohort, seeds, torch.device("cpu"))
    network = stack([build(c, cohort, s) for s in seeds])
    fit(network, data.train, epochs=2, batch_size=32, seeds=[key(s, 0) for s in seeds], max_steps=30)
    network.eval()
    with torch.no_grad():
        for pattern, masks in data.patterns.items():
            grid = network(data.inputs, masks)
            p = network.probabilities(grid)["reading"]
            for i, row in enumerate(rows):
                y = data.targets["reading"][i]
                score = roc_auc_score(y, p[i, -1, :, 1])
                assert row[f"auroc_{pattern}"] == pytest.approx(score, abs=1e-6)
                assert row[f"auroc_by_task_{pattern}"] == pytest.approx([score], abs=1e-6)
                balanced = balanced_accuracy_score(y, p[i, -1, :, 1] > 0.5)
                assert row[f"bac_{pattern}"] == pytest.approx(balanced, abs=1e-6)
                logits = grid.outputs["reading"][i, -1]
                loss = torch.nn.functional.cross_entropy(logits, y).item()
                assert row[f"loss_{pattern}"] == pytest.approx(loss, rel=1e-5)
                if pattern == "full":
                    chain = [roc_auc_score(y, p[i, k, :, 1]) for k in range(5)]
                    assert np.array(row["chain"])[:, 0] == pytest.approx(chain, abs=1e-6) and chain[0] == 0.5
    assert [row["seed"] for row in rows] == seeds and not rows[0]["diverged"]


def test_seeds_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    both = run(tmp_path / "a", "missing=robust", "corruption=mnar")
    alone = run(tmp_path / "b", "missing=robust", "corruption=mnar", "n_seeds=1", "seed=4")
    for name in ("auroc_full", "auroc_flip", "loss_same"):
        assert alone[0][name] == pytest.approx(both[1][name], abs=2e-3)


def test_contributions_are_recorded(tmp_path: Path) -> None:
    row = run(tmp_path, "task.contributions=true")[0]
    assert np.array(row["cumulative"]).shape == (5, 2, 2) and np.array(row["individual"]).shape == (4, 2, 2)
    assert len(row["subsets"]) == 16 and row["subsets"][0] == 0.5
    assert row["subsets"][15] == pytest.approx(row["auroc_full"], abs=1e-6) and row["prefix_gap"] < 1e-5
    chain = np.array(row["chain"]).mean(1)
    assert [row["subsets"][2**k - 1] for k in range(5)] == pytest.approx(chain.tolist(), abs=1e-6)
    parallel = run(tmp_path / "p", "task.contributions=true", "network=pfusion")[0]
    assert len(parallel["subsets"]) == 16 and "cumulative" not in parallel


@pytest.mark.parametrize("network", ["multimodn_official", "pfusion_raw", "pfusion_indicator"])
@pytest.mark.parametrize("rule", ["batch", "robust", "dropout", "leak_penalty"])
def test_networks_and_rules_train(tmp_path: Path, network: str, rule: str) -> None:
    if rule == "leak_penalty" and network.startswith("pfusion"):
        return
    row = run(tmp_path, f"network={network}", f"missing={rule}", "corruption=mnar", "cohort.tasks=[math]")[0]
    assert 0 <= row["auroc_flip"] <= 1 and row["parameters"] > 0


@pytest.mark.parametrize(
    ("cohort", "encoder"), [("weather_sequence", "gru"), ("weather_sequence", "transformer"), ("digits_images", "conv")]
)
@pytest.mark.parametrize("network", ["multimodn", "pfusion"])
def test_encoders_by_config(tmp_path: Path, cohort: str, encoder: str, network: str) -> None:
    overrides = [
        f"cohort={cohort}",
        f"network={network}",
        f"network.encoder={encoder}",
        "max_steps=2",
        "cohort.rows=null",
    ]
    assert run(tmp_path, *overrides)[0]["loss_full"] > 0
    with pytest.raises(ValueError, match="network.encoder=mlp: must be"):
        run(tmp_path, f"cohort={cohort}", "network.encoder=mlp", "cohort.rows=null")


def test_one_modality_alone(tmp_path: Path) -> None:
    row = run(tmp_path, "network.only=3")[0]
    assert row["modality_names"] == ["grade2"] and len(row["chain"]) == 2
    with pytest.raises(ValueError, match=r"network.only=9: must be in \[0, 3\]"):
        run(tmp_path, "network.only=9")


@pytest.mark.parametrize("classifier", ["logistic", "hist_gradient_boosting"])
def test_tables(tmp_path: Path, classifier: str) -> None:
    rows = run(tmp_path, f"task={classifier}", "corruption=mnar", "cohort.tasks=[reading]")
    assert len(rows) == 2 and rows[0]["auroc_full"] > 0.7 and rows[0]["auroc_flip"] < rows[0]["auroc_same"]
    assert rows[0]["auroc_by_task_full"] == [rows[0]["auroc_full"]]


def test_natural_labels_may_be_missing(tmp_path: Path) -> None:
    row = run(tmp_path, "cohort.natural=true", "cohort.rows=900")[0]
    assert 0.4 < row["auroc_full"] < 1 and set(row) >= {"auroc_full", "bac_full"} and "auroc_same" not in row


def test_ten_classes_and_regressions(tmp_path: Path) -> None:
    row = run(tmp_path, "cohort=digits", "cohort.tasks=[digit]")[0]
    assert 0.4 < row["auroc_full"] <= 1 and "bac_full" not in row
    row = run(tmp_path, "cohort=weather", "cohort.tasks=[temperature_change,rain]", "cohort.rows=null")[0]
    assert len(row["auroc_by_task_full"]) == 2 and row["auroc_by_task_full"][0] < 1
