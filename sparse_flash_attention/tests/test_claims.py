"""Every claim's test says `reproduced` in a world in which it is right, and nothing like it where arms are swapped, the
effect is taken away, or a number lies just beyond its bound."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from common.claims import CONTRADICTED, INCONCLUSIVE, NOT_TESTABLE, REPRODUCED, Claim, judge
from common.statistics import Outcome
from common.tests.report_fakes import FakeRecords
from common.tests.worlds import Change, changed
from sparse_flash_attention.claims import CLAIMS
from sparse_flash_attention.judging.samples import lengths, speedups
from sparse_flash_attention.judging.speed import KEEP_FLOORS, crossings, exponents, mix_lengths
from sparse_flash_attention.tests import worlds
from sparse_flash_attention.tests.worlds import beside, gain, level

BY_ID = {claim.id: claim for claim in CLAIMS}
OURS_ALONE = {"C6.time", "C7", "C7.content", "C7.near", "C7.self", "C9"}  # read arms that the paper does not have


@pytest.fixture(scope="module")
def laptop() -> FakeRecords:
    return worlds.records("laptop")


@pytest.fixture(scope="module")
def paper() -> FakeRecords:
    return worlds.records("paper")


def scale(claim: Claim) -> str:
    return claim.scale_needed or "laptop"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_a_right_world_is_judged_reproduced_and_its_control_in_no_part(
    claim: Claim, laptop: FakeRecords, paper: FakeRecords
) -> None:
    world = paper if claim.scale_needed else laptop
    verdict = judge(claim, world, scale(claim))
    assert verdict.verdict == REPRODUCED, (verdict.reason, [(p.label, p.outcome) for p in verdict.parts])
    assert all(part.outcome.n >= (3 if claim.scale_needed else 5) for part in verdict.parts)
    assert all(part.outcome.p < 0.05 < part.outcome.p_opposite for part in verdict.parts)
    control = judge(claim, claim.control(world), scale(claim))
    assert control.parts, control.reason  # it could be tested
    assert control.verdict != REPRODUCED
    for part in control.parts:
        assert part.outcome.p > 0.05, (part.label, part.outcome)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_a_control_leaves_the_records_themselves_alone(claim: Claim, laptop: FakeRecords, paper: FakeRecords) -> None:
    world = paper if claim.scale_needed else laptop
    before = {name: world[name].copy() for name in claim.experiments}
    claim.control(world)
    for name, frame in before.items():
        pd.testing.assert_frame_equal(world[name], frame)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_a_claim_reads_only_the_experiments_that_it_names(
    claim: Claim, laptop: FakeRecords, paper: FakeRecords
) -> None:
    world = paper if claim.scale_needed else laptop
    few = FakeRecords({name: world[name] for name in claim.experiments})
    assert judge(claim, few, scale(claim)).parts


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.id not in OURS_ALONE], ids=lambda c: c.id)
def test_what_a_claim_reads_is_there_at_paper_scale(claim: Claim, paper: FakeRecords) -> None:
    verdict = judge(claim, paper, "paper")
    assert verdict.verdict == REPRODUCED, (verdict.reason, [(p.label, p.outcome) for p in verdict.parts])


@pytest.mark.parametrize("name", sorted(OURS_ALONE))
def test_a_claim_on_our_own_arms_says_at_paper_scale_what_it_lacks(name: str, paper: FakeRecords) -> None:
    verdict = judge(BY_ID[name], paper, "paper")
    assert verdict.verdict == INCONCLUSIVE and "could not be tested" in verdict.reason and "arm=" in verdict.reason


def test_claims_of_the_papers_own_scale_wait_for_it(laptop: FakeRecords) -> None:
    waiting = {claim.id for claim in CLAIMS if judge(claim, laptop, "laptop").verdict == NOT_TESTABLE}
    assert waiting == {"C6.paper", "C7.paper"} == {claim.id for claim in CLAIMS if claim.scale_needed}


def test_claims_are_numbered_and_ordered() -> None:
    stems = [claim.id.split(".")[0] for claim in CLAIMS]
    assert list(dict.fromkeys(stems)) == [f"C{i}" for i in range(1, 11)] and len(BY_ID) == len(CLAIMS)
    assert {e for claim in CLAIMS for e in claim.experiments} == {
        e for e in worlds.plans("laptop") if e != "language_tune"
    }


def test_every_floor_of_c3_is_named_by_its_part() -> None:
    assert list(BY_ID["C3"].parts) == [f"{keep:g} kept: ratio > {floor:g}" for keep, floor in KEEP_FLOORS.items()]
    assert KEEP_FLOORS == {1.0: 0.95, 0.7: 1.6, 0.5: 3.0, 0.3: 6.5, 0.1: 35.0}


NULL = {  # experiment -> all contenders alike
    "runtime": lambda f: f.assign(**{c: 700.0 for c in f if c.endswith("_ms")}),
    "crossing": lambda f: f.assign(**{c: 700.0 for c in f if c.endswith("_ms")}),
    "step": lambda f: f.assign(**{c: 700.0 for c in f if c.endswith("_ms")}),
    "language": lambda f: f.assign(test_loss=2.9, dropping_loss=2.9, density_early=0.5, density_late=0.5),
    "coverage": lambda f: f.assign(ours=0.5, reformer=0.5),
    "aot": lambda f: f.assign(spilled=[[8]] * len(f)),
    "exactness": lambda f: f.assign(forward_error=1.0, backward_error=1.0, bad_numbers=1, stranded_nonzero=1),
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_without_an_effect_nothing_that_needs_one_is_reproduced(
    claim: Claim, laptop: FakeRecords, paper: FakeRecords
) -> None:
    world = paper if claim.scale_needed else laptop
    for name in claim.experiments:
        world = changed(world, name, NULL[name])
    # that something costs nothing is what these say, and nothing costs anything
    expected = claim.id in ("C7.paper", "C7.self", "C8.evaluation")
    assert (judge(claim, world, scale(claim)).verdict == REPRODUCED) == expected


FP32 = {"arm": "default", "task__dtype": "fp32"}
PLAIN = {"arm": "torch", "task__dtype": "fp32"}
UNIFORM, ANGULAR = ({"arm": arm, "task__length": 8192} for arm in ("uniform", "angular"))


def power(exponent: float) -> Change:
    """Time at 8,192 rows is proportional to the kept share to this power."""

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        for keep in KEEP_FLOORS:
            frame = gain(f"keep_{keep:g}", 0.98 / keep**exponent)(frame)
        return frame

    return change


def crossing_at(kind: str, dropped: float) -> Change:
    """Ours or the naive way is as fast as dense attention at this dropped share."""

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        for column in [c for c in frame if c.startswith(f"{kind}_")]:
            ratio = ((1 - dropped) / float(column.split("_")[1])) ** 2
            frame = gain(column.removesuffix("_ms"), ratio)(frame)
        return frame

    return change


def late(gap: float) -> Change:
    """The late density of the hash-sparse model is the early one plus a gap."""

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        near = frame["density_early"] + gap * np.array([worlds.noise(gap, s) ** 0.02 for s in frame["seed"]])
        return frame.assign(density_late=near.where(frame["arm"] == "hash", frame["density_late"]))

    return change


def one(metric: str) -> Change:
    """A single run counts 1."""
    return lambda frame: frame.assign(**{metric: [1] + [0] * (len(frame) - 1)})


def worst_kernel(metric: str, value: float) -> Change:
    """One kernel on one target needs this much."""
    return lambda frame: frame.assign(**{metric: [[*row[:-1], value] for row in frame[metric]]})


GROWING = {"arm": "growing", "task__length": 8192}
BOUNDS: list[tuple[str, str, Change, Change]] = [  # claim, experiment, within the bound, beyond it
    *[
        ("C1", "exactness", level(m, 0.99e-5, **where), level(m, 1.01e-5, **where))
        for m in ("forward_error", "backward_error")
        for where in (FP32, PLAIN)
    ],
    *[
        ("C1", "exactness", level("forward_error", low, task__dtype=d), level("forward_error", high, task__dtype=d))
        for d, low, high in (("bf16", 0.0299, 0.0301), ("fp16", 0.0039, 0.0041))
    ],
    *[("C1.zeros", "exactness", level(m, 0.0), one(m)) for m in ("stranded_nonzero", "bad_numbers")],
    ("C2", "runtime", gain("buckets_16", 4.02), gain("buckets_16", 3.98)),
    ("C2", "runtime", gain("buckets_2", 1.51), gain("buckets_2", 1.49)),
    *[
        ("C3", "runtime", gain(f"keep_{keep:g}", floor * 1.005), gain(f"keep_{keep:g}", floor * 0.995))
        for keep, floor in {1.0: 0.95, 0.7: 1.6, 0.5: 3.0, 0.3: 6.5, 0.1: 35.0}.items()
    ],
    *[  # over our own time with every row kept, .98 of dense attention's speed in this world
        ("C3.own", "runtime", gain(name, floor * 0.98 * 1.01), gain(name, floor * 0.98 * 0.99))
        for name, floor in (
            ("keep_0.7", 1.6), ("keep_0.5", 3.0), ("keep_0.3", 6.5), ("buckets_2", 1.5), ("buckets_16", 4.0),
        )
    ],
    ("C3.square", "runtime", power(1.61), power(1.59)),
    ("C3.square", "runtime", power(2.29), power(2.31)),
    ("C4", "crossing", crossing_at("keep", 0.46), crossing_at("keep", 0.48)),
    ("C5", "coverage", level("reformer", 0.399, **UNIFORM), level("reformer", 0.401, **UNIFORM)),
    ("C5", "coverage", level("reformer", 0.399, **ANGULAR), level("reformer", 0.401, **ANGULAR)),
    ("C5.control", "coverage", level("reformer", 0.9901, **GROWING), level("reformer", 0.9899, **GROWING)),
    ("C6", "step", gain("hash_16", 1.51), gain("hash_16", 1.49)),
    ("C6", "step", gain("hash_16", 4.51, 16384), gain("hash_16", 4.49, 16384)),
    ("C6.time", "step", gain("hash_16", 4.02), gain("hash_16", 3.98)),
    ("C6.time", "language", beside("hash", "dense_short", -0.01), beside("hash", "dense_short", 0.01)),
    ("C7", "language", beside("hash", "dense", 0.029), beside("hash", "dense", 0.031)),
    ("C7", "language", beside("none", "dense", 0.101), beside("none", "dense", 0.099)),
    ("C7.content", "language", beside("hash", "random", -0.001), beside("hash", "random", 0.001)),
    ("C7.near", "language", beside("window", "dense", -0.001), beside("window", "dense", 0.001)),
    ("C7.self", "language", beside("hash_official", "hash", 0.029), beside("hash_official", "hash", 0.031)),
    ("C7.sharpen", "language", late(-0.001), late(0.001)),
    ("C8", "language", beside("drop_30", "dense", 0.029), beside("drop_30", "dense", 0.031)),
    ("C8", "language", beside("drop_70", "drop_30", 0.001), beside("drop_70", "drop_30", -0.001)),
    (
        "C8.evaluation", "language",
        beside("drop_30", "dense", 0.029, "dropping_loss"), beside("drop_30", "dense", 0.031, "dropping_loss"),
    ),
    ("C8.speed", "step", gain("drop_0.3", 1.51), gain("drop_0.3", 1.49)),
    ("C8.speed", "step", gain("drop_0.5", 1.91), gain("drop_0.5", 1.89)),
    ("C8.speed", "step", gain("drop_0.7", 2.81), gain("drop_0.7", 2.79)),
    ("C9", "language", beside("hash", "reformer", -0.001), beside("hash", "reformer", 0.001)),
    ("C6.paper", "step", gain("hash_16", 1.51), gain("hash_16", 1.49)),
    ("C6.paper", "step", gain("hash_16", 2.51, 16384), gain("hash_16", 2.49, 16384)),
    ("C7.paper", "language", beside("hash", "dense", 0.029), beside("hash", "dense", 0.031)),
    ("C10", "aot", worst_kernel("spilled", 0), worst_kernel("spilled", 1)),
    ("C10", "aot", worst_kernel("shared_kib", 99.0), worst_kernel("shared_kib", 99.01)),
    ("C7.paper", "language", beside("drop_30", "dense", 0.029), beside("drop_30", "dense", 0.031)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "experiment", "within", "beyond"), BOUNDS)
def test_bounds_are_where_the_claims_say(
    name: str, experiment: str, within: Change, beyond: Change, laptop: FakeRecords, paper: FakeRecords
) -> None:
    claim = BY_ID[name]
    world = paper if claim.scale_needed else laptop
    for change, word in ((within, REPRODUCED), (beyond, CONTRADICTED)):
        verdict = judge(claim, changed(world, experiment, change), scale(claim))
        assert verdict.verdict == word, [(p.label, p.outcome) for p in verdict.parts]


COUNTS = ["buckets_2", "buckets_8", "buckets_16", "buckets_32"]


@pytest.mark.parametrize(("length", "usual"), [(8192, 10.5), (16384, 12.0)])
def test_a_trend_over_buckets_that_turns_is_not_reproduced(length: int, usual: float, laptop: FakeRecords) -> None:
    claim = BY_ID["C2.trend"]
    for factors, word in (
        ([0.5, 0.8, 1, 1.2], REPRODUCED),
        ([1.001, 1.003, 1, 1.002], INCONCLUSIVE),
        ([1.2, 1.1, 1, 0.8], CONTRADICTED),
    ):
        changes = [gain(name, usual * factor, length) for name, factor in zip(COUNTS, factors, strict=True)]
        assert judge(claim, changed(laptop, "runtime", *changes)).verdict == word


def test_a_trend_over_lengths_that_turns_is_not_reproduced(laptop: FakeRecords) -> None:
    found = lengths(laptop, "runtime", "buckets_16")
    assert len(found) >= 4

    def world(values: list[float]) -> FakeRecords:
        return changed(laptop, "runtime", *[gain("buckets_16", v, n) for n, v in zip(found, values, strict=True)])

    test = BY_ID["C2.trend"].parts["grows with the length, 16 buckets"]
    rising = [4.0 + i for i in range(len(found))]
    outcome = test(world(rising))  # type: ignore[arg-type]
    frame = laptop["runtime"]
    complete = frame[frame["buckets_16_ms"].notna()].groupby("seed")["task.length"].nunique() == len(found)
    assert outcome.p < 0.05 and outcome.n == complete.sum() < len(complete)  # the others lack the longest
    assert test(world(rising[::-1])).p_opposite < 0.05  # type: ignore[arg-type]
    flat = test(world([4.0] * len(found)))  # type: ignore[arg-type]
    assert flat.p > 0.05 and flat.p_opposite > 0.05


@pytest.mark.parametrize("arm", ["uniform", "angular"])
def test_reformers_coverage_must_fall(arm: str, laptop: FakeRecords) -> None:
    frame = laptop["coverage"]
    rising = frame["task.length"].map(lambda n: 0.3 + 1e-6 * n).where(frame["arm"] == arm, frame["reformer"])
    world = laptop.replace("coverage", frame.assign(reformer=rising))
    assert judge(BY_ID["C5"], world).verdict == CONTRADICTED


@pytest.mark.parametrize("arm", ["uniform", "angular", "chunk_128", "growing"])
def test_one_lost_pair_of_ours_contradicts_the_claim(arm: str, laptop: FakeRecords) -> None:
    frame = laptop["coverage"].copy()
    frame.loc[frame.index[frame["arm"] == arm][-1], "ours"] = np.nextafter(1.0, 0.0)
    assert judge(BY_ID["C5"], laptop.replace("coverage", frame)).verdict == CONTRADICTED


def test_a_diverged_model_counts_as_the_worst(laptop: FakeRecords) -> None:
    frame = laptop["language"]
    lost = (frame["arm"] == "hash") & (frame["seed"] == frame["seed"].min() + 2)
    world = laptop.replace("language", frame.assign(diverged=lost, test_loss=frame["test_loss"].where(~lost, np.nan)))
    verdict = judge(BY_ID["C7"], world)
    assert verdict.verdict == INCONCLUSIVE and verdict.parts[1].outcome.n == 5
    assert verdict.parts[1].outcome.effect < -0.03  # the loss of the worst model stands in


def test_dropping_in_evaluation_is_not_judged_by_another_loss(laptop: FakeRecords) -> None:
    world = laptop.replace("language", laptop["language"].drop(columns="dropping_loss"))
    verdict = judge(BY_ID["C8.evaluation"], world)
    assert verdict.verdict == INCONCLUSIVE and "dropping_loss" in verdict.reason
    frame = laptop["language"]
    first = frame["seed"].min()
    lost = laptop.replace("language", frame.assign(dropping_loss=frame["dropping_loss"].where(frame["seed"] != first)))
    assert judge(BY_ID["C8.evaluation"], lost).verdict != REPRODUCED


def test_what_was_not_timed_is_said(laptop: FakeRecords) -> None:
    without = laptop.replace("runtime", laptop["runtime"].drop(columns=["keep_0.1_ms", "buckets_16_ms"]))
    for name in ("C2", "C2.trend", "C3", "C3.square"):
        verdict = judge(BY_ID[name], without)
        assert verdict.verdict == INCONCLUSIVE and "was not timed" in verdict.reason, name
    with pytest.raises(ValueError, match=r"keep_0.3 was not timed at task.length=\[16384\]"):
        speedups(laptop, "runtime", 16384, "keep_0.3")  # type: ignore[arg-type]


def test_exponents_are_slopes() -> None:
    frame = pd.DataFrame(
        {"task.length": 8192, "seed": [0, 1], **{f"keep_{k:g}_ms": [k**2, 5 * k**1.7] for k in KEEP_FLOORS}}
    )
    assert exponents(FakeRecords({"runtime": frame})) == pytest.approx([2.0, 1.7])  # type: ignore[arg-type]


def crossed(gains: list[float]) -> float:
    """Where a contender with these ratios at .2, .4, .6 and .8 dropped overtakes dense attention."""
    keeps = (0.8, 0.6, 0.4, 0.2)
    row = {f"{kind}_{k:g}_ms": 100 / g for kind in ("keep", "naive") for k, g in zip(keeps, gains, strict=True)}
    return crossings(pd.DataFrame([{"dense_ms": 100.0} | row]), "keep")[0]


@pytest.mark.parametrize(
    ("gains", "where"),
    [
        ([2, 3, 4, 5], 0.0),
        ([0.5, 0.6, 0.7, 0.8], 1.0),
        ([0.5, 2, 3, 4], 0.3),  # half-way, on a logarithmic axis
        ([0.5, 0.5, 4, 5], 0.4 + 0.2 / 3),
        ([2, 0.5, 2, 4], 0.5),  # from which on it stays faster
        ([0.5, 1, 2, 4], 0.4),
        ([1, 1, 1, 1], 1.0),  # as fast is not faster
    ],
)
def test_where_a_contender_overtakes_dense_attention(gains: list[float], where: float) -> None:
    assert crossed(gains) == pytest.approx(where)


def test_the_naive_way_that_crosses_first_contradicts_the_claim(laptop: FakeRecords) -> None:
    early = [crossing_at("naive", 0.2), crossing_at("keep", 0.5)]
    assert judge(BY_ID["C4"], changed(laptop, "crossing", *early)).verdict == CONTRADICTED


def test_mixed_lengths_break_the_trend(laptop: FakeRecords) -> None:
    mixed = mix_lengths(("buckets_16",))(laptop)  # type: ignore[arg-type]
    outcome = BY_ID["C2.trend"].parts["grows with the length, 16 buckets"](mixed)
    assert isinstance(outcome, Outcome) and outcome.p > 0.05
