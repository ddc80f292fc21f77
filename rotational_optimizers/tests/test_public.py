"""The frozen public surface: names, config keys, and a 20-step run at full precision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rotational_optimizers
from common.config import schema_keys
from common.kernels.device import cpu_name
from rotational_optimizers.config import TrialConfig

GOLDEN = Path(__file__).parent / "golden"
OPTIMIZERS = {
    "RotationalAdamW": {"lr": 0.01, "betas": (0.9, 0.95)},
    "RotationalSGD": {"lr": 0.1, "momentum": 0.9},
    "RotationalLion": {"lr": 0.003},
}


def _curve(name: str) -> list[float]:
    """Losses of 20 steps of a small network, exact floats."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 12), torch.randint(4, (64,))
    hidden = [torch.nn.Linear(12, 16), torch.nn.LayerNorm(16), torch.nn.ReLU()]
    model = torch.nn.Sequential(*hidden, torch.nn.Linear(16, 4))
    groups = rotational_optimizers.rotational_param_groups(model, weight_decay=0.1)
    optimizer = getattr(rotational_optimizers, name)(groups, **OPTIMIZERS[name], foreach=False)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_golden_curve(name: str) -> None:
    """Bit for bit on the processor it was recorded on; within float32 rounding, amplified by 20 steps, elsewhere."""
    golden = json.loads((GOLDEN / "curves.json").read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = _curve(name)
    finally:
        torch.set_num_threads(threads)
    same = golden["cpu"] == cpu_name() and golden["torch"] == torch.__version__
    if same:
        assert measured == golden[name]
    assert measured == pytest.approx(golden[name], rel=1e-4)


def test_public_names_are_frozen_and_documented() -> None:
    frozen = (GOLDEN / "names.txt").read_text().split()
    assert sorted(rotational_optimizers.__all__) == frozen
    assert [n for n in frozen if not (getattr(rotational_optimizers, n).__doc__ or "").strip()] == []


def test_config_keys_are_frozen() -> None:
    assert sorted(schema_keys(TrialConfig)) == (GOLDEN / "keys.txt").read_text().split()
