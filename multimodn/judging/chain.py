"""Claims on predictions along the chain and from subsets of modalities (C4, C6) and their tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from common.claims import Claim, Control
from common.pairing import rows
from common.statistics import Outcome, every, mean_greater, mean_less
from multimodn import figures
from multimodn.judging.samples import BANDS, OVERLAP, SINGLE, UNIT, UNKNOWN, Array, Test, beats, holds, lowered, of
from multimodn.names import cohort as cohort_name

if TYPE_CHECKING:
    from common.records import Records

EXACT = 1e-6
"""Largest difference of logits that float32 leaves between two ways to compute the same prefix."""


def chains(records: Records) -> pd.DataFrame:
    """AUROC after every prefix, a row a seed: mean over the tasks of a cohort, then over the embedded cohorts."""
    frame = rows(records["multi"], arm="mm")
    frame = frame[frame["cohort.name"].isin(SINGLE)]
    each = pd.DataFrame([np.nanmean(c, axis=1) for c in frame["chain"]], index=frame.index)
    return each.groupby(frame["seed"]).mean()


def prefixes_are_exact(records: Records) -> Outcome:
    """A chain cut after k encoders predicts what row k of the full chain says."""
    frame = records["multi"]
    gaps = [of(frame, "mm", "prefix_gap", cohort__name=c).to_numpy() for c in SINGLE]
    return every([mean_less(gap, EXACT, unit="logits") for gap in gaps], [cohort_name(c) for c in SINGLE])


def chain_gains(records: Records) -> Outcome:
    """The full chain knows more than the initial state, whose AUROC is one half."""
    found = chains(records)
    return beats(found.iloc[:, -1], found.iloc[:, 0])


def chain_rises(records: Records) -> Outcome:
    """Spearman's correlation of prefix length and AUROC exceeds .8."""
    found = chains(records)
    steps = np.arange(found.shape[1])
    rho = [stats.spearmanr(steps, row).statistic if np.ptp(row) else 0.0 for row in found.to_numpy()]
    return mean_greater(rho, 0.8, unit="rho", overlap=OVERLAP)


def by_generator(records: Records, hit: Any) -> Array:
    """Share of (fold, task) pairs that are right, a value a generated data set."""
    frame = rows(records["planted"], arm="mm")
    right = [np.mean(hit(row)) for row in frame.to_dict("records")]
    return pd.Series(right, index=frame.index).groupby(frame["cohort.generator_seed"]).mean().to_numpy()


def largest_jump(row: dict[str, Any]) -> list[bool]:
    """Whether the AUROC of task j jumps most at modality j."""
    jumps = np.diff(np.array(row["chain"]), axis=0)  # (K, D)
    return [int(jumps[:, d].argmax()) == d for d in range(jumps.shape[1])]


def largest_contribution(row: dict[str, Any]) -> list[bool]:
    """Whether modality j alone tells the classes of task j apart best."""
    individual = np.array(row["individual"])  # (K, D, 2)
    apart = individual[:, :, 1] - individual[:, :, 0]
    return [int(apart[:, d].argmax()) == d for d in range(apart.shape[1])]


def next_task(records: Records) -> Records:
    """Every modality is said to carry the next task."""
    frame = records["planted"]
    moved = {
        "chain": frame["chain"].map(lambda c: np.roll(np.array(c), 1, axis=1).tolist()),
        "individual": frame["individual"].map(lambda c: np.roll(np.array(c), 1, axis=1).tolist()),
    }
    return records.replace("planted", frame.assign(**moved))


def reversed_chain(records: Records) -> Records:
    """Rows of the grid in reverse, and a prefix that differs by a tenth."""
    frame = records["multi"]
    turned = frame["chain"].map(lambda c: c[::-1] if isinstance(c, list) else c)
    return records.replace("multi", frame.assign(chain=turned, prefix_gap=frame["prefix_gap"] + 0.1))


def excess(subsets: list[float]) -> float:
    """Mean over subsets A and modalities k not in A of AUROC(A) − AUROC(A with k)."""
    count = len(subsets).bit_length() - 1
    pairs = [(a, a | 1 << k) for a in range(len(subsets)) for k in range(count) if not a >> k & 1]
    return float(np.mean([subsets[a] - subsets[b] for a, b in pairs]))


def partial(subsets: list[float]) -> float:
    """Mean AUROC over the subsets that hold some modalities and not all."""
    return float(np.mean(subsets[1:-1]))


def adding_helps(margin: float) -> Test:
    """Leaving a modality out does not raise the AUROC by more than `margin` on average, on every cohort."""

    def test(records: Records) -> Outcome:
        frame = records["multi"].assign(excess=records["multi"]["subsets"].map(excess))
        found = [of(frame, "mm", "excess", cohort__name=c) for c in SINGLE]
        outcomes = [mean_less(x.to_numpy(), margin, unit=UNIT, overlap=OVERLAP) for x in found]
        return every(outcomes, [cohort_name(c) for c in SINGLE])

    return test


def on_subsets(a: str, b: str, margin: float | None = None) -> Test:
    """Mean over all proper subsets, then cohorts: a is above b, or loses less than `margin`."""

    def test(records: Records) -> Outcome:
        frame = records["multi"][records["multi"]["cohort.name"].isin(SINGLE)]
        frame = frame.assign(partial=frame["subsets"].map(partial))
        first, second = of(frame, a, "partial"), of(frame, b, "partial")
        return beats(first, second) if margin is None else holds(first, second, margin)

    return test


def alone(records: Records, cohort: str, position: int) -> pd.Series:
    """AUROC of a network that sees one modality."""
    return of(records["unimodal"], "mm", cohort__name=cohort, network__only=position)


def above_single(records: Records) -> Outcome:
    """The full chain is above the best single modality of each cohort (best by its mean), mean over cohorts."""
    gains = []
    for c in SINGLE:
        best = max((alone(records, c, k) for k in range(4)), key=lambda scores: scores.mean())
        gains.append(of(records["multi"], "mm", cohort__name=c) - best)
    return mean_greater(pd.concat(gains, axis=1).dropna().mean(axis=1).to_numpy(), 0.0, unit=UNIT, overlap=OVERLAP)


def complement(records: Records) -> Records:
    """Every subset's AUROC is that of its complement, and the sequential and parallel arms exchange names."""
    frame = records["multi"]
    swapped = frame["arm"].replace({"mm": "pf", "pf": "mm", "mm_dropout": "mm_", "pf_dropout": "mm_dropout"})
    turned = frame["subsets"].map(lambda s: s[::-1])
    return records.replace("multi", frame.assign(subsets=turned, arm=swapped.replace({"mm_": "pf_dropout"})))


def other_subsets(records: Records) -> Records:
    """Every subset's AUROC is that of its complement, and prefixes differ by a tenth."""
    frame = records["multi"]
    turned = frame["subsets"].map(lambda s: s[::-1])
    return reversed_chain(records.replace("multi", frame.assign(subsets=turned)))


CLAIMS = [
    Claim(
        id="C4",
        title="Predictions after every modality, exact, and rising along the chain",
        statement="Every prefix of the chain gives the prediction of a network that ends there, and more modalities "
        "predict better.",
        source="experiment 3, figure of modality-wise contributions",
        paper_value=UNKNOWN,
        experiments=("multi",),
        parts={
            "row k equals the chain cut after k encoders (logits within 1e-6)": prefixes_are_exact,
            "full chain above the initial state": chain_gains,
            "Spearman correlation of prefix length and AUROC above .8": chain_rises,
        },
        control=Control("rows of the grid reversed, prefixes a tenth apart", reversed_chain),
        figure=figures.contributions,
        caption="Mean probability of class 1 among samples of class 0 and of class 1: along the chain (left), and its "
        "change by each modality alone on the initial state (right). NHEFS, mean over seeds.",
    ),
    Claim(
        id="C4.planted",
        title="Contributions find the modality that carries a task",
        statement="Where modality j alone carries task j, the chain's AUROC jumps most at j, and j's own contribution "
        "tells the classes apart best, in at least 95 % of cases.",
        source="our test of experiment 3 on generated data",
        paper_value=UNKNOWN,
        experiments=("planted",),
        parts={
            "largest jump of AUROC at j in 95 %": lambda records: mean_greater(
                by_generator(records, largest_jump), 0.95, unit="of cases"
            ),
            "largest contribution alone from j in 95 %": lambda records: mean_greater(
                by_generator(records, largest_contribution), 0.95, unit="of cases"
            ),
        },
        control=Control("every modality is said to carry the next task", next_task),
        figure=figures.planted,
        caption="Increase of the AUROC at each step of the chain, ten generated data sets with five folds each.",
    ),
    Claim(
        id="C6",
        title="Any subset of modalities at inference, without retraining",
        statement="A trained MultiModN predicts from any combination of modalities; leaving some out does not raise "
        "the AUROC by more than .02 on average, and leaving out the last ones is exactly the shorter chain.",
        source="figure 1 and method",
        paper_value=UNKNOWN,
        experiments=("multi",),
        parts={
            "a modality less raises the AUROC by less than .02 on average": adding_helps(0.02),
            "leaving out the last ones is the chain cut there": prefixes_are_exact,
        },
        control=Control("every subset exchanged for its complement, prefixes a tenth apart", other_subsets),
        figure=figures.subsets,
        caption=f"AUROC by the number of modalities shown at inference, mean over all subsets of that size. {BANDS}",
    ),
    Claim(
        id="C6.parallel",
        title="From subsets, skipping predicts better than padding",
        statement="On subsets of modalities, MultiModN, which skips what is missing, is more accurate than P-Fusion "
        "with padding; and hiding modalities in training adds to it.",
        source="figure 1 contrasts the two; the comparison is ours",
        paper_value=UNKNOWN,
        experiments=("multi",),
        parts={
            "MultiModN above P-Fusion, all proper subsets": on_subsets("mm", "pf"),
            "both with modality dropout: loses < .02 to P-Fusion": on_subsets("mm_dropout", "pf_dropout", 0.02),
            "modality dropout improves MultiModN": on_subsets("mm_dropout", "mm"),
        },
        control=Control("subsets exchanged for complements, arms for each other", complement),
        caption="See the figure of C6.",
    ),
    Claim(
        id="C6.unimodal",
        title="All modalities together are above the best single one",
        statement="A network of all modalities is more accurate than one of the best single modality.",
        source="our baseline",
        paper_value=UNKNOWN,
        experiments=("multi", "unimodal"),
        parts={"mean of five cohorts": above_single},
        control=lowered("multi", ("mm",), 0.2),
        figure=figures.single_modalities,
        caption=f"AUROC, mean over the cohort's tasks. {BANDS}",
    ),
]
