"""Claims on accuracy with complete data (C1 to C3) and their tests, fixed before the judging run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.claims import Claim, Control, chain
from common.pairing import rows
from common.statistics import Outcome, every, mean_greater
from multimodn import figures
from multimodn.judging.samples import (
    BANDS,
    PAPER,
    SINGLE,
    UNKNOWN,
    Test,
    alike,
    holds,
    lowered,
    of,
)
from multimodn.names import cohort as cohort_name

if TYPE_CHECKING:
    from common.records import Records

TASKS = [(cohort, task) for cohort, tasks in SINGLE.items() for task in tasks]
SEVERAL = tuple(cohort for cohort, tasks in SINGLE.items() if len(tasks) > 1)
PAPER_TASKS = 8


def embedded(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of embedded cohorts, which have every scale."""
    return frame[frame["cohort.name"].isin(SINGLE)]


def published(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of the paper's own cohorts."""
    return frame[frame["cohort.name"].isin(PAPER)]


def average(experiment: str, arm: str, other: str, margin: float, part: object = embedded) -> Test:
    """Arm loses less than `margin` to the other, mean over all cohorts and tasks."""

    def test(records: Records) -> Outcome:
        frame = part(records[experiment])  # type: ignore[operator]
        return holds(of(frame, arm), of(frame, other), margin)

    return test


def on_task(cohort: str, task: str, arm: str, other: str, margin: float) -> Test:
    """Arm loses less than `margin` to the other on one task."""

    def test(records: Records) -> Outcome:
        frame = records["single"].assign(task=records["single"]["task_names"].str[0])
        own = rows(frame, cohort__name=cohort, task=task)
        return holds(of(own, arm), of(own, other), margin)

    return test


def cohorts_one_by_one(arm: str, other: str, margin: float) -> Test:
    """Arm loses less than `margin` to the other on every cohort, mean over its tasks."""

    def test(records: Records) -> Outcome:
        frame = records["multi"]
        outcomes = [holds(of(frame, arm, cohort__name=c), of(frame, other, cohort__name=c), margin) for c in SINGLE]
        return every(outcomes, [cohort_name(c) for c in SINGLE])

    return test


def joint_against_single(cohorts: tuple[str, ...], margin: float) -> Test:
    """One network for all tasks loses less than `margin` to one a task, mean over tasks and then cohorts."""

    def test(records: Records) -> Outcome:
        multi = records["multi"][records["multi"]["cohort.name"].isin(cohorts)]
        single = records["single"][records["single"]["cohort.name"].isin(cohorts)]
        alone = [of(single, "mm", cohort__name=c) for c in cohorts]
        return holds(of(multi, "mm"), pd.concat(alone, axis=1).mean(axis=1), margin)

    return test


def fewer_parameters(cohorts: tuple[str, ...], factor: float) -> Test:
    """The networks of the single tasks have together more than `factor` times the joint network's parameters."""

    def test(records: Records) -> Outcome:
        ratios = []
        for c in cohorts:
            joint = of(records["multi"], "mm", "parameters", cohort__name=c)
            alone = rows(records["single"], arm="mm", cohort__name=c).groupby("seed")["parameters"].sum()
            ratios.append((alone / joint).dropna())
        outcomes = [mean_greater(np.asarray(r), factor, unit="×") for r in ratios]
        return every(outcomes, [cohort_name(c) for c in cohorts])

    return test


def first_modality(experiment: str) -> Control:
    """Control: MultiModN's AUROC is that after its first modality."""

    def apply(records: Records) -> Records:
        frame = records[experiment]
        mine = frame["arm"] == "mm"
        early = frame["chain"].map(lambda c: float(np.nanmean(c[:2][-1])) if isinstance(c, list) else np.nan)
        return records.replace(experiment, frame.assign(auroc_full=frame["auroc_full"].where(~mine, early)))

    return Control(f"MultiModN of {experiment} judged after its first modality", apply)


def other_encoders(margin: float) -> Test:
    """MultiModN loses less than `margin` to P-Fusion with the same kind of encoder, mean over three kinds."""

    def test(records: Records) -> Outcome:
        frame = embedded_sequences(records)
        frame = frame.assign(arm=frame["arm"].str[:2])
        return holds(of(frame, "mm"), of(frame, "pf"), margin)

    return test


def embedded_sequences(records: Records) -> pd.DataFrame:
    """The rows of embedded sequences and images."""
    frame = records["encoders"]
    return frame[frame["cohort.name"].isin(("weather_sequence", "digits_images"))]


def detail(arm: str, margin: float) -> Test:
    """A variant of MultiModN is as good as MultiModN, mean over four cohorts."""

    def test(records: Records) -> Outcome:
        frame = embedded(records["ablation"])
        return alike(of(frame, arm), of(frame, "mm"), margin)

    return test


CLAIMS = [
    Claim(
        id="C1",
        title="One task at a time, MultiModN loses less than .02 to P-Fusion",
        statement="Sequential fusion does not lose accuracy to parallel fusion, one task at a time, on ten tasks.",
        source="experiment 1, single-task results",
        paper_value=UNKNOWN,
        experiments=("single",),
        parts={
            "mean of ten tasks, against P-Fusion: loses < .02": average("single", "mm", "pf", 0.02),
            "mean of ten tasks, against P-Fusion of raw columns: loses < .02": average("single", "mm", "pf_raw", 0.02),
        },
        control=first_modality("single"),
        figure=figures.ten_tasks,
        caption=f"AUROC on held-out folds, ten tasks, every arm at its tuned setting. {BANDS}",
    ),
    Claim(
        id="C1.tasks",
        title="On no single task MultiModN loses .05 to P-Fusion",
        statement="Sequential fusion does not lose accuracy to parallel fusion on any of ten tasks.",
        source="experiment 1, single-task results",
        paper_value=UNKNOWN,
        experiments=("single",),
        parts={f"{cohort_name(c)} {t.replace('_', ' ')}": on_task(c, t, "mm", "pf", 0.05) for c, t in TASKS},
        control=first_modality("single"),
        caption="See the figure of C1.",
        note="A fold of PBC has 47 test rows: too few for a margin of .05.",
    ),
    Claim(
        id="C1.tables",
        title="MultiModN loses less than .02 to classifiers of plain tables",
        statement="Fusion networks are as accurate as what is usual for such tables: logistic regression and boosted "
        "trees on the concatenated columns.",
        source="our baselines",
        paper_value=UNKNOWN,
        experiments=("single",),
        parts={
            "mean of ten tasks, against logistic regression": average("single", "mm", "logistic", 0.02),
            "mean of ten tasks, against boosted trees": average("single", "mm", "boosting", 0.02),
        },
        control=first_modality("single"),
        caption="See the figure of C1.",
    ),
    Claim(
        id="C1.encoders",
        title="Also with recurrent, transformer and convolutional encoders",
        statement="Sequential fusion does not lose to parallel fusion with encoders over real sequences and images.",
        source="our test of the paper's modularity",
        paper_value=UNKNOWN,
        experiments=("encoders",),
        parts={"mean of recurrent, transformer and convolutional encoders: loses < .05": other_encoders(0.05)},
        control=lowered("encoders", ("mm_gru", "mm_transformer", "mm_conv"), 0.1),
        figure=figures.other_encoders,
        caption=f"AUROC, mean over the cohort's tasks. {BANDS}",
    ),
    Claim(
        id="C1.loss",
        title="The official loss on squashed outputs costs nothing",
        statement="Cross-entropy of sigmoid outputs, as the official code has it, is as good as that of logits.",
        source="official code; the question is ours",
        paper_value=UNKNOWN,
        experiments=("ablation",),
        parts={"mean of four cohorts: within .02": detail("mm_sigmoid", 0.02)},
        control=lowered("ablation", ("mm_sigmoid",), 0.05),
        caption="See the figure of C1.details.",
        note="Its gradients are damped, so that it needs longer training; here both have 15 epochs.",
    ),
    Claim(
        id="C1.details",
        title="Entry of the state and order change little",
        statement="Details of the official network do not decide its accuracy: each variant is within .02.",
        source="official code; the question is ours",
        paper_value=UNKNOWN,
        experiments=("ablation",),
        parts={
            "state joins at the last layer": detail("mm_output", 0.02),
            "chain reversed": detail("mm_reversed", 0.02),
            "order shuffled in training": detail("mm_shuffle", 0.02),
        },
        control=lowered("ablation", ("mm_output", "mm_reversed", "mm_shuffle"), 0.05),
        figure=figures.details,
        caption=f"AUROC, mean over four cohorts and their tasks. {BANDS}",
    ),
    Claim(
        id="C1.paper",
        title="MIMIC, Weather2K, EDU: loses less than .02 to P-Fusion",
        statement="Sequential fusion does not lose accuracy to parallel fusion on the paper's own data.",
        source="experiment 1, single-task results",
        paper_value=UNKNOWN,
        experiments=("single",),
        parts={"mean of all tasks, against P-Fusion: loses < .02": average("single", "mm", "pf", 0.02, published)},
        control=first_modality("single"),
        scale_needed="paper",
        note="Needs the files of the three data sets: `cohort.path`.",
    ),
    Claim(
        id="C2",
        title="One network for all tasks matches one a task",
        statement="A MultiModN trained on all tasks of a data set at once is as accurate as one network a task, with "
        "fewer parameters.",
        source="experiment 2, multi-task results",
        paper_value=UNKNOWN,
        experiments=("single", "multi"),
        parts={
            "mean of four cohorts: loses < .02": joint_against_single(SEVERAL, 0.02),
            "single-task networks have together 1.5 times its parameters": fewer_parameters(SEVERAL, 1.5),
        },
        control=chain(
            first_modality("multi"),
            Control(
                "the joint network counted once a task",
                lambda records: records.replace(
                    "multi", records["multi"].assign(parameters=3 * records["multi"]["parameters"])
                ),
            ),
        ),
        figure=figures.joint_tasks,
        caption=f"AUROC, mean over the cohort's tasks. {BANDS}",
    ),
    Claim(
        id="C3",
        title="All tasks at once, MultiModN loses less than .02 to P-Fusion",
        statement="Multi-task MultiModN does not lose accuracy to P-Fusion with one decoder a task.",
        source="experiment 2, multi-task results",
        paper_value=UNKNOWN,
        experiments=("multi",),
        parts={
            "mean of five cohorts, against P-Fusion: loses < .02": average("multi", "mm", "pf", 0.02),
            "mean of five cohorts, against P-Fusion of raw columns: loses < .02": average(
                "multi", "mm", "pf_raw", 0.02
            ),
            "every cohort, against P-Fusion: loses < .05": cohorts_one_by_one("mm", "pf", 0.05),
        },
        control=first_modality("multi"),
        caption="See the figure of C2.",
    ),
]
