"""The tests have the size and power they promise, and degenerate samples get an answer instead of NaN."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common import statistics as s
from common.pairing import both, rows

ALPHA = 0.05
SIMULATIONS = 3000
N = 8
# a rejection rate over SIMULATIONS draws lies within 4 standard errors of its expectation, but for 6 in 100 000 runs
SLACK = 4 * math.sqrt(ALPHA * (1 - ALPHA) / SIMULATIONS)
SAMPLES = np.random.default_rng(0).normal(size=(SIMULATIONS, 2, N))


def rejections(test, samples=SAMPLES, side="p"):
    return np.mean([getattr(test(*pair), side) <= ALPHA for pair in samples])


NULLS = {  # each test at the edge of its null hypothesis: rejects with probability alpha
    "paired_greater": lambda a, b: s.paired_greater(a, b),
    "paired_greater_margin": lambda a, b: s.paired_greater(a + 0.7, b, 0.7),
    "noninferior": lambda a, b: s.noninferior(a - 0.5, b, 0.5),
    "mean_greater": lambda a, b: s.mean_greater(a + 2, 2),
    "mean_less": lambda a, b: s.mean_less(a - 3, -3),
    "equivalence": lambda a, b: s.equivalence(a + 10, -10, 10),
    "ratio_greater": lambda a, b: s.ratio_greater(2 * np.exp(a), np.exp(b), 2.0),
    "ratio_noninferior": lambda a, b: s.ratio_noninferior(np.exp(a) / 1.5, np.exp(b), 1.5),
    "ratio_equivalence": lambda a, b: s.ratio_equivalence(100 * np.exp(a), 0.01, 100),
    "ratio_mean_greater": lambda a, b: s.ratio_mean_greater(np.exp(a), 1),
    "ratio_mean_less": lambda a, b: s.ratio_mean_less(np.exp(a), 1),
}


@pytest.mark.parametrize("name", NULLS)
def test_false_positive_rate_is_alpha_at_the_edge_of_the_null(name):
    assert abs(rejections(NULLS[name]) - ALPHA) < SLACK


@pytest.mark.parametrize("name", [n for n in NULLS if "equivalence" not in n])
def test_false_contradiction_rate_is_alpha_at_the_edge_of_the_null(name):
    assert abs(rejections(NULLS[name], side="p_opposite") - ALPHA) < SLACK


@pytest.mark.parametrize("width", [1e-6, 0.3, 3.0], ids=["a point", "narrow", "wide"])
def test_equivalence_is_contradicted_by_chance_at_most_alpha_of_the_time(width):
    assert rejections(lambda a, b: s.equivalence(a, 0.0, width), side="p_opposite") < ALPHA + SLACK


def test_power_of_the_paired_test_is_that_of_the_noncentral_t():
    shift = 1.0
    noncentrality = shift / math.sqrt(2 / N)
    expected = stats.nct.sf(stats.t.ppf(1 - ALPHA, N - 1), N - 1, noncentrality)
    assert abs(rejections(lambda a, b: s.paired_greater(a + shift, b)) - expected) < 4 * math.sqrt(0.25 / SIMULATIONS)


def test_pairing_removes_what_the_seeds_share():
    shared = np.random.default_rng(1).normal(size=N) * 100
    noise = np.random.default_rng(2).normal(size=(2, N)) * 0.1
    assert s.paired_greater(shared + noise[0] + 0.5, shared + noise[1]).p < 1e-3


def test_paired_test_is_scipy_s_one_sided_t_test():
    for a, b in SAMPLES[:20]:
        outcome = s.paired_greater(a, b, unit="points")
        expected = stats.ttest_rel(a, b, alternative="greater")
        interval = stats.ttest_rel(a, b).confidence_interval(0.95)
        np.testing.assert_allclose(outcome.p, expected.pvalue, rtol=1e-10)
        np.testing.assert_allclose([outcome.ci_low, outcome.ci_high], [interval.low, interval.high], rtol=1e-10)
        assert (outcome.n, outcome.unit) == (N, "points")


def test_tost_is_the_closed_form_of_schuirmann():
    x, low, high = SAMPLES[0, 0], -0.8, 1.1
    error = x.std(ddof=1) / math.sqrt(N)
    closed = max(stats.t.sf((x.mean() - low) / error, N - 1), stats.t.cdf((x.mean() - high) / error, N - 1))
    np.testing.assert_allclose(s.equivalence(x, low, high).p, closed, rtol=1e-10)


def test_equivalence_sees_a_mean_inside_and_contradicts_one_outside_on_either_side():
    x = 0.1 * SAMPLES[0, 0]
    assert s.equivalence(x, -1, 1).p < ALPHA
    for shift in (-2, 2):
        outside = s.equivalence(x + shift, -1, 1)
        assert outside.p > 0.5 and outside.p_opposite < ALPHA


def test_the_interval_covers_the_truth_95_times_in_100():
    covered = np.mean([o.ci_low <= 0 <= o.ci_high for o in (s.mean_greater(a, 0.0) for a, _ in SAMPLES)])
    assert abs(covered - 0.95) < SLACK


def test_the_ratio_interval_is_that_of_the_geometric_mean():
    a, b = np.exp(SAMPLES[0])
    outcome = s.ratio_greater(3 * a, b, 2.0)
    plain = s.paired_greater(np.log(3 * a), np.log(b), math.log(2.0))
    np.testing.assert_allclose(
        [outcome.effect, outcome.ci_low, outcome.ci_high], np.exp([plain.effect, plain.ci_low, plain.ci_high])
    )
    assert outcome.p == plain.p


finite = st.lists(st.tuples(*[st.floats(-1e3, 1e3)] * 2), min_size=1, max_size=9)


@given(finite, st.floats(-10, 10))
def test_the_opposite_is_the_mirrored_test(pairs, margin):
    a, b = np.array(pairs).T
    one, other = s.paired_greater(a, b, margin), s.paired_greater(b, a, -margin)
    assert (one.p, one.p_opposite) == pytest.approx((other.p_opposite, other.p), rel=1e-9, abs=1e-12)
    assert one.effect == -other.effect and one.p + one.p_opposite >= 1 - 1e-9


@given(finite, st.floats(-10, 10))
@settings(deadline=None)
def test_no_sample_gives_nan_p(pairs, margin):
    a, b = np.array(pairs).T
    for outcome in (s.paired_greater(a, b, margin), s.equivalence(a, margin, margin + 1), s.mean_less(b, margin)):
        assert 0 <= outcome.p <= 1 and 0 <= outcome.p_opposite <= 1


@pytest.mark.parametrize(
    ("shift", "p", "opposite"), [(0.0, 1, 1), (0.1, 0, 1), (-0.1, 1, 0)], ids=["identical", "above", "below"]
)
def test_a_constant_difference_is_decided_by_its_sign(shift, p, opposite):
    b = np.array([0.1, 0.2, 0.7])
    outcome = s.paired_greater(b + shift, b)
    assert (outcome.p, outcome.p_opposite) == (p, opposite)
    assert outcome.ci_low == outcome.effect == outcome.ci_high and "all 3 seeds" in outcome.detail


def test_a_constant_difference_equal_to_the_margin_up_to_rounding_supports_neither_side():
    outcome = s.paired_greater([0.3, 0.5, 1.1], [0.2, 0.4, 1.0], margin=0.1)
    assert (outcome.p, outcome.p_opposite) == (1, 1)


def test_one_seed_supports_nothing():
    outcome = s.paired_greater([5.0], [1.0])
    assert (outcome.p, outcome.p_opposite, outcome.n) == (1, 1, 1) and math.isnan(outcome.ci_low)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: s.paired_greater([1, 2, 3], [1, 2]), "same seeds"),
        (lambda: s.paired_greater(pd.Series([1, 2], [0, 1]), pd.Series([1, 2], [0, 2])), "seeds"),
        (lambda: s.paired_greater([1, math.nan], [1, 2]), "worst"),
        (lambda: s.mean_greater([], 0), "n >= 1"),
        (lambda: s.noninferior([1, 2], [1, 2], 0), "margin=0: must be > 0"),
        (lambda: s.equivalence([1, 2], 3, 2), "low=3, high=2"),
        (lambda: s.ratio_greater([1, -2], [1, 2]), "value -2"),
        (lambda: s.ratio_mean_less([1, 2], 0), "bound=0"),
        (lambda: s.ratio_noninferior([1, 2], [1, 2], 0.5), "factor=0.5: must be > 1"),
        (lambda: s.holm([0.1, 1.2]), "pvalues"),
        (lambda: s.every([]), "at least one"),
        (lambda: s.monotone_trend([1, 2], [1, 2]), ">= 3 points"),
        (lambda: s.exact_identity([1], [1, 2]), "shape"),
        (lambda: s.Outcome(0, 0, 0, 1, math.nan, 1, ""), "p=nan"),
    ],
)
def test_what_cannot_be_tested_is_refused_by_name_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_holm_agrees_with_a_hand_computed_example():
    # sorted .01 .03 .04 with factors 3 2 1: .03, .06, max(.06, .04)
    np.testing.assert_allclose(s.holm([0.04, 0.01, 0.03]), [0.06, 0.03, 0.06])
    np.testing.assert_allclose(s.holm([0.6, 0.7]), [1.0, 1.0])


def test_holm_keeps_the_family_wise_error():
    p = np.random.default_rng(3).uniform(size=(SIMULATIONS, 4))
    assert abs(np.mean([(s.holm(row) <= ALPHA).any() for row in p]) - (1 - (1 - ALPHA / 4) ** 4)) < SLACK


def test_every_holds_only_if_the_weakest_part_holds():
    strong, weak = s.Outcome(2, 1, 3, 8, 0.001, 0.999, "t"), s.Outcome(0.1, -1, 1, 6, 0.4, 0.6, "t")
    both = s.every([strong, weak], ["conv1", "conv2"])
    assert (both.p, both.effect, both.n) == (0.4, 0.1, 6) and "conv2" in both.detail
    assert s.every([strong, s.Outcome(-2, -3, -1, 8, 0.999, 0.001, "t")]).p_opposite == 0.002


def test_every_rejects_at_most_alpha_when_one_part_is_null():
    assert rejections(lambda a, b: s.every([s.mean_greater(a + 50, 0), s.mean_greater(b, 0)])) < ALPHA + SLACK


def trend(y, **kwargs):
    return s.monotone_trend(np.tile([1, 3, 10, 30], 3), y.ravel(), blocks=np.repeat([0, 1, 2], 4), **kwargs)


def test_trend_has_its_size_when_seeds_differ_in_level():
    draws = np.random.default_rng(4).normal(size=(400, 3, 4)) + 100 * np.arange(3)[:, None]
    rate = np.mean([trend(y, permutations=399).p <= ALPHA for y in draws])
    assert rate < ALPHA + 4 * math.sqrt(ALPHA * (1 - ALPHA) / 400)
    assert rate > 0.01


@pytest.mark.parametrize("increasing", [True, False])
def test_trend_sees_a_monotone_rise_in_the_stated_direction_only(increasing):
    y = np.array([[1, 2, 3, 4], [0, 5, 6, 7], [-3, -2, 9, 10]])
    outcome = trend(y, increasing=increasing)
    assert outcome.effect == pytest.approx(1.0) and outcome.n == 3
    assert (outcome.p < 0.01, outcome.p_opposite < 0.01) == (increasing, not increasing)


def test_trend_p_is_the_share_of_orders_that_rise_as_much():
    # all 3! orders of one block are equally likely; only one of them rises throughout
    assert s.monotone_trend([1, 2, 3], [4, 5, 6], permutations=20000).p == pytest.approx(1 / 6, abs=0.01)


def test_trend_of_a_constant_supports_nothing():
    outcome = trend(np.ones((3, 4)))
    assert (outcome.effect, outcome.p, outcome.p_opposite) == (0, 1, 1)


def test_identity_is_exact_unless_rounding_is_allowed():
    a = np.array([1.0, 2.0])
    nudged = a * (1 + 2**-50)
    assert s.exact_identity(a, a).p == 0
    assert (s.exact_identity(a, nudged).p, s.exact_identity(a, nudged).p_opposite) == (1, 0)
    assert s.exact_identity(a, nudged, rtol=2**-49).p == 0
    assert s.exact_identity([math.nan], [math.nan]).p == 1, "two diverged runs are no evidence of identity"


def test_bootstrap_interval_covers_the_mean_and_repeats_itself():
    draws = np.random.default_rng(5).exponential(size=(200, 30))
    intervals = [s.bootstrap_ci(x, resamples=499) for x in draws]
    covered = np.mean([low <= 1 <= high for low, high in intervals])
    assert 0.88 < covered < 0.99
    assert s.bootstrap_ci(draws[0], resamples=499) == intervals[0]
    assert s.bootstrap_ci(np.ones(4)) == (1, 1)


def runs(**columns):
    return pd.DataFrame(
        {"arm": ["a", "a", "b", "b"], "seed": [6, 5, 5, 6], "diverged": False, "accuracy": [0.6, 0.5, 0.1, 0.2]}
    ).assign(**columns)


def test_pairs_are_aligned_on_seed():
    a, b = s.paired(runs(), "a", "b", "accuracy")
    np.testing.assert_array_equal([a, b], [[0.5, 0.6], [0.1, 0.2]])


@pytest.mark.parametrize(
    ("mode", "worst", "expected"),
    [("max", None, 0.1), ("min", None, 0.5), ("max", 0.0, 0.0)],
    ids=["lowest", "highest", "stated"],
)
def test_a_diverged_run_counts_as_the_worst_value(mode, worst, expected):
    frame = runs(diverged=[True, False, False, False], accuracy=[0.99, 0.5, 0.1, 0.2])
    a, _ = s.paired(frame, "a", "b", "accuracy", mode=mode, worst=worst)
    np.testing.assert_array_equal(a, [0.5, expected])


def test_a_run_without_number_counts_as_diverged():
    np.testing.assert_array_equal(s.values(runs(accuracy=[math.nan, 0.5, 0.1, 0.2]), "a", "accuracy"), [0.5, 0.1])


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (runs(seed=[6, 5, 5, 7]), r"seeds \[6, 7\]"),
        (runs(seed=[5, 5, 5, 6]), "several rows for seed 5"),
        (runs(arm="a", seed=[1, 2, 3, 4]), "arm='b': must be one of a"),
        (runs(diverged=True), "give `worst`"),
        (runs().drop(columns="accuracy"), "'accuracy' is not recorded"),
    ],
    ids=["unpaired", "repeated", "no arm", "all diverged", "no metric"],
)
def test_pairing_refuses_what_it_cannot_pair(frame, message):
    with pytest.raises(ValueError, match=message):
        s.paired(frame, "a", "b", "accuracy")


@given(finite.filter(lambda pairs: len(pairs) > 2), st.floats(0.05, 1))
@settings(deadline=None)
def test_shared_rows_widen_the_interval_as_nadeau_and_bengio_say(pairs, overlap):
    a, b = (np.array(v) for v in zip(*pairs, strict=True))
    plain, shared = s.paired_greater(a, b), s.paired_greater(a, b, overlap=overlap)
    assert shared.effect == plain.effect
    width = shared.ci_high - shared.ci_low
    assert width == pytest.approx((plain.ci_high - plain.ci_low) * np.sqrt(1 + len(a) * overlap), abs=1e-9, rel=1e-6)
    assert "shared rows" in shared.test and "shared rows" not in plain.test


def test_shared_rows_in_every_test_of_means():
    x = np.array([0.1, 0.3, 0.2, 0.25, 0.15])
    error = x.std(ddof=1) * np.sqrt(1 / 5 + 0.25)
    expected = stats.t.sf((x.mean() - 0.05) / error, 4)
    assert s.mean_greater(x, 0.05, overlap=0.25).p == pytest.approx(expected)
    assert s.noninferior(x, np.zeros(5), 0.1, overlap=0.25).p == pytest.approx(stats.t.sf((x.mean() + 0.1) / error, 4))
    below = s.mean_less(x, 0.5, overlap=0.25)
    assert below.p == pytest.approx(stats.t.cdf((x.mean() - 0.5) / error, 4)) and "mean < 0.5" in below.test
    both = s.equivalence(x, 0.0, 0.5, overlap=0.25)
    assert both.p == pytest.approx(max(below.p, stats.t.sf(x.mean() / error, 4)))
    with pytest.raises(ValueError, match="overlap=-1"):
        s.mean_greater(x, 0.0, overlap=-1)


def test_rows_of_given_values_and_seeds_that_both_arms_have():
    frame = pd.DataFrame(
        {
            "arm": ["a", "a", "b", "b"],
            "seed": [1, 2, 2, 3],
            "optimizer.lr": [0.1, 0.1, 0.1, 0.3],
            "loss": [1.0, 2, 3, 4],
        }
    )
    assert rows(frame, arm="a")["loss"].tolist() == [1, 2]
    assert rows(frame, optimizer__lr=0.1 + 1e-12, seed=2)["loss"].tolist() == [2, 3]
    with pytest.raises(ValueError, match="no record with {'arm': 'c'}"):
        rows(frame, arm="c")
    with pytest.raises(ValueError, match="column 'optimizer.wd' is not recorded"):
        rows(frame, optimizer__wd=1)
    a, b = both(frame, "a", "b", "loss")
    assert (a.tolist(), b.tolist()) == ([2.0], [3.0])


def test_arms_without_a_common_seed_are_named():
    frame = pd.DataFrame({"arm": ["a", "b"], "seed": [1, 2], "loss": [0.1, 0.2]})
    with pytest.raises(ValueError, match=r"seeds \[1, 2\] are in only one of 'a' and 'b'"):
        both(frame, "a", "b", "loss")
    with pytest.raises(ValueError, match="arm='c': must be one of a, b"):
        both(frame, "a", "c", "loss")
