"""Triton's interpreter: kernels run on CPU tensors, slowly, so that their results can be checked without a GPU.

Triton decides at the import of a kernel's module whether it compiles or interprets, and it cannot do both in one
process (ahead-of-time compilation fails while the interpreter is on). Hence interpreted runs get their own process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SWITCH = "TRITON_INTERPRET"
ROOT = Path(__file__).resolve().parents[2]


def interpreting() -> bool:
    """Is this process one in which Triton kernels are interpreted (`TRITON_INTERPRET=1`)?"""
    return os.environ.get(SWITCH, "").lower() in ("1", "true", "on", "yes", "y")


def interpreted(arguments: Sequence[str], *, seconds: float = 300, on: bool = True) -> subprocess.CompletedProcess[str]:
    """Run Python with the interpreter switched on (or off), from the repository's root.

    Args:
        arguments: what follows `python`, e.g. `["-m", "pytest", "x/test_kernels.py"]`.
        seconds: limit on the run.
        on: False gives a process that can compile ahead of time, whatever this one's environment says.

    Returns:
        The finished process with `returncode`, `stdout` and `stderr` (text).

    Raises:
        subprocess.TimeoutExpired: after `seconds`; the process is killed.
    """
    environment = {**os.environ, SWITCH: "1" if on else "0"}
    # coverage and xdist settings of an outer pytest are not the inner one's business
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
