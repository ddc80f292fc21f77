"""What composing found, kept between runs: a plan of hundreds of trials is then read in milliseconds.

The cache is a plain JSON file beside the records. It names the hash of everything a plan is made from (YAML files,
schema and planning code, library versions); when that differs the cache is empty.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from common.compose import SHARED, conf_dir
from common.fingerprint import sources

PLANNING = ("config.py", "compose.py", "sweeps.py", "plancache.py", "planned.py")


@functools.cache
def inputs(paper: str) -> str:
    """Hash of what the paper's plans depend on."""
    files = {*sources(f"{paper}.train").values(), *(Path(__file__).with_name(name) for name in PLANNING)}
    files |= {path for root in (conf_dir(paper), SHARED) for path in root.rglob("*.yaml")}
    digest = hashlib.sha256(f"{metadata.version('hydra-core')} {metadata.version('omegaconf')}".encode())
    for path in sorted(files):
        digest.update(str(path).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def plans_path(root: Path) -> Path:
    """Where the plan's cache lies under a paper's results."""
    return root / "hydra" / "plans.json"


class PlanCache:
    """A dict of JSON values that outlives the process.

    Args:
        paper: package name.
        path: the file; None keeps nothing.
    """

    def __init__(self, paper: str, path: Path | None) -> None:
        self.path, self.state = path, inputs(paper) if path else ""
        self.values: dict[str, Any] = {}
        self._saved = 0
        if path is not None:
            try:
                found = json.loads(path.read_text())
                self.values = found["values"] if found["inputs"] == self.state else {}
            except (OSError, ValueError, KeyError, TypeError):
                self.values = {}
            self._saved = len(self.values)

    def save(self) -> None:
        """Write what is new; a cache that cannot be written costs time, nothing else."""
        if self.path is None or len(self.values) == self._saved:
            return
        aside = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps({"inputs": self.state, "values": self.values}))
            aside.replace(self.path)
            self._saved = len(self.values)
        except OSError:
            aside.unlink(missing_ok=True)
