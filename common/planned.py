"""Handing planned configs to the processes of a launcher, which would otherwise compose each of them anew.

The plan has composed and checked every config already; composing takes longer than many a small trial. So a launcher
gets a loader that composes nothing, and a task that finds the job's values by its overrides in the plan's cache file.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from common.compose import Composer, target
from common.task import TaskFunction


class PlannedLoader:
    """Stands in for Hydra's config loader: a job has the sweep's own `hydra` node and its overrides."""

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> DictConfig:
        """Return what Hydra needs to run a job."""
        config = copy.deepcopy(master_config)
        with read_write(config.hydra), open_dict(config.hydra):
            config.hydra.overrides.task = list(sweep_overrides)
        return config


@dataclass(frozen=True)
class PlannedTask(TaskFunction):
    """Trains the job whose overrides Hydra hands over.

    Attributes:
        plans: the plan's cache file.
    """

    plans: str

    def config(self, composed: DictConfig, overrides: list[str]) -> Any:
        """The job's config, from the plan or, where that is gone, composed from its overrides."""
        found = _read(self.plans, _changed(self.plans)).get(config_name(overrides), {})
        if found.get("kinds"):
            return rebuild(found["values"], found["kinds"])
        own = [o for o in overrides if not target(o).startswith("hydra")]
        return Composer(self.paper, self.cli().schema).config(own)


def planned_launcher(config: DictConfig, context: HydraContext, paper: str, plans: Path) -> Launcher:
    """Make the configured launcher for jobs that a plan has composed.

    Args:
        config: a composed config with its `hydra` node, which says which launcher.
        context: Hydra's context.
        paper: package name.
        plans: the plan's cache file.
    """
    small = OmegaConf.masked_copy(config, ["hydra", "results_dir"])
    light = HydraContext(config_loader=PlannedLoader(), callbacks=context.callbacks)  # type: ignore[arg-type]
    return Plugins.instance().instantiate_launcher(light, PlannedTask(paper, str(plans.resolve())), small)


def config_name(overrides: Sequence[str]) -> str:
    """Under what name a plan's cache keeps the config of a job."""
    return f"config {list(overrides)}"


def kinds(config: Any, prefix: str = "") -> dict[str, str]:
    """Dotted name of every dataclass in a config -> `module:class`."""
    found = {prefix: f"{type(config).__module__}:{type(config).__qualname__}"}
    for f in dataclasses.fields(config):
        if dataclasses.is_dataclass(getattr(config, f.name)):
            found |= kinds(getattr(config, f.name), f"{prefix}.{f.name}".lstrip("."))
    return found


def rebuild(values: dict[str, Any], kinds: dict[str, str], prefix: str = "") -> Any:
    """Undo `dataclasses.asdict`, range checks included."""
    module, _, name = kinds[prefix].partition(":")
    kind = getattr(importlib.import_module(module), name)
    arguments = {}
    for f in dataclasses.fields(kind):
        path = f"{prefix}.{f.name}".lstrip(".")
        arguments[f.name] = rebuild(values[f.name], kinds, path) if path in kinds else values[f.name]
    return kind(**arguments)


def as_values(config: Any) -> dict[str, Any]:
    """A config as JSON values with the kinds that rebuild it; no kinds where JSON would change it."""
    values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    found = kinds(config)
    return {"values": values, "kinds": found if rebuild(values, found) == config else {}}


def _changed(plans: str) -> int:
    """When the plan's cache file was last written."""
    path = Path(plans)
    return path.stat().st_mtime_ns if path.exists() else 0


@functools.lru_cache(maxsize=1)
def _read(plans: str, changed: int) -> dict[str, Any]:
    """The plan's cache file; empty when there is none."""
    try:
        return json.loads(Path(plans).read_text())["values"]
    except (OSError, ValueError, KeyError):
        return {}
