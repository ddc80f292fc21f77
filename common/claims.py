"""Claims of a paper and how records judge them: records -> verdicts, a pure function without training.

A claim lists its parts, each one statistical test that was fixed before the run. It is

    reproduced     when every part is significant (Holm over the parts, alpha = 0.05),
    contradicted   when one part is significantly the other way (Holm over the parts' opposite p-values),
    inconclusive   otherwise, and
    not testable at this scale   when it needs a larger scale than the records have.

Each claim carries a control: the same parts on records whose arms are swapped or whose values are permuted. A test that
still says "reproduced" there measures nothing, so the claim becomes inconclusive, with the reason.
"""

from __future__ import annotations

import string
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from common.statistics import Outcome, holm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from common.records import Records

Word = Literal["reproduced", "contradicted", "inconclusive", "not testable at this scale"]
REPRODUCED: Word = "reproduced"
CONTRADICTED: Word = "contradicted"
INCONCLUSIVE: Word = "inconclusive"
NOT_TESTABLE: Word = "not testable at this scale"
SHAPES: dict[str, str] = {REPRODUCED: "✓", CONTRADICTED: "✗", INCONCLUSIVE: "?", NOT_TESTABLE: "–"}
SCALES = ("smoke", "laptop", "gpu", "paper")
ALPHA = 0.05
MAX_TITLE_WORDS = 12


@dataclass(frozen=True)
class Claim:
    """One claim of a paper with the test that decides it."""

    id: str
    """`C1`, or `C1.lion` for a claim in another set-up; the parts become `C1a`, `C1b`, … and `C1.lion.a`, …"""
    statement: str
    """What the paper says, in one or two sentences of our own."""
    source: str
    """Table, figure, theorem or section of the paper."""
    paper_value: str
    """The paper's own figure, or `not established`."""
    experiments: tuple[str, ...]
    """Experiments whose records the parts read."""
    parts: Mapping[str, Callable[[Records], Outcome]]
    """What each part tests, in words -> the test."""
    control: Callable[[Records], Records]
    """Records in which the claim must not hold: `swap_arms`, `permute`, `roll` or a function with a docstring."""
    figure: Callable[[Records], Figure] | None = None
    """Draws the counterpart of the paper's figure."""
    caption: str = ""
    """What the figure shows: bands, seeds, axes."""
    scale_needed: str | None = None
    """Smallest scale at which the claim can be tested; None = any."""
    command: str = ""
    """Command that reruns its experiments; derived from `experiments` when empty."""
    note: str = ""
    """What we tried, candidate causes, caveats."""
    title: str = ""
    """The claim in at most twelve words, for tables; the statement's first words when empty."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError(f"{self.id}: parts must hold at least one test")
        if len(self.parts) > len(string.ascii_lowercase):
            raise ValueError(f"{self.id}: parts has {len(self.parts)} tests, at most {len(string.ascii_lowercase)}")
        if self.scale_needed is not None and self.scale_needed not in SCALES:
            raise ValueError(f"{self.id}: scale_needed={self.scale_needed!r}: must be one of {', '.join(SCALES)}")
        if len(self.title.split()) > MAX_TITLE_WORDS:
            raise ValueError(f"{self.id}: title={self.title!r}: must have at most {MAX_TITLE_WORDS} words")

    @property
    def short(self) -> str:
        """The claim in at most twelve words."""
        words = (self.title or self.statement).split()
        return " ".join(words) if len(words) <= MAX_TITLE_WORDS else " ".join(words[:MAX_TITLE_WORDS]) + " …"


@dataclass(frozen=True)
class PartVerdict:
    """One part of a claim, judged."""

    id: str
    label: str
    verdict: Word
    outcome: Outcome
    p_adjusted: float
    """Holm-adjusted over the claim's parts."""
    p_opposite_adjusted: float
    control: str
    """What the control said about this part."""


@dataclass(frozen=True)
class Verdict:
    """A claim, judged."""

    claim: Claim
    verdict: Word
    scale: str
    parts: tuple[PartVerdict, ...] = ()
    control: str = ""
    """What the control did and what it said."""
    control_verdict: str = ""
    """What it said, in a word."""
    reason: str = ""
    """Why, in a sentence, where the verdict does not follow from the parts alone."""
    decisive: PartVerdict | None = None
    """The part that decided: the weakest of a reproduced or inconclusive claim, the clearest of a contradicted one."""


@dataclass(frozen=True)
class Control:
    """A transformation of records under which a claim must not hold, with its description."""

    description: str
    apply: Callable[[Records], Records]

    def __call__(self, records: Records) -> Records:
        """Give the transformed records; the input stays as it is."""
        return self.apply(records)


def judge(claim: Claim, records: Records, scale: str = "laptop", alpha: float = ALPHA) -> Verdict:
    """Judge one claim on `records` recorded at `scale`, its control included.

    A part whose data cannot be tested (ValueError) makes the claim inconclusive and says why; other errors are raised.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: must be one of {', '.join(SCALES)}")
    if claim.scale_needed and SCALES.index(scale) < SCALES.index(claim.scale_needed):
        reason = f"needs scale={claim.scale_needed}; these records are of scale={scale}"
        return Verdict(claim, NOT_TESTABLE, scale, control="not run", control_verdict="not run", reason=reason)
    try:
        outcomes = _test_parts(claim, records)
    except ValueError as error:
        reason = f"could not be tested: {error}"
        return Verdict(claim, INCONCLUSIVE, scale, control="not run", control_verdict="not run", reason=reason)
    word, reason = _decide(outcomes, alpha), ""
    shadow_word, said = _ask_control(claim, records, alpha)
    if word == REPRODUCED and shadow_word != INCONCLUSIVE and shadow_word != CONTRADICTED:
        word, reason = INCONCLUSIVE, f"the control is {shadow_word}, so this test is not trusted"
    parts = _part_verdicts(claim, outcomes, said, alpha)
    control = f"{describe(claim.control)}: {shadow_word}"
    return Verdict(claim, word, scale, parts, control, shadow_word, reason, _decisive(word, parts))


def judge_all(claims: Iterable[Claim], records: Records, scale: str = "laptop", alpha: float = ALPHA) -> list[Verdict]:
    """Judge every claim; raises ValueError when two claims share an id."""
    listed = list(claims)
    repeated = sorted({c.id for c in listed if sum(d.id == c.id for d in listed) > 1})
    if repeated:
        raise ValueError(f"claim id {repeated[0]!r} is used twice: ids must be unique")
    return [judge(claim, records, scale, alpha) for claim in listed]


def describe(control: Callable[[Records], Records]) -> str:
    """Say in words what a control does: its description, else the first line of its docstring, else its name."""
    if isinstance(control, Control):
        return control.description
    name = getattr(control, "__name__", "control").replace("_", " ")
    return (control.__doc__ or name).strip().splitlines()[0].rstrip(".")


def swap_arms(experiment: str, a: str, b: str) -> Control:
    """Control: the rows of arm `a` are called `b` and the other way round."""

    def apply(records: Records) -> Records:
        frame = records[experiment]
        for arm in (a, b):
            if not (frame["arm"] == arm).any():
                raise ValueError(f"swap_arms: arm {arm!r} is not in experiment {experiment!r}")
        return records.replace(experiment, frame.assign(arm=frame["arm"].replace({a: b, b: a})))

    return Control(f"arms {a} and {b} of {experiment} swapped", apply)


def permute(experiment: str, column: str, by: str | tuple[str, ...] | None = "seed") -> Control:
    """Control: the values of `column` are shuffled among the rows that share `by` (None: among all rows).

    The shuffle is the same at every call; a group whose values differ never keeps its order.
    """
    keys = [] if by is None else [by] if isinstance(by, str) else list(by)

    def apply(records: Records) -> Records:
        frame = records[experiment].reset_index(drop=True)
        generator = np.random.default_rng(zlib.crc32(f"{experiment}/{column}/{keys}".encode()))
        source = np.arange(len(frame))
        for group in [frame] if not keys else [g for _, g in frame.groupby(keys, sort=True, dropna=False)]:
            source[group.index] = _shuffle(group[column], generator)
        return records.replace(experiment, _take(frame, [column], source))

    return Control(f"{column} of {experiment} permuted within {' and '.join(keys) or 'all rows'}", apply)


def roll(experiment: str, metric: str | tuple[str, ...], over: str = "arm") -> Control:
    """Control: within each seed every arm gets `metric` (one column or several) of the next arm."""
    columns = [metric] if isinstance(metric, str) else list(metric)

    def apply(records: Records) -> Records:
        frame = records[experiment].reset_index(drop=True)
        if frame[over].nunique() < 2:
            raise ValueError(f"roll: experiment {experiment!r} has one value of {over!r}, needs >= 2")
        source = np.arange(len(frame))
        for _, group in frame.groupby("seed", sort=True):
            ordered = group.sort_values(over, kind="stable")
            step = int((ordered[over] == ordered[over].iloc[0]).sum())
            source[ordered.index] = np.roll(ordered.index.to_numpy(), -step)
        return records.replace(experiment, _take(frame, columns, source))

    return Control(f"{', '.join(columns)} of {experiment} given to the next {over}", apply)


def chain(*controls: Callable[[Records], Records]) -> Control:
    """Control: several controls one after the other, for claims that read several experiments."""

    def apply(records: Records) -> Records:
        for control in controls:
            records = control(records)
        return records

    return Control("; ".join(describe(c) for c in controls), apply)


def _shuffle(values: pd.Series, generator: np.random.Generator) -> NDArray[np.int64]:
    """Give the index of `values` in a random order, one that changes the sequence of values wherever any order does."""
    words = values.map(repr).to_numpy()  # repr: cells may hold lists, and NaN must equal itself
    while True:
        order = generator.permutation(len(words))
        if (words[order] != words).any() or len(set(words)) < 2:
            return values.index.to_numpy()[order]


def _take(frame: pd.DataFrame, columns: list[str], source: NDArray[np.int64]) -> pd.DataFrame:
    """Give `frame` with row i of `columns` taken from row source[i]; source: (rows,) positions."""
    return frame.assign(**{column: frame[column].take(source).array for column in columns})


def _test_parts(claim: Claim, records: Records) -> list[Outcome]:
    outcomes = []
    for label, test in claim.parts.items():
        try:
            outcomes.append(test(records))
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
    return outcomes


def _ask_control(claim: Claim, records: Records, alpha: float) -> tuple[str, list[str]]:
    """Give the claim's verdict on its control records, and that of each part with its p."""
    try:
        outcomes = _test_parts(claim, claim.control(records))
    except ValueError as error:
        return f"not testable ({error})", ["not testable"] * len(claim.parts)
    return _decide(outcomes, alpha), [f"{_decide([o], alpha)} (p={o.p:.2g})" for o in outcomes]


def _decide(outcomes: list[Outcome], alpha: float) -> Word:
    if (holm([o.p for o in outcomes]) <= alpha).all():
        return REPRODUCED
    if (holm([o.p_opposite for o in outcomes]) <= alpha).any():
        return CONTRADICTED
    return INCONCLUSIVE


def _part_verdicts(claim: Claim, outcomes: list[Outcome], said: list[str], alpha: float) -> tuple[PartVerdict, ...]:
    supports, opposes = holm([o.p for o in outcomes]), holm([o.p_opposite for o in outcomes])
    parts = []
    for i, (label, outcome) in enumerate(zip(claim.parts, outcomes, strict=True)):
        word = REPRODUCED if supports[i] <= alpha else CONTRADICTED if opposes[i] <= alpha else INCONCLUSIVE
        dot = "." if "." in claim.id else ""
        name = f"{claim.id}{dot}{string.ascii_lowercase[i]}" if len(outcomes) > 1 else claim.id
        parts.append(PartVerdict(name, label, word, outcome, float(supports[i]), float(opposes[i]), said[i]))
    return tuple(parts)


def _decisive(word: Word, parts: tuple[PartVerdict, ...]) -> PartVerdict:
    if word == CONTRADICTED:
        return min(parts, key=lambda part: part.outcome.p_opposite)
    return max(parts, key=lambda part: part.outcome.p)
