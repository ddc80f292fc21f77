"""Every claim's test says `reproduced` in a world in which it is right, and nothing like it where an effect is taken
away, arms are missing, or a number lies just beyond its bound."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from common.claims import CONTRADICTED, INCONCLUSIVE, NOT_TESTABLE, REPRODUCED, Claim, Verdict, judge
from common.tests.report_fakes import FakeRecords
from common.tests.worlds import changed
from mulfree_training.claims import CLAIMS
from mulfree_training.judging.arithmetic import MEANS, TABLE
from mulfree_training.tests import worlds
from mulfree_training.tests.worlds import beside, level, without

BY_ID = {claim.id: claim for claim in CLAIMS}
ANY_SCALE = {"C4.proof", "C6", "C6.alpha", "C7", "C8"}  # without trainings
ACCURACY, NLL, BLEU = "test_accuracy", "test_nll", "test_bleu"
REPLACED = ("matmul", "softmax", "norm", "loss")
NETWORKS = ("vgg13", "resnet20", "resnet110", "resnext20", "convmixer")


@pytest.fixture(scope="module")
def laptop() -> FakeRecords:
    return worlds.records("laptop")


@pytest.fixture(scope="module")
def paper() -> FakeRecords:
    return worlds.records("paper")


def scale(claim: Claim) -> str:
    return claim.scale_needed or "laptop"


def words(verdict: Verdict) -> list[str]:
    return [part.verdict for part in verdict.parts]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_a_right_world_is_judged_reproduced_and_its_control_in_no_part(
    claim: Claim, laptop: FakeRecords, paper: FakeRecords
) -> None:
    world = paper if claim.scale_needed else laptop
    verdict = judge(claim, world, scale(claim))
    assert verdict.verdict == REPRODUCED, (verdict.reason, [(p.label, p.outcome) for p in verdict.parts])
    seeds = 3 if claim.scale_needed else 1 if claim.experiments == ("proof",) else 5
    assert all(part.outcome.n >= seeds for part in verdict.parts)
    assert all(part.outcome.p < 0.05 < part.outcome.p_opposite for part in verdict.parts)
    control = judge(claim, claim.control(world), scale(claim))
    assert control.parts, control.reason  # it could be tested
    assert words(control).count(REPRODUCED) == 0
    assert all(part.outcome.p > 0.05 for part in control.parts)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_a_control_leaves_the_records_themselves_alone(claim: Claim, laptop: FakeRecords, paper: FakeRecords) -> None:
    world = paper if claim.scale_needed else laptop
    before = {name: world[name].copy() for name in claim.experiments}
    claim.control(world)
    for name, frame in before.items():
        pd.testing.assert_frame_equal(world[name], frame)


def test_claims_are_numbered_and_say_where_they_come_from() -> None:
    stems = [claim.id.split(".")[0] for claim in CLAIMS]
    assert list(dict.fromkeys(stems)) == [f"C{i}" for i in range(1, 11)] and len(BY_ID) == len(CLAIMS)
    assert stems == sorted(stems, key=lambda stem: int(stem[1:]))
    assert all(claim.title and claim.source and claim.paper_value for claim in CLAIMS)
    recorded = {e for e, jobs in worlds.plans("laptop").items() if jobs} | {"imagenet", "translation"}
    assert {e for claim in CLAIMS for e in claim.experiments} == {e for e in recorded if not e.endswith("_tune")}


def test_claims_of_the_papers_own_scale_wait_for_it(laptop: FakeRecords) -> None:
    waiting = {claim.id for claim in CLAIMS if judge(claim, laptop, "laptop").verdict == NOT_TESTABLE}
    assert waiting == {"C1.paper", "C1.imagenet", "C2.paper", "C4.paper"} == {c.id for c in CLAIMS if c.scale_needed}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_a_claim_on_the_twins_says_at_paper_scale_what_it_lacks(claim: Claim, paper: FakeRecords) -> None:
    verdict = judge(claim, paper, "paper")
    if claim.scale_needed or claim.id in ANY_SCALE:
        assert verdict.verdict == REPRODUCED
    else:
        assert verdict.verdict == INCONCLUSIVE and "could not be tested" in verdict.reason
        assert "no records at this scale" in verdict.reason or "arm=" in verdict.reason


PAIRS = {"standard", "matmul"}
READ: dict[str, dict[str, set[str]]] = {  # claim -> experiment -> arms
    "C1": {"vision": PAIRS, "language": PAIRS},
    "C1.long": {"language_long": {*PAIRS, "full"}},
    "C2": {"convolution": PAIRS},
    "C3": {"vision": {"standard", *REPLACED}, "language": {"standard", *REPLACED}},
    "C4": {"vision": {"standard", "full"}, "language": {"standard", "full"}},
    "C4.proof": {"proof": set(worlds.FINDINGS)},
    "C5": {"vision": {"full", "full_exact"}, "language": {"full", "full_exact"}},
    "C5.accuracy": {"vision": {"full", "full_exact"}},
    "C5.matmul": {"vision": {"matmul", "matmul_exact"}, "language": {"matmul", "matmul_exact"}},
    "C5.loss": {"vision": {"full_exact", "full_exact_but_loss"}, "language": {"full_exact", "full_exact_but_loss"}},
    "C5.temperature": {"vision": {"full", "full_exact"}, "language": {"full", "full_exact"}},
    "C6": {"primitives": {"pam"}},
    "C6.alpha": {"primitives": {"alpha", "pam"}},  # the latter as control
    "C7": {"affine": {"pam", "pam_approx", "standard"}},
    "C8": {"proof": {"full"}},
    "C9": {e: {"matmul", "matmul_alpha", "full", "full_alpha"} for e in ("vision", "language")},
    "C10": {"vision": {"matmul_own", "full_own", "adder"}},
    "C10.power": {"vision": {"matmul_own", "power_of_two"}},
    "C1.paper": {"vision": PAIRS},
    "C1.imagenet": {"imagenet": PAIRS},
    "C2.paper": {"convolution": {*NETWORKS, *(f"{network}_matmul" for network in NETWORKS)}},
    "C4.paper": {"translation": {"standard", *REPLACED, "full"}},
}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_a_missing_arm_is_named_and_other_arms_do_not_matter(
    claim: Claim, laptop: FakeRecords, paper: FakeRecords
) -> None:
    world = paper if claim.scale_needed else laptop
    assert set(READ[claim.id]) == set(claim.experiments)
    few = FakeRecords({name: world[name] for name in claim.experiments})
    for experiment, arms in READ[claim.id].items():
        for arm in few[experiment]["arm"].unique():
            verdict = judge(claim, changed(few, experiment, without(arm)), scale(claim))
            if arm in arms:
                named = "alpha" if claim.id == "C6.alpha" else arm
                assert verdict.verdict == INCONCLUSIVE and f"'{named}'" in verdict.reason, (arm, verdict.reason)
            else:
                assert verdict.verdict == REPRODUCED, (arm, verdict.reason)


NULL = {  # experiment -> all contenders alike
    **{
        experiment: {ACCURACY: 96.0, NLL: 0.2, f"{NLL}_tempered": 0.2, BLEU: 34.0}
        for experiment in ("vision", "convolution", "language", "language_long", "imagenet", "translation")
    },
    "primitives": dict.fromkeys(worlds.error_law(), 0.0) | {"gain": 0.96},
    "affine": {"curvature_1e-06": 1e-6, "gradient_right": 0.5},
    "proof": dict.fromkeys(("findings", "machine_findings", "ptx_findings", "sass_findings"), 1)
    | dict.fromkeys(("planted_machine", "planted_ptx", "planted_sass", "planted_backward"), 0)
    | dict.fromkeys((f"cost_ratio_{what}" for what in ("multiplication", "accumulate", "step")), 1.0),
}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_without_an_effect_nothing_that_needs_one_is_reproduced(
    claim: Claim, laptop: FakeRecords, paper: FakeRecords
) -> None:
    world = paper if claim.scale_needed else laptop
    for name in claim.experiments:
        world = world.replace(name, world[name].assign(**NULL[name]))
    # that something costs nothing is what these say, and nothing costs anything
    free = {"C1", "C1.long", "C2", "C3", "C4", "C5.matmul", "C9"}
    expected = claim.id in free | {"C1.paper", "C1.imagenet", "C2.paper", "C4.paper"}
    assert (judge(claim, world, scale(claim)).verdict == REPRODUCED) == expected


World = Callable[[FakeRecords, float], FakeRecords]


def gap(experiment: str, arm: str, other: str = "standard", metric: str = NLL) -> World:
    """`metric` of an arm is that of another plus a number."""
    return lambda world, value: changed(world, experiment, beside(arm, other, metric, value))


def points(experiment: str, arm: str, other: str = "standard") -> World:
    return gap(experiment, arm, other, ACCURACY)


def number(experiment: str, arm: str, metric: str, spread: float = 0.0) -> World:
    """`metric` of an arm is a number."""
    return lambda world, value: changed(world, experiment, level(arm, metric, value, spread))


def left(experiment: str) -> World:
    """This share of the exact rule's cost is left at the best temperature."""

    def change(world: FakeRecords, value: float) -> FakeRecords:
        world = gap(experiment, "full_exact", "full")(world, 0.12)
        return gap(experiment, "full_exact", "full", f"{NLL}_tempered")(world, 0.12 * value)

    return change


def costs(experiment: str) -> World:
    """The exact rule costs this much, and less than nothing at the best temperature."""

    def change(world: FakeRecords, value: float) -> FakeRecords:
        world = gap(experiment, "full_exact", "full", f"{NLL}_tempered")(world, -0.1)
        return gap(experiment, "full_exact", "full")(world, value)

    return change


def flatter(world: FakeRecords, value: float) -> FakeRecords:
    """Second differences are this share of the standard network's."""
    metric, frame = "curvature_1e-06", world["affine"]
    smooth = frame[frame["arm"] == "standard"].set_index("seed")[metric]
    spread = np.exp([1e-4 * worlds.noise("flat", seed) for seed in frame["seed"]])
    near = value * frame["seed"].map(smooth) * spread
    return world.replace("affine", frame.assign(**{metric: near.where(frame["arm"] == "pam", frame[metric])}))


def around(value: float, tolerance: float) -> list[tuple[float, float]]:
    """Values within and beyond a tolerance, on both sides."""
    return [(value + side * 0.5 * tolerance, value + side * 1.5 * tolerance) for side in (-1, 1)]


LAW = worlds.error_law()
BOTH = [(-0.049, -0.051), (0.049, 0.051)]
BOTH_POINTS = [(-1.49, -1.51), (1.49, 1.51)]
DOMAINS = ("vision", "language")
BOUNDS: list[tuple[str, int, World, float, float]] = [  # claim, part, change, within the bound, beyond it
    ("C1", 0, points("vision", "matmul"), -1.49, -1.51),
    ("C1", 1, gap("language", "matmul"), 0.049, 0.051),
    ("C1.long", 0, gap("language_long", "matmul"), 0.049, 0.051),
    ("C1.long", 1, gap("language_long", "full"), 0.079, 0.081),
    ("C2", 0, points("convolution", "matmul"), -1.49, -1.51),
    *[("C3", i, points("vision", arm), -1.49, -1.51) for i, arm in enumerate(REPLACED)],
    *[("C3", i, gap("language", arm), 0.049, 0.051) for i, arm in enumerate(REPLACED, 4)],
    ("C4", 0, points("vision", "full"), -1.99, -2.01),
    ("C4", 1, gap("language", "full"), 0.079, 0.081),
    *[("C5", i, gap(e, "full", "full_exact"), -0.001, 0.001) for i, e in enumerate(DOMAINS)],
    ("C5.accuracy", 0, points("vision", "full", "full_exact"), 0.001, -0.001),
    *[("C5.matmul", i, gap(e, "matmul_exact", "matmul"), *x) for i, e in enumerate(DOMAINS) for x in BOTH],
    *[("C5.loss", i, gap(e, "full_exact_but_loss", "full_exact"), -0.001, 0.001) for i, e in enumerate(DOMAINS)],
    *[("C5.temperature", i, left(e), 0.49, 0.51) for i, e in enumerate(DOMAINS)],
    *[("C5.temperature", i, costs(e), 0.001, -0.001) for i, e in enumerate(DOMAINS)],
    *[
        ("C6", i, number("primitives", "pam", f"{operation}_{end}"), *values)
        for i, operation in enumerate(("mul", "div", "square", "exp2", "log2", "sqrt"))
        for end in ("min", "max")
        for values in around(LAW[f"{operation}_{end}"], 1e-6)
    ],
    *[
        ("C6", i, number("primitives", "pam", metric), *values)
        for i, metric in enumerate(MEANS, 6)
        for values in around(LAW[metric], 1e-4)
    ],
    *[("C6.alpha", 0, number("primitives", "alpha", "gain"), *x) for x in ((1.0019, 1.0021), (0.9981, 0.9979))],
    ("C7", 0, flatter, 0.00099, 0.00101),
    ("C7", 1, number("affine", "pam", "gradient_right", 1e-4), 0.601, 0.599),
    ("C7", 2, number("affine", "pam_approx", "gradient_right", 1e-4), 0.099, 0.101),
    *[
        ("C4.proof", i, number("proof", arm, "findings"), 0, 1)
        for i, arm in enumerate(("full", "full_exact", "language_full", "language_full_exact"))
    ],
    ("C4.proof", 4, number("proof", "full", "machine_findings"), 0, 1),
    ("C4.proof", 5, number("proof", "full", "ptx_findings"), 0, 1),
    ("C4.proof", 6, number("proof", "full", "sass_findings"), 0, 1),
    *[("C4.proof", 7, number("proof", a, "findings"), 1, 0) for a in ("standard", *REPLACED, "language_standard")],
    *[("C4.proof", 8, number("proof", "full", f"planted_{x}"), 1, 0) for x in ("machine", "ptx", "sass", "backward")],
    ("C8", 0, number("proof", "full", "cost_ratio_multiplication"), 44.9, 45.1),
    ("C8", 0, number("proof", "full", "cost_ratio_multiplication"), 20.1, 19.9),
    ("C8", 1, number("proof", "full", "cost_ratio_accumulate"), 4.01, 3.99),
    ("C8", 2, number("proof", "full", "cost_ratio_step"), 4.01, 3.99),
    *[
        ("C9", i, points("vision", f"{arm}_alpha", arm), *x)
        for i, arm in enumerate(("matmul", "full"))
        for x in BOTH_POINTS
    ],
    *[
        ("C9", i, gap(e, f"{arm}_alpha", arm), *x)
        for i, (e, arm) in enumerate(((e, arm) for e in DOMAINS for arm in ("matmul", "full")), 2)
        for x in BOTH
    ],
    *[("C10", i, points("vision", arm, "adder"), 0.001, -0.001) for i, arm in enumerate(("matmul_own", "full_own"))],
    ("C10.power", 0, points("vision", "matmul_own", "power_of_two"), 0.001, -0.001),
    ("C1.paper", 0, points("vision", "matmul"), -1.49, -1.51),
    ("C1.imagenet", 0, points("imagenet", "matmul"), -1.49, -1.51),
    *[("C2.paper", i, points("convolution", f"{x}_matmul", x), -1.49, -1.51) for i, x in enumerate(NETWORKS)],
    *[("C4.paper", i, gap("translation", arm), 0.049, 0.051) for i, arm in enumerate(REPLACED)],
    ("C4.paper", 4, gap("translation", "full"), 0.079, 0.081),
    *[
        ("C4.paper", i, gap("translation", arm, metric=BLEU), -0.49, -0.51)
        for i, arm in enumerate((*REPLACED, "full"), 5)
    ],
]


def test_every_part_has_its_bound_checked_and_says_it() -> None:
    assert {row[:2] for row in BOUNDS} == {(claim.id, i) for claim in CLAIMS for i in range(len(claim.parts))}
    for name, part, _, within, beyond in BOUNDS:
        label, bound = list(BY_ID[name].parts)[part], abs(within + beyond) / 2
        if any(word in label for word in ("loses", "within", "energy")) and (name, part) not in (
            ("C6.alpha", 0),
            ("C8", 0),
        ):
            assert f" {bound:g} " in f"{label} ", label


@pytest.mark.parametrize(("name", "part", "change", "within", "beyond"), BOUNDS)
def test_bounds_are_where_the_claims_say_and_concern_their_part_alone(
    name: str, part: int, change: World, within: float, beyond: float, laptop: FakeRecords, paper: FakeRecords
) -> None:
    claim = BY_ID[name]
    world = paper if claim.scale_needed else laptop
    verdict = judge(claim, change(world, within), scale(claim))
    assert verdict.verdict == REPRODUCED, [(p.label, p.outcome) for p in verdict.parts]
    verdict = judge(claim, change(world, beyond), scale(claim))
    assert verdict.verdict == CONTRADICTED, [(p.label, p.outcome) for p in verdict.parts]
    assert [i for i, word in enumerate(words(verdict)) if word != REPRODUCED] == [part]


def test_effects_are_the_arm_less_the_other_in_the_metrics_own_unit(laptop: FakeRecords) -> None:
    world = points("vision", "matmul")(gap("language", "matmul")(laptop, 0.03), -0.7)
    accuracy, loss = (part.outcome for part in judge(BY_ID["C1"], world).parts)
    assert accuracy.effect == pytest.approx(-0.7, abs=1e-3) and accuracy.unit == "points"
    assert loss.effect == pytest.approx(0.03, abs=1e-3) and loss.unit == "nats"
    assert "difference > -1.5" in accuracy.test and "difference < 0.05" in loss.test
    for outcome in (accuracy, loss):
        assert outcome.ci_low < outcome.effect < outcome.ci_high < outcome.ci_low + 0.01
    same = judge(BY_ID["C9"], points("vision", "full_alpha", "full")(laptop, 0.9)).parts[1].outcome
    assert same.effect == pytest.approx(0.9, abs=1e-3) and same.unit == "points"
    logarithm, root = (judge(BY_ID["C6"], laptop).parts[i].outcome.unit for i in (4, 5))
    assert (logarithm, root) == ("absolute error", "relative error")


def test_only_seeds_of_both_arms_are_compared_and_shown(laptop: FakeRecords) -> None:
    frame = laptop["vision"]
    far = frame.assign(**{ACCURACY: frame[ACCURACY].where(frame["seed"] < 25, 50.0)})
    outcome = judge(BY_ID["C5.accuracy"], laptop.replace("vision", far)).parts[0].outcome  # the exact rule: five seeds
    means = far[far["seed"] < 25].groupby("arm")[[ACCURACY, NLL]].mean().round(10)
    own, other = "5 + optimizer: no multiplication", "5, exact rule"
    for metric in (ACCURACY, NLL):
        levels = f"{own} {means[metric]['full']:.4g}, {other} {means[metric]['full_exact']:.4g}"
        assert f"{metric.replace('_', ' ')}: {levels}" in outcome.detail
    assert outcome.n == 5
    few = frame[~((frame["arm"] == "matmul") & (frame["seed"] == 22))].sample(frac=1, random_state=0)
    outcome = judge(BY_ID["C1"], laptop.replace("vision", few)).parts[0].outcome
    table = frame.pivot(index="seed", columns="arm", values=ACCURACY).drop(22)
    assert outcome.n == 9 and outcome.effect == pytest.approx((table["matmul"] - table["standard"]).mean())


def test_a_diverged_run_counts_as_the_worst(laptop: FakeRecords) -> None:
    frame = laptop["vision"]
    lost = (frame["arm"] == "matmul") & (frame["seed"] == 22)
    for metric in (ACCURACY, NLL):
        frame = frame.assign(**{metric: frame[metric].where(~lost, np.nan)})
    for world in (frame, frame.assign(diverged=lost, **{ACCURACY: laptop["vision"][ACCURACY]})):
        outcome = judge(BY_ID["C1"], laptop.replace("vision", world)).parts[0].outcome
        worst = world[ACCURACY][~lost].min()
        usual = laptop["vision"].pivot(index="seed", columns="arm", values=ACCURACY)
        gaps = usual["matmul"].where(usual.index != 22, worst) - usual["standard"]
        assert outcome.n == 10 and outcome.effect == pytest.approx(gaps.mean()) and outcome.p > 0.05


def test_one_seed_beyond_its_bound_contradicts_the_error_law(laptop: FakeRecords) -> None:
    frame = laptop["primitives"].copy()
    frame.loc[frame.index[frame["arm"] == "pam"][-1], "exp2_mean"] += 2e-4
    verdict = judge(BY_ID["C6"], laptop.replace("primitives", frame))
    assert words(verdict).count(CONTRADICTED) == 1
    assert {x.removesuffix("_min").removesuffix("_max") for x in LAW} == {*TABLE, *MEANS, "square_mean_logarithmic"}
    assert all(math.isclose(LAW[name], value, abs_tol=1e-6) for name, value in MEANS.items())


@pytest.mark.parametrize(
    "metric", ["machine_findings", "ptx_findings", "sass_findings", "planted_machine", "planted_backward"]
)
def test_what_was_not_scanned_is_not_free_of_multiplications(metric: str, laptop: FakeRecords) -> None:
    frame = laptop["proof"]
    for lacking in (frame.drop(columns=metric), frame.assign(**{metric: np.nan})):
        verdict = judge(BY_ID["C4.proof"], laptop.replace("proof", lacking))
        assert verdict.verdict == INCONCLUSIVE and f"{metric} is not recorded" in verdict.reason


def test_the_proof_says_where_it_looked(laptop: FakeRecords) -> None:
    parts = judge(BY_ID["C4.proof"], laptop).parts
    places = ["in two steps"] * 4 + ["in 2,000 instructions", "in 231 kernels", "in 77 kernels"]
    assert [part.outcome.detail for part in parts[:7]] == places


def test_seeds_that_disagree_on_what_multiplies_are_not_judged(laptop: FakeRecords) -> None:
    frame = laptop["proof"]
    twice = pd.concat([frame, frame[frame["arm"] == "full"].assign(seed=11, findings=3)])
    verdict = judge(BY_ID["C4.proof"], laptop.replace("proof", twice))
    assert verdict.verdict == INCONCLUSIVE and "differs between seeds: 0, 3" in verdict.reason


def test_the_caption_of_the_long_trainings_says_their_steps() -> None:
    steps = [worlds.plans("laptop")[e][0].config["task"]["steps"] for e in ("language", "language_long")]
    assert f"after {steps[0]} and {steps[1]} steps" in BY_ID["C1.long"].caption
    assert 2 * steps[1] == 3 * steps[0]
