"""The robust rules compute what their names say, and need of byzfl nothing but its aggregators."""

import importlib.util
import sys

import pytest
import torch

from clustered_pfl import rivals
from clustered_pfl.baselines import Global
from clustered_pfl.rivals import RULES

torch.set_num_threads(1)
F64 = torch.float64
# byzfl computes in float32: a few dozen roundings of numbers of size 4
CLOSE = {"rtol": 0, "atol": 64 * 2.0**-24 * 4}


def krum_scores(z, f):
    """Mean squared distance from the n - f - 1 nearest others."""
    return [sum(sorted((a - b).square().sum().item() for b in z)[1 : len(z) - f]) / (len(z) - f - 1) for a in z]


def krum(z, f):
    return z[min(range(len(z)), key=krum_scores(z, f).__getitem__)]


def multi_krum(z, f):
    best = sorted(range(len(z)), key=krum_scores(z, f).__getitem__)[: len(z) - f]
    return sum(z[i] for i in best) / len(best)


def median(z, f):
    ordered = [sorted(column) for column in z.T.tolist()]
    return torch.tensor([(c[(len(c) - 1) // 2] + c[len(c) // 2]) / 2 for c in ordered], dtype=z.dtype)


def trimmed_mean(z, f):
    ordered = [sorted(column)[f : len(z) - f] for column in z.T.tolist()]
    return torch.tensor([sum(c) / len(c) for c in ordered], dtype=z.dtype)


def geometric_median(z, f):
    guess = torch.zeros_like(z[0])
    for _ in range(3):
        weights = [1 / max((x - guess).norm().item(), 0.1) for x in z]
        guess = sum(w * x for w, x in zip(weights, z, strict=True)) / sum(weights)
    return guess


PLAIN = {
    "krum": krum,
    "multi_krum": multi_krum,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "geometric_median": geometric_median,
}


def messages(n, d, seed, dtype=F64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


@pytest.fixture
def fresh(monkeypatch):
    """No byzfl imported yet, and none left behind."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "byzfl"]:
        monkeypatch.delitem(sys.modules, name)
    rivals._byzfl.cache_clear()
    yield monkeypatch
    rivals._byzfl.cache_clear()


@pytest.mark.parametrize("name", PLAIN)
def test_every_rule_is_its_formula(name):
    assert set(PLAIN) == set(RULES)
    for n, d, f, seed in [(5, 3, 1, 0), (8, 1, 3, 1), (9, 20, 0, 2), (12, 7, 5, 3)]:
        z = messages(n, d, seed)
        torch.testing.assert_close(RULES[name](f)(z), PLAIN[name](z, f), **CLOSE)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_aggregate_has_the_dtype_of_the_messages_and_leaves_them_alone(dtype, name):
    z = messages(7, 4, 4, dtype)
    kept = z.clone()
    found = RULES[name](2)(z)
    assert found.dtype == dtype and found.shape == (4,) and torch.equal(z, kept)


@pytest.mark.parametrize("name", RULES)
def test_far_attackers_do_not_move_the_honest_mean_far(name):
    z = messages(20, 5, 5)
    z[:6] = 1e6
    assert RULES[name](6)(z).norm() < (5e5 if name == "geometric_median" else 5)


@pytest.mark.parametrize(("value", "harmed"), [("nan", {"krum", "median", "geometric_median"}), ("inf", set())])
def test_messages_that_are_not_finite_harm_the_rules_that_the_docstring_names(value, harmed):
    z = messages(9, 4, 6)
    z[:2] = float(value)
    assert {name for name in RULES if not RULES[name](2)(z).isfinite().all()} == harmed


def test_bad_numbers_of_attackers_are_refused():
    for name, n in (("median", -1), ("krum", 1.5), ("geometric_median", True)):
        with pytest.raises(ValueError, match=f"n_byzantine={n}: must be an integer >= 0"):
            RULES[name](n)
    for name in ("krum", "multi_krum", "trimmed_mean"):
        with pytest.raises(ValueError, match="2f"):
            RULES[name](3)(messages(6, 2, 7))


def test_rules_work_where_torchvision_and_seaborn_do_not(fresh):
    for missing in ("torchvision", "seaborn"):
        fresh.setitem(sys.modules, missing, None)
    z = messages(6, 3, 8)
    torch.testing.assert_close(RULES["krum"](1)(z), krum(z, 1), **CLOSE)
    assert not any(name.partition(".")[0] == "byzfl" for name in sys.modules), "a half-made byzfl is left behind"


def test_a_byzfl_that_is_already_imported_is_used_and_stays(fresh):
    whole = importlib.util.module_from_spec(importlib.util.find_spec("byzfl"))
    fresh.setitem(sys.modules, "byzfl", whole)
    found = rivals._byzfl()
    assert sys.modules["byzfl"] is whole and sys.modules["byzfl.aggregators"] is found


def test_without_byzfl_the_error_says_what_to_install(fresh):
    fresh.setitem(sys.modules, "byzfl", None)
    with pytest.raises(ImportError, match="pip install --no-deps byzfl"):
        RULES["median"](1)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_an_aggregate_of_global(name):
    def loss(params, batch):
        return (params["w"] - batch).square().sum() / 2

    targets, sent = messages(8, 3, 9), torch.full((2, 3), 4.0, dtype=F64)
    start = {"w": torch.zeros(8, 3, dtype=F64)}
    model = Global(loss, start, lr=0.5, aggregate=RULES[name](2), n_byzantine=2, attack=lambda exchange: sent)
    model.step(targets)
    expected = -0.5 * PLAIN[name](torch.cat([-targets, sent]), 2)
    torch.testing.assert_close(model.params["w"], expected.expand(8, 3), **CLOSE)
