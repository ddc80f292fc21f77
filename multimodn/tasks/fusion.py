"""Train MultiModN or P-Fusion on a cohort, all seeds side by side, and judge it where data are missing (C1 to C8)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.streams import key
from common.training import setup
from multimodn import explain, metrics
from multimodn.cohorts.config import read
from multimodn.decoders import ClassDecoder
from multimodn.model import MultiModN
from multimodn.network import Network
from multimodn.stacking import stack, unstack
from multimodn.tasks.folds import Folds, folds
from multimodn.tasks.networks import build
from multimodn.training import fit

if TYPE_CHECKING:
    from common.trials import Trial
    from multimodn.cohorts.base import Cohort
    from multimodn.config import TrialConfig

EVAL_ROWS = 4096  # rows of all models at once in evaluation


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed. For each pattern of test data P (`full`, `same`, `flip`): `auroc_P` and `bac_P` (balanced
        accuracy; means over the tasks of classes), `loss_P` (mean loss of the last row, nats or squares), and
        `auroc_by_task_P` (one a task, R² for regression). Also `chain` (AUROC after every prefix, (K+1, D)),
        `parameters` and `task_names`, `modality_names`. With `task.contributions`: `cumulative` and `individual` (mean
        probability of class 1 by true class, (K+1, D, 2) and (K, D, 2)), `subsets` (mean AUROC of every subset of
        modalities, in the order of binary numbers, bit k for modality k) and `prefix_gap` (largest difference
        between the full chain's row k and the prediction from the first k modalities alone).
        In the history: `train_loss` over epochs.
    """
    environment = setup(config.threads, config.device, config.precision, seed=config.seed)
    task, seeds = config.task, trial.seeds
    cohort = read(config.cohort)
    if config.network.only is not None:
        cohort = cohort.with_order([_named(cohort, config.network.only)])
    data = folds(config, cohort, seeds, environment.device)
    networks = [build(config, cohort, seed) for seed in seeds]
    parameters = sum(p.numel() for p in networks[0].parameters())
    network = stack(networks).to(environment.device)

    def report(epoch: int, loss: Tensor) -> None:
        trial.log({"train_loss": loss}, step=epoch)
        trial.progress(epoch, task.epochs)

    fit(
        network,
        data.train,
        missing=config.missing,
        epochs=task.epochs,
        batch_size=task.batch_size,
        lr=task.lr,
        seeds=[key(seed, 0) for seed in seeds],
        shuffle=task.shuffle,
        error_weight=task.error_weight,
        state_change_weight=task.state_change_weight,
        normalise=task.normalise,
        max_steps=config.max_steps,
        on_epoch=report,
        checkpoints=trial.folder,
    )
    network.eval()
    rows: list[dict[str, Any]] = [{"seed": seed} for seed in seeds]
    for pattern, masks in data.patterns.items():
        for row, found in zip(rows, judge(config, network, data, masks), strict=True):
            chain = found.pop("chain")
            row |= {f"{name}_{pattern}": value for name, value in found.items()}
            if pattern == "full":
                row["chain"] = chain
    if task.contributions:
        for row, found in zip(rows, contributions(network, data), strict=True):
            row |= found
    shared = {"parameters": parameters, "task_names": list(network.tasks), "modality_names": list(network.modalities)}
    return [row | shared | {"diverged": not math.isfinite(row["loss_full"])} for row in rows]


def _named(cohort: Cohort, number: int) -> str:
    names = list(cohort.modalities)
    if number >= len(names):
        raise ValueError(f"network.only={number}: must be in [0, {len(names) - 1}], of {', '.join(names)}")
    return names[number]


@torch.no_grad()
def predict(network: Network, data: Folds, masks: dict[str, Tensor], missing: str, size: int) -> dict[str, Tensor]:
    """Task -> outputs of every row of the grid (N, K+1, n, C), `size` rows at a time.

    Under the `batch` rule the rows of a call share their fate, so `size` is that of training.
    """
    count = next(iter(data.targets.values())).shape[1]
    parts: dict[str, list[Tensor]] = {name: [] for name in network.tasks}
    for begin in range(0, count, size):
        where = (slice(None), slice(begin, begin + size))
        inputs = {name: x[where] for name, x in data.inputs.items()}
        grid = network(inputs, {name: mask[where] for name, mask in masks.items()}, missing=missing)
        for name, outputs in grid.outputs.items():
            parts[name].append(outputs)
    return {name: torch.cat(pieces, -2) for name, pieces in parts.items()}


def judge(config: TrialConfig, network: Network, data: Folds, masks: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Scores of the last row of the grid, means over tasks and one by one, and of every row (`chain`); one a seed."""
    size = config.task.batch_size if config.missing.infer == "batch" else EVAL_ROWS
    outputs = predict(network, data, masks, config.missing.infer, size)
    scores, balanced, losses = [], [], []
    for name, decoder in network.decoders.items():
        target, raw = data.targets[name], outputs[name]
        repeated = target[:, None].expand(raw.shape[:-1])  # (N, K+1, n)
        if isinstance(decoder, ClassDecoder):
            p = decoder.probabilities(raw)
            if decoder.classes == 2:
                scores.append(metrics.auroc(p[..., 1], repeated))
                balanced.append(metrics.balanced_accuracy(p[..., -1, :, 1], target))
            else:
                scores.append(metrics.auroc_ovr(p, repeated))
        else:
            scores.append(metrics.r2(raw[..., 0], repeated))
        known = decoder.labelled(target)  # type: ignore[operator]
        losses.append(decoder.loss(raw[:, -1], target).sum(-1) / known.sum(-1).clamp_min(1))  # type: ignore[operator]
    chain = torch.stack(scores, -1)  # (N, K+1, D)
    loss = torch.stack(losses, -1).mean(-1)
    rows = []
    for i in range(len(chain)):
        row = {"auroc": _mean(chain[i, -1]), "auroc_by_task": chain[i, -1].tolist(), "loss": loss[i].item()}
        row["chain"] = chain[i].tolist()
        if balanced:
            row["bac"] = _mean(torch.stack(balanced, -1)[i])
        rows.append(row)
    return rows


def _mean(values: Tensor) -> float:
    return values.double().nanmean().item()


def contributions(network: Network, data: Folds) -> list[dict[str, Any]]:
    """What every modality says, for every seed; see `run`."""
    return [_contributions(model, data, i) for i, model in enumerate(unstack(network))]


def _contributions(model: Network, data: Folds, index: int) -> dict[str, Any]:
    inputs = {name: x[index] for name, x in data.inputs.items()}
    masks = {name: mask[index] for name, mask in data.patterns["full"].items()}
    targets = {name: y[index] for name, y in data.targets.items()}
    model.eval()
    scores = explain.subsets(model, inputs, targets, masks)
    found: dict[str, Any] = {"subsets": scores[[*model.tasks]].mean(axis=1).tolist()}
    if isinstance(model, MultiModN):
        found["prefix_gap"] = _prefix_gap(model, inputs, masks)
        for name, value in (("cumulative", "probability"), ("individual", "contribution")):
            frame = getattr(explain, name)(model, inputs, masks, targets=targets)
            frame = frame[(frame["label"] == 1) & (frame["of"] != explain.EVERYBODY)]
            table = frame.pivot(index="step", columns=["task", "of"], values=value)
            found[name] = [[[row[task][of] for of in (0, 1)] for task in model.tasks] for _, row in table.iterrows()]
    return found


@torch.no_grad()
def _prefix_gap(model: MultiModN, inputs: dict[str, Tensor], masks: dict[str, Tensor]) -> float:
    """Largest difference between row k of the full chain and the last row of the chain cut after k encoders."""
    whole, largest = model(inputs, masks), 0.0
    for k in range(1, len(model.modalities)):
        cut = model(inputs, masks, order=model.modalities[:k])
        for task, outputs in cut.outputs.items():
            largest = max(largest, (outputs[-1] - whole.outputs[task][k]).abs().max().item())
    return largest
