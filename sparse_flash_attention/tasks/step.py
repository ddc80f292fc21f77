"""Time of whole training steps at long context: dense, hash-sparse and key-dropping language models (C6, C8)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from common.streams import generator, key
from common.training import Run, setup
from sparse_flash_attention.gpt import GPTConfig, SparseGPT
from sparse_flash_attention.tasks.timing import Measurements, fastest

if TYPE_CHECKING:
    from common.trials import Trial
    from sparse_flash_attention.config import TrialConfig

TOKENS, DRAWS = 45, 46  # random streams
SMALL = 256


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial: a length, all models.

    Returns:
        One dict a seed (a repetition with weights and tokens of its own): `dense_ms`, `hash_<nb>_ms` and
        `drop_<s>_ms`, forward and backward and an AdamW step.
    """
    run_ = setup(config.threads, config.device, config.precision, seed=config.seed)
    task, m = config.task, config.model
    if config.max_steps is not None:
        task = dataclasses.replace(task, length=min(task.length, SMALL))
    if task.length > m.context:
        raise ValueError(f"task.length={task.length}: must be <= model.context={m.context}")
    arms: dict[str, tuple[str, dict[str, Any]]] = {"dense": ("dense", {})}
    arms |= {f"hash_{n}": ("hash", {"n_buckets": n}) for n in task.buckets}
    arms |= {f"drop_{s:g}": ("drop", {"drop_prob": s}) for s in task.drops}
    measurements = Measurements(trial, run_.device)
    rows: list[dict[str, Any]] = []
    for i, seed in enumerate(trial.seeds):

        def measure(warm: bool, seed: int = seed) -> dict[str, Any]:
            ids = torch.randint(m.vocab, (task.batch_size, task.length + 1), generator=generator(seed, TOKENS))
            ids = ids.to(run_.device)
            calls = {}
            for name, (kind, options) in arms.items():
                sizes = GPTConfig(m.vocab, m.d_model, m.n_layer, m.n_head, m.context, kind, options=options)
                calls[name] = _step(run_.place(SparseGPT(sizes, seed=seed)), ids, run_)
            if not warm:
                fastest(calls, 1, run_.device)
            torch.manual_seed(key(seed, DRAWS))
            return {f"{name}_ms": ms for name, ms in fastest(calls, 1, run_.device).items()}

        rows.append(measurements.row(seed, measure))
        trial.progress(i + 1, len(trial.seeds))
    return rows


def _step(model: SparseGPT, ids: torch.Tensor, run_: Run) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def call() -> None:
        with run_.autocast():
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return call
