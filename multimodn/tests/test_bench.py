"""The bench runs all its comparisons, and what is wrong is not timed."""

import json

import pytest
import torch

from common.kernels.bench import WrongResultError
from multimodn import bench
from multimodn.bench import Sizes

torch.set_num_threads(1)
TINY = Sizes((3, 5), (3, 2), 4, 2, (4,), (1, 2), 60, 1, (2, 2, 20))


def test_every_comparison_runs_and_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "SIZES", TINY)
    bench.main([f"results={tmp_path}", "seconds=0.01"])
    content = json.loads((tmp_path / "multimodn" / "bench-cpu.json").read_text())
    found = {(row["what"], row["ours"], row["baseline"]) for row in content["rows"]}
    assert found == {
        ("training step", "MultiModN", "official style"),
        ("training step", "MultiModN", "official style, vectorised scan"),
        ("training step", "MultiModN", "P-Fusion"),
        ("training step of several seeds", "stack", "loop over models"),
        ("training step of several seeds", "stack", "torch.func.vmap"),
        ("training, 1 epochs", "MultiModN", "sklearn MLPClassifier"),
        ("training, 1 epochs", "MultiModN", "sklearn HistGradientBoosting"),
        ("AUROC", "all at once", "loop over sklearn"),
    }
    assert all(row["floor_ms"] > 0 and row["ratio"] > 0 for row in content["rows"])
    assert str(tmp_path) in capsys.readouterr().out


def test_wrong_results_are_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "SIZES", TINY)
    monkeypatch.setattr(bench.metrics, "auroc", lambda scores, labels: torch.full(scores.shape[:-1], 0.4))
    for rows in (bench.training_rows, bench.score_rows):
        with pytest.raises(WrongResultError):
            list(rows("cpu", 0.01))
    monkeypatch.setattr(bench.Step, "__call__", lambda self: torch.ones(()))
    for rows in (bench.step_rows, bench.seed_rows):
        with pytest.raises(WrongResultError, match="differs by"):
            list(rows("cpu", 0.01))


@pytest.mark.parametrize("argument", ["speed=3", "seconds", "device="])
def test_bad_options_are_refused(argument):
    with pytest.raises(SystemExit, match=f"{argument}: must be key=value"):
        bench.main([argument])
