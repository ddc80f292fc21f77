"""Train networks, one a seed, side by side; measure loss, accuracy and how fast every neuron turns."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import load_checkpoint, save_checkpoint
from common.models import build
from common.training import Run, setup
from rotational_optimizers.optimizers import build_optimizer
from rotational_optimizers.schedule import lr_factor
from rotational_optimizers.tasks.measure import RotationRecorder
from rotational_optimizers.tasks.sources import Source, open_source

if TYPE_CHECKING:
    from common.trials import Trial
    from rotational_optimizers.config import NetworkTaskConfig, TrialConfig

CHECKPOINT_SECONDS = 120.0
LATE_STEPS = 500
CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_'s


def losses(logits: Tensor, target: Tensor, real: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of every network, (S,), in nats.

    Args:
        logits: (S, B, ..., K).
        target: classes (S, B, ...), `IGNORED` where there is none, or probabilities (S, B, ..., K).
        real: (S,), what sums are divided by where some targets are ignored; None: all targets count.
        smoothing: share of every target that is spread over all classes.
    """
    flat = target.flatten(0, -2) if target.is_floating_point() else target.flatten()
    each = F.cross_entropy(logits.flatten(0, -2), flat, reduction="none", label_smoothing=smoothing)
    each = each.view(len(target), -1)  # (S, B*...)
    return each.mean(1) if real is None else each.sum(1) / real


@torch.no_grad()
def clip_gradients(model: nn.Module, n_models: int, max_norm: float) -> None:
    """Scale every network's gradient to a norm of at most `max_norm`; its companions in the stack do not count."""
    gradients = [p.grad.unflatten(0, (n_models, -1)) for p in model.parameters() if p.grad is not None]
    square = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)  # (S,)
    factor = (max_norm / (square.sqrt() + CLIP_EPS)).clamp_max(1.0)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))


@torch.no_grad()
def evaluate(model: nn.Module, source: Source, split: str) -> dict[str, list[float]]:
    """Mean loss (nats) and accuracy of every network over a whole split."""
    model.eval()
    loss_sum = correct = torch.zeros((), dtype=torch.float64)
    count: Any = 0
    for inputs, y, real in source.eval_batches(split):
        logits = model(*inputs)
        size = y[0].numel() if real is None else real.double().cpu()
        loss_sum = loss_sum + losses(logits, y, real).double().cpu() * size
        correct = correct + (logits.argmax(-1) == y).flatten(1).double().sum(1).cpu()
        count += size
    model.train()
    return {"loss": (loss_sum / count).tolist(), "accuracy": (correct / count).tolist()}


def _freeze_non_rotational(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        if not group.get("rotational"):
            for parameter in group["params"]:
                parameter.requires_grad_(False)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, source: Source, run: Run, step: int, task: NetworkTaskConfig
) -> Tensor:
    """One optimizer step in `task.accumulate` micro-batches; returns every network's loss, (S,)."""
    total = torch.zeros((), device=run.device)
    for inputs, y, real in source.train_batches(step, task.accumulate):
        with run.accumulate(model):
            loss = losses(model(*inputs), y, real, task.label_smoothing)
            run.backward(loss.sum())
        total = total + loss.detach() / task.accumulate
    if task.clip_norm is not None:
        clip_gradients(model, len(total), task.clip_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


def _train(
    config: TrialConfig, trial: Trial, run: Run, source: Source, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[Tensor, RotationRecorder | None]:
    """The loop; returns every network's training loss over the last steps, (S,), and the rotation record."""
    task, schedule = config.task, config.schedule
    steps = source.steps(task)
    recorder = RotationRecorder(model, optimizer, config, steps) if task.track else None
    peaks = [group["lr"] for group in optimizer.param_groups]
    first = load_checkpoint(trial.folder, model, optimizer) or 0
    late_steps = max(1, min(steps // 10, LATE_STEPS))
    late, window = torch.zeros(2, config.n_seeds, device=run.device)
    saved = time.monotonic()
    for step in range(first, steps):
        factor = lr_factor(step, steps, schedule.name, schedule.warmup, schedule.power, schedule.floor)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        loss = _step(model, optimizer, source, run, step, task)
        window += loss
        late += loss if step >= steps - late_steps else 0
        done = step + 1
        if done % task.log_every and done < steps:
            continue
        mean = run.mean(window / ((done - 1) % task.log_every + 1))
        trial.log({"train/loss": mean, "lr": config.optimizer.lr * factor}, step=done)
        trial.progress(done, steps)
        window.zero_()
        if not torch.isfinite(mean).any():
            return mean, recorder
        # sums are empty here, so that a resumed run is the same run; angles are not kept
        if recorder is None and done <= steps - late_steps and time.monotonic() - saved > CHECKPOINT_SECONDS:
            save_checkpoint(trial.folder, model, optimizer, step=done)
            saved = time.monotonic()
    return run.mean(late / late_steps), recorder


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial: every seed's final training loss, the metrics of `task.evaluate`, and its rotation when tracked.

    Returns:
        One dict a seed. Metrics of the evaluated split are named `<split>_loss` (nats) and `<split>_accuracy`; the
        rotation metrics are those of `RotationRecorder`.
    """
    run_ = setup(config.threads, config.device, config.precision, config.task.accumulate, seed=config.seed)
    seeds = list(range(config.seed, config.seed + config.n_seeds))
    source = open_source(config, seeds, run_)
    model = run_.place(build(config.model, seeds))
    optimizer = build_optimizer(config.optimizer, model, config.n_seeds)
    if config.task.freeze_non_rotational:
        _freeze_non_rotational(optimizer)
    train_loss, recorder = _train(config, trial, run_, source, run_.distribute(model), optimizer)
    splits = ("validation", "test") if config.task.evaluate == "both" else (config.task.evaluate,)
    metrics = {f"{split}_{k}": v for split in splits for k, v in evaluate(model, source, split).items()}
    rotation = recorder.rows() if recorder is not None else [{} for _ in seeds]
    rows = []
    for i, seed in enumerate(seeds):
        values = {name: value[i] for name, value in metrics.items()}
        finite = math.isfinite(train_loss[i]) and all(map(math.isfinite, values.values()))
        rows.append({"seed": seed, "diverged": not finite, "train_loss": float(train_loss[i]), **values, **rotation[i]})
    return rows
