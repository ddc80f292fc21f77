"""Claims on language models (C6 to C9) and their tests, fixed before the judging run. Losses are in nats a token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.claims import Claim, Control, chain, swap_arms
from common.pairing import both, rows
from common.statistics import (
    Outcome,
    noninferior,
    paired_greater,
    ratio_greater,
)
from sparse_flash_attention import figures
from sparse_flash_attention.judging.samples import BANDS, LONG, TIMED, UNKNOWN, Test, faster, speedups, swap_times
from sparse_flash_attention.names import name

if TYPE_CHECKING:
    from common.records import Records

UNIT = "nats"
MARGIN = 0.03
"""Nats a token that count as the same perplexity (3 %)."""
INFORMATIVE = 0.1
"""Nats that dense attention must gain on no attention before parity means anything."""
QUARTER = 4.0
"""How many times more steps H-LM gets than `dense_short`; its step must be that much faster at 8,192 tokens."""
DROPS = ("drop_0.3", "drop_0.5", "drop_0.7")
HASH = "hash_16"


def levels(frame: pd.DataFrame, *arms: str) -> str:
    """Mean losses in words, with the loss when rows are dropped in evaluation too and the share of pairs seen."""
    found = []
    for arm in arms:
        own = rows(frame, arm=arm).mean(numeric_only=True)
        words = [f"{name(arm)} {own['test_loss']:.4f}"]
        if np.isfinite(own.get("dropping_loss", np.nan)):
            words.append(f"{own['dropping_loss']:.4f} dropping in evaluation")
        if own.get("density_late", 1.0) < 1:
            words.append(f"{own['density_late']:.3f} of all pairs")
        found.append(", ".join(words))
    return "; ".join(found)


def better(arm: str, other: str, margin: float = 0.0) -> Test:
    """Test loss of `arm` is more than `margin` below that of `other`, paired over seeds."""

    def test(records: Records) -> Outcome:
        frame = records["language"]
        a, b = both(frame, other, arm, "test_loss", mode="min")
        return replace(paired_greater(a, b, margin, unit=UNIT), detail=levels(frame, arm, other))

    return test


def parity(arm: str, metric: str = "test_loss", baseline: str = "dense") -> Test:
    """Test loss of `arm` is less than `MARGIN` above that of the baseline."""

    def test(records: Records) -> Outcome:
        frame = records["language"]
        if metric not in frame:
            raise ValueError(f"column {metric!r} is not recorded")
        # dense attention drops nothing, so it has one loss only
        frame = frame.assign(judged=frame["test_loss"].where(frame["arm"] == "dense", frame[metric]))
        other, own = both(frame, baseline, arm, "judged", mode="min")
        return replace(noninferior(-own, -other, MARGIN, unit=UNIT), detail=levels(frame, arm, baseline))

    return test


def sharpens(records: Records) -> Outcome:
    """The share of live pairs is lower at the end of training than early on."""
    frame = rows(records["language"], arm="hash").sort_values("seed")
    early, late = frame["density_early"].to_numpy(), frame["density_late"].to_numpy()
    detail = f"early {early.mean():.3f}, late {late.mean():.3f}"
    return replace(paired_greater(early, late, unit="share of pairs"), detail=detail)


def longer_gains(records: Records) -> Outcome:
    """The step's ratio is larger at 16,384 tokens than at 8,192."""
    return ratio_greater(speedups(records, "step", 16384, HASH), speedups(records, "step", LONG, HASH))


def more_dropped_is_faster(a: str, b: str) -> Test:
    """The step with more rows dropped is the faster one."""
    return lambda records: ratio_greater(speedups(records, "step", LONG, b), speedups(records, "step", LONG, a))


def reversed_densities(records: Records) -> Records:
    """Early and late densities change places."""
    frame = records["language"]
    return records.replace(
        "language", frame.assign(density_early=frame["density_late"], density_late=frame["density_early"])
    )


def raised(arms: tuple[str, ...], by: float) -> Control:
    """The losses of some arms rise."""

    def apply(records: Records) -> Records:
        frame = records["language"]
        columns = [c for c in ("test_loss", "dropping_loss") if c in frame]
        more = frame["arm"].isin(arms) * by
        return records.replace("language", frame.assign(**{c: frame[c] + more for c in columns}))

    return Control(f"losses of {', '.join(arms)} rise by {by:g} nats", apply)


CLAIMS = [
    Claim(
        id="C6",
        title="Training steps are faster, the more so at 16,384 tokens",
        statement="Hash-sparse attention with 16 buckets makes whole training steps faster at long context.",
        source="abstract: 2.0 × at 8,192 and 3.3 × at 16,384 tokens at equal perplexity",
        paper_value="2.0 × (8,192), 3.3 × (16,384); 12 layers of width 768 on A100s",
        experiments=("step",),
        parts={
            "8,192 tokens: ratio > 1.5": faster("step", HASH, 1.5),
            "16,384 tokens: a larger ratio": longer_gains,
        },
        control=swap_times("step", (HASH,)),
        figure=figures.steps,
        caption=f"Dense step time over sparse step time, 2 layers of width 128, forward, backward and update. {TIMED}",
        note="Our network has almost no MLP and our dense step runs PyTorch's CPU attention: the sizes of the ratios "
        "cannot be compared with the paper's.",
    ),
    Claim(
        id="C6.time",
        title="In equal time hash-sparse attention trains further",
        statement="In the time in which the dense model makes a quarter of the steps, the hash-sparse model reaches a "
        "lower loss.",
        source="abstract: training time to the same perplexity",
        paper_value="2.0 × and 3.3 × less time",
        experiments=("step", "language"),
        parts={
            "the hash-sparse step at 8,192 tokens is 4 times faster": faster("step", HASH, QUARTER),
            "its loss is below that of dense attention with a quarter of the steps": better("hash", "dense_short"),
        },
        control=chain(swap_times("step", (HASH,)), swap_arms("language", "hash", "dense_short")),
        caption="See the figures of C6 and C7.",
        note="Step times are those of 8,192 tokens, the losses those of short sequences.",
    ),
    Claim(
        id="C7",
        title="Hash-sparse attention loses nothing in perplexity",
        statement="H-LM reaches the perplexity of the dense model in as many steps.",
        source="section 4, H-LM (read in a third party's summary)",
        paper_value="slightly better than dense",
        experiments=("language",),
        parts={
            "dense attention beats no attention by > .1 nats": better("dense", "none", INFORMATIVE),
            "hash-sparse loses < .03 nats": parity("hash"),
        },
        control=chain(raised(("dense",), 0.5), raised(("hash",), 1.0)),
        figure=figures.losses(("dense", "hash", "random", "window", "none")),
        caption=f"Test loss after as many tokens. {BANDS} Dots: seeds.",
    ),
    Claim(
        id="C7.content",
        title="Buckets by content beat random buckets",
        statement="What H-LM gains comes from hashing by content: random buckets of the same number do worse.",
        source="our control",
        paper_value=UNKNOWN,
        experiments=("language",),
        parts={"hash-sparse is below random buckets": better("hash", "random")},
        control=raised(("hash",), 0.5),
        caption="See the figure of C7.",
    ),
    Claim(
        id="C7.near",
        title="Near tokens are what counts at this length of training",
        statement="A window of 32 tokens trains better than dense attention and than hash-sparse attention, which "
        "sees more pairs.",
        source="ours: why C7 and C9 come out as they do here",
        paper_value=UNKNOWN,
        experiments=("language",),
        parts={
            "window of 32 is below dense attention": better("window", "dense"),
            "window of 32 is below hash-sparse": better("window", "hash"),
        },
        control=raised(("window",), 0.5),
        caption="See the figure of C7.",
        note="Added after the records had been seen: an explanation, not a prediction.",
    ),
    Claim(
        id="C7.self",
        title="Hiding a token from itself costs nothing",
        statement="The released H-LM hides every row from itself, so that the first of a bucket outputs 0; this loses "
        "nothing.",
        source="official code; the question is ours",
        paper_value=UNKNOWN,
        experiments=("language",),
        parts={"without itself loses < .03 nats to with itself": parity("hash_official", baseline="hash")},
        control=raised(("hash_official",), 0.5),
        figure=figures.losses(("hash", "hash_official", "random")),
        caption=f"Test loss after as many tokens. {BANDS} Dots: seeds.",
    ),
    Claim(
        id="C7.sharpen",
        title="Buckets sharpen as training goes on",
        statement="H-LM gets faster in the course of training, because its buckets become more even.",
        source="section 4, H-LM (read in a third party's summary)",
        paper_value=UNKNOWN,
        experiments=("language",),
        parts={"live pairs: fewer at the end than early": sharpens},
        control=reversed_densities,
        figure=figures.training,
        caption="Share of causal pairs in one bucket on held-out text, mean over layers and heads, a line a seed.",
    ),
    Claim(
        id="C8",
        title="30 % dropped rows cost nothing, 70 % do",
        statement="Dropping 30 % of queries and keys keeps the dense model's perplexity, dropping more hurts it.",
        source="section 4, D-LM (read in a third party's summary)",
        paper_value="30 %: same perplexity",
        experiments=("language",),
        parts={
            "30 % dropped in training loses < .03 nats": parity("drop_30"),
            "70 % is above 30 %": better("drop_30", "drop_70"),
        },
        control=chain(swap_arms("language", "drop_30", "drop_70"), raised(("drop_30",), 0.5)),
        figure=figures.losses(("dense", "drop_30", "drop_70", "none")),
        caption=f"Test loss after as many tokens, nothing dropped in evaluation. {BANDS} Dots: seeds.",
    ),
    Claim(
        id="C8.evaluation",
        title="Also when rows are dropped in evaluation",
        statement="As released, D-LM drops rows in evaluation too; its perplexity is still that of the dense model.",
        source="official code",
        paper_value=UNKNOWN,
        experiments=("language",),
        parts={"30 % dropped in training and evaluation loses < .03 nats": parity("drop_30", "dropping_loss")},
        control=raised(("drop_30",), 0.5),
        caption="See the figure of C8.",
    ),
    Claim(
        id="C8.speed",
        title="The more is dropped, the faster the step",
        statement="D-LM's training steps are faster than the dense model's, the more so the more is dropped.",
        source="section 4, D-LM (read in a third party's summary)",
        paper_value="1.9, 2.6 and 3.5 × at 30, 50 and 70 %, 8,192 tokens",
        experiments=("step",),
        parts={
            "30 %: ratio > 1.5": faster("step", DROPS[0], 1.5),
            "50 % faster than 30 %": more_dropped_is_faster(DROPS[0], DROPS[1]),
            "70 % faster than 50 %": more_dropped_is_faster(DROPS[1], DROPS[2]),
        },
        control=swap_times("step", DROPS),
        caption="See the figure of C6.",
    ),
    Claim(
        id="C9",
        title="Exact buckets train better than Reformer's chunks",
        statement="With the same buckets, attending to whole buckets gives a lower loss than Reformer's chunks.",
        source="sequential MNIST and enwik8 (read in a third party's summary)",
        paper_value="1.67 against 1.76 perplexity; 2.29 against 3.32 bits a character",
        experiments=("language",),
        parts={"hash-sparse is below Reformer's chunks": better("hash", "reformer")},
        control=raised(("hash",), 0.5),
        figure=figures.losses(("hash", "reformer", "random", "none")),
        caption=f"Test loss after as many tokens. {BANDS} Dots: seeds.",
    ),
    Claim(
        id="C6.paper",
        title="Paper scale: 2.0 × and 3.3 × less time",
        statement="At the paper's size hash-sparse attention halves the training time at 8,192 tokens and cuts it by "
        "3.3 at 16,384.",
        source="abstract",
        paper_value="2.0 ×, 3.3 ×",
        experiments=("step",),
        parts={
            "8,192 tokens: ratio > 1.5": faster("step", HASH, 1.5),
            "16,384 tokens: ratio > 2.5": faster("step", HASH, 2.5, 16384),
        },
        control=swap_times("step", (HASH,)),
        scale_needed="paper",
    ),
    Claim(
        id="C7.paper",
        title="Paper scale: OpenWebText2 at 8,192 tokens, equal perplexity",
        statement="On the paper's data and network H-LM and D-LM (30 %) reach the dense model's perplexity.",
        source="section 4",
        paper_value=UNKNOWN,
        experiments=("language",),
        parts={
            "hash-sparse, 16 buckets, loses < .03 nats": parity("hash"),
            "30 % dropped loses < .03 nats": parity("drop_30"),
        },
        control=raised(("hash", "drop_30"), 0.5),
        scale_needed="paper",
    ),
]
