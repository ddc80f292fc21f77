"""The frozen public surface: names, config keys, and a 20-step run at full precision."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import clustered_pfl
from clustered_pfl.config import (
    BlobsConfig,
    EstimationConfig,
    ImagesConfig,
    QuadraticsConfig,
    RegressionConfig,
    TrialConfig,
)
from common.config import schema_keys
from common.kernels.device import cpu_name

GOLDEN = Path(__file__).parent / "golden"
TASKS = (ImagesConfig, RegressionConfig, QuadraticsConfig, BlobsConfig, EstimationConfig)


def curve() -> list[float]:
    """Mean loss of eight clients in two clusters over 20 steps of Federated-Clustering, exact floats."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(8, 16, 12, generator=rng)
    y = torch.randint(4, (8, 16), generator=rng)
    y[4:] = (x[4:, :, :4] + 1).argmax(-1)  # something to learn in the second cluster
    y[:4] = (x[:4, :, 4:8] - 1).argmax(-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    loss = clustered_pfl.module_loss(network, nn.functional.cross_entropy)
    federation = clustered_pfl.FederatedClustering(
        loss, clustered_pfl.stack(network, 8), lr=0.1, radius=clustered_pfl.Quantile(0.4), rounds=5
    )
    losses = []
    for _ in range(20):
        federation.step((x, y))
        each = torch.stack([loss({k: p[i] for k, p in federation.params.items()}, (x[i], y[i])) for i in range(8)])
        losses.append(each.mean().item())
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
        assert measured == golden["FederatedClustering"]
    assert measured == pytest.approx(golden["FederatedClustering"], rel=1e-4)
    assert measured[-1] < 0.6 * measured[0]


def test_public_names_are_frozen_and_documented() -> None:
    frozen = (GOLDEN / "names.txt").read_text().split()
    public = list(clustered_pfl.__all__)
    for module in (clustered_pfl.attacks, clustered_pfl.baselines, clustered_pfl.diagnostics):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        public += [f"{module.__name__.rpartition('.')[2]}.{n}" for n in own if not n.startswith("_")]
    assert sorted(public) == frozen
    for name in frozen:
        value = clustered_pfl
        for part in name.split("."):
            value = getattr(value, part)
        assert (value.__doc__ or "").strip(), name
    for name in ("FederatedClustering", "MomentumClustering", "threshold_clustering"):
        assert "Args:" in inspect.getdoc(getattr(clustered_pfl, name)), name


def keys() -> list[str]:
    """Every key of a trial; those of the tasks under the task's name."""
    found = list(schema_keys(TrialConfig))
    found = [key for key in found if not key.startswith("task.")]
    for task in TASKS:
        found += [f"task[{task().name}].{key}" for key in schema_keys(task)]
    return sorted(found)


def test_config_keys_are_frozen() -> None:
    assert keys() == (GOLDEN / "keys.txt").read_text().split()
