"""W&B runs and progress bars that never ask, never hang and never stop a training.

A trial is one W&B run: project = paper, group = experiment, job type = scale, name = what varies. It goes online when a
login is found and the server answers, else it stays under `<results>/<paper>/wandb`, to be looked at with `wandb leet`
or uploaded later (`python -m common.tracking sync <paper>`). Any failure of tracking costs one line, never the run.
"""

import netrc
import os
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from common.network import answers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("auto", "online", "offline", "disabled")
CONNECT_SECONDS = 3.0
INIT_SECONDS = 15.0
FINISH_SECONDS = 120.0
NAME_LENGTH = 128  # W&B's own limit for run names

_online_failed = False  # one failure sends the rest of the process offline: waiting once is enough


class Tracker:
    """One W&B run at a time, as a context manager; mode "disabled" does nothing and imports nothing.

    Args:
        mode: "auto" (online when logged in and reachable, else offline; `WANDB_MODE` is obeyed), "online" (falls back
            to offline with one line), "offline" or "disabled". Ranks other than 0 are always disabled.
        entity: W&B team or user; empty for the login's default.
        tags: W&B tags of every run.
        progress: show progress bars.
        results: root under which offline runs are kept.

    Raises:
        ValueError: `mode` is none of the four.
    """

    def __init__(
        self,
        mode: str = "auto",
        entity: str = "",
        tags: Sequence[str] = (),
        progress: bool = True,
        results: Path | str = "results",
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
        self.mode = "disabled" if int(os.environ.get("RANK", "0")) else mode
        self.entity, self.tags, self.results = entity, list(tags), Path(results)
        self.show_progress = progress
        self._run: Any = None

    def start(
        self,
        config: Mapping[str, Any],
        paper: str,
        experiment: str = "",
        arm: str = "",
        scale: str = "",
        name: str = "",
        axes: Mapping[str, str] | None = None,
    ) -> Self:
        """Open a run.

        Args:
            config: the trial's config, JSON-like.
            paper: W&B project.
            experiment: W&B group.
            arm: becomes a tag and opens the run's name.
            scale: W&B job type.
            name: what varies in this run, e.g. "optimizer.lr=0.01".
            axes: metric glob -> the metric that is its x axis; everything else is drawn over "step".
        """
        self.finish()
        settings = {
            "project": paper,
            "entity": self.entity or None,
            "group": experiment or None,
            "job_type": scale or None,
            "name": " ".join(part for part in (arm, name) if part)[:NAME_LENGTH] or None,
            "tags": [*self.tags, *([arm] if arm else [])],
            "config": dict(config),
        }
        for mode in _attempts("offline" if _online_failed and self.mode != "disabled" else decide(self.mode)):
            self._run = self._open(paper, {"mode": mode, **settings})
            if self._run is not None:
                self._run.define_metric("step")
                self._run.define_metric("*", step_metric="step")
                for metric, axis in (axes or {}).items():
                    self._run.define_metric(axis)
                    self._run.define_metric(metric, step_metric=axis)
                break
        return self

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        """Add one row at `step`; a list (one value a seed) is shown as its mean, lowest and highest value."""
        if self._run is not None:
            self._run.log({"step": step, **_spread(metrics)})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final values of the run."""
        if self._run is not None:
            self._run.summary.update(dict(values))

    def figure(self, name: str, figure: "Figure") -> None:
        """Attach a matplotlib figure."""
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Image(figure)})

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Attach a table."""
        if self._run is not None:
            import wandb

            self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

    def finish(self, failed: bool = False) -> None:
        """Close the run; upload time is bounded, what was not uploaded stays on disk for `sync`."""
        run, self._run = self._run, None
        if run is not None:
            try:
                run.finish(exit_code=int(failed))
            except Exception as error:  # tracking never costs a training
                _note(f"W&B could not close the run ({_brief(error)}); it stays on disk")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(failed=kind is not None)

    def _open(self, paper: str, arguments: dict[str, Any]) -> Any:
        global _online_failed
        folder = self.results / paper
        # its own chatter and crash reports: the latter wait for ten seconds at exit on a network that swallows packets
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            import wandb

            settings = wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                save_code=False,
                x_save_requirements=False,
                init_timeout=INIT_SECONDS,
                login_timeout=CONNECT_SECONDS,
                finish_timeout=FINISH_SECONDS,
            )
            return wandb.init(dir=str(folder), settings=settings, reinit="finish_previous", **arguments)
        except Exception as error:  # tracking never costs a training
            _note(f"W&B {arguments['mode']} run not started ({_brief(error)})")
            _online_failed = _online_failed or arguments["mode"] == "online"
            return None


def decide(mode: str) -> str:
    """The mode that will really be used: "online", "offline" or "disabled"."""
    if mode == "auto":
        wish = os.environ.get("WANDB_MODE", "")
        if wish in ("offline", "disabled"):
            return wish
        return "online" if logged_in() and reachable() else "offline"
    if mode == "online" and not logged_in():
        _note("W&B: not logged in (`wandb login` or WANDB_API_KEY), runs are kept offline")
        return "offline"
    if mode == "online" and not reachable():
        _note("W&B: the server does not answer, runs are kept offline")
        return "offline"
    return mode


def logged_in() -> bool:
    """Is there a W&B credential in the environment or the netrc file? The credential itself is not kept."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return netrc.netrc(str(path)).authenticators(urllib.parse.urlsplit(_server()).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def reachable() -> bool:
    """Does the W&B server answer within `CONNECT_SECONDS`? Asked once a process."""
    return answers(_server(), CONNECT_SECONDS)


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def _attempts(mode: str) -> list[str]:
    return {"online": ["online", "offline"], "offline": ["offline"]}.get(mode, [])


def _spread(metrics: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, (list, tuple)) and value and all(isinstance(item, (int, float)) for item in value):
            shown[name] = sum(value) / len(value)
            shown |= {f"{name}/lowest": min(value), f"{name}/highest": max(value)}
        else:
            shown[name] = value
    return shown


class Progress:
    """Done, total and time left: a bar on a terminal, a line every half minute elsewhere, nothing in a worker process.

    Args:
        label: what is being done.
        total: number of steps.
        enabled: False shows nothing.
    """

    LINE_SECONDS = 30.0

    def __init__(self, label: str, total: int, enabled: bool = True) -> None:
        import multiprocessing

        # bars of several workers would overwrite each other; the parent shows the sweep
        alone = multiprocessing.current_process().name == "MainProcess" and os.environ.get("RANK", "0") == "0"
        self.label, self.total, self.enabled = label, total, enabled and alone
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        if self.enabled and sys.stderr.isatty():
            self._bar = _bar()
            self._task = self._bar.add_task(label, total=total)
            self._bar.start()

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Say that `done` of `total` steps are done."""
        self.total = self.total if total is None else total
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total, description=f"{self.label} {note}".strip())
        elif self.enabled and time.monotonic() - self._last >= self.LINE_SECONDS:
            self._last = time.monotonic()
            left = (self._last - self._start) * (self.total - done) / done if done else float("nan")
            words = (f"{self.label}: {done}/{self.total}", note, f"about {left:.0f} s left")
            print(*filter(None, words), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bar() -> Any:
    from rich import progress
    from rich.console import Console

    done = progress.MofNCompleteColumn()
    times = (progress.TimeElapsedColumn(), "left", progress.TimeRemainingColumn())
    return progress.Progress(
        "{task.description}", progress.BarColumn(), done, *times, console=Console(stderr=True), transient=True
    )


def offline_runs(paper: str, results: Path | str = "results") -> list[Path]:
    """Folders of the paper's offline runs that were not uploaded yet, oldest first."""
    folders = sorted((Path(results) / paper / "wandb").glob("offline-run-*"))
    return [folder for folder in folders if not list(folder.glob("*.wandb.synced"))]


def sync(paper: str, results: Path | str = "results") -> int:
    """Upload the offline runs of a paper, or of "all"; returns the exit status."""
    root = Path(results)
    papers = (
        sorted(folder.name for folder in root.iterdir() if folder.is_dir())
        if paper == "all" and root.is_dir()
        else [paper]
    )
    runs = [run for name in papers for run in offline_runs(name, results)]
    if not runs:
        print(f"nothing to upload: no offline runs of {paper} under {root}/")
        return 0
    if not logged_in():
        print(f"{len(runs)} offline runs wait; log in first: wandb login (or set WANDB_API_KEY)", file=sys.stderr)
        return 1
    if not reachable():
        print(f"{len(runs)} offline runs wait; {_server()} does not answer", file=sys.stderr)
        return 1
    return subprocess.run([sys.executable, "-m", "wandb", "sync", *map(str, runs)], check=False).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: `python -m common.tracking sync <paper|all> [--results DIR]`."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m common.tracking", description="upload offline W&B runs")
    parser.add_argument("command", choices=["sync"])
    parser.add_argument("paper", help="name of a paper, or all")
    parser.add_argument("--results", default="results", help="root of the results (default: results)")
    chosen = parser.parse_args(arguments)
    return sync(chosen.paper, chosen.results)


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
