"""The bench runs all its comparisons, what it compares with computes the same, and bad options are refused."""

import json
from dataclasses import replace

import pytest
import torch

from clustered_pfl import bench
from clustered_pfl.bench import Plain, Sizes, by_loops, network, one_model_at_a_time, synthetic
from clustered_pfl.radius import Quantile
from clustered_pfl.rivals import RULES
from clustered_pfl.threshold import threshold_clustering
from common.kernels.bench import WrongResultError

torch.set_num_threads(1)
F64 = torch.float64
TINY = Sizes(
    synthetic=((2, 3),),
    network=((6, 5, 4), 8, 3),
    large_network=((6, 5, 4), 8, 3),
    one_start=((8, 64), (5, 300)),
    threaded=(5, 300),
    all_starts=((8, 64), (5, 300)),
    aggregated=(11, 50),
    clustered=((20, 200), (20, 300)),
)
PROBLEMS = {
    "synthetic, strict": synthetic(4, 3, dtype=F64),
    "network": network((6, 5, 4), 10, 3, dtype=F64),
}


@pytest.mark.parametrize("estimate", [by_loops, one_model_at_a_time])
@pytest.mark.parametrize("name", PROBLEMS)
def test_plain_rounds_are_federated_clustering(name, estimate):
    problem = replace(PROBLEMS[name], lr=0.01)
    ours, plain = problem.ours(), Plain(problem, estimate)
    start = plain.models
    for _ in range(5):
        ours.step(problem.batches)
        plain.step()
    size = start.abs().max().item()
    assert (plain.models - start).abs().max() > 1e-4 * size
    # 5 rounds of sums of some tens of terms, in other orders
    torch.testing.assert_close(ours.models[0], plain.models, rtol=0, atol=1e-12 * size)


@pytest.mark.parametrize("radius", [Quantile(0.2), Quantile(0.3, strict=True), Quantile(0.4, factor=0.99)])
def test_loops_over_points_are_threshold_clustering(radius):
    points = bench.clouds(11, 40).double()
    ours = threshold_clustering(points, points, radius=radius, rounds=6).centers
    loops = torch.stack([bench.points_by_loops(list(points), start, radius, 6) for start in points])
    torch.testing.assert_close(ours, loops, rtol=0, atol=1e-13)  # numbers up to 5, 6 rounds
    if radius == Quantile(radius.q):
        torch.testing.assert_close(bench.cdist_loop(points, points, radius, 6), loops, rtol=0, atol=1e-13)


def test_every_comparison_runs_and_is_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "SIZES", TINY)
    monkeypatch.setattr(bench, "cores", lambda device: [1])
    bench.main([f"results={tmp_path}", "seconds=0.01"])
    content = json.loads((tmp_path / "clustered_pfl" / "bench-cpu.json").read_text())
    assert content["provenance"]["threads"] == [1]
    found = {(row["what"], row["ours"], row["baseline"].partition(",")[0]) for row in content["rows"]}
    fc, tc, one = "all pairs at once", "Threshold-Clustering", "Threshold-Clustering, one start"
    assert found == {
        ("10 FC rounds", fc, "loop over clients"),
        ("FC round", fc, "loop over clients"),
        ("FC round", fc, "vmap"),
        ("FC round of 8 seeds", "all pairs and seeds at once", "loop over seeds and clients"),
        ("FC round", "streamed, memory_mb=16", "all at once"),
        *((tc, "Gram", name) for name in ("direct", "torch.cdist loop", "loop over points")),
        *(("aggregation", one, f"byzfl {name}") for name in RULES),
        ("aggregation", f"{tc}, n starts", "byzfl krum"),
        *(("aggregation", f"{tc}, n starts", f"sklearn {name}") for name in ("KMeans", "MeanShift")),
    }
    assert all(row["floor_ms"] > 0 and row["memory_mb"] > 0 and row["ratio"] > 0 for row in content["rows"])
    assert str(tmp_path) in capsys.readouterr().out


def test_cores_are_one_and_all(monkeypatch):
    monkeypatch.setattr(bench.os, "cpu_count", lambda: 4)
    assert bench.cores("cpu") == [1, 4] and bench.cores("cuda") == [1]


def test_wrong_results_are_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "SIZES", TINY)
    monkeypatch.setattr(bench, "cdist_loop", lambda points, starts, radius, rounds: 1.01 * starts)
    for rows in (bench.clustering_rows, bench.aggregation_rows):
        with pytest.raises(WrongResultError, match="differs by"):
            list(rows("cpu", 0.01))
    monkeypatch.setattr(bench, "by_loops", lambda problem, model, own: torch.ones(10))
    with pytest.raises(WrongResultError, match="differs by"):
        list(bench.round_rows("cpu", 0.01))


@pytest.mark.parametrize("argument", ["speed=3", "seconds", "device="])
def test_bad_options_are_refused(argument):
    with pytest.raises(SystemExit, match=f"{argument}: must be key=value with a key of device, seconds, results"):
        bench.main([argument])
