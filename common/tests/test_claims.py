"""Verdicts follow the parts; controls catch tests that measure nothing and destroy what they say they destroy."""

import dataclasses

import numpy as np
import pytest

from common import claims as c
from common.statistics import Outcome, exact_identity, mean_greater, values
from common.tests.report_fakes import (
    base_beats_method,
    claim,
    four_claims,
    frame,
    method_beats_base,
    records,
    twin_beats_base,
)


def fixed(p, p_opposite=1.0):
    return lambda r: Outcome(1.0, 0.5, 1.5, 8, p, p_opposite, "fixed")


def follows_the_arms(p, p_opposite=1.0):
    """An outcome that turns round when the arms of table1 are swapped."""

    def test(r):
        gap = values(r["table1"], "method", "accuracy").mean() - values(r["table1"], "base", "accuracy").mean()
        return Outcome(gap, gap, gap, 8, *((p, p_opposite) if gap > 0 else (1.0, 1.0)), "fixed")

    return test


def word(parts, **kwargs):
    return c.judge(claim(parts=parts, **kwargs), records()).verdict


def test_four_claims_get_the_four_verdicts():
    verdicts = c.judge_all(four_claims(), records())
    assert [v.verdict for v in verdicts] == [c.REPRODUCED, c.CONTRADICTED, c.INCONCLUSIVE, c.NOT_TESTABLE]
    assert set(c.SHAPES) == {v.verdict for v in verdicts}


def test_a_claim_holds_only_if_all_its_parts_hold_after_holm():
    assert word({"a": follows_the_arms(0.02), "b": follows_the_arms(0.04)}) == c.REPRODUCED
    assert word({"a": follows_the_arms(0.03), "b": follows_the_arms(0.04)}) == c.INCONCLUSIVE, "0.03 > 0.05 / 2"
    assert word({"a": follows_the_arms(0.001), "b": follows_the_arms(0.06)}) == c.INCONCLUSIVE


def test_one_part_significantly_the_other_way_contradicts():
    assert word({"a": follows_the_arms(0.001), "b": fixed(0.99, 0.01)}) == c.CONTRADICTED
    assert word({"a": follows_the_arms(0.001), "b": fixed(0.97, 0.03)}) == c.INCONCLUSIVE, "0.03 > 0.05 / 2"


def test_the_decisive_part_is_the_weakest_or_the_one_that_contradicts():
    weak = c.judge(claim(parts={"a": fixed(0.001), "b": fixed(0.4)}), records())
    against = c.judge(claim(parts={"a": fixed(0.99, 0.001), "b": fixed(0.4)}), records())
    assert (weak.decisive.id, against.decisive.id) == ("C1b", "C1a")
    assert [part.id for part in weak.parts] == ["C1a", "C1b"]


def test_parts_are_judged_by_their_adjusted_p():
    parts = c.judge(claim(parts={"a": fixed(0.03), "b": fixed(0.04)}), records()).parts
    assert [part.p_adjusted for part in parts] == pytest.approx([0.06, 0.06])
    assert [part.verdict for part in parts] == [c.INCONCLUSIVE] * 2


def test_swapped_arms_turn_the_verdict_round():
    verdict = c.judge(claim(), records())
    assert verdict.verdict == c.REPRODUCED
    assert verdict.control == "arms method and base of table1 swapped: contradicted"
    assert verdict.parts[0].control.startswith("contradicted")


def test_a_test_that_its_control_cannot_change_is_not_believed():
    verdict = c.judge(claim(parts={"always": fixed(0.0)}), records())
    assert verdict.verdict == c.INCONCLUSIVE
    assert "control is reproduced" in verdict.reason


def test_a_control_that_cannot_be_tested_supports_nothing():
    verdict = c.judge(claim(control=c.swap_arms("table1", "method", "nobody")), records())
    assert verdict.verdict == c.INCONCLUSIVE and "not testable" in verdict.reason and "nobody" in verdict.control


def test_data_that_cannot_be_tested_leave_the_claim_inconclusive_with_the_reason():
    verdict = c.judge(
        claim(parts={"no such arm": lambda r: mean_greater(values(r["table1"], "x", "accuracy"), 0)}), records()
    )
    assert verdict.verdict == c.INCONCLUSIVE and "no such arm: arm='x'" in verdict.reason


def test_other_errors_are_not_swallowed():
    with pytest.raises(KeyError):
        c.judge(claim(parts={"typo": lambda r: r["tabel1"]}), records())


@pytest.mark.parametrize(("scale", "testable"), [("smoke", False), ("laptop", False), ("gpu", True), ("paper", True)])
def test_a_claim_waits_for_its_scale(scale, testable):
    verdict = c.judge(claim(scale_needed="gpu"), records(), scale)
    assert (verdict.verdict != c.NOT_TESTABLE) == testable
    assert testable or "scale=gpu" in verdict.reason


def test_judging_leaves_the_records_alone():
    before = records()
    copy = before["table1"].copy()
    for control in (
        c.swap_arms("table1", "method", "base"),
        c.permute("table1", "accuracy"),
        c.roll("table1", "accuracy"),
    ):
        control(before)
    assert before["table1"].equals(copy)


def test_swap_exchanges_exactly_two_arms():
    after = c.swap_arms("table1", "method", "base")(records())["table1"]
    before = records()["table1"]
    for a, b in (("method", "base"), ("base", "method"), ("twin", "twin")):
        np.testing.assert_array_equal(values(after, a, "accuracy"), values(before, b, "accuracy"))


@pytest.mark.parametrize("by", ["seed", ("seed", "threads"), None])
def test_permute_shuffles_within_its_groups_and_always_alike(by):
    before, control = records()["table1"], c.permute("table1", "accuracy", by=by)
    after = control(records())["table1"]
    assert after.equals(control(records())["table1"])
    for seed, rows in before.groupby("seed") if by else [(None, before)]:
        moved = after[after["seed"] == seed] if by else after
        assert sorted(moved["accuracy"]) == sorted(rows["accuracy"])
        assert list(moved["accuracy"]) != list(rows["accuracy"])
    assert after.drop(columns="accuracy").equals(before.drop(columns="accuracy"))


def test_permute_ends_where_all_values_are_equal():
    constant = records().replace("table1", frame().assign(accuracy=1.0))
    assert (c.permute("table1", "accuracy")(constant)["table1"]["accuracy"] == 1).all()


def test_roll_gives_every_arm_the_values_of_the_next():
    rates = (0.01, 0.1)
    before, after = (
        r["table1"] for r in (records(lr=rates), c.roll("table1", ("accuracy", "curve"))(records(lr=rates)))
    )
    following = {"base": "method", "method": "twin", "twin": "base"}
    for arm, other in following.items():
        for rate in rates:
            a, b = (f[(f["arm"] == name) & (f["optimizer.lr"] == rate)] for f, name in ((after, arm), (before, other)))
            assert exact_identity(a["accuracy"], b["accuracy"]).p == 0
    assert after["accuracy"].dtype == before["accuracy"].dtype


def test_chain_applies_every_control():
    control = c.chain(c.swap_arms("table1", "method", "base"), c.swap_arms("table1", "method", "base"))
    assert control(records())["table1"].equals(records()["table1"])
    assert c.describe(control).count("swapped") == 2


def test_a_plain_function_is_described_by_its_docstring():
    def shift(r):
        """Shift every value by one.

        And more.
        """
        return r

    assert c.describe(shift) == "Shift every value by one"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": {}}, "at least one test"),
        ({"scale_needed": "huge"}, "scale_needed='huge'"),
        ({"title": "word " * 13}, "at most 12 words"),
    ],
)
def test_a_malformed_claim_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(claim(), **change)


def test_two_claims_with_one_id_are_refused():
    with pytest.raises(ValueError, match="'C1' is used twice"):
        c.judge_all([claim(), claim()], records())


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale='huge'"):
        c.judge(claim(), records(), "huge")


def test_null_claims_are_reproduced_at_most_at_rate_alpha():
    verdicts = [c.judge(claim(parts={"twin > base": twin_beats_base}), records(seed=i)).verdict for i in range(200)]
    assert verdicts.count(c.REPRODUCED) <= 0.05 * 200 + 4 * (0.05 * 0.95 * 200) ** 0.5


def test_a_short_title_has_at_most_twelve_words():
    assert claim(title="").short == "The method is more accurate than the base on every seed that …"
    assert claim().short == "Method beats base"


def test_opposite_claims_get_opposite_verdicts():
    assert word({"a": method_beats_base}) == c.REPRODUCED
    assert word({"a": base_beats_method}) == c.CONTRADICTED
