"""`python -m common.dashboard <paper>`: look at the runs of a paper.

Logged in and online, the paper's W&B workspace is built from code and saved: one section a claim, with panels that
mirror the report's figures, as `<paper>/dashboard.py` lists them in `sections()`. Offline, `wandb leet` opens on the
runs under `<results>/<paper>/wandb`, or, without a terminal, the line that does so is printed.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.tracking import logged_in, reachable

KINDS = ("line", "scatter", "bar")


@dataclass(frozen=True)
class Panel:
    """One panel; names are metrics, or config keys when written as `config.<key>`, e.g. `config.optimizer.lr`."""

    y: str
    """What is drawn: a logged metric, or a summary value in scatter and bar panels."""
    x: str = "step"
    """The axis: a logged metric for lines, a config key or summary value for scatter panels; unused by bars."""
    group: str = ""
    """Runs of equal value are drawn as one line with a band, e.g. `config.arm`."""
    kind: str = "line"
    """`line`, `scatter` or `bar`."""
    title: str = ""
    """Heading; `y over x` by default."""
    log_x: bool = False
    """Logarithmic x axis."""
    log_y: bool = False
    """Logarithmic y axis."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: must be one of {', '.join(KINDS)}")


@dataclass(frozen=True)
class Section:
    """One claim of the paper."""

    title: str
    """Claim id and statement, e.g. `C1 Equilibrium formulas`."""
    panels: Sequence[Panel] = field(default_factory=tuple)
    """Its panels."""


def sections(paper: str) -> list[Section]:
    """What `<paper>/dashboard.py` lists.

    Raises:
        ValueError: there is no such paper, or it has no `dashboard.py`.
    """
    name = f"{paper}.dashboard"
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name != paper:  # the paper is there, something it imports is not
            raise
        found = None
    if found is None:
        raise ValueError(f"paper={paper}: there is no {paper}/dashboard.py")
    return list(importlib.import_module(name).sections())


def workspace(paper: str, entity: str, parts: Sequence[Section]) -> Any:
    """The W&B workspace (not yet saved)."""
    import wandb_workspaces.workspaces as ws

    shown = [ws.Section(name=part.title, panels=[_panel(panel) for panel in part.panels]) for part in parts]
    if shown:
        shown[0].is_open = True
    return ws.Workspace(entity=entity, project=paper, name=f"{paper}: claims", sections=shown)


def save(paper: str, results: Path | str = "results") -> str:
    """Build and save the workspace; a second call updates the first one's. Returns its address."""
    import wandb
    import wandb_workspaces.workspaces as ws

    entity = os.environ.get("WANDB_ENTITY") or wandb.Api(timeout=20).default_entity or ""
    built = workspace(paper, entity, sections(paper))
    note = Path(results) / paper / "wandb" / "workspace.url"
    if note.is_file():
        kept = ws.Workspace.from_url(note.read_text().strip())
        kept.sections = built.sections
        built = kept
    saved = built.save()
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(saved.url + "\n")
    return saved.url


def leet(paper: str, results: Path | str = "results") -> int:
    """Open `wandb leet` on the offline runs, or say how; returns the exit status."""
    folder = Path(results) / paper / "wandb"
    if not any(folder.glob("*run-*")):
        print(f"no runs under {folder}: run `make reproduce-{paper}` first", file=sys.stderr)
        return 1
    if not _has_leet():
        print(f"this wandb has no `leet`; the figures are in {Path(results) / paper / 'report.html'}")
        return 0
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        print(f"no terminal here; in one: wandb leet {folder}")
        return 0
    return subprocess.run([sys.executable, "-m", "wandb", "leet", str(folder)], check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m common.dashboard", description="look at the runs of a paper")
    parser.add_argument("paper", help="package name of the paper")
    parser.add_argument("--results", default="results", help="root of the results (default: results)")
    parser.add_argument("--offline", action="store_true", help="look at the offline runs even when logged in")
    chosen = parser.parse_args(arguments)
    if chosen.offline or not logged_in() or not reachable():
        return leet(chosen.paper, chosen.results)
    try:
        print(save(chosen.paper, chosen.results))
    except Exception as error:  # whatever W&B objects to, the runs can still be looked at
        print(f"the workspace was not saved ({str(error).strip().splitlines()[:1]})", file=sys.stderr)
        return leet(chosen.paper, chosen.results)
    return 0


def _panel(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    title = panel.title or (panel.y if panel.kind == "bar" else f"{panel.y} over {panel.x}")
    group = _name(panel.group) if panel.group else None
    if panel.kind == "bar":
        return wr.BarPlot(title=title, metrics=[_name(panel.y)], groupby=group)
    if panel.kind == "scatter":
        x, y = _name(panel.x, summary=True), _name(panel.y, summary=True)
        return wr.ScatterPlot(title=title, x=x, y=y, log_x=panel.log_x, log_y=panel.log_y)
    return wr.LinePlot(
        title=title,
        x=_name(panel.x),
        y=[_name(panel.y)],
        log_x=panel.log_x,
        log_y=panel.log_y,
        groupby=group,
        groupby_rangefunc="minmax" if panel.group else None,
        aggregate=bool(panel.group) or None,
    )


def _name(name: str, summary: bool = False) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if name.startswith("config."):
        return wr.Config(name.removeprefix("config."))
    return wr.SummaryMetric(name) if summary else wr.Metric(name)


def _has_leet() -> bool:
    probe = [sys.executable, "-m", "wandb", "leet", "--help"]
    try:
        return subprocess.run(probe, capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False


if __name__ == "__main__":
    sys.exit(main())
