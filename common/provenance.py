"""Where a number comes from: commit, versions, machine, time and memory."""

from __future__ import annotations

import contextlib
import functools
import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from common.kernels.device import cpu_name, usable_cores

PACKAGES = ("torch", "numpy", "scipy", "pandas", "scikit-learn", "hydra-core", "accelerate", "datasets", "transformers")
ROOT = Path(__file__).resolve().parents[1]


@functools.lru_cache(maxsize=1)
def git_state() -> dict[str, Any]:
    """Commit of HEAD and whether sources differ from it (results/ aside); `commit` is empty outside a clone."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        dirty = bool(commit and git("status", "--porcelain", "--", ".", ":(exclude)results"))
    except (OSError, subprocess.TimeoutExpired):
        commit, dirty = "", False
    return {"commit": commit, "dirty": dirty}


@functools.lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can move a number."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Meter:
    """Wall time and peak memory of what happens between construction and `read()`."""

    def __init__(self) -> None:
        self.start = time.time()
        self._reset_peak()

    @staticmethod
    def _reset_peak() -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew, a worker runs many trials

    @staticmethod
    def _peak_mb() -> float:
        try:
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) / 1024
        except (OSError, IndexError, ValueError):
            unit = 2**20 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    def read(self) -> dict[str, Any]:
        """Start (UTC), seconds and peak resident memory (MiB), and peak device memory when a GPU was used."""
        torch = sys.modules.get("torch")
        end = time.time()
        found: dict[str, Any] = {
            "started": datetime.fromtimestamp(self.start, UTC).isoformat(timespec="seconds"),
            "start_unix": self.start,
            "end_unix": end,
            "wall_s": round(end - self.start, 3),
            "peak_memory_mb": round(self._peak_mb(), 1),
            "device": "cpu",
        }
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            found["device"] = torch.cuda.get_device_name()
            found["peak_device_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        return found


def machine() -> dict[str, Any]:
    """Processor and core count; no host or user names."""
    return {"cpu": cpu_name(), "cores": usable_cores(), "system": f"{platform.system()} {platform.machine()}"}
