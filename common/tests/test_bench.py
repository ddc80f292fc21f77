"""A bench refuses to time what is wrong, pairs its samples, and writes the rows of the contract."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.kernels import bench

KEYS = ["what", "size", "threads", "ours", "ours_ms", "baseline", "baseline_ms"]
KEYS += ["ratio", "ratio_lo", "ratio_hi", "floor_ms", "memory_mb", "n"]


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only in `clock.call(seconds)`, on a machine that gets slower from round to round."""

    class Clock:
        now, calls, contenders = 0.0, 0, 1

        def call(self, seconds):
            def pass_time():
                self.now += seconds * (1 + self.calls // self.contenders)
                self.calls += 1

            return pass_time

    fake = Clock()
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: fake.now, time=time.time))
    return fake


def test_wrong_result_is_not_timed():
    def wrong():
        assert 1 == 2, "ours differs"

    def never():
        pytest.fail("timed although wrong")

    with pytest.raises(bench.WrongResultError, match="ours differs"):
        bench.compare("sum", "4", ("ours", never), {"torch": never}, check=wrong)


def test_ratio_is_baseline_time_over_our_time_of_the_same_round(clock):
    clock.contenders = 3
    others = {"three times slower": clock.call(0.015), "as fast": clock.call(0.005)}
    slower, equal = bench.compare("f", "1", ("ours", clock.call(0.005)), others, check=lambda: None, rounds=7)
    # the machine slows down eightfold on the way, and a paired ratio does not move
    assert slower.ratio == pytest.approx(3) and slower.ratio_lo == pytest.approx(slower.ratio_hi)
    assert equal.ratio == pytest.approx(1)
    assert slower.ours_ms == equal.ours_ms == pytest.approx(5 * 5)
    assert slower.n == equal.n == 7


def test_rounds_end_with_the_time_budget_but_not_before_five(clock):
    (row,) = bench.compare("f", "1", ("a", clock.call(1)), {"b": clock.call(1)}, check=lambda: None, budget_s=0.1)
    assert row.n == 5


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


def test_written_file_follows_the_contract_and_keeps_rows_that_lose(clock, tmp_path, capsys):
    rows = bench.compare("f", "1", ("ours", clock.call(0.01)), {"fast": clock.call(0.003)}, check=lambda: None)
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
        bench.compare("sum", "4", ("ours", int), {}, check=lambda: None)
    with pytest.raises(ValueError, match="'same'"):
        bench.compare("sum", "4", ("same", int), {"same": int}, check=lambda: None)
