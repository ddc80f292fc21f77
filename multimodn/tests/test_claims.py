"""Every claim's test says `reproduced` in a world in which it is right, and nothing like it where arms are swapped, the
effect is taken away, or a number lies just beyond its bound."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from common.claims import CONTRADICTED, NOT_TESTABLE, REPRODUCED, Claim, judge
from common.compose import conf_dir
from common.statistics import Outcome
from common.tests.report_fakes import FakeRecords
from common.tests.worlds import changed
from multimodn.claims import CLAIMS
from multimodn.judging.chain import excess, partial
from multimodn.judging.samples import OVERLAP, of
from multimodn.tests import worlds

BY_ID = {claim.id: claim for claim in CLAIMS}
EXPERIMENTS = sorted(path.stem for path in (conf_dir("multimodn") / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def laptop() -> FakeRecords:
    return worlds.records("laptop")


@pytest.fixture(scope="module")
def paper() -> FakeRecords:
    return worlds.records("paper")


def scale(claim: Claim) -> str:
    return claim.scale_needed or "laptop"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_a_right_world_is_judged_reproduced_and_its_control_is_not(
    claim: Claim, laptop: FakeRecords, paper: FakeRecords
) -> None:
    world = paper if claim.scale_needed else laptop
    verdict = judge(claim, world, scale(claim))
    assert verdict.verdict == REPRODUCED, (verdict.reason, [(p.label, p.outcome) for p in verdict.parts])
    control = judge(claim, claim.control(world), scale(claim))
    assert control.parts, control.reason  # it could be tested
    assert control.verdict != REPRODUCED
    assert all(part.outcome.n >= 5 for part in verdict.parts)


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.scale_needed is None], ids=lambda c: c.id)
def test_what_a_claim_reads_is_there_at_paper_scale(claim: Claim, paper: FakeRecords) -> None:
    verdict = judge(claim, paper, "paper")
    assert verdict.verdict == REPRODUCED, verdict.reason


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_figures_are_drawn_and_say_what_their_axes_are(claim: Claim, laptop: FakeRecords) -> None:
    if claim.figure is None:
        assert claim.caption or claim.scale_needed
        return
    figure = claim.figure(laptop)
    for ax in figure.axes:
        assert not ax.get_visible() or ax.get_xlabel() or ax.get_ylabel() or ax.get_title() or ax.texts
    plt.close(figure)


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


def test_claims_of_the_papers_own_data_wait_for_it(laptop: FakeRecords) -> None:
    waiting = {claim.id for claim in CLAIMS if judge(claim, laptop, "laptop").verdict == NOT_TESTABLE}
    assert waiting == {"C1.paper", "C5.mimic"} == {claim.id for claim in CLAIMS if claim.scale_needed}


def test_claims_are_numbered_and_ordered() -> None:
    stems = [claim.id.split(".")[0] for claim in CLAIMS]
    assert list(dict.fromkeys(stems)) == [f"C{i}" for i in range(1, 10)] and len(BY_ID) == len(CLAIMS)
    assert {e for claim in CLAIMS for e in claim.experiments} == set(EXPERIMENTS) - {"tune", "rules_tune"}


NULL = {  # without any effect: all arms alike, no chain, no contribution
    "auroc_full": 0.7, "auroc_same": 0.7, "auroc_flip": 0.7,
}  # fmt: skip
STAY = {  # ask for no difference, or bound one that is not there
    *("C1", "C1.tasks", "C1.tables", "C1.encoders", "C1.details", "C1.loss", "C2", "C3", "C5.cause", "C7"),
    *("C8.parallel", "C8.mechanisms", "C9", "C9.robust", "C4", "C4.planted", "C6", "C6.parallel"),
}


def test_without_an_effect_nothing_that_needs_one_is_reproduced(laptop: FakeRecords) -> None:
    flat = laptop
    for name in EXPERIMENTS:
        draw = np.random.default_rng(1).standard_normal((len(flat[name]), len(NULL)))
        values = {m: v + 2e-3 * draw[:, i] for i, (m, v) in enumerate(NULL.items())}
        flat = flat.replace(name, flat[name].assign(**values))
    reproduced = {c.id for c in CLAIMS if c.scale_needed is None and judge(c, flat).verdict == REPRODUCED}
    assert reproduced <= STAY and len(set(BY_ID) - STAY) >= 10


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.scale_needed is None], ids=lambda c: c.id)
def test_every_part_is_an_outcome_over_all_seeds(claim: Claim, laptop: FakeRecords) -> None:
    for label, test in claim.parts.items():
        outcome = test(laptop)  # type: ignore[arg-type]
        assert isinstance(outcome, Outcome) and outcome.p < 0.05 < outcome.p_opposite, label
        assert outcome.n >= 5, label


def shift(arm: str, metric: str, by: float, **where: object):  # type: ignore[no-untyped-def]
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        hit = frame["arm"] == arm
        for column, value in where.items():
            hit &= frame[column.replace("__", ".")] == value
        assert hit.any()
        frame.loc[hit, metric] = frame.loc[hit, metric] + by
        return frame

    return change


@pytest.mark.parametrize(
    ("claim", "experiment", "change"),
    [
        ("C1", "single", shift("mm", "auroc_full", -0.05)),
        ("C1.tasks", "single", shift("mm", "auroc_full", -0.08, cohort__name="pbc")),
        ("C1.tables", "single", shift("boosting", "auroc_full", 0.05)),
        ("C1.encoders", "encoders", shift("pf_conv", "auroc_full", 0.2)),
        ("C1.loss", "ablation", shift("mm_sigmoid", "auroc_full", -0.03)),
        ("C1.details", "ablation", shift("mm_reversed", "auroc_full", 0.03)),
        ("C2", "multi", shift("mm", "auroc_full", -0.04)),
        ("C2", "multi", shift("mm", "parameters", 20_000)),
        ("C3", "multi", shift("mm", "auroc_full", -0.08, cohort__name="digits")),
        ("C4", "multi", shift("mm", "prefix_gap", 1e-5)),
        ("C5.rare", "mnar", shift("mm_batch", "auroc_flip", -0.06, cohort__name="nhefs")),
        ("C5", "mnar", shift("mm_batch", "auroc_flip", -0.06, cohort__name="star")),
        ("C5", "mnar", shift("pf_sample", "auroc_flip", 0.7, cohort__name="digits")),
        ("C5.sample", "mnar", shift("mm_sample", "auroc_flip", -0.2, cohort__name="star")),
        ("C5.cause", "mnar", shift("pf_batch", "auroc_flip", -0.06, cohort__name="weather")),
        ("C5.order", "mnar", shift("pf_batch", "auroc_flip", 0.05, cohort__name="weather")),
        ("C5.shares", "mnar", shift("pf_sample", "auroc_flip", 0.7, corruption__share=0.4)),
        ("C5.positions", "positions", shift("mm_sample", "auroc_flip", 0.7, corruption__modality=2)),
        ("C5.positions", "positions", shift("pf_batch", "auroc_flip", -0.08, corruption__modality=3)),
        ("C5.batches", "batch_sizes", shift("mm_batch", "auroc_flip", 0.3, task__batch_size=2)),
        ("C5.trees", "mnar", shift("boosting", "auroc_flip", 0.7, cohort__name="nhefs")),
        ("C6.unimodal", "unimodal", shift("mm", "auroc_full", 0.4, network__only=3)),
        ("C7", "mcar", shift("mm", "auroc_same", -0.3, corruption__share=0.8)),
        ("C8", "rules", shift("mm_robust", "auroc_flip", -0.6, cohort__name="digits")),
        ("C8", "rules", shift("mm_robust", "auroc_full", -0.04)),
        ("C8", "rules", shift("mm_robust_complete", "auroc_full", 1e-9)),
        ("C8.rules", "rules", shift("mm_shuffle", "auroc_flip", 0.3)),
        ("C8.parallel", "rules", shift("pf_robust", "auroc_flip", -0.07)),
        ("C8.price", "rules", shift("mm_robust", "auroc_same", 0.1, cohort__name="weather")),
        ("C8.mechanisms", "mechanisms", shift("mm_robust", "auroc_flip", -0.05, corruption__mechanism="mar")),
        ("C9", "natural", shift("pf_indicator", "auroc_full", 0.05)),
        ("C9.batch", "natural", shift("mm_batch", "auroc_full", 0.19, cohort__name="star")),
        ("C9.robust", "natural", shift("mm_robust", "auroc_full", -0.09, cohort__name="pbc")),
    ],
)
def test_one_arm_on_the_wrong_side_contradicts_the_claim(
    claim: str, experiment: str, change, laptop: FakeRecords
) -> None:
    assert judge(BY_ID[claim], changed(laptop, experiment, change)).verdict == CONTRADICTED


def test_chains_and_contributions_are_read(laptop: FakeRecords) -> None:
    def flat_chain(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(chain=frame["chain"].map(lambda c: [c[0]] + [c[0]] * (len(c) - 1)))

    assert judge(BY_ID["C4"], changed(laptop, "multi", flat_chain)).verdict != REPRODUCED

    def wrong_modality(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(individual=frame["individual"].map(lambda x: x[::-1]))

    assert judge(BY_ID["C4.planted"], changed(laptop, "planted", wrong_modality)).verdict == CONTRADICTED

    def falling(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(subsets=frame["subsets"].map(lambda s: [1 - v for v in s]))

    assert judge(BY_ID["C6"], changed(laptop, "multi", falling)).verdict == CONTRADICTED


def test_subsets_are_averaged_as_said() -> None:
    scores = [0.5, 0.6, 0.7, 0.9]  # none, first, second, both
    assert partial(scores) == pytest.approx(0.65)
    assert excess(scores) == pytest.approx(np.mean([-0.1, -0.2, -0.3, -0.2]))


def test_a_diverged_seed_counts_as_the_worst_and_a_lost_one_is_refused(laptop: FakeRecords) -> None:
    frame = laptop["multi"].copy()
    hit = (frame["arm"] == "mm") & (frame["cohort.name"] == "star") & (frame["seed"] == 21)
    diverged = frame.assign(diverged=hit)
    assert of(diverged, "mm", cohort__name="star")[21] == 0.0
    with pytest.raises(ValueError, match="every seed needs all of them"):
        of(frame[~hit], "mm")


def test_the_share_of_common_rows_is_that_of_the_splits() -> None:
    from multimodn.cohorts.base import split
    from multimodn.cohorts.config import CohortConfig, read

    parts = split(read(CohortConfig(name="star")), 20)
    assert len(parts.test) / len(parts.train) == pytest.approx(OVERLAP, rel=0.01)
