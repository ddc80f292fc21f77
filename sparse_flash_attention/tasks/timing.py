"""Timing of calls that alternate in one process, on any device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def fastest(calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of the fastest of `rounds` runs of every call, taking turns."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            found[name] = min(found[name], (time.perf_counter() - start) * 1e3)
    return found


def training_pass(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: tuple[Tensor, ...]
) -> Callable[[], object]:
    """A call that runs an attention forward and backward on inputs that require gradients."""

    def call() -> object:
        out = attention(*inputs)
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return call


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
