"""Small language trials on made-up text, run in this process."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from common.compose import Composer
from common.trials import Trial
from sparse_flash_attention.config import TrialConfig
from sparse_flash_attention.train import TASKS

SMALL = [
    "model.vocab=40", "model.d_model=32", "model.n_layer=2", "model.n_head=4", "model.context=32", "task.steps=20",
    "task.batch_size=4", "task.eval_tokens=512", "task.eval_batch_size=5", "task.log_every=1", "task.early_step=5",
    "attention.n_buckets=4", "optimizer.lr=0.01", "optimizer.warmup=0.05", "device=cpu", "threads=1",
    "tracking.mode=disabled",
]  # fmt: skip


def documents(count: int = 60) -> list[str]:
    """Program text with something to learn: every line returns the name that it was given."""
    rng = random.Random(0)
    names = ["x", "y", "value", "key", "name", "item"]
    found = []
    for _ in range(count):
        lines = [f"def f({(n := rng.choice(names))}):\n    return {n} + {rng.randrange(10)}\n" for _ in range(12)]
        found.append("\n".join(lines))
    return found


def text_folder(root: Path, count: int = 60) -> Path:
    """A folder with `train.jsonl`, column `text`."""
    root.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": text}) for text in documents(count)]
    (root / "train-0.jsonl").write_text("\n".join(rows) + "\n")
    return root


def config(*overrides: str) -> TrialConfig:
    """A trial's config from overrides."""
    return Composer("sparse_flash_attention", TrialConfig).config(list(overrides))


def trial(folder: Path, config: TrialConfig) -> Trial:
    """A trial that logs and checkpoints into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return Trial(folder, list(range(config.seed, config.seed + config.n_seeds)))


def run(folder: Path, config: TrialConfig) -> tuple[list[dict[str, Any]], Trial]:
    """The rows of a trial, and the trial with its history."""
    from importlib import import_module

    made = trial(folder, config)
    return import_module(TASKS[config.task.name]).run(config, made), made


def curve(made: Trial, metric: str = "train/loss") -> list[list[float]]:
    """A logged metric, one list (a value a seed) a step."""
    return [row[metric] for _, row in sorted(made._history.items()) if metric in row]
