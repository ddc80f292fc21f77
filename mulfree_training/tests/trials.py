"""Small trials, run in this process, and data sets on disk with the schemas of the hub's."""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from common.compose import Composer
from common.trials import Trial
from mulfree_training.config import TrialConfig
from mulfree_training.train import TASKS

QUIET = ["device=cpu", "threads=1", "tracking.mode=disabled", "task.log_every=1"]
IMAGES = [
    *QUIET, "data=digits", "data.test=0.22", "data.validation=0.15", "model=vit_digits", "task.epochs=2",
    "task.batch_size=32", "optimizer.lr=0.002", "optimizer.warmup=10",
]  # fmt: skip
LANGUAGE = [
    *QUIET, "task=language", "data=prose", "model=gpt_characters", "model.d_model=16", "model.d_hidden=32",
    "model.n_layer=1", "model.context=16", "task.steps=12", "task.batch_size=8", "task.eval_tokens=512",
    "optimizer=adamw_language", "optimizer.lr=0.02", "optimizer.warmup=2",
]  # fmt: skip
TRANSLATION = [
    *QUIET, "task=translation", "data=iwslt14", "model=transformer_iwslt", "model.d_model=16", "model.d_hidden=32",
    "model.n_layer=1", "model.n_head=2", "model.source_vocab=260", "model.vocab=260", "model.dropout=0",
    "task.steps=6", "task.batch_tokens=200", "optimizer=adamw_iwslt", "optimizer.lr=0.01", "optimizer.warmup=2",
]  # fmt: skip
ROWS = ("standard", "matmul", "softmax", "norm", "loss", "full")


def config(*overrides: str) -> TrialConfig:
    """A trial's config from overrides."""
    return Composer("mulfree_training", TrialConfig).config(list(overrides))


def run(folder: Path, config: TrialConfig) -> tuple[list[dict[str, Any]], Trial]:
    """The rows of a trial, and the trial with its history."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Trial(folder, list(range(config.seed, config.seed + config.n_seeds)))
    return import_module(TASKS[config.task.name]).run(config, made), made


def curve(made: Trial, metric: str = "train/loss") -> list[list[float]]:
    """A logged metric, one list (a value a seed) a step."""
    return [row[metric] for _, row in sorted(made._history.items()) if metric in row]


def sound(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without their times."""
    return [{k: v for k, v in row.items() if k != "train_s"} for row in rows]


def write(root: Path, **splits: datasets.Dataset) -> Path:
    """A folder of parquet files, one a split."""
    root.mkdir(parents=True, exist_ok=True)
    for name, split in splits.items():
        split.to_parquet(root / f"{name}-00000-of-00001.parquet")
    return root


def pictures(count: int, first: int = 0, *, column: str = "img", sizes: bool = False) -> datasets.Dataset:
    """Pictures of one grey value 5 i and labels i mod 10; with `sizes` each has a size of its own, some one channel."""
    images = []
    for i in range(first, first + count):
        size, value = ((30 + i % 7, 34 - i % 5) if sizes else (32, 32)), 5 * i % 256
        grey = sizes and i % 3 == 0
        images.append(Image.new("L", size, value) if grey else Image.new("RGB", size, (value,) * 3))
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    labels = [i % 10 for i in range(first, first + count)]
    return datasets.Dataset.from_dict({column: images, "label": labels}, features=features)


def sentences(count: int, seed: int = 0, letters: str = "abcde", longest: int = 6) -> list[dict[str, str]]:
    """Pairs whose translation is a copy: words of one letter."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(letters, k=rng.randint(4, longest))) for _ in range(count)]
    return [{"de": text, "en": text} for text in texts]


def pairs(rows: list[dict[str, str]]) -> datasets.Dataset:
    """A split of the hub set's schema, {translation: {de, en}}."""
    features = datasets.Features({"translation": datasets.Translation(languages=["de", "en"])})
    return datasets.Dataset.from_dict({"translation": rows}, features=features)
