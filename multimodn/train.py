"""One trial: `python -m multimodn.train cohort=nhefs seed=1`; a sweep: `experiment=mnar -m`."""

from common.cli import trial_cli
from multimodn.config import TrialConfig

TASKS = {"fusion": "multimodn.tasks.fusion", "tabular": "multimodn.tasks.tabular"}

main = trial_cli(paper="multimodn", schema=TrialConfig, entry=lambda config: TASKS[config.task.name])

if __name__ == "__main__":
    main()
