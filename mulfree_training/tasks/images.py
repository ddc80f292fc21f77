"""Train an image classifier in a given arithmetic (C1, C2, C3, C4, C5, C9, C10)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from common.data import load, normalise, tensors
from common.data.augment import crop_and_flip
from common.kernels.dispatch import forced
from common.streams import generator
from common.training import Run, setup
from mulfree_training.networks.build import build
from mulfree_training.tasks.arithmetic import convert, loss_function
from mulfree_training.tasks.evaluation import accuracy, logits_and_labels, nll, temperature
from mulfree_training.tasks.stream import Stream, is_streamed
from mulfree_training.tasks.training import Batch, Losses, check_batch, epoch_order, fit

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from common.trials import Trial
    from mulfree_training.config import TrialConfig

CROPS = 52  # random stream
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


class Memory:
    """Images in memory: batches by (seed, step), and whole splits.

    Raises:
        ValueError: no images, or fewer than a batch.
    """

    def __init__(self, config: TrialConfig, splits: DatasetDict) -> None:
        self.task, self.config, self.splits = config.task, config, splits
        self.x, self.y = images_of(splits["train"], config)
        self.steps_per_epoch = len(self.x) // self.task.batch_size

    def __call__(self, seed: int, step: int) -> Batch:
        """The batch of one model."""
        epoch, place = divmod(step, self.steps_per_epoch)
        size = self.task.batch_size
        rows = epoch_order(seed, epoch, len(self.x))[place * size :][:size]
        images = self.x[rows]
        if self.task.augment == "crop":
            images = crop_and_flip(images, generator(seed, CROPS, step))
        return Batch((_resized(images, self.task.upsample),), self.y[rows])

    def held_out(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """A split in order, part by part."""
        size = self.task.eval_batch_size
        for x, y in zip(*(part.split(size) for part in images_of(self.splits[split], self.config)), strict=True):
            yield _resized(x, self.task.upsample), y


def open_images(config: TrialConfig, seeds: list[int], run: Run) -> Memory | Stream:
    """The images of a trial: read one by one where they differ in size or timm augments them, else all in memory.

    Raises:
        ValueError: no split to evaluate on, a loss that cannot have probabilities as targets, or what the two refuse.
    """
    task = config.task
    check_batch(task.batch_size, "task.batch_size", task.accumulate, run)
    if task.augment == "deit" and "loss" in config.arithmetic.scope:
        reason = "none or crop for loss in arithmetic.scope, which needs class indices: deit mixes classes"
        raise ValueError(f"task.augment=deit: must be {reason}")
    splits = load(config.data)
    if task.evaluate not in splits:
        raise ValueError(f"task.evaluate={task.evaluate}: data.{task.evaluate}=0 leaves no {task.evaluate} split")
    rows = len(splits["train"])
    if rows < task.batch_size:
        raise ValueError(f"task.batch_size={task.batch_size}: must be <= {rows}, the images to train on")
    if is_streamed(config, splits["train"]):
        return Stream(config, splits, seeds, run)
    return Memory(config, splits)


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed: `<split>_accuracy` in percent and `<split>_nll` in nats, `<split>_nll_tempered` at the
        temperature that fits the validation split best, that `temperature`, `train_loss` of the last step, `train_s`.
    """
    with forced(config.arithmetic.backend or None):
        return _run(config, trial)


def _run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    task = config.task
    run = setup(config.threads, config.device, config.precision, task.accumulate, seed=config.seed)
    images = open_images(config, trial.seeds, run)
    steps = task.epochs * images.steps_per_epoch
    steps = steps if config.max_steps is None else min(steps, config.max_steps)
    models = [convert(build(config.model, seed), config.arithmetic) for seed in trial.seeds]
    losses = run.place(Losses(models, loss_function(config.arithmetic, task.label_smoothing, "torch")))
    train_loss, seconds = fit(config, trial, run, losses, images, steps)
    names = sorted({"validation", task.evaluate} & set(images.splits))
    outputs = {name: logits_and_labels(list(losses.models), images.held_out(name), run) for name in names}
    rows = []
    for i, seed in enumerate(trial.seeds):
        own = {name: (logits[i], labels) for name, (logits, labels) in outputs.items()}
        heat = temperature(*own["validation"]) if "validation" in own else 1.0
        chosen = own[task.evaluate]
        loss = nll(*chosen)
        found = {"accuracy": accuracy(*chosen), "nll": loss, "nll_tempered": nll(*chosen, heat)}
        rows.append(
            {"seed": seed, "diverged": not math.isfinite(loss)}
            | {f"{task.evaluate}_{name}": value for name, value in found.items()}
            | {"temperature": heat, "train_loss": train_loss[i], "train_s": seconds}
        )
    logged = (f"{task.evaluate}_accuracy", f"{task.evaluate}_nll")
    trial.log({name.replace("_", "/"): [row[name] for row in rows] for name in logged}, step=steps)
    return rows


def _resized(images: Tensor, size: int | None) -> Tensor:
    """Bicubic resizing of normalised images; None leaves them."""
    if size is None:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
