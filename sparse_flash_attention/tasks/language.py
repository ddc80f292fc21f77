"""Train language models that differ only in who sees whom, and measure their loss on held-out text (C7, C8, C9)."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common import ranks
from common.checkpoint import load_checkpoint, load_extra, save_checkpoint
from common.streams import key
from common.training import Run, setup
from sparse_flash_attention.gpt import GPTConfig, SparseGPT
from sparse_flash_attention.tasks.text import Text, read

if TYPE_CHECKING:
    from common.trials import Trial
    from sparse_flash_attention.config import LanguageConfig, OptimizerConfig, TrialConfig

DRAWS = 41  # random stream of buckets and dropped rows
EVALUATION_SEED = 0
DENSITY_SEQUENCES = 4
CHECKPOINT_SECONDS = 120.0
SMALL = 4096  # tokens to evaluate on where `max_steps` cuts everything short


def build(config: TrialConfig, seed: int) -> SparseGPT:
    """The language model of a trial.

    Raises:
        ValueError: the network has not as many parameters as `model.expected_parameters`.
    """
    m, a = config.model, config.attention
    kind = GPTConfig(m.vocab, m.d_model, m.n_layer, m.n_head, m.context, a.kind, options=a.options())
    model = SparseGPT(kind, seed=seed)
    count = sum(p.numel() for p in model.parameters())
    if m.expected_parameters not in (None, count):
        raise ValueError(f"model.expected_parameters={m.expected_parameters}: the network has {count}")
    return model


class Losses(nn.Module):
    """Models side by side: (S, B, T + 1) tokens -> (S,) mean losses in nats a token."""

    def __init__(self, models: list[SparseGPT]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    @property
    def members(self) -> list[SparseGPT]:
        """The models."""
        return list(self.models)  # type: ignore[arg-type]

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token losses, one a model."""
        pairs = zip(self.members, tokens, strict=True)
        return torch.stack([model.loss(x[:, :-1], x[:, 1:]) for model, x in pairs])


def lr_factor(step: int, steps: int, c: OptimizerConfig) -> float:
    """One cosine cycle: `start` -> 1 in the first `warmup` of the steps, -> `final` at the last step."""
    rise = max(round(c.warmup * steps), 1)
    if step < rise:
        return c.start + (1 - c.start) * (1 - math.cos(math.pi * step / rise)) / 2
    fall = (step - rise) / max(steps - 1 - rise, 1)
    return c.final + (1 - c.final) * (1 + math.cos(math.pi * fall)) / 2


@torch.no_grad()
def evaluate(losses: Losses, windows: Tensor, task: LanguageConfig, run: Run) -> list[float]:
    """Mean loss of every model over the windows (n, T + 1); buckets are drawn from one fixed seed."""
    losses.eval()
    found = []
    for model in losses.members:
        total = 0.0
        with model.seeded(EVALUATION_SEED), run.autocast():
            for part in windows.split(task.eval_batch_size):
                x = part.to(run.device)
                total += float(model.loss(x[:, :-1], x[:, 1:])) * len(x)
        found.append(total / len(windows))
    losses.train()
    return found


def densities(losses: Losses, windows: Tensor, run: Run) -> list[float]:
    """Share of causal pairs that is live, mean over layers, heads and a few held-out windows."""
    losses.eval()
    ids = windows[:DENSITY_SEQUENCES, :-1].to(run.device)
    found = []
    for model in losses.members:
        with model.seeded(EVALUATION_SEED), run.autocast():
            found.append(float(model.densities(ids).mean()))
    losses.train()
    return found


def _train(
    config: TrialConfig, trial: Trial, run: Run, text: Text, losses: Losses, optimizer: torch.optim.Optimizer
) -> tuple[list[float], list[float], float]:
    """The loop; returns last training losses, early densities and seconds of training a model."""
    task, c = config.task, config.optimizer
    windows = text.evaluation(task.eval_tokens)
    model = run.distribute(losses)
    draws = [torch.Generator(run.device) for _ in trial.seeds]
    for generator, one in zip(draws, losses.members, strict=True):
        for layer in one.attentions:
            layer.generator = generator
    first = load_checkpoint(trial.folder, losses, optimizer) or 0
    kept = load_extra(trial.folder)
    early = kept.get("early", [math.nan] * len(trial.seeds))
    mean, spent = torch.tensor(kept.get("mean", [math.nan] * len(trial.seeds))), kept.get("spent", 0.0)
    saved = time.monotonic()
    mine = slice(run.rank, None, run.world)
    for step in range(first, task.steps):
        started = time.perf_counter()
        factor = lr_factor(step, task.steps, c)
        for group in optimizer.param_groups:
            group["lr"] = c.lr * factor
        for generator, seed in zip(draws, trial.seeds, strict=True):
            generator.manual_seed(key(seed, DRAWS, step * run.world + run.rank))
        tokens = torch.stack([text.batch(seed, step, task.batch_size)[mine] for seed in trial.seeds])
        total = torch.zeros(len(trial.seeds), device=run.device)
        for part in tokens.chunk(task.accumulate, 1):
            with run.accumulate(model):
                loss = model(part.to(run.device))
                run.backward(loss.sum())
            total += loss.detach() / task.accumulate
        if c.clip_norm is not None:
            for one in losses.members:
                nn.utils.clip_grad_norm_(one.parameters(), c.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        spent += time.perf_counter() - started
        done = step + 1
        if done == min(task.early_step, task.steps):
            early = densities(losses, windows, run)
            trial.log({"density": early}, step=done)
        if task.eval_every and done % task.eval_every == 0 and done < task.steps:
            trial.log({f"{task.evaluate}/loss": evaluate(losses, windows, task, run)}, step=done)
        if done % task.log_every and done < task.steps:
            continue
        mean = run.mean(total)
        trial.log({"train/loss": mean, "lr": c.lr * factor}, step=done)
        trial.progress(done, task.steps)
        if not torch.isfinite(mean).any():
            break
        # every process must write it, or none: their clocks differ
        if done < task.steps and ranks.agree(time.monotonic() - saved > CHECKPOINT_SECONDS, "checkpoint"):
            extra = {"early": early, "mean": mean.tolist(), "spent": spent}
            save_checkpoint(trial.folder, losses, optimizer, step=done, extra=extra)
            saved = time.monotonic()
    return mean.tolist(), early, spent / len(trial.seeds)


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed: `<split>_loss` in nats a token and `train_loss` of the last step; `density_early` and
        `density_late`, the share of live pairs after `task.early_step` and after all steps; `train_s`, seconds of
        training; `dropping_loss` (drop only), the loss with rows dropped in evaluation too.
    """
    task = config.task
    if config.max_steps is not None:
        steps, tokens = min(task.steps, config.max_steps), min(task.eval_tokens, SMALL)
        task = dataclasses.replace(task, steps=steps, eval_tokens=tokens)
        config = dataclasses.replace(config, task=task)
    run_ = setup(config.threads, config.device, config.precision, task.accumulate, seed=config.seed)
    if task.batch_size % (task.accumulate * run_.world):
        allowed = f"a multiple of task.accumulate={task.accumulate} times {run_.world} processes"
        raise ValueError(f"task.batch_size={task.batch_size}: must be {allowed}")
    text = read(config)
    losses = run_.place(Losses([build(config, seed) for seed in trial.seeds]))
    groups = [group for one in losses.members for group in one.parameter_groups(config.optimizer.weight_decay)]
    c = config.optimizer
    optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), fused=True)
    train_loss, early, seconds = _train(config, trial, run_, text, losses, optimizer)
    windows = text.evaluation(task.eval_tokens)
    held_out = evaluate(losses, windows, task, run_)
    late = densities(losses, windows, run_)
    trial.log({f"{task.evaluate}/loss": held_out, "density": late}, step=task.steps)
    rows = [
        {"seed": seed, "diverged": not math.isfinite(held_out[i]), f"{task.evaluate}_loss": held_out[i]}
        | {"train_loss": train_loss[i], "density_early": early[i], "density_late": late[i], "train_s": seconds}
        for i, seed in enumerate(trial.seeds)
    ]
    if config.attention.kind == "drop":
        for one in losses.members:
            for attention in one.attentions:
                attention.drop_at_eval = True  # type: ignore[assignment]
        for row, loss in zip(rows, evaluate(losses, windows, task, run_), strict=True):
            row["dropping_loss"] = loss
    return rows
