"""Records without any training: a scale's plans with made-up metrics, in a world in which every claim is right."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from common.sweeps import Job
from common.tests import worlds
from common.tests.report_fakes import FakeRecords
from common.tests.worlds import Change
from sparse_flash_attention.train import main

LOSSES = {
    "dense": 2.9, "hash": 2.91, "random": 3.1, "drop_30": 2.91, "drop_50": 2.95, "drop_70": 3.0, "reformer": 3.0,
    "window": 2.85, "none": 3.3, "dense_short": 3.1, "hash_official": 2.915,
}  # fmt: skip
ERRORS = {"fp32": 2e-6, "bf16": 1.5e-2, "fp16": 1e-3}
DROP_GAINS = {0.3: 1.9, 0.5: 2.8, 0.7: 4.6}


def noise(*name: Any) -> float:
    """A factor near 1 that depends on the name alone."""
    return math.exp(1e-3 * float(np.random.default_rng(zlib.crc32(repr(name).encode())).standard_normal()))


def right(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Metrics of one seed of a trial where the paper and we are right."""
    return {"seed": seed, "diverged": False} | KINDS[config["task"]["name"]](config, seed)


def _exactness(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    dtype, arm = config["task"]["dtype"], config["arm"]
    found = {k: ERRORS[dtype] * noise(arm, dtype, k, seed) ** 50 for k in ("forward_error", "backward_error")}
    return found | {"bad_numbers": 0, "stranded": 50 + seed, "stranded_nonzero": 0}


def _runtime(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    task = config["task"]
    length = task["length"]
    gains = {f"buckets_{n}": 2 * (n / 2) ** 0.8 * (length / 8192) ** 0.2 for n in task["buckets"]}
    gains |= {f"keep_{k:g}": 0.98 / k**1.9 for k in task["keeps"]}
    if task["naive"]:
        gains |= {f"naive_{k:g}": 0.3 / k**1.9 for k in task["keeps"]}
    return _times((length / 8192) ** 2 * 700, gains, config, seed)


def _step(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    task = config["task"]
    length = task["length"]
    gains = {f"hash_{n}": 4.5 * (n / 16) ** 0.3 * (length / 8192) ** 0.5 for n in task["buckets"]}
    gains |= {f"drop_{s:g}": DROP_GAINS[s] for s in task["drops"]}
    return _times((length / 8192) ** 2 * 2000, gains, config, seed)


def _times(dense: float, gains: Mapping[str, float], config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    found = {name: dense / gain for name, gain in ({"dense": 1.0} | dict(gains)).items()}
    return {f"{name}_ms": ms * noise(config["experiment"], name, dense, seed) for name, ms in found.items()}


def _coverage(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    task = config["task"]
    bucket = task["length"] / task["n_buckets"]
    share = 1.5 * task["chunk"] / bucket
    lost = 0.001 if share > 1 else 1 - share
    return {"ours": 1.0, "reformer": 1 - lost * noise(config["arm"], bucket, seed)}


def _language(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    task, arm = config["task"], config["arm"]
    loss = LOSSES.get(arm, 2.95) * noise(arm, seed) * noise("text", seed) ** 20
    dense = config["attention"]["kind"] != "hash"
    found = {
        f"{task['evaluate']}_loss": loss, "train_loss": loss - 0.1, "train_s": 20.0,
        "density_early": 1.0 if dense else 0.7 * noise(arm, seed, "early"),
        "density_late": 1.0 if dense else 0.45 * noise(arm, seed, "late"),
    }  # fmt: skip
    return found | ({"dropping_loss": loss + 0.005} if config["attention"]["kind"] == "drop" else {})


def _aot(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    kernels, targets = ("forward", "delta", "key", "query"), ("sm_80", "sm_90", "sm_100")
    dims = config["task"]["head_dims"]
    names = [f"{k}, {config['task']['dtype']} D={d}" for d in dims for k in kernels for _ in targets]
    found = {"registers": 200, "spilled": 0, "shared_kib": 99.0}
    return {"kernels": names, "targets": [*targets] * (len(names) // 3)} | {
        k: [v] * len(names) for k, v in found.items()
    }


KINDS = {
    "exactness": _exactness, "runtime": _runtime, "step": _step, "coverage": _coverage, "language": _language,
    "aot": _aot,
}  # fmt: skip


def records(scale: str) -> FakeRecords:
    """Those of every planned trial."""
    return worlds.recorded(plans(scale), right)


def plans(scale: str) -> dict[str, list[Job]]:
    """All trials of a scale by experiment."""
    return worlds.planned(main, scale)


def chosen(frame: pd.DataFrame, where: Mapping[str, Any]) -> pd.Series:
    """Which rows have the given values (`a__b` is column a.b)."""
    found = pd.Series(True, index=frame.index)
    for key, value in where.items():
        found &= frame[key.replace("__", ".")] == value
    assert found.any(), where
    return found


def level(metric: str, value: float, **where: Any) -> Change:
    """`metric` is about `value`, with a noise far below its distance to any bound."""

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        near = value * np.array([noise(metric, value, seed) ** 0.02 for seed in frame["seed"]])
        return frame.assign(**{metric: frame[metric].where(~chosen(frame, where), near)})

    return change


def gain(name: str, value: float, length: int = 8192) -> Change:
    """`name` takes 1 / `value` of dense time at a length."""

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        near = np.array([noise(name, value, seed) ** 0.02 for seed in frame["seed"]])
        hit = chosen(frame, {"task__length": length})
        return frame.assign(**{f"{name}_ms": frame[f"{name}_ms"].where(~hit, frame["dense_ms"] * near / value)})

    return change


def beside(arm: str, other: str, gap: float, metric: str = "test_loss") -> Change:
    """`metric` of `arm` is that of `other` plus about `gap`, seed by seed."""

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        levels = frame[frame["arm"] == other].set_index("seed")["test_loss"]
        near = np.array([levels[seed] + gap * noise(arm, gap, seed) ** 0.02 for seed in frame["seed"]])
        return frame.assign(**{metric: frame[metric].where(~chosen(frame, {"arm": arm}), near)})

    return change
