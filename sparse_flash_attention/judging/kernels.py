"""Claims on the attention itself (C1 to C5) and their tests, fixed before the judging run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from common.claims import Claim, Control
from common.pairing import rows
from common.statistics import (
    Outcome,
    equivalence,
    every,
    exact_identity,
    mean_greater,
    mean_less,
    monotone_trend,
    paired_greater,
    ratio_mean_greater,
)
from sparse_flash_attention import figures
from sparse_flash_attention.judging.samples import (
    BANDS,
    TIMED,
    TIMES,
    UNKNOWN,
    Array,
    Test,
    at_length,
    lengths,
    names_of,
    speedups,
    swap_times,
    times_of,
)

if TYPE_CHECKING:
    from common.records import Records

LONG = 8192
"""Length at which speeds are judged."""
KEEP_FLOORS = {1.0: 0.95, 0.7: 1.6, 0.5: 3.0, 0.3: 6.5, 0.1: 35.0}
"""Kept share -> the ratio that must be exceeded."""
FP32_ERROR = 1e-5
HALF_ERRORS = {"bf16": 3e-2, "fp16": 4e-3}
A100 = "A100, bf16, read off a figure of the official notebook"


def exact(arm: str, dtype: str, metric: str, bound: float) -> Test:
    """Largest error of every seed's patterns: the mean over seeds is below the bound."""

    def test(records: Records) -> Outcome:
        frame = rows(records["exactness"], arm=arm, task__dtype=dtype)
        return mean_less(frame[metric].to_numpy(), bound)

    return test


def zeros(metric: str) -> Test:
    """A count that must be 0 in every run of every precision."""

    def test(records: Records) -> Outcome:
        found = records["exactness"][metric].to_numpy(dtype=np.float64)
        return exact_identity(found, np.zeros(len(found)))

    return test


def worse_numbers(records: Records) -> Records:
    """Errors are 1,000 times larger and one stranded row leaks."""
    frame = records["exactness"]
    larger = {name: frame[name] * 1000 for name in ("forward_error", "backward_error")}
    return records.replace("exactness", frame.assign(**larger, stranded_nonzero=1, bad_numbers=1))


def faster(name: str, bound: float, length: int = LONG, experiment: str = "runtime") -> Test:
    """Geometric mean of dense time over sparse time exceeds the bound."""
    return lambda records: ratio_mean_greater(speedups(records, experiment, length, name), bound, unit=TIMES)


def rises_with_length(name: str) -> Test:
    """The ratio grows with the length: Spearman's rank correlation, seeds as blocks."""

    def test(records: Records) -> Outcome:
        found = [
            pd.DataFrame({"x": length, "y": speedups(records, "runtime", length, name)}).assign(
                seed=at_length(records, "runtime", length)["seed"].to_numpy()
            )
            for length in lengths(records, "runtime", name)
        ]
        frame = pd.concat(found)
        frame = frame[frame.groupby("seed")["x"].transform("size") == len(found)]  # seeds that have every length
        return monotone_trend(frame["x"], frame["y"], blocks=frame["seed"])

    return test


def rises_with_buckets(length: int, counts: Sequence[int]) -> Test:
    """The ratio grows with the number of buckets: Spearman's rank correlation, seeds as blocks."""

    def test(records: Records) -> Outcome:
        ratios = np.stack([speedups(records, "runtime", length, f"buckets_{n}") for n in counts], axis=1)
        seeds = np.repeat(np.arange(len(ratios)), len(counts))
        return monotone_trend(np.tile(counts, len(ratios)), ratios.ravel(), blocks=seeds)

    return test


def exponents(records: Records, length: int = LONG) -> Array:
    """Slope of log time against log kept share, a value a seed."""
    frame = at_length(records, "runtime", length)
    keeps = sorted(KEEP_FLOORS)
    times = np.log(np.stack([times_of(frame, f"keep_{keep:g}") for keep in keeps], axis=1))
    return np.array([np.polyfit(np.log(keeps), row, 1)[0] for row in times])


def crossings(frame: pd.DataFrame, kind: str) -> Array:
    """Least dropped share from which on `kind` (keep or naive) is faster than dense attention, a value a seed.

    Between two shares the ratio is interpolated on a logarithmic axis; 0 if it is faster at once, 1 if it never is.
    """
    keeps = sorted((float(c.split("_")[1]) for c in names_of(frame, "naive_")), reverse=True)
    dropped = 1 - np.array(keeps)
    found = []
    for _, row in frame.iterrows():
        gains = np.log([row["dense_ms"] / row[f"{kind}_{keep:g}_ms"] for keep in keeps])
        slower = np.flatnonzero(gains <= 0)
        last = slower[-1] if len(slower) else -1
        if last == len(keeps) - 1:
            found.append(1.0)
        elif last < 0:
            found.append(0.0)
        else:
            rise = gains[last + 1] - gains[last]
            found.append(dropped[last] + (dropped[last + 1] - dropped[last]) * -gains[last] / rise)
    return np.array(found)


def crosses_earlier(records: Records) -> Outcome:
    """Ours beats dense attention from a smaller dropped share on than the naive way."""
    frame = records["crossing"].sort_values("seed")
    return paired_greater(crossings(frame, "naive"), crossings(frame, "keep"), unit="share dropped")


def swap_naive(records: Records) -> Records:
    """The naive way and ours exchange their times."""
    frame = records["crossing"]
    keeps = [c.removeprefix("naive_") for c in names_of(frame, "naive_")]
    swapped = {f"naive_{k}": frame[f"keep_{k}"] for k in keeps} | {f"keep_{k}": frame[f"naive_{k}"] for k in keeps}
    return records.replace("crossing", frame.assign(**swapped))


def covered(metric: str, arm: str, **where: object) -> Test:
    """Coverage of one arm."""

    def test(records: Records) -> Outcome:
        frame = rows(records["coverage"], arm=arm, **where)
        return mean_less(frame[metric].to_numpy(), 0.4, unit="share of pairs")

    return test


def all_covered(records: Records) -> Outcome:
    """Every pair of every case is attended."""
    found = records["coverage"]["ours"].to_numpy()
    return exact_identity(found, np.ones(len(found)), unit="share of pairs")


def falls(arm: str) -> Test:
    """Reformer's coverage falls with the length: Spearman's rank correlation, seeds as blocks."""

    def test(records: Records) -> Outcome:
        frame = rows(records["coverage"], arm=arm)
        return monotone_trend(frame["task.length"], frame["reformer"], blocks=frame["seed"], increasing=False)

    return test


def stays(records: Records) -> Outcome:
    """With a bucket a chunk Reformer covers more than 99 % at every length."""
    frame = rows(records["coverage"], arm="growing")
    parts = [
        mean_greater(part["reformer"].to_numpy(), 0.99, unit="share of pairs")
        for _, part in frame.groupby("task.length")
    ]
    return every(parts, [f"{length:,} rows" for length in sorted(frame["task.length"].unique())])


def swap_coverage(records: Records) -> Records:
    """Ours and Reformer's exchange their coverage."""
    frame = records["coverage"]
    return records.replace("coverage", frame.assign(ours=frame["reformer"], reformer=frame["ours"]))


def fixed_for_growing(records: Records) -> Records:
    """The rows with a bucket a chunk are those of 16 buckets."""
    frame = records["coverage"]
    others = frame[frame["arm"] != "growing"]
    return records.replace("coverage", pd.concat([others, rows(frame, arm="uniform").assign(arm="growing")]))


def mix_lengths(names: tuple[str, ...]) -> Control:
    """The times of `names` are dealt out anew among lengths and seeds, dense time stays 1."""

    def apply(records: Records) -> Records:
        frame = records["runtime"].reset_index(drop=True)
        order = np.random.default_rng(0).permutation(len(frame))
        changed = {}
        for name in names:
            ratio = (frame[f"{name}_ms"] / frame["dense_ms"]).to_numpy()
            known = np.flatnonzero(np.isfinite(ratio))
            dealt = ratio.copy()
            dealt[known] = ratio[known][np.argsort(order[known])]
            changed[f"{name}_ms"] = dealt * frame["dense_ms"]
        return records.replace("runtime", frame.assign(**changed))

    return Control(f"ratios of {', '.join(n.replace('_', ' ') for n in names)} dealt out anew among lengths", apply)


def compiled(records: Records) -> dict[str, Array]:
    """Registers, spilled bytes and shared memory, an entry a kernel and target."""
    row = records["aot"].iloc[0]
    if not row["kernels"]:
        raise ValueError("Triton is not installed: nothing was compiled")
    return {name: np.array(row[name], dtype=np.float64) for name in ("registers", "spilled", "shared_kib")}


def within(name: str, most: float, unit: str) -> Test:
    """No kernel goes over `most` on any target."""

    def test(records: Records) -> Outcome:
        over = np.maximum(compiled(records)[name] - most, 0)
        return exact_identity(over, np.zeros(len(over)), unit=unit)

    return test


def greedy(records: Records) -> Records:
    """Every kernel spills 8 bytes and takes 100 KiB more shared memory."""
    frame = records["aot"]
    more = {name: [[x + by for x in row] for row in frame[name]] for name, by in (("spilled", 8), ("shared_kib", 100))}
    return records.replace("aot", frame.assign(**more))


BUCKETS = (2, 8, 16, 32)
KEEPS = tuple(f"keep_{keep:g}" for keep in KEEP_FLOORS)

CLAIMS = [
    Claim(
        id="C1",
        title="Exactly masked dense attention, forward and backward",
        statement="Output and gradients equal masked dense attention for every pattern of dropped rows and every hash.",
        source="section 3; the official code's tests",
        paper_value="exact",
        experiments=("exactness",),
        parts={
            "float32, output: largest error < 1e-5": exact("default", "fp32", "forward_error", FP32_ERROR),
            "float32, gradients: largest error < 1e-5 of the largest": exact(
                "default", "fp32", "backward_error", FP32_ERROR
            ),
            "plain PyTorch, output": exact("torch", "fp32", "forward_error", FP32_ERROR),
            "plain PyTorch, gradients": exact("torch", "fp32", "backward_error", FP32_ERROR),
            "bfloat16, output: < 3e-2": exact("default", "bf16", "forward_error", HALF_ERRORS["bf16"]),
            "float16, output: < 4e-3": exact("default", "fp16", "forward_error", HALF_ERRORS["fp16"]),
        },
        control=worse_numbers,
        figure=figures.errors,
        caption="Largest absolute difference from float64 over random patterns of every seed (dots), by precision.",
    ),
    Claim(
        id="C1.zeros",
        title="Rows that see nothing are exactly 0, without NaN",
        statement="A query without a visible key outputs exactly 0 and passes no gradient; nothing is ever NaN.",
        source="official code; appendix",
        paper_value="0",
        experiments=("exactness",),
        parts={
            "stranded rows that are not 0": zeros("stranded_nonzero"),
            "numbers that are not finite": zeros("bad_numbers"),
        },
        control=worse_numbers,
        caption="See the figure of C1.",
    ),
    Claim(
        id="C2",
        title="Hash-sparse attention beats dense attention",
        statement="Attention inside buckets, sorting included, is faster than dense attention, forward and backward.",
        source="runtime figure for hash-sparse attention; official timing notebook",
        paper_value=f"16 buckets: 2.3 × at 16,384 rows, 2.7 × at 32,768; 2 buckets: .93 × ({A100})",
        experiments=("runtime",),
        parts={
            "16 buckets at 8,192 rows: ratio > 4": faster("buckets_16", 4.0),
            "2 buckets at 8,192 rows: ratio > 1.5": faster("buckets_2", 1.5),
        },
        control=swap_times("runtime", tuple(f"buckets_{n}" for n in BUCKETS)),
        figure=figures.bucket_runtime,
        caption=f"Dense time over sparse time, forward and backward, against the length. {TIMED} {BANDS}",
    ),
    Claim(
        id="C2.trend",
        title="More so for longer inputs and more buckets",
        statement="The gain of hash-sparse attention grows with the length and with the number of buckets.",
        source="runtime figure for hash-sparse attention",
        paper_value=f"32,768 rows: .94 × (2 buckets) to 3.5 × (64) ({A100})",
        experiments=("runtime",),
        parts={
            "grows with the length, 16 buckets": rises_with_length("buckets_16"),
            "grows with the buckets at 8,192 rows": rises_with_buckets(8192, BUCKETS),
            "grows with the buckets at 16,384 rows": rises_with_buckets(16384, BUCKETS),
        },
        control=swap_times("runtime", tuple(f"buckets_{n}" for n in BUCKETS)),
        caption="See the figure of C2.",
    ),
    Claim(
        id="C3",
        title="Dropping rows pays at every sparsity",
        statement="Attention among kept rows is faster than dense attention at any share of dropped rows.",
        source="runtime figure for QK-sparse attention; official timing notebook",
        paper_value=f"32,768 rows, kept .8 to .2: 1.04, 1.3, 1.8, 2.5, 3.8, 6.2, 12 × ({A100})",
        experiments=("runtime",),
        parts={
            f"{keep:g} kept: ratio > {bound:g}": faster(f"keep_{keep:g}", bound) for keep, bound in KEEP_FLOORS.items()
        },
        control=swap_times("runtime", KEEPS[::-1]),
        figure=figures.keep_runtime,
        caption=f"Dense time over sparse time, forward and backward, at 8,192 rows. {TIMED} {BANDS}",
    ),
    Claim(
        id="C3.square",
        title="Time falls with the square of the kept share",
        statement="Time is proportional to the kept share to the power of about 2.",
        source="section 3.1: work is kept queries times kept keys",
        paper_value="2 in theory; 1.04 × at .8 kept where the square is 1.56 (official figure)",
        experiments=("runtime",),
        parts={
            "slope of log time on log share within 1.6 and 2.3": lambda records: equivalence(
                exponents(records), 1.6, 2.3, unit="power"
            )
        },
        control=swap_times("runtime", KEEPS[::-1]),
        caption="See the figure of C3.",
    ),
    Claim(
        id="C4",
        title="The naive way needs far more sparsity",
        statement="Compaction with an explicit mask beats dense attention only at high sparsity, the kernel at low.",
        source="appendix (read in a third party's summary)",
        paper_value="naive: from about 70 % dropped on",
        experiments=("crossing",),
        parts={"ours crosses at a smaller dropped share": crosses_earlier},
        control=swap_naive,
        figure=figures.crossing,
        caption=f"Time over dense time against the dropped share, 8,192 rows. {TIMED} {BANDS}",
    ),
    Claim(
        id="C5",
        title="All pairs of a bucket are attended, Reformer loses most",
        statement="Ranges attend to every pair of a bucket; Reformer's chunks lose more of them the longer the input.",
        source="coverage figure (read in a third party's summary)",
        paper_value="100 % against a steep fall",
        experiments=("coverage",),
        parts={
            "ours is 1 in every case": all_covered,
            "Reformer falls with the length, random buckets": falls("uniform"),
            "Reformer falls with the length, angular LSH": falls("angular"),
            "Reformer at 8,192 rows < .4, random buckets": covered("reformer", "uniform", task__length=LONG),
            "Reformer at 8,192 rows < .4, angular LSH": covered("reformer", "angular", task__length=LONG),
        },
        control=swap_coverage,
        figure=figures.coverage,
        caption=f"Share of same-bucket causal pairs that is attended, one hash round. {BANDS}",
        note="16 buckets at every length, as in the paper; C5.control shows that the fall comes from this.",
    ),
    Claim(
        id="C5.control",
        title="With a bucket a chunk Reformer keeps its pairs",
        statement="The fall of Reformer's coverage comes from a fixed number of buckets: with one bucket a chunk it "
        "stays above 99 % at every length.",
        source="our control",
        paper_value=UNKNOWN,
        experiments=("coverage",),
        parts={"coverage > .99 at every length": stays},
        control=fixed_for_growing,
        caption="See the figure of C5.",
    ),
    Claim(
        id="C10",
        title="GPU kernels fit without spilling, from A100 to B200",
        statement="Compiled ahead of time, every Triton kernel keeps its numbers in registers and fits into 99 KiB of "
        "shared memory, for heads of 64 and 128 channels in bfloat16.",
        source="ours: the GPU kernels, proven without a GPU",
        paper_value="official kernels: 388 to 1,764 bytes spilled (64 channels, their own tiles)",
        experiments=("aot",),
        parts={
            "spilled bytes": within("spilled", 0, "bytes"),
            "shared memory over 99 KiB": within("shared_kib", 99, "KiB"),
        },
        control=greedy,
        figure=figures.registers,
        caption="Registers a thread and KiB of shared memory as ptxas counts them; no kernel spills where C10 holds.",
        note="Speed on a GPU was not measured: `make gpu-check` does it on one.",
    ),
]
