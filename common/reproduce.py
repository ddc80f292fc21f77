"""`python -m common.reproduce <paper> [key=value ...]`: train what is missing, judge every claim, write the report."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import errors
from common.compose import conf_dir, target
from common.launch import launch, register_sweeper, untrained
from common.records import Records
from common.sweeps import Job, Planner
from common.trials import TrialRecord, TrialStore

USAGE = """usage: python -m common.reproduce <paper> [key=value ...]
  scale=smoke|laptop|gpu|paper     how large (default: the paper's config, laptop)
  hydra/launcher=basic|laptop|slurm|ray_local   where trials run (default: laptop, one process a core)
  tracking.mode=disabled, results_dir=..., and any other key of `python -m <paper>.train --help`"""


def main(arguments: Sequence[str]) -> int:
    """Run the pipeline; return 0, 1 (failed), 2 (misused) or 130 (interrupted)."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    if not arguments or arguments[0].startswith("-") or "=" in arguments[0]:
        sys.stderr.write(f"{USAGE}\n")
        return 2
    schema = None
    try:
        register_sweeper()
        conf_dir(arguments[0])
        cli = importlib.import_module(f"{arguments[0]}.train").main
        schema = cli.schema
        reproduce(cli, arguments[1:])
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; what was recorded is kept: run the same line again to go on\n")
        return 130
    except Exception as error:
        return errors.report(error, schema)
    return 0


def reproduce(cli: Any, overrides: Sequence[str]) -> dict[str, Any]:
    """Train, judge and report one paper.

    Args:
        cli: the paper's entry point (`<paper>.train.main`).
        overrides: Hydra overrides; `hydra/...` ones go to the launch, the others to every trial.

    Returns:
        The report, as in report.json.

    Raises:
        SweepError: some trials failed; the others are recorded.
    """
    start = time.time()
    hydra_overrides = [o for o in overrides if target(o).startswith("hydra")]
    own = [o for o in overrides if not target(o).startswith("hydra")]
    planner = planner_for(cli, own)
    records, trained, total = train(planner, hydra_overrides)
    recorded = total - trained
    print(f"{cli.paper}: {total} trials at scale={planner.scale}, {trained} trained now, {recorded} recorded before")
    report = judge(cli, planner, records)
    print(f"done in {time.time() - start:.0f} s")
    return report


def planner_for(cli: Any, overrides: Sequence[str]) -> Planner:
    """A planner over the results folder and scale that the overrides ask for."""
    probe = Planner(cli, None, "laptop", []).composer.config([o for o in overrides if target(o) != "experiment"])
    return Planner(cli, TrialStore(Path(probe.results_dir) / cli.paper), probe.scale, list(overrides))


def train(planner: Planner, hydra_overrides: Sequence[str] = ()) -> tuple[Records, int, int]:
    """Train the missing trials of every experiment, wave by wave; return records, trials trained, trials in all."""
    store = planner.store
    assert store is not None
    jobs: dict[str, list[Job]] = {}
    trained = 0
    for wave in planner.waves(planner.composer.experiments()):
        jobs |= {experiment: planner.plan(experiment) for experiment in wave}
        missing = untrained([job for experiment in wave for job in jobs[experiment]], store)
        if missing:
            print(f"{', '.join(wave)}: training {len(missing)} trials", flush=True)
            shown = missing[0].config["tracking"]["progress"]
            launch(planner.cli, missing, hydra_overrides, store, shown)
            trained += len(missing)
    found: dict[str, TrialRecord] = {}
    for job in (job for several in jobs.values() for job in several):
        record = found.get(job.key) or store.load(job.key)
        if record is None:
            raise FileNotFoundError(2, "record vanished", str(store.root / "trials" / job.key))
        found[job.key] = record
    return Records(planner.scale, jobs, found), trained, len(found)


def judge(cli: Any, planner: Planner, records: Records) -> dict[str, Any]:
    """Judge the paper's claims on records and write the report."""
    from common import claims, report

    assert planner.store is not None
    verdicts = claims.judge_all(importlib.import_module(f"{cli.paper}.claims").CLAIMS, records, records.scale)
    written = report.write(cli.paper, verdicts, records, planner.store.root)
    report.print_table(written)
    return written


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
