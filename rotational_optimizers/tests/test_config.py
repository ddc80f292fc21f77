"""Every experiment composes at every scale; bad values are refused with key, value and range."""

from __future__ import annotations

import math

import pytest

from common.compose import conf_dir
from common.tests.planners import Diagonal
from rotational_optimizers.claims import CLAIMS
from rotational_optimizers.config import ImbalanceConfig, NetworkTaskConfig, OptimizerConfig, ScheduleConfig
from rotational_optimizers.train import main

EXPERIMENTS = sorted(path.stem for path in (conf_dir("rotational_optimizers") / "experiment").glob("*.yaml"))
# kin optimizers and our own extra settings, which no test of a claim reads
LAPTOP_ONLY = {"hyperball", "update_floor", "adamp", "lamb", "nero", "rv_adamw_cosine2"}


@pytest.fixture(scope="module")
def planners() -> dict[str, Diagonal]:
    """One a scale, since composing takes its time; scale=paper is planned in `test_paper_scale`."""
    return {scale: Diagonal(main, None, scale) for scale in ("smoke", "laptop", "gpu")}


@pytest.mark.parametrize("scale", ["smoke", "laptop", "gpu"])
def test_every_experiment_composes_into_checked_configs(planners: dict[str, Diagonal], scale: str) -> None:
    planner, grids = planners[scale], {e: planners["laptop"].sweeper(e)["grids"] for e in EXPERIMENTS}
    # without a grid of its own a scale is the laptop's again
    for experiment in [e for e in EXPERIMENTS if scale != "gpu" or "gpu" in grids[e]]:
        jobs = planner.plan(experiment)
        assert jobs, experiment
        for job in jobs:
            config = job.config
            assert (config["experiment"], config["scale"]) == (experiment, scale)
            assert config["arm"], f"{experiment}: a job without the name of its arm"
            assert config["device"] == ("cuda" if scale == "gpu" else "cpu")
            if scale == "smoke" and config["task"]["name"] == "network":
                assert (config["task"]["steps"], config["n_seeds"]) == (12, 3)


def test_the_arms_that_a_claim_reads_are_there_at_every_scale(planners: dict[str, Diagonal]) -> None:
    for experiment in {experiment for claim in CLAIMS for experiment in claim.experiments}:
        grids = planners["laptop"].sweeper(experiment)["grids"]
        wanted = {entry["arm"] for entry in grids["laptop"]} - LAPTOP_ONLY
        for scale in grids:
            assert wanted <= {entry["arm"] for entry in grids[scale]}, (experiment, scale)


@pytest.mark.parametrize("scale", ["laptop", "gpu"])
def test_every_arm_searches_as_many_settings(planners: dict[str, Diagonal], scale: str) -> None:
    entries = planners[scale].sweeper("tune")["grids"][scale]
    sizes = {e["arm"]: math.prod(len(v) for v in e.values() if isinstance(v, list)) for e in entries}
    assert len(sizes) == len(entries) and len(set(sizes.values())) == 1, sizes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimizerConfig(lr=-1), "optimizer.lr=-1: must be > 0"),
        (lambda: OptimizerConfig(lr=0), "optimizer.lr=0: must be > 0"),
        (lambda: OptimizerConfig(beta1=1.0), r"optimizer.beta1=1.0: must be in \[0, 1\)"),
        (lambda: OptimizerConfig(momentum=-0.1), r"optimizer.momentum=-0.1: must be in \[0, 1\)"),
        (lambda: OptimizerConfig(update_norm_decay=1.0), "optimizer.update_norm_decay=1.0"),
        (lambda: OptimizerConfig(name="adamx"), "optimizer.name=adamx: must be one of sgdm"),
        (lambda: OptimizerConfig(name="rv_adamw", weight_decay=0), "optimizer.weight_decay=0: must be > 0"),
        (lambda: ImbalanceConfig(kind="quadruple"), "optimizer.imbalance.kind=quadruple"),
        (lambda: ImbalanceConfig(fraction=2), r"optimizer.imbalance.fraction=2: must be in \[0, 1\]"),
        (lambda: ScheduleConfig(name="step"), "schedule.name=step"),
        (lambda: ScheduleConfig(warmup=1.0), "schedule.warmup=1.0"),
        (lambda: NetworkTaskConfig(steps=0), "task.steps=0: must be >= 1"),
        (lambda: NetworkTaskConfig(evaluate="train"), "task.evaluate=train"),
        (lambda: NetworkTaskConfig(track_tail=0), "task.track_tail=0"),
        (lambda: NetworkTaskConfig(augment="cutout"), "task.augment=cutout: must be one of none, crop_flip, deit"),
        (lambda: NetworkTaskConfig(augment="deit"), "task.augment=deit: must be none or crop_flip, or set task.image"),
        (lambda: NetworkTaskConfig(clip_norm=0.0), "task.clip_norm=0.0: must be > 0, or null"),
        (lambda: NetworkTaskConfig(label_smoothing=1.0), r"task.label_smoothing=1.0: must be in \[0, 1\)"),
        (lambda: NetworkTaskConfig(batch_tokens=0), "task.batch_tokens=0: must be > 0, or null"),
        (lambda: NetworkTaskConfig(image_size=-1), "task.image_size=-1: must be > 0, or null"),
        (lambda: OptimizerConfig(exclude=["head", ""]), "optimizer.exclude=.*none of them empty"),
        (lambda: ScheduleConfig(floor=1.0), r"schedule.floor=1.0: must be in \[0, 1\)"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
