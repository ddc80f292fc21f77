"""The command line of one trial: `python -m <paper>.train [key=value ...]`, with -m for a sweep.

Hydra composes the config; this module turns it into a `TrialConfig`, looks for the record, trains when there is none,
and says everything a user needs in a few lines.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser

from common import errors, ranks
from common.compose import conf_dir, target
from common.config import CommonConfig
from common.fingerprint import fingerprint
from common.launch import limit_threads, register_sweeper
from common.manual import page
from common.task import TaskFunction
from common.tracking import Progress
from common.trials import LABELS, TrialRecord, TrialStore, trial_key

INTERRUPTED = 130


@dataclass(frozen=True)
class TrialCLI:
    """Entry point of a paper's trials; see `trial_cli`."""

    paper: str
    schema: type[CommonConfig]
    entry: Callable[[Any], str]

    @property
    def task_function(self) -> TaskFunction:
        """The function that launchers call."""
        return TaskFunction(self.paper)

    def __call__(self, argv: Sequence[str] | None = None) -> None:
        """Run the command line (default: sys.argv) and exit: 0 done, 1 failed, 2 misused, 130 interrupted."""
        arguments = list(sys.argv[1:] if argv is None else argv)
        sys.exit(self.main(arguments))

    def main(self, arguments: list[str]) -> int:
        """Run Hydra on the arguments and return the exit code."""
        limit_threads()
        register_sweeper()
        before = sys.argv
        try:
            if {"--help", "-h"} & set(arguments):
                print(page(self.paper, self.schema))
                return 0
            sys.argv = [f"python -m {self.paper}.train", *ordered(arguments), f"hydra.job.name={self.paper}"]
            with errors.from_hydra():
                hydra.main(version_base="1.3", config_path=str(conf_dir(self.paper)), config_name="config")(
                    self.task_function
                )()  # type: ignore[arg-type]
        except KeyboardInterrupt:
            sys.stderr.write("interrupted; what was recorded is kept: run the same line again to go on\n")
            return INTERRUPTED
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception as error:
            return errors.report(error, self.schema)
        finally:
            sys.argv = before
        return 0

    def trial(self, config: CommonConfig, overrides: list[str], quiet: bool) -> str:
        """Train a trial, or find its record; return its key."""
        entry = self.entry(config)
        key = trial_key(config, fingerprint(entry))
        store = TrialStore(Path(config.results_dir) / self.paper)
        shown = not quiet and ranks.is_first()
        record = store.load(key)
        if ranks.agree(record is not None, key):
            if shown and record is not None:
                print(f"already recorded (same config, same code), nothing to train: {record.folder}")
        else:
            with Progress("training", 0, enabled=shown and config.tracking.progress) as bar:
                record = store.run(key, config, entry, run_name(overrides), bar.update)
        if shown and record is not None:
            print(summary(record))
            print(f"repeat: {repeat_line(self.paper, config, overrides)}")
        return key


def trial_cli(paper: str, schema: type[CommonConfig], entry: Callable[[Any], str]) -> TrialCLI:
    """Make the entry point of `<paper>/train.py`, to be bound to the module's name `main`.

    Args:
        paper: package name; its configs lie in <paper>/conf, the primary one is config.yaml.
        schema: the trial's dataclass, registered with `common.config.register`.
        entry: names the module whose `run(config, trial) -> list[dict]` trains this config.
    """
    return TrialCLI(paper, schema, entry)


def ordered(arguments: Sequence[str]) -> list[str]:
    """Put flags before overrides, which Hydra's parser needs but users need not know.

    Raises:
        UsageError: an unknown flag, or a word that is neither flag nor key=value.
    """
    overrides = [a for a in arguments if a.startswith("~") or ("=" in a and not a.startswith("-"))]
    flags = [a for a in arguments if a not in overrides]
    known, unknown = get_args_parser().parse_known_args(flags)
    for word in (*unknown, *known.overrides):
        raise errors.UsageError(f"{word}: not a flag or key=value (--help lists what there is)")
    return [*flags, *overrides]


def run_name(overrides: Sequence[str]) -> str:
    """What varies: the trial's overrides without labels, groups of keys shortened to the last name."""
    return " ".join(o.rpartition(".")[2] if "." in target(o) else o for o in overrides if target(o) not in LABELS)


def repeat_line(paper: str, config: CommonConfig, overrides: Sequence[str]) -> str:
    """The shell line that repeats a trial."""
    words = [shlex.quote(o) for o in overrides if not target(o).startswith("hydra")]
    alone = ["hydra.mode=RUN"] if config.experiment else []
    return " ".join([f"python -m {paper}.train", *words, *alone])


def summary(record: TrialRecord) -> str:
    """A small table of the record's scalar metrics, one column a seed."""
    found = record.provenance
    seeds = ", ".join(str(row["seed"]) for row in record.rows)
    lines = [
        f"trial {record.key}: seed {seeds}, {found['wall_s']:.1f} s on {found['device']}, record in {record.folder}"
    ]
    names = [k for k, v in record.rows[0].items() if isinstance(v, int | float | str) and k != "seed"]
    width = max(map(len, names))
    for name in names:
        values = "  ".join(
            f"{v:>11.5g}" if isinstance(v, float) else f"{v!s:>11}"
            for v in (row.get(name, "") for row in record.rows[:8])
        )
        lines.append(f"  {name:<{width}}  {values}{'  ...' if len(record.rows) > 8 else ''}")
    return "\n".join(lines)
