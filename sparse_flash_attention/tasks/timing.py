"""Timing of calls that alternate in one process, on any device, and a place where measured times are kept."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.kernels.device import facts

if TYPE_CHECKING:
    from common.trials import Trial

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


class Measurements:
    """What a trial has measured, kept one repetition at a time in `results/<paper>/timings/<trial>.json`.

    Unlike a training, a measurement that is made again gives other numbers. So what the same trial (same config, same
    sources) has measured on the same machine is read back, after a kill as well as when a record was lost, and a report
    stays the same until the folder `timings` is deleted. A trial outside a store keeps nothing.

    Args:
        trial: whose folder says where.
        device: what the times hang on, beside the machine.
    """

    def __init__(self, trial: Trial, device: torch.device) -> None:
        folder = trial.folder
        kept = folder.parent.name == "scratch"
        self.path = folder.parent.parent / "timings" / f"{folder.name}.json" if kept else None
        self.machine = facts(str(device))
        self.rows: dict[str, dict[str, Any]] = self._read(self.path) if self.path else {}
        self._warm = False

    def row(self, seed: int, measure: Callable[[bool], dict[str, Any]]) -> dict[str, Any]:
        """The numbers of one repetition with its seed, measured unless they are known.

        `measure` is told whether this process has measured before: a kernel's first call may compile it.
        """
        name = str(seed)
        if name not in self.rows:
            self.rows[name] = measure(self._warm)
            self._warm = True
            if self.path:
                self._write(self.path)
        return {"seed": seed} | self.rows[name]

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(path.read_text())
            return dict(found["rows"]) if found["machine"] == self.machine else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as handle:
            json.dump({"machine": self.machine, "rows": self.rows}, handle)
        os.replace(handle.name, path)
