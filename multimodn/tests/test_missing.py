"""Rules for missing modalities: equalised presence removes what absence says about labels, and nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodn import ClassDecoder, MLPEncoder, MultiModN, Rows, Rule, fit, metrics
from multimodn.corruption import mnar
from multimodn.missing import RULES, equalising, leak, rule


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_after_thinning_every_label_has_it_equally_often(p0: float, p1: float, seed: int) -> None:
    y = torch.arange(4000) % 2
    visible = mnar(y, p0, seed, hide=0) & mnar(y, p1, seed, hide=1)
    keep = equalising({"a": visible}, {"t": y})["a"]
    share = [(keep * visible)[y == c].mean().item() for c in (0, 1)]
    assert share == pytest.approx([1 - max(p0, p1)] * 2, abs=0.01)
    if visible.any():
        assert keep.max() == 1.0  # one label keeps all it has


def test_nothing_is_dropped_where_absence_says_nothing() -> None:
    y = torch.arange(1000) % 2
    complete = torch.ones(1000, dtype=torch.bool)
    assert (equalising({"a": complete}, {"t": y})["a"] == 1).all()
    balanced = (torch.arange(1000) // 2) % 4 != 0  # a quarter of each label is missing
    assert (equalising({"a": balanced}, {"t": y})["a"] > 0.999).all()


def test_several_tasks_are_equalised_jointly() -> None:
    """Presence that depends on the exclusive or of two tasks tells nothing about either alone."""
    rng = torch.Generator().manual_seed(0)
    u, v = (torch.randint(2, (8000,), generator=rng) for _ in range(2))
    visible = torch.rand(8000, generator=rng) < torch.where(u == v, 0.9, 0.3)
    keep = equalising({"a": visible}, {"u": u, "v": v})["a"]
    shares = [(keep * visible)[(u == i) & (v == j)].mean().item() for i in (0, 1) for j in (0, 1)]
    assert max(shares) - min(shares) < 0.02
    assert keep[u == v].mean() < 0.4 and keep[u != v].mean() > 0.95


def test_modalities_are_equalised_one_by_one() -> None:
    y = torch.arange(2000) % 2
    masks = {"a": mnar(y, 0.8, 0), "b": torch.ones(2000, dtype=torch.bool)}
    keep = equalising(masks, {"t": y})
    assert (keep["b"] == 1).all() and keep["a"][y == 0].mean() == pytest.approx(0.2, abs=0.01)


def test_rare_missing_and_real_valued_labels() -> None:
    y = torch.zeros(1000, dtype=torch.long)
    y[:500], y[500:505], y[505:510] = 1, 2, 3
    visible = torch.ones(1000, dtype=torch.bool)
    visible[500:510] = False  # ten rows of two rare labels: their own stratum, drawn towards the overall share
    keep = equalising({"a": visible}, {"t": y})["a"]
    assert keep[500:510].unique().numel() == 1 and (keep > 0.2).all()
    value = torch.linspace(0, 1, 1000)
    value[:10] = torch.nan
    by_value = torch.rand(1000, generator=torch.Generator().manual_seed(0)) < 1 - 0.8 * torch.linspace(0, 1, 1000)
    keep = equalising({"a": by_value}, {"t": value})["a"]
    low, high = ((keep * by_value)[part].mean().item() for part in (slice(10, 250), slice(750, 1000)))
    assert low == pytest.approx(high, abs=0.06) and keep[:250].mean() < keep[750:].mean()
    labels = torch.stack([torch.arange(1000) % 2, torch.arange(1000) // 500], 1).float()
    assert equalising({"a": visible}, {"t": labels})["a"].shape == (1000,)


def test_leak_is_the_squared_covariance() -> None:
    states, present = torch.randn(3, 6, 4, dtype=torch.float64), torch.rand(2, 6) < 0.5
    s, m = states[-1], present.double()
    expected = 0.0
    for k in range(2):
        for j in range(4):
            expected += ((m[k] - m[k].mean()) * (s[:, j] - s[:, j].mean())).mean() ** 2
    torch.testing.assert_close(leak(states, present), torch.as_tensor(expected))
    assert leak(states, torch.ones(2, 6, dtype=torch.bool)) == 0


def test_rules_by_name() -> None:
    assert rule("robust") == RULES["robust"] == Rule(equalise=True)
    assert rule("batch") == Rule("batch", "batch") and rule("sample") == Rule()
    own = Rule(dropout=0.3)
    assert rule(own) is own
    with pytest.raises(ValueError, match="missing=never: must be one of sample, batch, robust"):
        rule("never")
    for key, bad in (("train", "x"), ("dropout", 1.0), ("leak_weight", -1.0), ("infer", "y")):
        with pytest.raises(ValueError, match=f"missing.{key}={bad}"):
            Rule(**{key: bad})


def test_the_robust_rule_survives_what_misleads_plain_training() -> None:
    """Two noisy views of a label; one is hidden for 90 % of class 1 in training, and of class 0 in the test."""
    rng = torch.Generator().manual_seed(0)

    def data(n: int, hide: int) -> tuple[dict, dict, dict]:
        y = torch.randint(2, (n,), generator=rng)
        x = {name: torch.randn(n, 2, generator=rng) + (2 * y - 1)[:, None] * 0.7 for name in "ab"}
        return x, {"t": y}, {"a": mnar(y, 0.9, 5, hide=hide), "b": torch.ones(n, dtype=torch.bool)}

    train, test = data(2000, 1), data(2000, 0)
    scores = {}
    for how in ("sample", "robust", "batch"):
        torch.manual_seed(0)
        model = MultiModN({n: MLPEncoder(2, 8, (8,)) for n in "ab"}, {"t": ClassDecoder(8)}, 8)
        x, y, masks = train
        fit(model, Rows.of(x, y, masks), missing=how, epochs=8, lr=3e-3)
        p = model.predict(test[0], test[2])["t"][:, 1]
        scores[how] = metrics.auroc(p, test[1]["t"]).item()
    assert scores["sample"] < 0.5 < 0.8 < scores["robust"]
    assert scores["batch"] > scores["sample"]


@pytest.mark.parametrize("most", [0, 1])
def test_a_yes_no_label_that_nearly_all_share_is_told_apart(most: int) -> None:
    """The quartiles of 0 and 1 are then one number."""
    y = torch.full((2000, 1), float(most))
    y[::8] = 1 - most
    visible = (y[:, 0] != most) | (torch.arange(2000) % 5 == 0)
    keep = equalising({"a": visible}, {"t": y})["a"]
    shares = [(keep * visible)[y[:, 0] == c].mean().item() for c in (0, 1)]
    assert shares == pytest.approx([0.2, 0.2], abs=0.02)


@pytest.mark.parametrize("edge", ["largest", "smallest"])
def test_real_values_of_which_many_are_the_extreme_one(edge: str) -> None:
    """As with limits of detection: the many equal ones are a stratum of their own."""
    value = torch.linspace(0, 1, 2000)
    many = torch.arange(2000) % 10 < 8
    value[many] = 2.0 if edge == "largest" else -1.0
    visible = ~many | (torch.arange(2000) % 3 == 0)
    keep = equalising({"a": visible}, {"t": value})["a"]
    shares = [(keep * visible)[part].mean().item() for part in (many, ~many)]
    assert shares == pytest.approx([1 / 3, 1 / 3], abs=0.02)


def test_labels_of_which_none_or_one_is_known_or_all_are_equal() -> None:
    visible = torch.arange(100) % 4 != 0
    for value in (torch.full((100,), torch.nan), torch.full((100,), 3.0), torch.full((100,), -100)):
        assert (equalising({"a": visible}, {"t": value})["a"] == 1).all()
    one = torch.full((100,), torch.nan)
    one[4] = 1.0
    assert torch.isfinite(equalising({"a": visible}, {"t": one})["a"]).all()


def test_a_missing_label_is_a_label_of_its_own() -> None:
    value = torch.full((400,), torch.nan)
    value[::2] = 0.0
    visible = ~value.isnan() | (torch.arange(400) % 4 == 1)
    for y in (value, torch.where(value.isnan(), -100, 0)):
        keep = equalising({"a": visible}, {"t": y})["a"]
        assert keep[::2].mean() == pytest.approx(0.5, abs=0.03) and (keep[1::2] == 1).all()


def test_the_share_of_few_rows_is_drawn_towards_that_of_all() -> None:
    """(rows that have it + 5 · overall share) / (rows + 5), by hand; a label nobody has it for leaves little."""
    y = torch.tensor([0] * 75 + [1] * 25)
    visible = y == 0
    keep = equalising({"a": visible}, {"t": y})["a"]
    share = [(75 + 5 * 0.75) / 80, 5 * 0.75 / 30]
    assert keep[:75].tolist() == pytest.approx([share[1] / share[0]] * 75) and (keep[75:] == 1).all()
    nobody = equalising({"a": torch.zeros(100, dtype=torch.bool)}, {"t": y})["a"]
    assert nobody.isfinite().all() and ((nobody >= 0) & (nobody <= 1)).all()


def test_labels_rarer_than_twenty_rows_share_a_stratum() -> None:
    for rare, together in ((19, True), (20, False)):
        y = torch.zeros(400, dtype=torch.long)
        y[:rare], y[rare : 2 * rare] = 1, 2
        visible = torch.ones(400, dtype=torch.bool)
        visible[:rare] = False
        keep = equalising({"a": visible}, {"t": y})["a"]
        assert (keep[0] == keep[2 * rare - 1]).item() == together
