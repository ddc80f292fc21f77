"""One trial: `python -m mulfree_training.train arithmetic=matmul seed=1`; a sweep: `experiment=vision -m`."""

from common.cli import trial_cli
from mulfree_training.config import TrialConfig

NAMES = ("images", "language", "translation", "primitives", "affine", "proof")
TASKS = {name: f"mulfree_training.tasks.{name}" for name in NAMES}

main = trial_cli(paper="mulfree_training", schema=TrialConfig, entry=lambda config: TASKS[config.task.name])

if __name__ == "__main__":
    main()
