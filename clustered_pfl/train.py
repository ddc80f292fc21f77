"""One trial: `python -m clustered_pfl.train method=ditto seed=1`; a sweep: `experiment=table1 -m`."""

from clustered_pfl.config import TrialConfig
from common.cli import trial_cli

TASKS = {
    "images": "clustered_pfl.tasks.images",
    "regression": "clustered_pfl.tasks.regression",
    "quadratics": "clustered_pfl.tasks.quadratics",
    "blobs": "clustered_pfl.tasks.blobs",
    "estimation": "clustered_pfl.tasks.estimation",
}

main = trial_cli(paper="clustered_pfl", schema=TrialConfig, entry=lambda config: TASKS[config.task.name])

if __name__ == "__main__":
    main()
