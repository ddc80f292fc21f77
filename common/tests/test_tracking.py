"""Tracking never asks, never hangs, never leaks a key and never stops a training."""

import os
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest

from common import network, tracking
from common.tracking import Progress, Tracker

KEY = "0123456789abcdef" * 3
RUN = textwrap.dedent(
    """
    import sys, time
    from common import tracking
    tracking.INIT_SECONDS = 3.0
    tracking.FINISH_SECONDS = 3.0
    with tracking.Tracker(sys.argv[1], results=sys.argv[2]) as tracker:
        tracker.start({"optimizer": {"lr": 0.1}}, "paper", "table2", "adamw", "laptop", "optimizer.lr=0.1")
        tracker.log({"loss": 1.0}, step=1)
        tracker.summary({"accuracy": 0.5})
    """
)


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """No login, no server, no memory of an earlier look at the network."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "RANK", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    network.answers.cache_clear()
    yield
    network.answers.cache_clear()


def run_apart(mode, results, **environment):
    """The run of a newcomer: no terminal to ask on, no login."""
    command = [sys.executable, "-c", RUN, mode, str(results)]
    start = time.monotonic()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done, time.monotonic() - start


def folders(results):
    return list((results / "paper" / "wandb").glob("offline-run-*"))


def test_disabled_tracking_imports_no_wandb(tmp_path):
    code = RUN + "\nassert 'wandb' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code, "disabled", str(tmp_path)], check=True, timeout=60)
    assert not list(tmp_path.iterdir())


def test_without_login_a_run_stays_offline_and_says_nothing(tmp_path):
    done, _ = run_apart("auto", tmp_path)
    assert len(folders(tmp_path)) == 1
    assert done.stdout + done.stderr == ""


def test_online_without_login_falls_back_with_one_line(tmp_path):
    done, _ = run_apart("online", tmp_path)
    assert len(folders(tmp_path)) == 1
    assert done.stderr.count("\n") == 1 and "not logged in" in done.stderr


def test_server_that_refuses_means_offline_and_no_key_on_disk(tmp_path):
    done, _ = run_apart("auto", tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert len(folders(tmp_path)) == 1
    assert done.stderr == ""
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_server_that_never_answers_costs_seconds_and_falls_back(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        done, seconds = run_apart("auto", tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=address)
    assert len(folders(tmp_path)) == 1
    assert done.stderr == ""
    assert seconds < 15
    assert KEY not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_run_costs_little(tmp_path):
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        with Tracker("offline", results=tmp_path) as tracker:
            tracker.start({"a": 1}, "paper", "table2", "adamw", "laptop", "lr=0.1")
            for step in range(60):
                tracker.log({"loss": 1.0, "accuracy": [0.1, 0.2]}, step)
        seconds.append(time.perf_counter() - start)
    # the first run of a process starts W&B's service; the others are what a trial pays
    assert min(seconds[1:]) < 2  # it takes hundredths; waiting for anything would take seconds
    assert len(folders(tmp_path)) == 4


class FakeRun:
    def __init__(self):
        self.axes, self.rows, self.summary, self.exit_code = [], [], {}, None

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def fake(monkeypatch):
    run = FakeRun()

    def init(**arguments):
        run.arguments = arguments
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **settings: settings))
    return run


def test_run_is_filed_by_paper_experiment_scale_and_what_varies(fake, tmp_path):
    with Tracker("offline", entity="team", tags=["night"], results=tmp_path) as tracker:
        tracker.start({"a": 1}, "paper", "table2", "adamw", "laptop", "lr=0.1", axes={"val/*": "epoch"})
    wanted = {"project": "paper", "group": "table2", "job_type": "laptop", "name": "adamw lr=0.1", "entity": "team"}
    assert wanted.items() <= fake.arguments.items()
    assert fake.arguments["tags"] == ["night", "adamw"]
    assert fake.arguments["mode"] == "offline"
    assert fake.arguments["dir"] == str(tmp_path / "paper")
    assert ("*", "step") in fake.axes and ("val/*", "epoch") in fake.axes
    assert fake.exit_code == 0


def test_values_of_several_seeds_are_shown_as_mean_and_range(fake, tmp_path):
    with Tracker("offline", results=tmp_path) as tracker:
        tracker.start({}, "paper")
        tracker.log({"loss": [1.0, 2.0, 6.0], "lr": 0.1}, step=7)
    assert fake.rows == [{"step": 7, "loss": 3.0, "loss/lowest": 1.0, "loss/highest": 6.0, "lr": 0.1}]


def test_failed_training_marks_its_run(fake, tmp_path):
    with pytest.raises(RuntimeError, match="lost"), Tracker("offline", results=tmp_path) as tracker:
        tracker.start({}, "paper")
        raise RuntimeError("lost")
    assert fake.exit_code == 1


def test_wandb_that_fails_does_not_stop_the_training(monkeypatch, tmp_path, capsys):
    def init(**_):
        raise OSError("no space left")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **settings: settings))
    with Tracker("offline", results=tmp_path) as tracker:
        tracker.start({}, "paper")
        tracker.log({"loss": 1.0}, step=0)
        tracker.summary({"loss": 1.0})
    assert "no space left" in capsys.readouterr().err


def test_one_failure_online_sends_the_rest_of_the_process_offline(fake, monkeypatch, tmp_path, capsys):
    opened, init = [], sys.modules["wandb"].init

    def refuse(**arguments):
        opened.append(arguments["mode"])
        if arguments["mode"] == "online":
            raise TimeoutError("no answer")
        return init(**arguments)

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    monkeypatch.setattr(tracking, "decide", lambda mode: "online")
    monkeypatch.setattr(tracking, "_online_failed", False)
    for _ in range(2):
        with Tracker("auto", results=tmp_path) as tracker:
            tracker.start({}, "paper")
    assert opened == ["online", "offline", "offline"]
    assert capsys.readouterr().err.count("\n") == 1


def test_only_rank_zero_tracks(fake, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    with Tracker("offline", results=tmp_path) as tracker:
        tracker.start({}, "paper")
    assert not hasattr(fake, "arguments")


@pytest.mark.parametrize(
    ("mode", "login", "server", "wish", "used"),
    [
        ("auto", True, True, "", "online"),
        ("auto", True, False, "", "offline"),
        ("auto", False, True, "", "offline"),
        ("auto", True, True, "offline", "offline"),
        ("auto", True, True, "disabled", "disabled"),
        ("online", True, True, "", "online"),
        ("online", True, False, "", "offline"),
        ("offline", True, True, "", "offline"),
        ("disabled", True, True, "", "disabled"),
    ],
)
def test_mode_is_decided_here(monkeypatch, mode, login, server, wish, used):
    monkeypatch.setattr(tracking, "logged_in", lambda: login)
    monkeypatch.setattr(tracking, "reachable", lambda: server)
    monkeypatch.setenv("WANDB_MODE", wish)
    assert tracking.decide(mode) == used


def test_login_is_found_in_netrc(tmp_path):
    assert not tracking.logged_in()
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert tracking.logged_in()


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="mode='sometimes': must be one of auto, online, offline, disabled"):
        Tracker("sometimes")


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    with Progress("trials", total=100) as progress:
        for done in range(1, 101):
            clock[0] += 1.0
            progress.update(done)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "trials: 30/100 about 70 s left"


def test_progress_can_be_switched_off(monkeypatch, capsys):
    monkeypatch.setattr(Progress, "LINE_SECONDS", 0.0)
    Progress("trials", total=2, enabled=False).update(1)
    assert capsys.readouterr().err == ""


def test_sync_names_what_is_missing(tmp_path, capsys):
    assert tracking.main(["sync", "all", "--results", str(tmp_path)]) == 0
    assert "nothing to upload" in capsys.readouterr().out
    run = tmp_path / "paper" / "wandb" / "offline-run-1-x"
    run.mkdir(parents=True)
    (run / "run-x.wandb").touch()
    assert tracking.main(["sync", "all", "--results", str(tmp_path)]) == 1
    assert "log in first" in capsys.readouterr().err


def test_sync_uploads_each_offline_run_once(tmp_path, monkeypatch):
    for name in ("offline-run-1-x", "offline-run-2-y"):
        (tmp_path / "paper" / "wandb" / name).mkdir(parents=True)
    (tmp_path / "paper" / "wandb" / "offline-run-1-x" / "run-x.wandb.synced").touch()
    called = []
    monkeypatch.setattr(tracking, "logged_in", lambda: True)
    monkeypatch.setattr(tracking, "reachable", lambda: True)
    monkeypatch.setattr(
        tracking.subprocess, "run", lambda command, check: called.append(command) or SimpleNamespace(returncode=0)
    )
    assert tracking.sync("paper", tmp_path) == 0
    assert [path.split("/")[-1] for path in called[0][4:]] == ["offline-run-2-y"]
