"""Train an image classifier in a given arithmetic (C1, C2, C3, C4, C5, C9, C10)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import load, normalise, tensors
from common.data.augment import crop_and_flip
from common.kernels.dispatch import forced
from common.streams import generator
from common.training import setup
from mulfree_training.networks.build import build
from mulfree_training.tasks.arithmetic import convert, loss_function
from mulfree_training.tasks.evaluation import accuracy, logits_of, nll, temperature
from mulfree_training.tasks.training import Batch, Losses, check_batch, fit

if TYPE_CHECKING:
    from datasets import Dataset

    from common.trials import Trial
    from mulfree_training.config import TrialConfig

ORDER, CROPS = 51, 52  # random streams
DIGITS_MAXIMUM = 16.0


def images_of(split: Dataset, config: TrialConfig) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) float32 and labels (N,) int64 of a split."""
    data = config.data
    columns = tensors(split, [data.inputs, data.label])
    x, y = columns[data.inputs], columns[data.label].long()
    if x.dim() == 4:
        return normalise(x, data.mean, data.std), y
    side = math.isqrt(x.shape[1])
    if side * side != x.shape[1]:
        raise ValueError(f"data.name={data.name}: must hold images, these rows have {x.shape[1]} values")
    return x.view(-1, 1, side, side) / DIGITS_MAXIMUM, y


def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """A permutation of the images, a pure function of (seed, epoch)."""
    return torch.randperm(count, generator=generator(seed, ORDER, epoch))


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed: `<split>_accuracy` in percent and `<split>_nll` in nats, `<split>_nll_tempered` at the
        temperature that fits the validation split best, that `temperature`, `train_loss` of the last step, `train_s`.
    """
    task = config.task
    with forced(config.arithmetic.backend or None):
        return _run(config, trial, task)


def _run(config: TrialConfig, trial: Trial, task: Any) -> list[dict[str, Any]]:
    run = setup(config.threads, config.device, config.precision, task.accumulate, seed=config.seed)
    check_batch(task.batch_size, "task.batch_size", task.accumulate, run)
    splits = load(config.data)
    if task.evaluate not in splits:
        raise ValueError(f"task.evaluate={task.evaluate}: data.{task.evaluate}=0 leaves no {task.evaluate} split")
    x, y = images_of(splits["train"], config)
    if len(x) < task.batch_size:
        raise ValueError(f"task.batch_size={task.batch_size}: must be <= {len(x)}, the images to train on")
    an_epoch = len(x) // task.batch_size
    steps = task.epochs * an_epoch if config.max_steps is None else min(task.epochs * an_epoch, config.max_steps)

    def batch(seed: int, step: int) -> Batch:
        epoch, place = divmod(step, an_epoch)
        rows = epoch_order(seed, epoch, len(x))[place * task.batch_size :][: task.batch_size]
        images = x[rows]
        if task.augment == "crop":
            images = crop_and_flip(images, generator(seed, CROPS, step))
        return (_resized(images, task.upsample),), y[rows]

    models = [convert(build(config.model, seed), config.arithmetic) for seed in trial.seeds]
    loss = loss_function(config.arithmetic, task.label_smoothing, "torch")
    losses = run.place(Losses(models, loss))
    train_loss, seconds = fit(config, trial, run, losses, batch, steps)
    held_out = {name: images_of(splits[name], config) for name in {"validation", task.evaluate} & set(splits)}
    rows = []
    for i, (seed, model) in enumerate(zip(trial.seeds, losses.models, strict=True)):
        outputs = {
            name: (logits_of(model, _resized(images, task.upsample), task.eval_batch_size, run), labels)
            for name, (images, labels) in held_out.items()
        }
        logits, labels = outputs[task.evaluate]
        heat = temperature(*outputs["validation"]) if "validation" in outputs else 1.0
        loss_of = nll(logits, labels)
        own = {"accuracy": accuracy(logits, labels), "nll": loss_of, "nll_tempered": nll(logits, labels, heat)}
        rows.append(
            {"seed": seed, "diverged": not math.isfinite(loss_of)}
            | {f"{task.evaluate}_{name}": value for name, value in own.items()}
            | {"temperature": heat, "train_loss": train_loss[i], "train_s": seconds}
        )
    names = (f"{task.evaluate}_accuracy", f"{task.evaluate}_nll")
    trial.log({name.replace("_", "/"): [row[name] for row in rows] for name in names}, step=steps)
    return rows


def _resized(images: Tensor, size: int | None) -> Tensor:
    """Bicubic resizing of normalised images; None leaves them."""
    if size is None:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
