"""Every claim's test says `reproduced` on records in which the paper is right by construction, and nothing like it when
arms are swapped, the effect is taken away, or a number lies just beyond its bound."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from clustered_pfl.claims import CLAIMS
from clustered_pfl.judging.samples import fewer, slopes
from clustered_pfl.tests.worlds import ATTACKED, RNG, changed, right
from common.claims import CONTRADICTED, NOT_TESTABLE, REPRODUCED, Claim, judge
from common.compose import conf_dir
from common.statistics import Outcome
from common.tests.report_fakes import FakeRecords

BY_ID = {claim.id: claim for claim in CLAIMS}
# no comparison of arms, or a control that leaves no effect instead of the opposite one
NO_OPPOSITE = {"C4.cliff"}


@pytest.fixture(scope="module")
def records() -> FakeRecords:
    return right()


def scale(claim: Claim) -> str:
    return claim.scale_needed or "laptop"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_a_world_in_which_the_paper_is_right_is_judged_reproduced_and_the_control_is_not(
    claim: Claim, records: FakeRecords
) -> None:
    verdict = judge(claim, records, scale(claim))
    assert verdict.verdict == REPRODUCED, (verdict.reason, [(p.label, p.outcome) for p in verdict.parts])
    control = judge(claim, claim.control(records), scale(claim))
    assert control.verdict != REPRODUCED
    assert control.parts, control.reason  # it could be tested
    if claim.id not in NO_OPPOSITE:
        assert control.verdict == CONTRADICTED


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_a_control_leaves_the_records_themselves_alone(claim: Claim, records: FakeRecords) -> None:
    before = {name: records[name].copy() for name in claim.experiments}
    claim.control(records)
    for name, frame in before.items():
        pd.testing.assert_frame_equal(records[name], frame)


def test_claims_of_the_papers_own_data_wait_for_it(records: FakeRecords) -> None:
    waiting = [claim for claim in CLAIMS if claim.scale_needed]
    assert {claim.id for claim in waiting} == {"C4.cifar", "C5.cifar"}
    for claim in waiting:
        assert claim.scale_needed == "paper"
        assert judge(claim, records, "gpu").verdict == NOT_TESTABLE


def test_claims_are_those_of_the_paper_in_its_order() -> None:
    stems = [claim.id.split(".")[0] for claim in CLAIMS]
    assert list(dict.fromkeys(stems)) == [f"C{i}" for i in range(1, 12)]
    assert len(BY_ID) == len(CLAIMS)


def test_every_experiment_a_claim_reads_exists() -> None:
    names = {path.stem for path in (conf_dir("clustered_pfl") / "experiment").glob("*.yaml")}
    assert {e for claim in CLAIMS for e in claim.experiments} <= names


def test_a_part_reads_no_experiment_that_its_claim_does_not_name(records: FakeRecords) -> None:
    for claim in CLAIMS:
        few = FakeRecords({name: records[name] for name in claim.experiments})
        assert judge(claim, few, scale(claim)).parts


COMPARED = {
    "fig3": "log10_distance", "cliff": "log10_distance", "table1": "test_accuracy", "official": "test_accuracy",
    "fig4": "test_accuracy", "fig5": "test_accuracy", "fig6": "test_accuracy", "assignment": "exact",
    "momentum": "pairs", "motivation": "pairs", "rate": "error",
}  # fmt: skip


def test_without_an_effect_nothing_that_compares_arms_is_reproduced(records: FakeRecords) -> None:
    flat = records
    for name, metric in COMPARED.items():
        noise = 0.9 + 0.002 * np.random.default_rng(1).standard_normal(len(flat[name]))
        flat = flat.replace(name, flat[name].assign(**{metric: noise}))
    judged = [c for c in CLAIMS if set(c.experiments) & set(COMPARED)]
    assert len(judged) > 15
    # C1.truth asks for no difference, and there is none; so does C3.truth, but its control holds as well
    assert {c.id for c in judged if judge(c, flat, scale(c)).verdict == REPRODUCED} == {"C1.truth"}


def test_every_part_holds_by_itself_over_all_seeds(records: FakeRecords) -> None:
    for claim in CLAIMS:
        for label, test in claim.parts.items():
            outcome = test(records)  # type: ignore[arg-type]
            assert isinstance(outcome, Outcome) and outcome.p < 0.05 < outcome.p_opposite, (claim.id, label)
            assert outcome.n >= 8, (claim.id, label)


@pytest.mark.parametrize("loser", ["local", "global", "ditto", "ifca", "knn_per"])
@pytest.mark.parametrize("kind", ["private_label", "rotation"])
def test_an_arm_that_fc_does_not_beat_on_one_task_contradicts_the_claim(
    loser: str, kind: str, records: FakeRecords
) -> None:
    claim = BY_ID["C3.others" if loser in ("ifca", "knn_per") else "C3"]
    better = changed(
        records, "table1", "test_accuracy", lambda _: 0.935 + 1e-4 * RNG.random(), arm=loser, partition__kind=kind
    )
    assert judge(claim, better).verdict == CONTRADICTED


@pytest.mark.parametrize("arm", ["local", "global", "ditto", "ifca"])
def test_cifar_claims_name_every_rival(arm: str, records: FakeRecords) -> None:
    better = changed(records, "fig4", "test_accuracy", lambda _: 0.95 + 1e-4 * RNG.random(), arm=arm)
    assert judge(BY_ID["C4.cifar"], better, "paper").verdict == CONTRADICTED
    if arm in ("local", "global"):
        better = changed(records, "fig5", "test_accuracy", lambda _: 0.97 + 1e-4 * RNG.random(), arm=arm)
        assert judge(BY_ID["C5.cifar"], better, "paper").verdict == CONTRADICTED


@pytest.mark.parametrize("attack", ATTACKED)
def test_each_attack_is_judged(attack: str, records: FakeRecords) -> None:
    claim = BY_ID["C6.adaptive" if attack in ("inside_radius", "non_finite") else "C6"]
    for arm, level in (("fc", 0.879), ("global", 0.93)):
        other = changed(
            records, "fig6", "test_accuracy", lambda _, v=level: v + 1e-4 * RNG.random(), arm=arm, attack__name=attack
        )
        assert judge(claim, other).verdict == CONTRADICTED, arm


def _near(value: float):  # type: ignore[no-untyped-def]
    """A value with a noise far below its distance to any bound."""
    return lambda _: value * (1 + 1e-5 * RNG.standard_normal())


def _scaled(factors):  # type: ignore[no-untyped-def]
    """Entries of a list-valued metric times factors, with such a noise."""
    return lambda old: [x * f * (1 + 1e-5 * RNG.standard_normal()) for x, f in zip(old, factors, strict=True)]


def _slope(slope: float, members=(4, 8, 16, 32, 64)):  # type: ignore[no-untyped-def]
    return _scaled([n ** (slope + 1) for n in members])


def _excess(slope: float):  # type: ignore[no-untyped-def]
    return _scaled([delta ** (slope - 1) for delta in (10.0, 40.0, 160.0) for _ in range(3)])


P, R = {"partition__kind": "private_label"}, {"partition__kind": "rotation"}
FLOORED = [1.7, 1.2]  # at Delta = 2 and 3, which the floor does not judge
BOUNDS = [  # claim, experiment, metric, which rows, a value within the bound, one beyond
    ("C1.truth", "fig3", "log10_distance", {"arm": "fc", "task__clusters": 16}, _near(-1.51), _near(-1.49)),
    ("C1.truth", "fig3", "log10_distance", {"arm": "fc", "task__clusters": 16}, _near(-2.49), _near(-2.51)),
    ("C1.truth", "fig3", "log10_distance", {"arm": "fc", "task__dtype": "float32"}, _near(-3.71), _near(-3.69)),
    ("C2", "fig2", "intra_max", {}, _near(99.0), _near(101.0)),
    ("C2", "fig2", "intra_slope", {}, _near(0.0099), _near(0.0101)),
    ("C2.separation", "fig2", "inter_min", {}, _near(1.01e5), _near(0.99e5)),
    ("C3.truth", "table1", "test_accuracy", {"arm": "fc", **P}, _near(0.921), _near(0.919)),
    ("C3.truth", "table1", "test_accuracy", {"arm": "fc", **R}, _near(0.901), _near(0.899)),
    ("C3.code", "official", "test_accuracy", {"arm": "local_redraw"}, _near(0.801), _near(0.799)),
    ("C3.code", "official", "test_accuracy", {"arm": "fc_neg_prob"}, _near(0.929), _near(0.931)),
    ("C3.code", "official", "test_accuracy", {"arm": "local_neg_prob"}, _near(0.749), _near(0.751)),
    ("C3.code", "official", "test_accuracy", {"arm": "ground_truth_neg_prob"}, _near(0.939), _near(0.941)),
    ("C4", "fig4", "test_accuracy", {"arm": "local_steps", "method__local_steps": 5}, _near(0.944), _near(0.946)),
    ("C4", "fig4", "test_accuracy", {"arm": "local_steps", "method__local_steps": 5}, _near(0.886), _near(0.884)),
    ("C4", "fig4", "test_accuracy", {"method__radius__quantile": 0.025}, _near(0.929), _near(0.931)),
    ("C4", "fig4", "test_accuracy", {"method__radius__quantile": 0.4}, _near(0.929), _near(0.931)),
    ("C4.cliff", "cliff", "log10_distance", {"method__radius__quantile": 0.4}, _near(-3.99), _near(-4.01)),
    ("C4.cliff", "cliff", "log10_distance", {"method__radius__quantile": 0.1}, _near(-6.99), _near(-7.01)),
    ("C5", "fig5", "test_accuracy", {"arm": "local"}, _near(0.949), _near(0.951)),
    ("C6", "fig6", "test_accuracy", {"arm": "fc", "attack__name": "bit_flip"}, _near(0.881), _near(0.879)),
    ("C6", "fig6", "test_accuracy", {"arm": "global", "attack__name": "large_gradient"}, _near(0.149), _near(0.151)),
    *[
        ("C7", "fig7", "plateau", {"task__std": s}, _near(1.049 * v), _near(1.051 * v))
        for s, v in ((0.5, 1.5), (1.0, 2.95))
    ],
    *[
        ("C7", "fig7", "plateau", {"task__std": s}, _near(0.951 * v), _near(0.949 * v))
        for s, v in ((2.0, 5.9), (4.0, 13.4))
    ],
    ("C7", "fig7", "curve", {"task__std": 2.0}, lambda _: [1.0, 0.5, 0.5009], lambda _: [1.0, 0.5, 0.5011]),
    ("C8", "theory", "errors", {"arm": "members"}, _slope(-1.14), _slope(-1.16)),
    ("C8", "theory", "errors", {"arm": "members"}, _slope(-0.86), _slope(-0.84)),
    (
        "C8",
        "theory",
        "errors",
        {"arm": "separation"},
        _scaled([1.21 / 1.7, 1, 1, 1, 1, 1]),
        _scaled([1.19 / 1.7, 1, 1, 1, 1, 1]),
    ),
    (
        "C8",
        "theory",
        "errors",
        {"arm": "separation"},
        _scaled([1, 1, 1.09 / 1.05, 1, 1, 1]),
        _scaled([1, 1, 1.11 / 1.05, 1, 1, 1]),
    ),
    ("C8", "theory", "errors", {"arm": "separation"}, _scaled([1, 1, 1, 1, 0.91, 1]), _scaled([1, 1, 1, 1, 0.89, 1])),
    ("C8", "theory", "excess", {"arm": "byzantine"}, _excess(1.14), _excess(1.16)),
    ("C8", "theory", "excess", {"arm": "byzantine"}, _excess(0.86), _excess(0.84)),
    ("C8", "theory", "excess", {"arm": "byzantine"}, _scaled([4.99] * 9), _scaled([5.01] * 9)),
    ("C8", "theory", "excess", {"arm": "far"}, _scaled([1, 1, 1, 1, 9.1, 1]), _scaled([1, 1, 1, 1, 9.3, 1])),
    ("C8", "theory", "errors", {"arm": "far"}, _scaled([1, 1, 1, 1, 1, 1.009]), _scaled([1, 1, 1, 1, 1, 1.011])),
    ("C10", "momentum", "pairs", {"arm": "mc", "method__alpha": 1.0}, _near(0.899), _near(0.901)),
    ("C10", "momentum", "final_error", {"arm": "mc_long", "method__alpha": 1.0}, _near(0.21), _near(0.19)),
    *[
        ("C11", "motivation", "occupied", {"arm": a}, _near(3.9), _near(4.1))
        for a in ("ifca", "ifca_gradient", "hypcluster")
    ],
    ("C11", "motivation", "pairs", {"arm": "ifca"}, _near(0.99), _near(1.01)),
]


@pytest.mark.parametrize(("name", "experiment", "metric", "where", "within", "beyond"), BOUNDS)
def test_bounds_are_where_the_claims_say(name, experiment, metric, where, within, beyond, records) -> None:  # type: ignore[no-untyped-def]
    claim = BY_ID[name]
    assert judge(claim, changed(records, experiment, metric, within, **where)).verdict == REPRODUCED
    assert judge(claim, changed(records, experiment, metric, beyond, **where)).verdict == CONTRADICTED


@pytest.mark.parametrize(
    ("arm", "within", "beyond"), [("fc", -0.81, -0.79), ("fc", -1.19, -1.21), ("both", -1.1, -1.21)]
)
def test_the_rates_slope_and_its_gap_to_the_ground_truth(arm: str, within: float, beyond: float, records) -> None:  # type: ignore[no-untyped-def]
    def world(slope: float, truth: float) -> FakeRecords:
        found = records
        for name, own in (("fc", slope), ("ground_truth", truth)):
            for n in (2, 4, 8, 16, 32):
                found = changed(found, "rate", "error", _near(n**own), arm=name, task__clients=n)
        return found

    for slope, word in ((within, REPRODUCED), (beyond, CONTRADICTED)):
        assert judge(BY_ID["C9"], world(slope, slope)).verdict == word
    for gap, word in ((0.09, REPRODUCED), (-0.09, REPRODUCED), (0.11, CONTRADICTED), (-0.11, CONTRADICTED)):
        assert judge(BY_ID["C9"], world(-1.0, -1.0 - gap)).verdict == word


def test_one_setup_above_the_bound_is_enough(records: FakeRecords) -> None:
    test = BY_ID["C8"].parts["excess below βσΔ everywhere"]
    for factor, below in ((4.99, True), (5.01, False)):
        world = changed(records, "theory", "excess", _scaled([1, 1, 1, factor, 1, 1, 1, 1, 1]), arm="byzantine")
        assert (test(world).p < 0.05) == below  # type: ignore[arg-type]


def test_a_run_has_lost_a_cluster_ten_points_below_its_ground_truth(records: FakeRecords) -> None:
    claim = BY_ID["C3.lost"]

    def world(gap: float) -> FakeRecords:
        frame = records["table1"].copy()
        hit = (frame["arm"] == "ifca") & (frame["seed"] % 2 == 0) & (frame["partition.kind"] == "private_label")
        level = np.where(frame["arm"] == "ground_truth", 0.94, np.where(hit, 0.94 - gap, 0.93))
        return records.replace("table1", frame.assign(test_accuracy=level))

    assert judge(claim, world(0.101)).verdict == REPRODUCED
    assert judge(claim, world(0.099)).verdict != REPRODUCED


def test_one_object_must_cost_ifca_twenty_points(records: FakeRecords) -> None:
    steady = changed(records, "table1", "test_accuracy", _near(0.9), arm="ifca")
    for level, word in ((0.699, REPRODUCED), (0.701, CONTRADICTED)):
        shared = changed(steady, "official", "test_accuracy", _near(level), arm="ifca_shared")
        assert judge(BY_ID["C3.code"], shared).verdict == word


def test_fishers_test_needs_enough_events() -> None:
    none, all_ = np.zeros(20, bool), np.ones(20, bool)
    some = np.arange(20) < 5
    # 5 of 20 against none: C(20, 5) / C(40, 5)
    assert fewer(none, some).p == pytest.approx(15504 / 658008, rel=1e-9)
    assert fewer(none, np.arange(20) < 4).p > 0.05
    assert fewer(some, none).p == pytest.approx(1) and fewer(some, none).p_opposite < 0.05
    found = fewer(none, all_)
    # Newcombe's interval of 1 - 0 from Wilson's ends z^2 / (n + z^2) = .16113 of both
    assert (found.effect, found.n) == (1, 20)
    assert found.ci_low == pytest.approx(1 - np.hypot(0.161125, 0.161125), abs=1e-5) and found.ci_high == pytest.approx(
        1
    )
    equal = fewer(some, some)
    assert equal.effect == 0 and equal.ci_low == pytest.approx(-equal.ci_high)


def test_slopes_are_those_of_straight_lines_in_logarithms() -> None:
    x = np.array([2.0, 4.0, 16.0])
    y = np.stack([3 * x**-1.0, 0.5 * x**0.25, -x])
    found = slopes(x, y)
    assert found[:2] == pytest.approx([-1, 0.25], rel=1e-12) and np.isnan(found[2])
