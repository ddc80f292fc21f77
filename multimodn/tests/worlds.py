"""Records without any training: a scale's plans with made-up metrics, in a world in which every claim is right."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from common.tests import worlds
from common.tests.report_fakes import FakeRecords
from multimodn.judging.samples import SINGLE
from multimodn.train import main

DEFAULT_TASKS = {c: list(tasks) for c, tasks in SINGLE.items()} | {
    "weather_sequence": list(SINGLE["weather"]),
    "digits_images": list(SINGLE["digits"]),
    "planted": ["t0", "t1", "t2", "t3"],
    "haim": ["enlarged_cardiomediastinum", "cardiomegaly"],
    "weather2k": ["warmer", "rain", "low_visibility", "windy"],
    "weather2k_sequence": ["warmer", "rain", "low_visibility", "windy"],
}
FLIP = {
    "mm_batch": 0.88, "pf_batch": 0.86, "mm_sample": 0.35, "pf_sample": 0.25, "raw_sample": 0.3, "boosting": 0.2,
    "pf_indicator": 0.2, "mm_robust": 0.87, "pf_robust": 0.865, "mm_robust_dropout": 0.86, "mm_dropout": 0.7,
    "mm_shuffle": 0.7, "mm_leak_penalty": 0.4, "mm_batch_then_sample": 0.8,
}  # fmt: skip
SAME = {"mm_sample": 0.96, "pf_sample": 0.96, "raw_sample": 0.95}
FULL = {"pf": 0.845, "pf_raw": 0.84, "logistic": 0.84, "boosting": 0.84, "mm_dropout": 0.85}
K = 4  # modalities


def noise(*name: Any) -> float:
    """A small number that depends on the name alone."""
    return 1e-3 * float(np.random.default_rng(zlib.crc32(repr(name).encode())).standard_normal())


def right(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Metrics of one seed of a trial where the paper and we are right."""
    arm, cohort, experiment = config["arm"], config["cohort"]["name"], config["experiment"]
    tasks = config["cohort"]["tasks"] or DEFAULT_TASKS[cohort]
    c, rows = config["corruption"], len(config["cohort"]["tasks"] or DEFAULT_TASKS[cohort])
    shaken = noise(experiment, cohort, seed, arm.replace("_robust_complete", "_complete"), str(tasks))
    full = FULL.get(arm, 0.85) + shaken
    same = SAME.get(arm, 0.88) + shaken
    flip = FLIP.get(arm, 0.85) + shaken
    if experiment == "positions" and arm == "mm_sample":
        flip += 0.03 * c["modality"]
    if experiment == "natural" and arm == "mm_batch":
        full -= 0.2
    if experiment == "unimodal":
        full -= 0.05 + 0.02 * config["network"]["only"]
    if experiment == "batch_sizes":
        flip = 0.6 + 0.05 * np.log2(config["task"]["batch_size"]) + shaken
    if experiment == "mechanisms":
        flip = 0.85 + shaken
    if experiment == "mcar":
        same = full - c["share"] * (0.2 if arm == "pf" else 0.1)
    chain = [[0.5] * rows] + [[0.5 + 0.35 * k / K + shaken] * rows for k in range(1, K + 1)]
    if config["network"]["kind"] == "pfusion":
        chain = [[full] * rows]  # the grid of P-Fusion has one row
    individual = [[[-0.1, 0.1]] * rows for _ in range(K)]
    if experiment == "planted":
        chain = [[0.5 + 0.01 * k + 0.35 * (k > d) + shaken / 9 for d in range(rows)] for k in range(K + 1)]
        individual = [[[-0.3, 0.3] if k == d else [-0.02, 0.02] for d in range(rows)] for k in range(K)]
    lead = {"mm": 0.0, "mm_dropout": 0.04, "pf": -0.04, "pf_dropout": 0.04}.get(arm, 0.0)
    subsets = [0.5 + 0.08 * b.bit_count() + lead * (0 < b.bit_count() < K) + shaken for b in range(2**K)]
    return {
        "seed": seed, "auroc_full": full, "auroc_same": same, "auroc_flip": flip, "chain": chain, "subsets": subsets,
        "individual": individual, "cumulative": [[[0.4, 0.6]] * rows for _ in range(K + 1)], "prefix_gap": 0.0,
        "parameters": 24_000 if experiment == "multi" else 20_000, "task_names": tasks,
        "modality_names": [f"m{i}" for i in range(K)], "diverged": False,
    }  # fmt: skip


def records(scale: str) -> FakeRecords:
    """Those of every planned trial."""
    return worlds.recorded(worlds.planned(main, scale), right)
