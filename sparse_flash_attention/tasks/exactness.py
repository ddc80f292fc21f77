"""Outputs and gradients beside masked dense attention in double precision, over random shapes and patterns (C1)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.streams import generator
from common.training import setup
from sparse_flash_attention.attention import hash_sparse_attention, qk_sparse_attention
from sparse_flash_attention.hashing import random_buckets, random_keep
from sparse_flash_attention.reference import visible
from sparse_flash_attention.tasks.timing import DTYPES

if TYPE_CHECKING:
    from common.trials import Trial
    from sparse_flash_attention.config import ExactnessConfig, TrialConfig

PATTERNS = 48  # random stream
HEADS = 3
DIMS = (16, 32, 64, 80, 128)
MOST_BUCKETS = 40


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial.

    Returns:
        One dict a seed over `task.patterns` random patterns: `forward_error`, the largest |out - exact|;
        `backward_error`, the largest |gradient - exact| over max(1, the largest exact gradient), of q, k and v;
        `bad_numbers`, entries that are not finite; `stranded`, rows without a visible key, and `stranded_nonzero`,
        those among them whose output or gradient is not exactly 0.
    """
    device = setup(config.threads, config.device, seed=config.seed).device
    task = config.task
    patterns = task.patterns if config.max_steps is None else min(task.patterns, config.max_steps)
    rows = []
    for i, seed in enumerate(trial.seeds):
        row = {"forward_error": 0.0, "backward_error": 0.0, "bad_numbers": 0, "stranded": 0, "stranded_nonzero": 0}
        for pattern in range(patterns):
            found = _compare(task, generator(seed, PATTERNS, pattern), pattern, device)
            for name, value in found.items():
                row[name] = max(row[name], value) if name.endswith("error") else row[name] + value
        rows.append({"seed": seed} | row)
        trial.progress(i + 1, len(trial.seeds))
    return rows


def _compare(task: ExactnessConfig, rng: torch.Generator, pattern: int, device: torch.device) -> dict[str, Any]:
    """One pattern: even ones drop rows, odd ones hash, every third of these drops rows as well."""
    length = int(torch.randint(1, task.longest + 1, (), generator=rng))
    dim = DIMS[int(torch.randint(len(DIMS), (), generator=rng))]
    shape = (1, HEADS, length)
    inputs = [torch.randn(*shape, dim, generator=rng).to(device, DTYPES[task.dtype]) for _ in range(3)]
    grad = torch.randn(*shape, dim, generator=rng).to(device, DTYPES[task.dtype])
    sparsity: dict[str, Any] = {}
    if pattern % 2 == 0 or pattern % 3 == 0:
        keep = float(torch.rand((), generator=rng))
        sparsity |= {name: random_keep(shape, keep, rng).to(device) for name in ("q_keep", "k_keep")}
    attention: Any = partial(qk_sparse_attention, **sparsity)
    if pattern % 2:
        n = int(torch.randint(1, MOST_BUCKETS + 1, (), generator=rng))
        sparsity |= {name: random_buckets(shape, n, rng).to(device) for name in ("q_hash", "k_hash")}
        attention = partial(hash_sparse_attention, **sparsity)
    found = _with_gradients(partial(attention, backend=task.backend), inputs, grad)
    exact = _with_gradients(partial(attention, backend="reference"), [x.double() for x in inputs], grad.double())
    stranded = ~visible((*shape, length), **sparsity, device=device).any(-1)
    leaks = found[0][stranded].ne(0).any(-1) | found[1][stranded].ne(0).any(-1)
    # a maximum of Python's would pass over NaN
    errors = [float((x - y).abs().nan_to_num(nan=torch.inf).max()) for x, y in zip(found, exact, strict=True)]
    scales = [max(1.0, float(y.abs().max())) for y in exact]
    return {
        "forward_error": errors[0],
        "backward_error": max(e / s for e, s in zip(errors[1:], scales[1:], strict=True)),
        "bad_numbers": sum(int((~torch.isfinite(x)).sum()) for x in found),
        "stranded": int(stranded.sum()),
        "stranded_nonzero": int(leaks.sum()),
    }


def _with_gradients(attention: Any, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]
