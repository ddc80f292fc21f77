"""An app with two kinds of nodes learns a model a kind, in one process and in Flower's own engine."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install '.[flower]'")

from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfig

from clustered_pfl.tests import flower_app
from clustered_pfl.tests.flower_grid import (
    Grid,
    identity,  # noqa: F401
    node,
)

ROOT = Path(__file__).parents[2]


# --- an app with two kinds of nodes: what it learns is checked in one process, then in Flower's own engine


def optimum(partitions):
    """Weights and bias of the regularised softmax regression on all images of these nodes."""
    network = flower_app.Network()
    parts = [flower_app.data(p) for p in partitions]
    images, labels = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        decay = sum(p.square().sum() for p in network.parameters()) * flower_app.DECAY / 2
        value = torch.nn.functional.cross_entropy(network(images), labels) + decay
        value.backward()
        return value

    optimizer.step(loss)
    return torch.cat([network.weight.flatten(), network.bias]).detach()


def check_learned(found, exchange):
    """Personal models are near their own cluster's optimum and agree inside it; the global one is in between."""
    even, odd = optimum([0, 2, 4, 6]), optimum([1, 3, 5])
    gap = (even - odd).norm()
    to_even, to_odd = ((torch.tensor(found["fedavg"]["models"]["all"]) - x).norm() / gap for x in (even, odd))
    assert abs(to_even - to_odd) < 0.1 and min(to_even, to_odd) > 0.4
    assert found["fedavg"]["history"][-1]["accuracy"] < 0.5
    learned = found[f"{exchange}:attack"]
    models = torch.tensor([learned["models"][p] for p in range(flower_app.ATTACKER)])  # honest nodes
    own, other = (even, odd), (odd, even)
    for p, model in enumerate(models):
        assert (model - own[p % 2]).norm() / gap < (0.35 if exchange == "updates" else 0.25)
        assert (model - other[p % 2]).norm() / gap > 0.75
    apart = torch.cdist(models, models) / gap
    kind = torch.arange(len(models)) % 2
    alike = kind[:, None] == kind
    assert apart[alike].max() < 0.3 and apart[~alike].min() > 0.6
    assert learned["history"][-1]["accuracy"] > 0.78
    assert learned["sizes"] == [3.0] * len(learned["sizes"])


class LocalGrid(Grid):
    """Runs the client app in this process."""

    def __init__(self, count):
        super().__init__(*(10 + 7 * i for i in range(count)))
        config = [UserConfig({"partition-id": i, "num-partitions": count}) for i in range(count)]
        self.contexts = {
            n: Context(run_id=1, node_id=n, node_config=config[i], state=RecordDict(), run_config=UserConfig())
            for i, n in enumerate(self.nodes)
        }

    def send_and_receive(self, messages, *, timeout=None):
        return [flower_app.client(m, self.contexts[node(m)]) for m in messages]


def test_an_unchanged_client_app_learns_one_model_a_kind(monkeypatch):
    monkeypatch.setattr(flower_app, "data", functools.cache(flower_app.data))
    runs = ["fedavg", "local", "updates", "updates:attack", "all_pairs:attack", "fedavg:attack"]
    found = {run: flower_app.serve(LocalGrid(flower_app.NODES), run, 6) for run in runs}
    accuracy = {run: result["history"][-1]["accuracy"] for run, result in found.items()}
    for exchange in ("updates", "all_pairs"):
        check_learned(found, exchange)
        assert accuracy[f"{exchange}:attack"] > accuracy["local"] + 0.05
    assert abs(accuracy["updates:attack"] - accuracy["updates"]) < 0.03
    assert accuracy["fedavg:attack"] < 0.15  # the attack is one


def remaining(mark, patience=15.0):
    """Processes with this in their environment that are still there after a while."""
    end = time.monotonic() + patience
    while True:
        left = [p for p in psutil.process_iter(["environ"]) if mark.items() <= (p.info["environ"] or {}).items()]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(330)
def test_flower_simulation_learns_the_same_and_leaves_nothing_behind(tmp_path):
    mark = {"FLWR_HOME": str(tmp_path / "home")}
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    env = os.environ | mark | quiet | {"PYTHONPATH": str(ROOT)}
    app = [sys.executable, "-m", "clustered_pfl.tests.flower_app"]
    command = [*app, "fedavg", "updates:attack", "all_pairs:attack", "--rounds", "6"]
    # sockets lie in this folder, and their paths must be short
    with tempfile.TemporaryDirectory(prefix="flwr", ignore_cleanup_errors=True) as short:
        command += ["--out", str(tmp_path / "found.json"), "--ray-folder", short]
        try:
            done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=280)
        finally:
            left = remaining(mark)
            for process in left:
                process.kill()
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert not left
    assert not Path(short).exists()
    print(done.stdout)
    found = json.loads((tmp_path / "found.json").read_text())
    for result in found.values():
        result["models"] = {int(p) if p.isdigit() else p: model for p, model in result["models"].items()}
    for exchange in ("updates", "all_pairs"):
        check_learned(found, exchange)
        assert len(found[f"{exchange}:attack"]["history"]) == 6
