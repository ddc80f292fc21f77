"""`python -m common.reproduce`: from nothing to a report, and only what changed the second time."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from common import reproduce
from common.compose import Composer
from common.sweeps import Planner
from common.tests.runs import FIXTURE, OFF, PAPER, REPRODUCE, records, run, verdicts
from common.trials import TrialStore

from fixture_paper.train import main as cli  # isort: skip

REPORT = PAPER / "report.json"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished reproduction."""
    folder = tmp_path_factory.mktemp("done")
    first = run([*REPRODUCE, OFF], folder)
    assert first.returncode == 0, first.stderr
    assert "11 trials at scale=laptop, 11 trained now, 0 recorded before" in first.stdout
    return folder


@pytest.fixture
def copy(done: Path, tmp_path: Path) -> Path:
    """A copy of the finished reproduction that a test may damage."""
    shutil.copytree(done / "results", tmp_path / "results")
    return tmp_path


def trained(folder: Path, source: Path) -> str:
    """Train what is missing with the sources in `source`, in a fresh process; return "<trained> of <all>"."""
    code = (
        "import fixture_paper.train as t; from common import reproduce as r; "
        f"_, now, total = r.train(r.planner_for(t.main, ['{OFF}']), ['hydra/launcher=basic']); print(now, 'of', total)"
    )
    done = run([sys.executable, "-c", code], folder, source=source)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_every_claim_is_judged_and_reported(done: Path) -> None:
    (claim,) = verdicts(done)
    assert (claim["id"], claim["verdict"], claim["n"]) == ("C1", "reproduced", 5)
    assert [path.name for path in done.iterdir()] == ["results"]
    assert {"report.json", "report.md", "report.html"} <= {path.name for path in (done / PAPER).iterdir()}


def test_provenance_is_complete(done: Path) -> None:
    found = json.loads((done / REPORT).read_text())["provenance"]
    assert {"commit", "dirty", "fingerprint", "versions", "device", "threads", "started", "wall_s"} <= set(found)
    assert found["wall_s"] > 0 and found["trials"] == 11 and found["versions"]["python"]


def test_again_nothing_is_trained_and_the_report_is_the_same_to_the_byte(done: Path) -> None:
    before = (done / REPORT).read_bytes()
    stamps = {path: path.stat().st_mtime_ns for path in (done / PAPER / "trials").rglob("*")}
    second = run([*REPRODUCE, OFF], done)
    assert second.returncode == 0 and "0 trained now, 11 recorded before" in second.stdout and not second.stderr
    assert (done / REPORT).read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in (done / PAPER / "trials").rglob("*")} == stamps


def test_planning_a_finished_paper_imports_no_heavy_library(done: Path) -> None:
    code = (
        "import sys, fixture_paper.train as t; from common import reproduce as r; "
        f"r.train(r.planner_for(t.main, ['{OFF}'])); "
        "print(sorted({'torch', 'wandb', 'datasets', 'transformers', 'fixture_paper.quadratic'} & set(sys.modules)))"
    )
    found = run([sys.executable, "-c", code], done)
    assert found.stdout.strip() == "[]", found.stderr


def test_missing_and_torn_records_are_trained_again_and_the_verdict_is_the_same(copy: Path) -> None:
    before = records(copy)
    keys = sorted(before)
    for key in keys[::3]:
        shutil.rmtree(copy / PAPER / "trials" / key)
    (copy / PAPER / "trials" / keys[1] / "summary.json").write_text("[{\n ")
    assert trained(copy, FIXTURE) == f"{len(keys[::3]) + 1} of 11"
    assert records(copy) == before


def edited(tmp_path: Path, name: str, old: str, new: str) -> Path:
    """A copy of the fixture paper with one edit."""
    source = tmp_path / "source"
    shutil.copytree(FIXTURE, source, ignore=shutil.ignore_patterns("__pycache__"))
    path = source / "fixture_paper" / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return source


def test_editing_the_method_trains_all_that_used_it(copy: Path) -> None:
    source = edited(copy, "method.py", "return x - lr * velocity", "return x - 2 * lr * velocity")
    assert trained(copy, source) == "11 of 11"


def test_editing_a_claim_and_a_docstring_trains_nothing(copy: Path) -> None:
    source = edited(copy, "claims.py", "ends at a lower loss", "ends lower")
    method = source / "fixture_paper" / "method.py"
    method.write_text(method.read_text().replace("Heavy ball", "The heavy ball of 1964"))
    assert trained(copy, source) == "0 of 11"


def test_widening_a_grid_trains_only_what_is_new(copy: Path) -> None:
    source = edited(copy, "conf/experiment/tune.yaml", "0.9], seed: 0, n_seeds: 2}", "0.9, 1.7], seed: 0, n_seeds: 2}")
    assert trained(copy, source) == "1 of 12"


def test_smoke_runs_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["fixture_paper", OFF, "scale=smoke", "hydra/launcher=basic"]) == 0
    assert json.loads(REPORT.read_text())["scale"] == "smoke"


@pytest.mark.parametrize("words", [[], ["-x"], ["scale=smoke"]])
def test_misuse_prints_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce.main(words) == 2
    assert capsys.readouterr().err.startswith("usage: python -m common.reproduce <paper>")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nosuch"], "paper=nosuch: must be a package with conf/config.yaml"),
        (["fixture_paper", "scale=nosuch"], "scale=nosuch: no such option; scale is one of gpu, laptop, paper, smoke"),
        (["fixture_paper", "steps=x"], "steps=x: must be an integer"),
        (["fixture_paper", "optimizer.lr=-1"], "optimizer.lr=-1.0: must be > 0"),
        (["fixture_paper", "hydra/launcher=nosuch"], "hydra/launcher=nosuch: no such option; hydra/launcher is one of"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(words) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}") and err.count("\n") == 1


def test_failed_trials_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reproduce.main(["fixture_paper", OFF, "fail=bug", "hydra/launcher=basic"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: 9 of 9 trials failed, the first (") and err.count("\n") == 1
    assert not REPORT.exists()


def test_a_finished_plan_of_hundreds_of_trials_is_composed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [{"arm": "gd", "optimizer.lr": [i / 1000 for i in range(1, 351)]}]
    monkeypatch.setattr(Planner, "entries", lambda self, experiment: entries)
    composed = []
    plain = Composer.config
    monkeypatch.setattr(Composer, "config", lambda self, overrides: composed.append(1) or plain(self, overrides))
    store = TrialStore(tmp_path / "fixture_paper")
    first = Planner(cli, store, "laptop").plan("tune")
    assert len(composed) == len(first) == 350
    assert Planner(cli, store, "laptop").plan("tune") == first and len(composed) == 350


def test_records_are_tables_of_trials_and_seeds(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(done)
    found, trained, total = reproduce.train(reproduce.planner_for(cli, [OFF]))
    assert (trained, total) == (0, 11)
    frame = found["compare"]
    assert list(frame["arm"]) == ["gd"] * 5 + ["heavy_ball"] * 5 and list(frame["seed"]) == [*range(10, 15)] * 2
    assert {"optimizer.lr", "optimizer.momentum", "key", "diverged", "final_loss", "tracking.mode"} <= set(frame)
    history = found.history("compare")
    assert len(history) == 10 * 15 and {"step", "seed", "loss", "arm", "optimizer.lr"} <= set(history)
    last = history[history["step"] == 14].sort_values(["arm", "seed"])["loss"]
    assert list(last) == list(frame.sort_values(["arm", "seed"])["final_loss"])
    assert [s.arm for s in found.selections("compare")] == ["gd", "heavy_ball"]
    swapped = found.replace("compare", frame.assign(arm="x"))
    assert set(swapped["compare"]["arm"]) == {"x"} and set(found["compare"]["arm"]) == {"gd", "heavy_ball"}
    with pytest.raises(KeyError, match="nosuch: must be one of tune, compare"):
        found["nosuch"]
