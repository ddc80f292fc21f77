"""Hand trials to a Hydra launcher, show how far they are, and collect what failed.

`GridSweeper` is what `python -m <paper>.train experiment=<name> -m` uses; `common.reproduce` calls `launch` itself. The
launcher is Hydra's choice (`hydra/launcher=`): joblib on a laptop, Slurm, ray, or one after the other.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.callbacks import Callbacks  # HydraContext wants one, and Hydra offers no other way to make it
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from common.compose import hydra_for, merge, target
from common.plancache import plans_path
from common.planned import planned_launcher
from common.sweeps import Job, Planner
from common.task import TrialError
from common.tracking import Progress
from common.trials import TrialStore

THREAD_POOLS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
POLL_S = 0.5


class SweepError(RuntimeError):
    """Some trials of a sweep failed; the others are recorded."""

    trace = ""  # their own tracebacks are shown, not the launch's


class GridSweeper(Sweeper):
    """Hydra's sweeper plugin for lists of grids (`common.sweeps`); plain `key=a,b` sweeps work too.

    Args:
        grids: scale -> list of grids.
        overrides: appended to every job.
        max_batch_size: jobs launched at once, None for all.
    """

    def __init__(self, grids: Any = None, overrides: Any = None, max_batch_size: int | None = None) -> None:
        super().__init__()
        self.max_batch_size = max_batch_size

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self.config, self.cli = config, task_function.cli()  # type: ignore[attr-defined]
        self.store = TrialStore(Path(config.results_dir) / self.cli.paper)
        self.launcher = planned_launcher(config, hydra_context, self.cli.paper, plans_path(self.store.root))

    def sweep(self, arguments: list[str]) -> Any:
        """Train the missing trials of the sweep.

        Raises:
            SweepError: when trials failed.
        """
        assert self.config is not None and self.launcher is not None  # set up by Hydra
        fixed, sweeps = split_sweeps(arguments)
        store, experiment, jobs = self.store, self.config.experiment, []
        for swept in sweeps:
            planner = Planner(self.cli, store, self.config.scale, [*fixed, *swept])
            if experiment and planner.entries(experiment):
                jobs += planner.plan(experiment)
            elif experiment and planner.sweeper(experiment).get("grids"):
                known = ", ".join(planner.sweeper(experiment)["grids"])
                raise ValueError(f"experiment={experiment}: has no grid at scale={planner.scale}; it has {known}")
            else:
                jobs.append(planner.job(merge(fixed, swept)))
                planner.cache.save()
        missing = untrained(jobs, store)
        recorded = len(jobs) - len(missing)
        print(f"{experiment or 'sweep'}: {len(jobs)} trials, {recorded} recorded already, training {len(missing)}")
        run_jobs(self.launcher, missing, store, self.max_batch_size, self.config.tracking.progress)
        return []


def split_sweeps(arguments: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Split command-line overrides into fixed ones and the product of those with several values (`key=a,b`)."""
    fixed, combinations = [], [[]]  # type: tuple[list[str], list[list[str]]]
    for override in OverridesParser.create(config_loader=GlobalHydra.instance().config_loader()).parse_overrides(
        list(arguments)
    ):
        if override.is_discrete_sweep():
            values = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            combinations = [[*c, value] for c in combinations for value in values]
        elif override.is_sweep_override():
            raise ValueError(
                f"{override.input_line}: must be key=a,b, key=choice(a,b), key=range(...) or key=glob(...)"
            )
        else:
            fixed.append(str(override.input_line))
    return fixed, combinations


def untrained(jobs: Sequence[Job], store: TrialStore) -> list[Job]:
    """The jobs without a record, one a key, the costliest first so that none is left over at the end."""
    unique: dict[str, Job] = {}
    for job in jobs:
        unique.setdefault(job.key, job)
    missing = [job for job in unique.values() if store.load(job.key) is None]
    return sorted(missing, key=lambda job: -float(job.config.get("cost") or 0))


def launch(
    cli: Any, jobs: Sequence[Job], hydra_overrides: Sequence[str], store: TrialStore, shown: bool = True
) -> None:
    """Train jobs through the configured Hydra launcher.

    Args:
        cli: the paper's entry point.
        jobs: what to train.
        hydra_overrides: `hydra/launcher=...` and the like.
        store: where the records go.
        shown: whether to show progress.

    Raises:
        SweepError: when trials failed.
    """
    register_sweeper()
    with hydra_for(cli.paper):
        overrides = [*hydra_overrides, f"results_dir={store.root.parent}", "hydra.mode=MULTIRUN"]
        config = hydra.compose("config", overrides, return_hydra_config=True)
        context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks(config))
        launcher = planned_launcher(config, context, cli.paper, plans_path(store.root))
        run_jobs(launcher, jobs, store, config.hydra.sweeper.get("max_batch_size"), shown)


def register_sweeper() -> None:
    """Make GridSweeper known to Hydra, which only takes plugins by a name under `hydra_plugins`."""
    Plugins.instance().class_name_to_class["hydra_plugins.common.GridSweeper"] = GridSweeper


def limit_threads(threads: int = 1) -> None:
    """Give every worker process to come `threads` threads, unless the user's environment says otherwise."""
    for name in THREAD_POOLS:
        os.environ.setdefault(name, str(threads))


def run_jobs(launcher: Launcher, jobs: Sequence[Job], store: TrialStore, batch: int | None, shown: bool) -> None:
    """Launch jobs in batches.

    Raises:
        SweepError: one line about the trials that failed, after all others are done.
    """
    limit_threads()
    failed: list[tuple[Job, TrialError]] = []
    with watching(jobs, store, shown):
        for start in range(0, len(jobs), batch or len(jobs) or 1):
            part = jobs[start : start + (batch or len(jobs))]
            returned = launcher.launch([job.overrides for job in part], initial_job_idx=start)
            failed += [(job, error) for job, error in zip(part, map(_error, returned), strict=True) if error]
    if failed:
        job, first = failed[0]
        sys.stderr.write(first.trace)
        what = " ".join(o for o in job.overrides if target(o) not in ("scale", "experiment"))
        rest = "the others are recorded; " if len(failed) < len(jobs) else ""
        raise SweepError(f"{len(failed)} of {len(jobs)} trials failed, {rest}the first ({what}): {first.message}")


def _error(returned: JobReturn) -> TrialError | None:
    """What a job raised; read past the property that would print Hydra's own message."""
    value = returned._return_value
    if returned.status is JobStatus.COMPLETED or isinstance(value, TrialError):
        return value if isinstance(value, TrialError) else None
    return TrialError(f"{type(value).__name__}: {value}")


@contextlib.contextmanager
def watching(jobs: Sequence[Job], store: TrialStore, shown: bool) -> Iterator[None]:
    """Show done/total and the time left while launchers are busy, by watching the records appear."""
    if not shown or not jobs:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=([job.key for job in jobs], store, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _watch(keys: list[str], store: TrialStore, over: threading.Event) -> None:
    paths = [store.root / "trials" / key / "provenance.json" for key in keys]
    before = [_stamp(path) for path in paths]
    with Progress("trials", len(keys)) as bar:
        while not over.wait(POLL_S):
            bar.update(sum(_stamp(path) not in (None, old) for path, old in zip(paths, before, strict=True)))


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
