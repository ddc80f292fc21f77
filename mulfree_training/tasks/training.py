"""The loop that all trainings share: models side by side, one a seed, each step a pure function of (seed, step)."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from common import ranks
from common.checkpoint import load_checkpoint, load_extra, save_checkpoint
from common.streams import generator
from common.training import Run
from mulfree_training.tasks.arithmetic import Loss, make_optimizer

if TYPE_CHECKING:
    from common.trials import Trial
    from mulfree_training.config import OptimizerConfig, TrialConfig

CHECKPOINT_SECONDS = 120.0
ORDER = 51  # random stream


class Rows(Protocol):
    """A batch, or the promise of one that is read in parts."""

    def rows(self, part: slice) -> Batch:
        """Every `part.step`-th row from `part.start` on."""


class Batch(NamedTuple):
    """What a network trains on in one step."""

    inputs: tuple[Tensor, ...]
    """Of the network, rows first."""
    target: Tensor
    """Indices (B, …), `IGNORED` where there is none, or probabilities (B, V)."""
    real: Tensor | None = None
    """() float32, how many targets a loss divides by where some do not count; None: as many as are there."""

    def rows(self, part: slice) -> Batch:
        """Every `part.step`-th row; the mean over all parts of sums over the part's number is the mean of the batch."""
        # without parts nothing is divided
        real = self.real if self.real is None or part.step == 1 else self.real / part.step
        return Batch(tuple(x[part] for x in self.inputs), self.target[part], real)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        real = None if self.real is None else self.real.to(device)
        return Batch(tuple(x.to(device) for x in self.inputs), self.target.to(device), real)


class Watch(Protocol):
    """Looks at the models during training, and survives a kill."""

    every: int
    """Steps between two looks; the last step has one too."""

    def look(self, step: int) -> dict[str, list[float]]:
        """Look after a step; must not change weights or random states. Returns metrics to log."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""


class Losses(nn.Module):
    """Models side by side: a batch for each -> (S,) mean losses."""

    def __init__(self, models: list[nn.Module], loss: Loss) -> None:
        super().__init__()
        self.models, self.loss = nn.ModuleList(models), loss

    def forward(self, batches: list[Batch]) -> Tensor:
        """One loss a model."""
        pairs = zip(self.models, batches, strict=True)
        return torch.stack([self.loss(model(*b.inputs), b.target, b.real) for model, b in pairs])


@functools.lru_cache(maxsize=16)
def epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    """A permutation of the rows or batches of an epoch, a pure function of (seed, epoch); not to be written to."""
    return torch.randperm(count, generator=generator(seed, ORDER, epoch))


def lr_factor(step: int, steps: int, c: OptimizerConfig) -> float:
    """Linear from `start` to 1 in the first `warmup` steps, then one cosine to `final` at the last step."""
    rise = min(c.warmup, steps)
    if step < rise:
        return c.start + (1 - c.start) * (step + 1) / rise
    fall = (step - rise + 1) / max(steps - rise, 1)
    return c.final + (1 - c.final) * (1 + math.cos(math.pi * fall)) / 2


def backward(run: Run, losses: Tensor, accumulate: int) -> None:
    """Backpropagate the sum of the losses; without accumulation nothing is divided."""
    if accumulate == 1:
        losses.sum().backward()
    else:
        run.backward(losses.sum())


def fit(
    config: TrialConfig,
    trial: Trial,
    run: Run,
    losses: Losses,
    batch: Callable[[int, int], Rows],
    steps: int,
    watch: Watch | None = None,
) -> tuple[list[float], float]:
    """Train all models.

    Args:
        config: of the trial; its task has `accumulate` and `log_every`.
        trial: whose seeds the models have, and where progress and checkpoints go.
        run: where to compute.
        losses: the models, placed.
        batch: (seed, step) -> the whole batch of one model on any device; only the rows of this process are asked for.
        steps: optimizer steps.
        watch: looks at the models now and then; its time does not count.

    Returns:
        Training loss of the last step, one a model, and seconds of training a model.
    """
    task, c = config.task, config.optimizer
    optimizer = make_optimizer(losses, c, config.arithmetic)
    model = run.distribute(losses)
    first = load_checkpoint(trial.folder, losses, optimizer) or 0
    kept = load_extra(trial.folder)
    mean = torch.tensor(kept.get("mean", [math.nan] * len(trial.seeds)))
    spent, saved = kept.get("spent", 0.0), time.monotonic()
    if watch is not None and "watch" in kept:
        watch.load_state_dict(kept["watch"])
    for step in range(first, steps):
        started = time.perf_counter()
        factor = lr_factor(step, steps, c)
        for group in optimizer.param_groups:
            group["lr"] = c.lr * factor
        total = torch.zeros(len(trial.seeds), device=run.device)
        for part in range(task.accumulate):
            own = own_rows(run, part, task.accumulate)
            shards = [batch(seed, step).rows(own).to(run.device) for seed in trial.seeds]
            with run.accumulate(model):
                loss = model(shards)
                backward(run, loss, task.accumulate)
            total += loss.detach() / task.accumulate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        spent += time.perf_counter() - started
        done = step + 1
        if watch is not None and (done % watch.every == 0 or done == steps):
            trial.log(watch.look(done), step=done)
        if done % task.log_every and done < steps:
            continue
        mean = run.mean(total)
        trial.log({"train/loss": mean, "lr": c.lr * factor}, step=done)
        trial.progress(done, steps)
        if not torch.isfinite(mean).any():
            break
        # every process must write it, or none: their clocks differ
        if done < steps and ranks.agree(time.monotonic() - saved > CHECKPOINT_SECONDS, "checkpoint"):
            extra = {"mean": mean.tolist(), "spent": spent} | ({} if watch is None else {"watch": watch.state_dict()})
            save_checkpoint(trial.folder, losses, optimizer, step=done, extra=extra)
            saved = time.monotonic()
    return mean.tolist(), spent / len(trial.seeds)


def own_rows(run: Run, part: int, parts: int) -> slice:
    """The rows of this process in a micro-batch."""
    return slice(run.rank * parts + part, None, run.world * parts)


def check_batch(size: int, key: str, accumulate: int, run: Run) -> None:
    """Every process and micro-batch must get as many rows.

    Raises:
        ValueError: they cannot.
    """
    if size % (accumulate * run.world):
        allowed = f"a multiple of task.accumulate={accumulate} times {run.world} processes"
        raise ValueError(f"{key}={size}: must be {allowed}")
