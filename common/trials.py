"""One trial = one config = one record on disk, written whole or not at all.

    results/<paper>/trials/<key>/    config.yaml  history.parquet  summary.json  provenance.json
    results/<paper>/scratch/<key>/   checkpoints of a running trial; kept across a kill, gone with the record
    results/<paper>/locks/<key>      held while a process trains the trial

The key is a hash of everything that can change the numbers: the config without its labels, and the sources that the
trial imports. A record is built aside, synced and renamed; its files' SHA-256 stand in provenance.json, so half a
record is seen as none and the trial is run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common import provenance, ranks
from common.config import CommonConfig
from common.fingerprint import fingerprint as fingerprint_of
from common.rows import checked, from_json, means, to_json

LABELS = ("experiment", "arm", "scale", "results_dir", "tracking", "cost")
"""Config keys that cannot change a number; they are not part of a trial's key."""
HASHED = ("config.yaml", "history.parquet", "summary.json")
FREE_BYTES = 4 << 20


def trial_key(config: CommonConfig | dict[str, Any], fingerprint: str) -> str:
    """Hash a config (without labels) and the fingerprint of its sources into 16 hex digits."""
    values = config if isinstance(config, dict) else dataclasses.asdict(config)
    canonical = json.dumps({k: v for k, v in values.items() if k not in LABELS}, sort_keys=True, default=str)
    return hashlib.sha256(f"{fingerprint}\0{canonical}".encode()).hexdigest()[:16]


@dataclass
class Trial:
    """What `run(config, trial)` gets beside its config.

    Attributes:
        folder: scratch folder for checkpoints; survives a kill, is removed when the record is written.
        seeds: the seeds of this trial, in the order of vector-valued metrics.
        tracker: the W&B run, None when tracking is off.
        bar: called with (done, total) to show progress, None to show none.
    """

    folder: Path
    seeds: list[int]
    tracker: Any = None
    bar: Any = None
    writes: bool = True
    _history: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    _earlier: bool = False

    def __post_init__(self) -> None:
        self._earlier = (self.folder / "history.jsonl").exists()
        self._history = _read_history(self.folder / "history.jsonl")

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """Add metrics to the history at `step` (and to W&B).

        Args:
            metrics: name -> number, or one number a seed (list, array or tensor of shape (n_seeds,)).
            step: non-negative; a resumed trial may log a step again, which replaces what was logged from there on.

        Raises:
            ValueError: when a vector does not have one entry a seed.
        """
        if not self.writes:
            return
        if self._earlier:  # a resumed trial repeats the steps after its checkpoint
            self._forget_from(step)
        row = {name: self._per_seed(name, value) for name, value in metrics.items()}
        self._history.setdefault(int(step), {}).update(row)
        with open(self.folder / "history.jsonl", "a") as file:
            file.write(json.dumps([int(step), row]) + "\n")
        if self.tracker is not None:
            shown = {name: values if len(values) > 1 else values[0] for name, values in row.items()}
            self.tracker.log(shown, step=int(step))

    def _forget_from(self, step: int) -> None:
        """Drop what an interrupted run had logged at or after `step`, a torn last line included."""
        self._history = {s: row for s, row in self._history.items() if s < step}
        self._earlier = False
        aside = self.folder / "history.new"
        aside.write_text("".join(json.dumps([s, row]) + "\n" for s, row in self._history.items()))
        aside.replace(self.folder / "history.jsonl")

    def _per_seed(self, name: str, value: Any) -> list[float]:
        plain = value.tolist() if hasattr(value, "tolist") else value
        values = [float(v) for v in plain] if isinstance(plain, list | tuple) else [float(plain)] * len(self.seeds)
        if len(values) != len(self.seeds):
            raise ValueError(f"{name}: has {len(values)} values, must have one a seed ({len(self.seeds)})")
        return values

    def progress(self, done: int, total: int) -> None:
        """Show how far the trial is."""
        if self.bar is not None:
            self.bar(done, total)

    def history_rows(self) -> list[dict[str, Any]]:
        """The history as one row per (step, seed)."""
        return [
            {"step": step, "seed": seed, **{name: values[i] for name, values in row.items()}}
            for step, row in sorted(self._history.items())
            for i, seed in enumerate(self.seeds)
        ]


def _read_history(path: Path) -> dict[int, dict[str, list[float]]]:
    """Read back what an interrupted run of the same trial had logged; a torn last line is ignored."""
    history: dict[int, dict[str, list[float]]] = {}
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                step, row = json.loads(line)
            except ValueError:
                break
            history.setdefault(step, {}).update(row)
    return history


@dataclass
class TrialRecord:
    """A finished trial, read back from disk."""

    key: str
    rows: list[dict[str, Any]]
    provenance: dict[str, Any]
    folder: Path

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The trial's whole config, nested."""
        return yaml.load(
            (self.folder / "config.yaml").read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )

    @functools.cached_property
    def history(self) -> Any:
        """The logged metrics as a DataFrame with columns step, seed and one a metric."""
        import pandas as pd

        return pd.read_parquet(self.folder / "history.parquet")


class TrialStore:
    """The trial records of one paper under `root` (= results/<paper>)."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def load(self, key: str) -> TrialRecord | None:
        """Return the record of `key`, or None when there is none or one of its files is torn."""
        folder = self.root / "trials" / key
        try:
            found = json.loads((folder / "provenance.json").read_text())
            blobs = {name: (folder / name).read_bytes() for name in HASHED}
            if any(hashlib.sha256(blob).hexdigest() != found["sha256"][name] for name, blob in blobs.items()):
                return None
            rows = json.loads(blobs["summary.json"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return TrialRecord(key, [from_json(row) for row in rows], found, folder)

    def run(self, key: str, config: CommonConfig, entry: str, name: str = "", bar: Any = None) -> TrialRecord | None:
        """Train the trial unless its record exists, and return the record.

        Under torchrun every process trains and rank 0 alone writes; the other ranks get None.

        Args:
            key: `trial_key(config, fingerprint(entry))`.
            config: the trial's config.
            entry: dotted name of the module with `run(config, trial) -> list[dict]`.
            name: what varies, shown as the run's name.
            bar: called with (done, total).

        Raises:
            OSError: no space left; nothing is half written, and the next run goes on.
        """
        with self._lock(key) if ranks.is_first() else contextlib.nullcontext():
            done = self.load(key) if ranks.is_first() else None
            if not ranks.agree(done is not None, key):
                done = self._train(key, config, entry, name, bar)
        return done

    def _train(self, key: str, config: CommonConfig, entry: str, name: str, bar: Any) -> TrialRecord | None:
        scratch = self.root / "scratch" / key
        scratch.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(scratch).free < FREE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(scratch))
        meter = provenance.Meter()
        module = importlib.import_module(entry)
        _limit_threads(config.threads)
        seeds = list(range(config.seed, config.seed + config.n_seeds))
        with _tracker(config, entry.split(".")[0], name) as tracker:
            trial = Trial(scratch, seeds, tracker, bar, writes=ranks.is_first())
            try:
                rows = module.run(config, trial)
            except FloatingPointError:
                rows = [{"seed": seed, "diverged": True} for seed in seeds]
            rows = checked(rows, seeds, entry)
            if tracker is not None:
                tracker.summary(means(rows))
        if not ranks.is_first():
            return None
        found = {
            "key": key,
            "entry": entry,
            "fingerprint": fingerprint_of(entry),
            "seed": config.seed,
            "n_seeds": config.n_seeds,
            "threads": config.threads,
            "processes": ranks.count(),
            **provenance.git_state(),
            **meter.read(),
            "machine": provenance.machine(),
            "versions": provenance.versions(),
        }
        self._write(key, dataclasses.asdict(config), rows, trial.history_rows(), found)
        shutil.rmtree(scratch, ignore_errors=True)
        record = self.load(key)
        if record is None:
            raise OSError(errno.EIO, "the record cannot be read back", str(self.root / "trials" / key))
        return record

    def _write(
        self, key: str, config: dict[str, Any], rows: list[Any], history: list[Any], found: dict[str, Any]
    ) -> None:
        """Build the record aside, sync it and rename it into place."""
        import pandas as pd

        folder, built = self.root / "trials" / key, self.root / "scratch" / f"{key}.record"
        shutil.rmtree(built, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        built.mkdir(parents=True)
        try:
            (built / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            pd.DataFrame(history or {"step": [], "seed": []}).to_parquet(built / "history.parquet")
            (built / "summary.json").write_text(json.dumps(to_json(rows), indent=1, allow_nan=False) + "\n")
            digests = {name: hashlib.sha256((built / name).read_bytes()).hexdigest() for name in HASHED}
            (built / "provenance.json").write_text(json.dumps(found | {"sha256": digests}, indent=1) + "\n")
            for path in (*built.iterdir(), built):
                _sync(path)
            if folder.exists():  # a torn record, or load() would have found it
                torn = built.with_suffix(".torn")
                shutil.rmtree(torn, ignore_errors=True)
                folder.rename(torn)
                shutil.rmtree(torn, ignore_errors=True)
            built.rename(folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(built, ignore_errors=True)

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Hold the trial's lock; the system frees it when the process dies."""
        path = self.root / "locks" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                held = path.exists() and os.fstat(handle).st_ino == path.stat().st_ino
            except OSError:
                held = False
            if held:
                break
            os.close(handle)  # the holder before us removed the file: lock the new one
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(handle)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _limit_threads(threads: int) -> None:
    """Keep every thread pool of this process at `threads`."""
    import threadpoolctl

    threadpoolctl.threadpool_limits(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _tracker(config: CommonConfig, paper: str, name: str) -> Iterator[Any]:
    """Open the trial's W&B run, or nothing when tracking is disabled or another rank owns it."""
    if config.tracking.mode == "disabled" or not ranks.is_first():
        yield None
        return
    from common.tracking import Tracker

    wish = config.tracking
    root = Path(config.results_dir)
    with Tracker(wish.mode, entity=wish.entity, tags=wish.tags, progress=wish.progress, results=root) as tracker:
        tracker.start(dataclasses.asdict(config), paper, config.experiment, config.arm, config.scale, name)
        yield tracker
