"""Whatever happens to a run, nothing is torn, and the same line again ends with the same records."""

from __future__ import annotations

import fcntl
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from common.tests.runs import (
    OFF,
    PAPER,
    REPRODUCE,
    TRAIN,
    environment,
    records,
    run,
    signal_group,
    start,
    verdicts,
    wait_until,
)
from common.trials import TrialStore

SLOW = [OFF, "pause=0.05", "steps=40"]


def trial_folder(folder: Path, part: str) -> Path:
    """The only trial in a part of the results."""
    (found,) = (folder / PAPER / part).iterdir()
    return found


def is_free(lock: Path) -> bool:
    """Whether no process holds a trial's lock."""
    with open(lock) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_trial_killed_in_the_middle_resumes_and_ends_the_same(tmp_path: Path) -> None:
    process = start([*TRAIN, *SLOW], tmp_path)
    wait_until(lambda: list((tmp_path / PAPER).glob("scratch/*/state.npz")))
    signal_group(process, signal.SIGKILL)
    assert not records(tmp_path)
    again = run([*TRAIN, *SLOW], tmp_path)
    assert again.returncode == 0, again.stderr
    whole = tmp_path / "whole"
    whole.mkdir()
    run([*TRAIN, *SLOW], whole)
    resumed, straight = trial_folder(tmp_path, "trials"), trial_folder(whole, "trials")
    assert resumed.name == straight.name
    (row,), (expected,) = (json.loads((f / "summary.json").read_text()) for f in (resumed, straight))
    assert row.pop("resumed_at") > 0 and expected.pop("resumed_at") == 0
    assert row == expected  # to the last bit
    pd.testing.assert_frame_equal(
        *(pd.read_parquet(f / "history.parquet") for f in (resumed, straight)), check_exact=True
    )
    assert not list((tmp_path / PAPER / "scratch").iterdir())


def test_a_sweep_killed_in_the_middle_goes_on_to_the_same_report(tmp_path: Path) -> None:
    process = start([*REPRODUCE, OFF, "pause=0.02"], tmp_path)
    wait_until(lambda: len(records(tmp_path)) >= 2)
    signal_group(process, signal.SIGKILL)
    kept = records(tmp_path)
    stamps = {key: (tmp_path / PAPER / "trials" / key).stat().st_mtime_ns for key in kept}
    again = run([*REPRODUCE, OFF, "pause=0.02"], tmp_path)
    assert again.returncode == 0 and f"{11 - len(kept)} trained now" in again.stdout, again.stderr
    assert stamps == {key: (tmp_path / PAPER / "trials" / key).stat().st_mtime_ns for key in kept}
    assert verdicts(tmp_path)[0]["verdict"] == "reproduced"


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    process = start([*TRAIN, OFF, "-m", "pause=0.2", "steps=200,201"], tmp_path)
    wait_until(lambda: len(list((tmp_path / PAPER).glob("scratch/*/state.npz"))) == min(2, os.cpu_count() or 1))
    process.kill()
    locks = [path for path in (tmp_path / PAPER / "locks").iterdir()]
    assert locks
    wait_until(lambda: all(is_free(path) for path in locks), seconds=20)
    process.communicate(timeout=20)  # ends when the last worker has closed its pipes


def test_two_at_once_share_the_work(tmp_path: Path) -> None:
    both = [start([*REPRODUCE, OFF, "pause=0.01"], tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    found = records(tmp_path)
    assert len(found) == 11 and all(row["resumed_at"] == 0 for rows in found.values() for row in rows)
    assert not list((tmp_path / PAPER / "scratch").iterdir()) and not list((tmp_path / PAPER / "locks").iterdir())
    assert verdicts(tmp_path)[0]["verdict"] == "reproduced"


@pytest.mark.parametrize("command", [[*TRAIN, *SLOW], [*REPRODUCE, *SLOW]], ids=["trial", "reproduce"])
def test_ctrl_c_is_one_line_and_leaves_a_clean_state(command: list[str], tmp_path: Path) -> None:
    process = start(command, tmp_path)
    wait_until(lambda: list((tmp_path / PAPER).glob("scratch/*/state.npz")))
    _, err = signal_group(process, signal.SIGINT)
    assert process.returncode == 130
    assert err == "interrupted; what was recorded is kept: run the same line again to go on\n"
    store = TrialStore(tmp_path / PAPER)
    assert all(store.load(key) is not None for key in records(tmp_path))
    assert not list((tmp_path / PAPER).glob("scratch/*.record"))


def test_a_killed_worker_is_one_line(tmp_path: Path) -> None:
    killed = run([*TRAIN, OFF, "fail=kill", "steps=3,4", "-m"], tmp_path)
    assert killed.returncode == 1
    assert killed.stderr.startswith("error: a worker died (SIGKILL(-9)") and killed.stderr.count("\n") == 1
    assert not list((tmp_path / PAPER).glob("trials/*"))


def test_a_diverged_trial_is_a_record(tmp_path: Path) -> None:
    assert run([*TRAIN, OFF, "fail=nan"], tmp_path).returncode == 0
    record = TrialStore(tmp_path / PAPER).load(trial_folder(tmp_path, "trials").name)
    assert record is not None and record.rows[0]["diverged"] and math.isnan(record.rows[0]["final_loss"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with a few MiB, where the machine lets us make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_one_line_and_the_next_run_completes(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    process = start([*TRAIN, *SLOW], small_disk)
    wait_until(lambda: list((small_disk / PAPER).glob("scratch/*/state.npz")))
    with open(ballast, "wb", buffering=0) as file:  # fills the disk while the trial runs
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "no space left" in err and err.count("\n") == 1, err
    assert not records(small_disk)
    early = run([*TRAIN, *SLOW], small_disk)
    assert early.returncode == 1 and "no space left" in early.stderr and early.stderr.count("\n") == 1
    ballast.unlink()
    again = run([*TRAIN, *SLOW], small_disk)
    assert again.returncode == 0, again.stderr
    assert TrialStore(small_disk / PAPER).load(trial_folder(small_disk, "trials").name) is not None


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    command = [*TRAIN, OFF, "weights=[" + ",".join(["1"] * 400) + "]"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    torn = subprocess.run(command, cwd=tmp_path, env=environment(), preexec_fn=limit, capture_output=True, text=True)
    assert torn.returncode == 1 and "no space left" in torn.stderr and torn.stderr.count("\n") == 1, torn.stderr
    assert not list((tmp_path / PAPER).glob("trials/*")) and not list((tmp_path / PAPER).glob("scratch/*.record"))
    assert run(command, tmp_path).returncode == 0 and len(records(tmp_path)) == 1


@pytest.mark.slow
def test_under_torchrun_one_process_writes(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    first = run([*torchrun, "-m", *TRAIN[2:], OFF], tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("repeat: ") == 1 and len(records(tmp_path)) == 1
    found = json.loads((trial_folder(tmp_path, "trials") / "provenance.json").read_text())
    assert found["processes"] == 2
    second = run([*torchrun, "-m", *TRAIN[2:], OFF], tmp_path)
    assert second.returncode == 0 and second.stdout.count("already recorded") == 1
    assert not list((tmp_path / PAPER / "locks").iterdir())
