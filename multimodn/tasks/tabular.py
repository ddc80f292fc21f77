"""Classifiers of scikit-learn on the concatenated columns: what a table needs no fusion for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from common.training import setup
from multimodn import metrics
from multimodn.cohorts.config import read
from multimodn.decoders import MISSING
from multimodn.tasks.folds import Folds, folds

if TYPE_CHECKING:
    import numpy as np

    from common.trials import Trial
    from multimodn.config import TabularConfig, TrialConfig


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed: for each pattern P of test data `auroc_P`, `bac_P` (means over the binary tasks) and
        `auroc_by_task_P`, as `multimodn.tasks.fusion.run` has them.
    """
    setup(config.threads, config.device, config.precision, seed=config.seed)
    cohort = read(config.cohort)
    data = folds(config, cohort, trial.seeds, torch.device("cpu"))
    binary = [name for name, task in cohort.tasks.items() if task.kind == "classes" and task.classes == 2]
    if not binary:
        raise ValueError(f"cohort.tasks={list(cohort.tasks)}: must hold a binary task for task.classifier")
    rows = []
    for i, seed in enumerate(trial.seeds):
        fitted = [_fit(config, data, name, i, seed) for name in binary]
        row: dict[str, Any] = {"seed": seed, "task_names": binary, "diverged": False}
        for pattern, masks in data.patterns.items():
            x = _columns(data.inputs, masks, i)
            p = torch.stack([torch.from_numpy(model.predict_proba(x)[:, 1]) for model in fitted])
            y = torch.stack([data.targets[name][i] for name in binary])
            auroc = metrics.auroc(p, y)
            row |= {f"auroc_{pattern}": auroc.mean().item(), f"auroc_by_task_{pattern}": auroc.tolist()}
            row[f"bac_{pattern}"] = metrics.balanced_accuracy(p, y).mean().item()
        rows.append(row)
        trial.progress(i + 1, len(trial.seeds))
    return rows


def _fit(config: TrialConfig, data: Folds, name: str, index: int, seed: int) -> Any:
    x = _columns(data.train.inputs, data.train.masks, index)
    y = data.train.targets[name][index].numpy()
    known = y != MISSING
    return classifier(config.task, seed, config.max_steps).fit(x[known], y[known])


def classifier(c: TabularConfig, seed: int, max_steps: int | None = None) -> Any:
    """The classifier; columns are standardised, so that a zero in place of NaN is the mean."""
    if c.classifier == "logistic":
        from sklearn.impute import SimpleImputer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        zeros = SimpleImputer(strategy="constant", fill_value=0.0)
        return make_pipeline(zeros, LogisticRegression(C=c.strength, max_iter=max_steps or 1000))
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(
        learning_rate=c.strength, max_iter=max_steps or 100, max_leaf_nodes=15, random_state=seed % 2**32
    )


def _columns(inputs: dict[str, torch.Tensor], masks: dict[str, torch.Tensor], index: int) -> np.ndarray:
    """All modalities of one seed's rows side by side, (rows, F) float64, NaN where missing."""
    parts = []
    for name, x in inputs.items():
        own = x[index].flatten(1).double()
        parts.append(own.masked_fill(~masks[name][index][:, None], float("nan")))
    return torch.cat(parts, 1).numpy()
