"""One trial: `python -m sparse_flash_attention.train attention=hash seed=1`; a sweep: `experiment=language -m`."""

from common.cli import trial_cli
from sparse_flash_attention.config import TrialConfig

NAMES = ("language", "runtime", "step", "coverage", "exactness", "aot")
TASKS = {name: f"sparse_flash_attention.tasks.{name}" for name in NAMES}

main = trial_cli(paper="sparse_flash_attention", schema=TrialConfig, entry=lambda config: TASKS[config.task.name])

if __name__ == "__main__":
    main()
