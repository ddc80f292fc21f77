"""Compile the Triton kernels ahead of time for GPUs that are not here, and count what they need (C10)."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from common.trials import Trial
    from sparse_flash_attention.config import TrialConfig


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial; nothing in it is random.

    Returns:
        One dict a seed of lists, an entry a kernel and target: `kernels` and `targets`, their names; `registers` a
        thread; `spilled` bytes, stores and loads together; `shared_kib`. The lists are empty without Triton.
    """
    dims = config.task.head_dims if config.max_steps is None else config.task.head_dims[:1]
    used = _compile(dims, config.task.dtype) if importlib.util.find_spec("triton") else []
    found = {
        "kernels": [f"{u.kernel}, {u.size}" for u in used],
        "targets": [u.target for u in used],
        "registers": [u.registers for u in used],
        "spilled": [u.spill_stores + u.spill_loads for u in used],
        "shared_kib": [u.shared / 1024 for u in used],
    }
    return [{"seed": seed} | found for seed in trial.seeds]


def _compile(head_dims: list[int], dtype: str) -> list[Any]:
    from common.kernels.aot import compile_all
    from sparse_flash_attention.kernels.aot import kernels

    return compile_all(kernels([(dtype, head) for head in head_dims], None, every=False), workers=1)
