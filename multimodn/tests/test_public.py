"""The frozen public surface: names, config keys, and a 20-step run at full precision."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch

import multimodn
from common.config import schema_keys
from common.kernels.device import cpu_name
from multimodn.config import FusionConfig, TabularConfig, TrialConfig
from multimodn.corruption import mnar
from multimodn.tests.networks import batch, targets
from multimodn.tests.networks import multimodn as network

GOLDEN = Path(__file__).parent / "golden"
STEPS = 20


def curve() -> list[float]:
    """Loss of 20 steps with hidden modalities under the robust rule, one batch an epoch, exact floats."""
    x, y = batch(64), targets(64)
    masks = {"b": mnar(y["yes"], 0.5)}
    losses: list[float] = []
    data = multimodn.Rows.of(x, y, masks)
    multimodn.fit(
        network(dropout=0.1), data, missing="robust", epochs=STEPS, batch_size=64, lr=0.01,
        on_epoch=lambda _, loss: losses.append(loss.item()),
    )  # fmt: skip
    return losses


def test_golden_curve() -> None:
    """Bit for bit on the processor it was recorded on; within float32 rounding, amplified by 20 steps, elsewhere."""
    golden = json.loads((GOLDEN / "curves.json").read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = curve()
    finally:
        torch.set_num_threads(threads)
    if golden["cpu"] == cpu_name() and golden["torch"] == torch.__version__:
        assert measured == golden["MultiModN"]
    assert measured == pytest.approx(golden["MultiModN"], rel=1e-4)
    assert measured[-1] < 0.97 * measured[0]


def test_public_names_are_frozen_and_documented() -> None:
    public = list(multimodn.__all__)
    for module in (multimodn.corruption, multimodn.explain, multimodn.metrics):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        public += [f"{module.__name__.rpartition('.')[2]}.{n}" for n in own if not n.startswith("_")]
    frozen = (GOLDEN / "names.txt").read_text().split()
    assert sorted(public) == frozen
    for name in frozen:
        value = multimodn
        for part in name.split("."):
            value = getattr(value, part)
        assert (value.__doc__ or "").strip(), name
    for name in ("MultiModN", "PFusion", "fit", "stack"):
        assert "Args:" in inspect.getdoc(getattr(multimodn, name)), name


def keys() -> list[str]:
    """Every key of a trial; those of the tasks under the task's name."""
    found = [key for key in schema_keys(TrialConfig) if not key.startswith("task.")]
    for task in (FusionConfig, TabularConfig):
        found += [f"task[{task().name}].{key}" for key in schema_keys(task)]
    return sorted(found)


def test_config_keys_are_frozen() -> None:
    assert keys() == (GOLDEN / "keys.txt").read_text().split()
