"""Claims on missing modalities (C5, C7) and their tests, fixed before the judging run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.claims import Claim, Control, chain, swap_arms
from common.pairing import rows
from common.statistics import Outcome, every, monotone_trend, noninferior
from multimodn import figures
from multimodn.judging.samples import (
    BANDS,
    MNAR,
    OVERLAP,
    UNKNOWN,
    Test,
    alike,
    beats,
    both_on_seeds,
    of,
)
from multimodn.names import cohort as cohort_name

if TYPE_CHECKING:
    from common.records import Records

SHARES = (0.2, 0.4, 0.6, 0.8)
SWEPT = ("star", "digits")
RARE = ("nhefs", "weather")
MCAR = ("star", "nhefs", "digits")
SETUP = "Hidden in training: the second modality, for a share p of class 1. Unchanged test: for p of class 1. "
SETUP += "Flipped test: for p of class 0."


def hidden(records: Records, cohort: str, share: float = 0.8) -> pd.DataFrame:
    """The rows of the paper's experiment on one cohort at one share."""
    return rows(records["mnar"], cohort__name=cohort, corruption__mechanism="mnar", corruption__share=share)


def learns_pattern(cohort: str, arm: str = "pf_sample") -> Test:
    """The arm is more than .05 better where the pattern is unchanged than where it is flipped."""

    def test(records: Records) -> Outcome:
        frame = hidden(records, cohort)
        return beats(of(frame, arm, "auroc_same"), of(frame, arm, "auroc_flip"), 0.05)

    return test


def flipped(cohort: str, a: str, b: str, share: float = 0.8, margin: float = 0.0) -> Test:
    """Arm a is more than `margin` above arm b under the flipped pattern."""

    def test(records: Records) -> Outcome:
        frame = hidden(records, cohort, share)
        return beats(of(frame, a, "auroc_flip"), of(frame, b, "auroc_flip"), margin)

    return test


def steady(cohort: str, arm: str, margin: float) -> Test:
    """The arm's AUROC under the unchanged and the flipped pattern lie within `margin`."""

    def test(records: Records) -> Outcome:
        frame = hidden(records, cohort)
        return alike(of(frame, arm, "auroc_same"), of(frame, arm, "auroc_flip"), margin)

    return test


def same_flip(cohort: str, a: str, b: str, margin: float) -> Test:
    """Two arms lie within `margin` under the flipped pattern."""

    def test(records: Records) -> Outcome:
        frame = hidden(records, cohort)
        return alike(of(frame, a, "auroc_flip"), of(frame, b, "auroc_flip"), margin)

    return test


def on_all(cohorts: tuple[str, ...], test: object, *arguments: object) -> Test:
    """A test of one cohort on all of them."""
    return lambda records: every(
        [test(c, *arguments)(records) for c in cohorts],  # type: ignore[operator]
        [cohort_name(c) for c in cohorts],
    )


def each(test: object, *arguments: object) -> dict[str, Test]:
    """A part a cohort."""
    return {cohort_name(c): test(c, *arguments) for c in MNAR}  # type: ignore[operator]


def at_position(records: Records, cohort: str, arm: str, position: int, metric: str = "auroc_flip") -> pd.Series:
    """A metric where one modality was hidden."""
    return of(records["positions"], arm, metric, cohort__name=cohort, corruption__modality=position)


def everywhere_steady(cohort: str, arm: str, margin: float) -> Test:
    """At every hidden position the arm's AUROC under both patterns lie within `margin`."""

    def test(records: Records) -> Outcome:
        outcomes = [
            alike(at_position(records, cohort, arm, k, "auroc_same"), at_position(records, cohort, arm, k), margin)
            for k in range(4)
        ]
        return every(outcomes, [f"modality {k + 1}" for k in range(4)])

    return test


def everywhere_misled(cohort: str, arm: str) -> Test:
    """At every hidden position the arm is better where the pattern is unchanged than where it is flipped."""

    def test(records: Records) -> Outcome:
        outcomes = [
            beats(at_position(records, cohort, arm, k, "auroc_same"), at_position(records, cohort, arm, k))
            for k in range(4)
        ]
        return every(outcomes, [f"modality {k + 1}" for k in range(4)])

    return test


def later_helps(cohort: str) -> Test:
    """MultiModN's AUROC under the flipped pattern rises with the position of the hidden modality."""

    def test(records: Records) -> Outcome:
        found = [at_position(records, cohort, "mm_sample", k) for k in range(4)]
        seeds = np.concatenate([x.index for x in found])
        levels = np.repeat(np.arange(4), [len(x) for x in found])
        return monotone_trend(levels, pd.concat(found).to_numpy(), blocks=seeds)

    return test


def in_batches(records: Records, arm: str, size: int, share: float) -> pd.Series:
    """AUROC under the flipped pattern at a batch size."""
    return of(records["batch_sizes"], arm, "auroc_flip", task__batch_size=size, corruption__share=share)


def smaller_batches_hurt(arm: str, small: int, share: float, margin: float) -> Test:
    """Batches of 32 are more than `margin` better than small ones under the flipped pattern."""
    return lambda records: beats(in_batches(records, arm, 32, share), in_batches(records, arm, small, share), margin)


def slope_holds(margin: float) -> Test:
    """MultiModN's AUROC falls with the share of missing values no more than `margin` faster than P-Fusion's."""

    def test(records: Records) -> Outcome:
        a, b = (pd.concat([slope(records, c, arm) for c in MCAR], axis=1).mean(axis=1) for arm in ("mm", "pf"))
        return noninferior(*both_on_seeds(a, b), margin, unit="AUROC a share of 1", overlap=OVERLAP)

    return test


def slope(records: Records, cohort: str, arm: str) -> pd.Series:
    """Least-squares slope of the AUROC over the share of values missing at random, by seed."""
    frame = rows(records["mcar"], arm=arm, cohort__name=cohort)
    shares = sorted(frame["corruption.share"].unique())
    values = pd.concat([of(frame, arm, "auroc_same", corruption__share=float(p)) for p in shares], axis=1).dropna()
    x = np.array(shares) - np.mean(shares)
    return pd.Series(values.to_numpy() @ x / (x @ x), index=values.index)


def better_without(records: Records) -> Records:
    """P-Fusion's values do not depend on what is missing; MultiModN's fall to one half."""
    frame = records["mcar"]
    falls = frame["auroc_full"] - (frame["auroc_full"] - 0.5) * frame["corruption.share"]
    return records.replace("mcar", frame.assign(auroc_same=frame["auroc_full"].where(frame["arm"] == "pf", falls)))


def patterns_exchanged(experiment: str) -> Control:
    """Control: unchanged and flipped test patterns exchange names in half of the seeds, less a tenth."""

    def apply(records: Records) -> Records:
        frame = records[experiment]
        odd = frame["seed"] % 2 == 1
        same = frame["auroc_same"].where(~odd, frame["auroc_flip"]) - 0.2
        flip = frame["auroc_flip"].where(~odd, frame["auroc_same"])
        return records.replace(experiment, frame.assign(auroc_same=same, auroc_flip=flip))

    return Control(f"unchanged pattern of {experiment} a fifth lower, patterns exchanged in odd seeds", apply)


CLAIMS = [
    Claim(
        id="C5",
        title="As released: MultiModN is robust to flipped missingness, P-Fusion is not",
        statement="If a modality is missing for most samples of class 1 in training, P-Fusion learns that missing "
        "means class 1 and fails when the pattern is flipped; MultiModN does not.",
        source="experiment 4; the release skips whole batches in MultiModN, single samples in P-Fusion",
        paper_value=UNKNOWN,
        experiments=("mnar",),
        parts={
            "P-Fusion by sample: unchanged above flipped by .05, both cohorts": on_all(SWEPT, learns_pattern),
            "MultiModN by batch above P-Fusion by sample, flipped, both cohorts": on_all(
                SWEPT, flipped, "mm_batch", "pf_sample"
            ),
            "MultiModN by batch: unchanged and flipped within .05, both cohorts": on_all(
                SWEPT, steady, "mm_batch", 0.05
            ),
        },
        control=chain(swap_arms("mnar", "mm_batch", "pf_sample"), patterns_exchanged("mnar")),
        figure=figures.missing_shares,
        caption=f"{SETUP} {BANDS}",
    ),
    Claim(
        id="C5.rare",
        title="As released, also where class 1 is rare",
        statement="The same on tasks whose class 1 is rare (NHEFS 18 %, weather 13 %), where more batches of 16 are "
        "complete.",
        source="our extension of experiment 4",
        paper_value=UNKNOWN,
        experiments=("mnar",),
        parts={
            f"{cohort_name(c)}: {words}": test
            for c in RARE
            for words, test in (
                ("P-Fusion by sample, unchanged above flipped by .05", learns_pattern(c)),
                ("MultiModN by batch above it, flipped", flipped(c, "mm_batch", "pf_sample")),
                ("MultiModN by batch, unchanged and flipped within .05", steady(c, "mm_batch", 0.05)),
            )
        },
        control=chain(swap_arms("mnar", "mm_batch", "pf_sample"), patterns_exchanged("mnar")),
        caption="See the figure of C8.",
        note="With share π of class 1 a batch is kept with probability (1 - p π)^16: 8 % on NHEFS, 18 % on weather.",
    ),
    Claim(
        id="C5.sample",
        title="Sample by sample: MultiModN above P-Fusion under the flipped pattern",
        statement="The paper's text: MultiModN can skip over missing modalities. With each sample skipping what it "
        "lacks, it is robust where P-Fusion is not.",
        source="figure 1, caption; experiment 4",
        paper_value=UNKNOWN,
        experiments=("mnar",),
        parts=each(flipped, "mm_sample", "pf_sample"),
        control=swap_arms("mnar", "mm_sample", "pf_sample"),
        caption="See the figure of C5.",
        note="One sample's prediction must not depend on its batch, so this is the rule that can be deployed.",
    ),
    Claim(
        id="C5.cause",
        title="With whole batches masked, P-Fusion is as robust as MultiModN",
        statement="The robustness comes from masking whole batches, not from sequential fusion: P-Fusion that pads a "
        "modality for the whole batch is within .05 of MultiModN by batch under the flipped pattern.",
        source="our test of experiment 4's cause",
        paper_value=UNKNOWN,
        experiments=("mnar",),
        parts=each(same_flip, "pf_batch", "mm_batch", 0.05),
        control=swap_arms("mnar", "pf_batch", "pf_sample"),
        caption="See the figure of C5.",
    ),
    Claim(
        id="C5.order",
        title="With whole batches masked, MultiModN is above P-Fusion",
        statement="Given the same masking of whole batches, sequential fusion is still the more robust one.",
        source="our test of experiment 4's cause",
        paper_value=UNKNOWN,
        experiments=("mnar",),
        parts=each(flipped, "mm_batch", "pf_batch"),
        control=swap_arms("mnar", "mm_batch", "pf_batch"),
        caption="See the figure of C5.",
    ),
    Claim(
        id="C5.shares",
        title="As released, at every share of missing rows",
        statement="MultiModN by batch is above P-Fusion by sample under the flipped pattern from p = .2 to .8.",
        source="experiment 4, sweep of p (its values from memory)",
        paper_value=UNKNOWN,
        experiments=("mnar",),
        parts={f"{cohort_name(c)}, p = {p:g}": flipped(c, "mm_batch", "pf_sample", p) for c in SWEPT for p in SHARES},
        control=swap_arms("mnar", "mm_batch", "pf_sample"),
        caption="See the figure of C5.",
    ),
    Claim(
        id="C5.positions",
        title="Wherever the hidden modality stands in the chain",
        statement="By sample, MultiModN and P-Fusion are misled at every position (flipped below unchanged); by batch, "
        "both are steady (within .05).",
        source="our extension of experiment 4",
        paper_value=UNKNOWN,
        experiments=("positions",),
        parts={
            "STAR: MultiModN by sample is misled at every position": everywhere_misled("star", "mm_sample"),
            "STAR: P-Fusion by sample is misled at every position": everywhere_misled("star", "pf_sample"),
            "STAR: MultiModN by batch within .05 at every position": everywhere_steady("star", "mm_batch", 0.05),
            "STAR: P-Fusion by batch within .05 at every position": everywhere_steady("star", "pf_batch", 0.05),
            "digits: MultiModN by sample is misled at every position": everywhere_misled("digits", "mm_sample"),
            "digits: P-Fusion by sample is misled at every position": everywhere_misled("digits", "pf_sample"),
            "digits: MultiModN by batch within .05 at every position": everywhere_steady("digits", "mm_batch", 0.05),
            "digits: P-Fusion by batch within .05 at every position": everywhere_steady("digits", "pf_batch", 0.05),
        },
        control=chain(
            swap_arms("positions", "mm_sample", "mm_batch"),
            swap_arms("positions", "pf_sample", "pf_batch"),
        ),
        figure=figures.positions,
        caption=f"p = .8, flipped test pattern, by the hidden modality. {BANDS}",
    ),
    Claim(
        id="C5.later",
        title="By sample, MultiModN is misled less by later modalities",
        statement="The later the hidden modality stands in the chain, the less MultiModN's predictions follow its "
        "absence.",
        source="our extension of experiment 4",
        paper_value=UNKNOWN,
        experiments=("positions",),
        parts={"STAR": later_helps("star"), "digits": later_helps("digits")},
        control=Control(
            "positions counted from the end",
            lambda records: records.replace(
                "positions",
                records["positions"].assign(**{"corruption.modality": 3 - records["positions"]["corruption.modality"]}),
            ),
        ),
        caption="See the figure of C5.positions.",
    ),
    Claim(
        id="C5.batches",
        title="The batch rule protects less in small batches",
        statement="Batches of 2 are skipped less often than batches of 32, and whether they are says something about "
        "their labels: the flipped pattern hurts more.",
        source="our extension: what the official rule depends on",
        paper_value=UNKNOWN,
        experiments=("batch_sizes",),
        parts={
            "p = .4: batches of 32 above batches of 2": smaller_batches_hurt("mm_batch", 2, 0.4, 0.0),
            "p = .8: batches of 32 above batches of 2": smaller_batches_hurt("mm_batch", 2, 0.8, 0.0),
        },
        control=Control(
            "batches of 2 and 32 exchanged",
            lambda records: records.replace(
                "batch_sizes",
                records["batch_sizes"].assign(
                    **{"task.batch_size": records["batch_sizes"]["task.batch_size"].replace({2: 32, 32: 2})}
                ),
            ),
        ),
        figure=figures.batch_sizes,
        caption=f"STAR, flipped test pattern, training and inference in batches of the same size. {BANDS}",
    ),
    Claim(
        id="C5.trees",
        title="Boosted trees and missing-indicator bits are misled as well",
        statement="What learns from missing values directly fails in the same way: unchanged above flipped by .05.",
        source="our baselines",
        paper_value=UNKNOWN,
        experiments=("mnar",),
        parts={
            f"{label}, {cohort_name(c)}": learns_pattern(c, arm)
            for arm, label in (("boosting", "boosted trees"), ("pf_indicator", "P-Fusion + bits"))
            for c in MNAR
        },
        control=Control(
            "flipped test data exchanged for unchanged ones",
            lambda records: records.replace("mnar", records["mnar"].assign(auroc_flip=records["mnar"]["auroc_same"])),
        ),
        caption="See the figure of C8.",
    ),
    Claim(
        id="C5.mimic",
        title="MIMIC, as released: robust to flipped missingness, P-Fusion is not",
        statement="The paper's experiment on its own data: the image embedding is missing for 80 % of class 1.",
        source="experiment 4",
        paper_value=UNKNOWN,
        experiments=("mnar",),
        parts={
            "P-Fusion of raw columns: unchanged above flipped by .05": learns_pattern("haim", "raw_sample"),
            "MultiModN by batch above P-Fusion of raw columns, flipped": flipped("haim", "mm_batch", "raw_sample"),
            "MultiModN by batch: unchanged and flipped within .05": steady("haim", "mm_batch", 0.05),
        },
        control=swap_arms("mnar", "mm_batch", "raw_sample"),
        scale_needed="paper",
        note="Needs the HAIM-MIMIC-MM file: `cohort.path`.",
    ),
    Claim(
        id="C7",
        title="Missing at random: skipping degrades no faster than mean imputation",
        statement="With 0 to 80 % of all modalities missing at random in training and test, MultiModN's AUROC falls no "
        "faster than that of P-Fusion with mean imputation.",
        source="section on missingness, inferred",
        paper_value=UNKNOWN,
        experiments=("mcar",),
        parts={"mean of three cohorts: the slope is at most .02 steeper": slope_holds(0.02)},
        control=Control("P-Fusion loses nothing, MultiModN falls to one half", better_without),
        figure=figures.at_random,
        caption=f"AUROC by the share of missing values, mean over the cohort's tasks. {BANDS}",
    ),
]
