"""Train a language model in a given arithmetic (C1, C3, C4, C5, C9)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from common.kernels.dispatch import forced
from common.training import setup
from mulfree_training.networks.build import build
from mulfree_training.tasks.arithmetic import convert, loss_function
from mulfree_training.tasks.evaluation import logits_of, nll, temperature
from mulfree_training.tasks.text import read
from mulfree_training.tasks.training import Batch, Losses, check_batch, fit

if TYPE_CHECKING:
    from common.trials import Trial
    from mulfree_training.config import TrialConfig

SMALL = 2048
"""Tokens to evaluate on where `max_steps` cuts everything short."""


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed: `<split>_nll` in nats a token, `<split>_nll_tempered` at the temperature that fits the
        validation split best, that `temperature`, `train_loss` of the last step, `train_s`.
    """
    with forced(config.arithmetic.backend or None):
        return _run(config, trial)


def _run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    task = config.task
    run = setup(config.threads, config.device, config.precision, task.accumulate, seed=config.seed)
    check_batch(task.batch_size, "task.batch_size", task.accumulate, run)
    short = config.max_steps is not None
    steps = min(task.steps, config.max_steps) if config.max_steps is not None else task.steps
    tokens = min(task.eval_tokens, SMALL) if short else task.eval_tokens
    text = read(config)

    def batch(seed: int, step: int) -> Batch:
        windows = text.batch(seed, step, task.batch_size)
        return Batch((windows[:, :-1],), windows[:, 1:])

    models = [convert(build(config.model, seed), config.arithmetic) for seed in trial.seeds]
    losses = run.place(Losses(models, loss_function(config.arithmetic, task.label_smoothing, "fairseq")))
    train_loss, seconds = fit(config, trial, run, losses, batch, steps)
    rows = []
    for i, (seed, model) in enumerate(zip(trial.seeds, losses.models, strict=True)):
        outputs = {}
        for name in sorted({"validation", task.evaluate} & set(text.streams)):
            windows = text.evaluation(name, tokens)
            outputs[name] = (logits_of(model, windows[:, :-1], task.eval_batch_size, run), windows[:, 1:])
        heat = temperature(*outputs["validation"]) if "validation" in outputs else 1.0
        loss = nll(*outputs[task.evaluate])
        rows.append(
            {"seed": seed, "diverged": not math.isfinite(loss), f"{task.evaluate}_nll": loss}
            | {f"{task.evaluate}_nll_tempered": nll(*outputs[task.evaluate], heat), "temperature": heat}
            | {"train_loss": train_loss[i], "train_s": seconds}
        )
    trial.log({f"{task.evaluate}/nll": [row[f"{task.evaluate}_nll"] for row in rows]}, step=steps)
    return rows
