"""Time of dense and sparse attention, forward and backward, sorting and gathering included (C2, C3, C4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.streams import generator
from common.training import setup
from sparse_flash_attention.attention import hash_sparse_attention, qk_sparse_attention
from sparse_flash_attention.hashing import random_buckets, random_keep
from sparse_flash_attention.naive import naive_qk_sparse_attention
from sparse_flash_attention.tasks.timing import DTYPES, Measurements, fastest, training_pass

if TYPE_CHECKING:
    from common.trials import Trial
    from sparse_flash_attention.config import RuntimeConfig, TrialConfig

INPUTS, MASKS, BUCKETS = 42, 43, 44  # random streams
SMALL = 256

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial: a length, all sparsities.

    Returns:
        One dict a seed (a repetition with inputs, masks and buckets of its own): `dense_ms`, `keep_<share>_ms`,
        `buckets_<nb>_ms` and, if asked for, `naive_<share>_ms`; and `density_…`, the share of causal pairs that is
        live in each.
    """
    device = setup(config.threads, config.device, seed=config.seed).device
    task = config.task
    if config.max_steps is not None:
        task = dataclasses.replace(task, length=min(task.length, SMALL))
    measurements = Measurements(trial, device)
    rows: list[dict[str, Any]] = []
    for i, seed in enumerate(trial.seeds):
        rows.append(measurements.row(seed, partial(_measure, task, seed, device)))
        trial.progress(i + 1, len(trial.seeds))
    return rows


def _measure(task: RuntimeConfig, seed: int, device: torch.device, warm: bool) -> dict[str, Any]:
    """One repetition; a cold process runs every contender once before."""
    shape = (task.batch, task.heads, task.length)
    rng = generator(seed, INPUTS)
    inputs = tuple(
        torch.randn(*shape, task.head_dim, generator=rng).to(device, DTYPES[task.dtype]).requires_grad_()
        for _ in range(3)
    )
    row: dict[str, Any] = {}
    attentions = _attentions(task, seed, device, row)
    calls = {name: training_pass(attention, inputs) for name, attention in attentions.items()}
    if not warm:
        fastest(calls, 1, device)
    return row | {f"{name}_ms": ms for name, ms in fastest(calls, task.rounds, device).items()}


def _attentions(task: RuntimeConfig, seed: int, device: torch.device, row: dict[str, Any]) -> dict[str, Attention]:
    """All contenders on one draw of masks and buckets; notes in `row` which share of pairs is live in each."""
    shape = (task.batch, task.heads, task.length)
    found: dict[str, Attention] = {"dense": partial(F.scaled_dot_product_attention, is_causal=True)}
    for keep in task.keeps:
        rng = generator(seed, MASKS, round(keep * 1000))
        q_keep, k_keep = (random_keep(shape, keep, rng).to(device) for _ in range(2))
        found[f"keep_{keep:g}"] = partial(qk_sparse_attention, q_keep=q_keep, k_keep=k_keep)
        if task.naive:
            found[f"naive_{keep:g}"] = partial(naive_qk_sparse_attention, q_keep=q_keep, k_keep=k_keep)
        seen = k_keep.cumsum(-1)[q_keep].sum()
        row[f"density_keep_{keep:g}"] = float(seen) / _pairs(task)
    for n in task.buckets:
        buckets = random_buckets(shape, n, generator(seed, BUCKETS, n)).to(device)
        found[f"buckets_{n}"] = partial(hash_sparse_attention, q_hash=buckets)
        sizes = torch.nn.functional.one_hot(buckets.long(), n).sum(-2).double()
        row[f"density_buckets_{n}"] = float((sizes * (sizes + 1) / 2).sum()) / _pairs(task)
    return found


def _pairs(task: RuntimeConfig) -> float:
    return task.batch * task.heads * task.length * (task.length + 1) / 2
