"""Schema of the fixture's trials."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.config import CommonConfig, check, register


@dataclass(frozen=True)
class OptimizerConfig:
    """How the quadratic is descended."""

    name: str = "gd"
    """`gd` or `heavy_ball`."""
    lr: float = 0.1
    """Learning rate."""
    momentum: float | None = None
    """Momentum of the heavy ball."""

    def __post_init__(self) -> None:
        check("optimizer.lr", self.lr, self.lr > 0, "> 0")


@dataclass
class TrialConfig(CommonConfig):
    """One descent."""

    steps: int = 20
    """Descent steps."""
    pause: float = 0.0
    """Seconds to sleep a step, for tests that interrupt."""
    fail: str = ""
    """What to do wrong, for tests: `nan`, `oserror`, `bug`, `memory`, `kill`."""
    start_from: str = ""
    """A file with the starting point; empty draws one."""
    cost: float = 1.0
    """Hint for the order of trials."""
    weights: list[float] = field(default_factory=lambda: [1.0, 2.0])
    """Curvatures of the quadratic."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("steps", self.steps, self.steps >= 1, ">= 1")


register("fixture_paper_schema", TrialConfig)
