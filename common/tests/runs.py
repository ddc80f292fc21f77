"""Runs of the fixture paper: in this process where possible, as processes where they are to be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FIXTURE = Path(__file__).parent / "fixture_paper"
ROOT = Path(__file__).resolve().parents[2]
TRAIN = [sys.executable, "-m", "fixture_paper.train"]
REPRODUCE = [sys.executable, "-m", "common.reproduce", "fixture_paper"]
OFF = "tracking=disabled"
PAPER = Path("results") / "fixture_paper"

if str(FIXTURE) not in sys.path:
    sys.path.insert(0, str(FIXTURE))


def environment(source: Path = FIXTURE, **more: str) -> dict[str, str]:
    """Environment of a run whose fixture paper lies in `source`."""
    return {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1", **more}


def run(command: list[str], cwd: Path, *, source: Path = FIXTURE, **more: str) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    return subprocess.run(
        command, cwd=cwd, env=environment(source, **more), capture_output=True, text=True, timeout=120
    )


def start(command: list[str], cwd: Path) -> subprocess.Popen[str]:
    """Start in a process group of its own."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a shell's background jobs ignore Ctrl-C, and their children inherit that
    hear = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    return subprocess.Popen(command, cwd=cwd, env=environment(), start_new_session=True, preexec_fn=hear, **pipes)


def signal_group(process: subprocess.Popen[str], what: signal.Signals) -> tuple[str, str]:
    """Send a signal to a started process and all it started, and wait; return stdout and stderr."""
    os.killpg(process.pid, what)
    return process.communicate(timeout=60)


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Poll until the condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def records(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Trial key -> rows of every record."""
    found = (folder / PAPER / "trials").glob("*/summary.json")
    return {path.parent.name: json.loads(path.read_text()) for path in found}


def verdicts(folder: Path) -> list[dict[str, Any]]:
    """The claims of the report."""
    return json.loads((folder / PAPER / "report.json").read_text())["claims"]
