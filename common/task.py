"""One trial as Hydra's launchers see it: a function of a composed config, in whatever process they start."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
import typing
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from common import errors
from common.config import to_config


class TrialError(RuntimeError):
    """A trial failed in its own process; plain text, so that it crosses any launcher.

    Args:
        message: one line.
        trace: the traceback, empty unless the user asked for it.
    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message, trace)
        self.message, self.trace = message, trace


@dataclass(frozen=True)
class TaskFunction:
    """What Hydra calls for every job; found by the paper's name in whatever process a launcher starts.

    Attributes:
        paper: package name.
    """

    paper: str

    def cli(self) -> Any:
        """The paper's entry point, a `common.cli.TrialCLI`."""
        return importlib.import_module(f"{self.paper}.train").main

    def config(self, composed: DictConfig, overrides: list[str]) -> Any:
        """The checked config of the trial."""
        return to_config(composed, self.cli().schema)

    def __call__(self, config: DictConfig) -> str:
        """Train one trial and return its key.

        Raises:
            TrialError: in a sweep, the explained failure.
            SystemExit: on its own, with the failure printed.
        """
        job = HydraConfig.get()
        in_sweep = not OmegaConf.is_missing(job.job, "num")
        if in_worker():
            obey_parent()
        cli = self.cli()
        try:
            # as written: a value such as ${seed} is for the config, not for this node
            overrides = typing.cast(list[str], OmegaConf.to_container(job.overrides.task, resolve=False))
            return cli.trial(self.config(config, overrides), overrides, quiet=in_sweep)
        except Exception as error:
            if not in_sweep:
                raise SystemExit(errors.report(error, cli.schema)) from None
            trace = traceback.format_exc() if errors.wants_traceback() else ""
            raise TrialError(errors.explain(error, cli.schema), trace) from None


@functools.cache
def obey_parent() -> None:
    """Let the parent alone end this worker: ignore Ctrl-C, which reaches the whole group, and die with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # nothing is lost but the trial in flight, and its checkpoints are kept

    threading.Thread(target=watch, daemon=True).start()


def in_worker() -> bool:
    """Whether this is the main thread of a process that a parallel launcher started."""
    process = multiprocessing.current_process().name
    return process != "MainProcess" and threading.current_thread() is threading.main_thread()
