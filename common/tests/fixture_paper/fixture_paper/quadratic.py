"""Descend 0.5 * sum(w x^2) from a random start, checkpointed at every step."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from common.trials import Trial
from fixture_paper.config import TrialConfig
from fixture_paper.method import update


def start(config: TrialConfig, seeds: list[int], curvature: np.ndarray) -> np.ndarray:
    """Starting points (S, n)."""
    if config.start_from:
        return np.tile(np.loadtxt(Path(config.start_from)), (len(seeds), 1))
    return np.stack([np.random.default_rng(seed).normal(size=len(curvature)) for seed in seeds])


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One descent a seed, side by side."""
    curvature = np.array(config.weights)
    x = start(config, trial.seeds, curvature)  # (S, n)
    velocity, begin = np.zeros_like(x), 0
    checkpoint = trial.folder / "state.npz"
    if checkpoint.exists():
        state = np.load(checkpoint)
        x, velocity, begin = state["x"], state["velocity"], int(state["step"])
    for step in range(begin, config.steps):
        x, velocity = update(x, curvature * x, velocity, config.optimizer.lr, config.optimizer.momentum or 0.0)
        loss = 0.5 * (curvature * x**2).sum(axis=1)  # (S,)
        trial.log({"loss": loss}, step)
        trial.progress(step + 1, config.steps)
        time.sleep(config.pause)
        if config.pause and trial.writes:
            np.savez(trial.folder / "state.tmp.npz", x=x, velocity=velocity, step=step + 1)
            os.replace(trial.folder / "state.tmp.npz", checkpoint)
    loss = 0.5 * (curvature * x**2).sum(axis=1)  # also when killed between the last checkpoint and the record
    misbehave(config.fail, loss)
    return [
        {"seed": seed, "diverged": bool(loss[i] > 1e6), "final_loss": loss[i], "path": list(x[i]), "resumed_at": begin}
        for i, seed in enumerate(trial.seeds)
    ]


def misbehave(fail: str, loss: np.ndarray) -> None:
    """Do what a test asks for."""
    if fail == "nan":
        loss[:] = np.nan
    elif fail == "oserror":
        raise FileNotFoundError(2, "No such file or directory", "/nowhere/data.csv")
    elif fail == "bug":
        raise KeyError("a bug")
    elif fail == "memory":
        raise MemoryError("cannot allocate 1 TB")
    elif fail == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
