"""One trial: `python -m rotational_optimizers.train optimizer.lr=3e-3 seed=1`; a sweep: `experiment=compare -m`."""

from common.cli import trial_cli
from rotational_optimizers.config import TrialConfig

TASKS = {
    "network": "rotational_optimizers.tasks.network",
    "random_walk": "rotational_optimizers.tasks.random_walk",
}

main = trial_cli(paper="rotational_optimizers", schema=TrialConfig, entry=lambda config: TASKS[config.task.name])

if __name__ == "__main__":
    main()
