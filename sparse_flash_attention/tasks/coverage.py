"""Which share of the pairs in one bucket is attended, by exact ranges and by Reformer's chunks (C5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from common.streams import generator
from common.training import setup
from sparse_flash_attention.hashing import lsh_hash, random_buckets
from sparse_flash_attention.pairs import coverage, reformer_coverage
from sparse_flash_attention.segments import plan

if TYPE_CHECKING:
    from common.trials import Trial
    from sparse_flash_attention.config import TrialConfig

HASHES = 47  # random stream


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed: `ours` and `reformer`, shares in [0, 1], mean over heads.
    """
    setup(config.threads, "cpu", seed=config.seed)
    task = config.task
    length = min(task.length, 256) if config.max_steps is not None else task.length
    rows = []
    for seed in trial.seeds:
        rng = generator(seed, HASHES)
        if task.hashing == "uniform":
            hashes = random_buckets((1, task.heads, length), task.n_buckets, rng)
        else:
            x = torch.randn(1, task.heads, length, task.head_dim, generator=rng)
            hashes = lsh_hash(x, task.n_buckets, generator=rng)
        ranges = plan((1, task.heads, length, length), None, None, hashes, hashes)
        ours, chunks = coverage(ranges, hashes), reformer_coverage(hashes, task.chunk)
        rows.append({"seed": seed, "ours": float(ours.mean()), "reformer": float(chunks.mean())})
    return rows
