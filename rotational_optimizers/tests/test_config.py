"""Every experiment composes at every scale; bad values are refused with key, value and range."""

import pytest

from common.compose import conf_dir
from common.sweeps import plan  # noqa: F401
from rotational_optimizers.config import ImbalanceConfig, NetworkTaskConfig, OptimizerConfig, ScheduleConfig

EXPERIMENTS = sorted(path.stem for path in (conf_dir("rotational_optimizers") / "experiment").glob("*.yaml"))


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
    ],
)
def test_values_out_of_range_are_refused_by_name(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
