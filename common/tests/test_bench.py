"""A bench refuses to time what is wrong, pairs its samples, and writes the rows of the contract."""

import json
import time

import numpy as np
import pytest
import torch

from common.kernels import bench

KEYS = ["what", "size", "threads", "ours", "ours_ms", "baseline", "baseline_ms"]
KEYS += ["ratio", "ratio_lo", "ratio_hi", "floor_ms", "memory_mb", "n"]


def sleeper(seconds):
    return lambda: time.sleep(seconds)


def test_wrong_result_is_not_timed():
    def wrong():
        assert 1 == 2, "ours differs"

    def never():
        pytest.fail("timed although wrong")

    with pytest.raises(bench.WrongResultError, match="ours differs"):
        bench.compare("sum", "4", ("ours", never), {"torch": never}, check=wrong)


def test_ratio_is_baseline_time_over_our_time():
    contenders = {"three times slower": sleeper(0.015), "as fast": sleeper(0.005)}
    slower, equal = bench.compare("sleep", "5 ms", ("ours", sleeper(0.005)), contenders, check=lambda: None, rounds=7)
    # sleeping overshoots, by the same tenths of a millisecond in both
    assert 2 < slower.ratio < 4
    assert 0.5 < equal.ratio < 2
    assert slower.ratio_lo <= slower.ratio <= slower.ratio_hi
    assert slower.n == equal.n == 7


def test_samples_are_paired_by_round_and_all_contenders_share_each_round():
    trace = []
    calls = {name: (lambda name=name: (trace.append(name), time.sleep(0.003))) for name in "ab"}
    samples = bench.interleaved(calls, rounds=6)
    assert [len(values) for values in samples.values()] == [6, 6]
    rounds = [trace[i : i + 2] for i in range(len(trace) - 12, len(trace), 2)]
    assert all(sorted(pair) == ["a", "b"] for pair in rounds)
    assert len({tuple(pair) for pair in rounds}) == 2, "the order never changed"


def test_quantiles_are_numpys():
    values = sorted(np.random.default_rng(0).normal(size=31).tolist())
    for q in (0.2, 0.5, 0.8):
        assert bench._quantile(values, q) == pytest.approx(np.quantile(values, q), rel=1e-12)


def test_peak_memory_counts_what_lives_at_once():
    x = torch.ones(1_000_000)  # 4 MB

    def chain():
        y = x + 1  # 4 MB
        y = y * 2  # 8 MB while both live
        del y

    slack = 1000  # scalars that an operator wraps
    assert bench.peak_bytes(lambda: x.add_(1)) < slack
    assert abs(bench.peak_bytes(lambda: x + 1) - 4e6) < slack
    assert abs(bench.peak_bytes(chain) - 8e6) < slack


def test_threads_are_limited_and_restored():
    before = torch.get_num_threads()
    with bench.threads_of(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads=0"), bench.threads_of(0):
        pass


def test_floor_is_below_a_real_copy_and_grows_with_the_work(monkeypatch):
    a, b = torch.ones(4_000_000), torch.ones(4_000_000)
    traffic = 2 * 4 * a.numel()
    with bench.threads_of(1):
        copies = bench._timings(lambda: b.copy_(a), "cpu", 9)
        assert bench.floor(traffic, 0, 1) < 1.3 * sorted(copies)[4]
    monkeypatch.setattr(bench, "bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(bench, "gemm_rate", lambda *_: 1e10)
    assert bench.floor(1e6, 0, 1) == pytest.approx(1e-3)
    assert bench.floor(1e6, 2e8, 1) == pytest.approx(2e-2)


def test_written_file_follows_the_contract_and_keeps_rows_that_lose(tmp_path, capsys):
    rows = bench.compare("sleep", "1", ("ours", sleeper(0.01)), {"fast": sleeper(0.003)}, check=lambda: None, rounds=5)
    assert rows[0].ratio < 1
    path = bench.write("some_paper", rows, results=tmp_path)
    assert path == tmp_path / "some_paper" / "bench-cpu.json"
    content = json.loads(path.read_text())
    assert list(content["rows"][0]) == KEYS
    assert {"commit", "dirty", "versions", "device", "threads", "started", "wall_s"} <= set(content["provenance"])
    assert [path.name for path in path.parent.iterdir()] == ["bench-cpu.json"]
    bench.show(rows)
    assert "slower" in capsys.readouterr().out


def test_comparison_without_a_baseline_is_refused():
    with pytest.raises(ValueError, match="baselines"):
        bench.compare("sum", "4", ("ours", sleeper(0)), {}, check=lambda: None)
    with pytest.raises(ValueError, match="'same'"):
        bench.compare("sum", "4", ("same", sleeper(0)), {"same": sleeper(0)}, check=lambda: None)
