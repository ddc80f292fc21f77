"""The dashboard mirrors the claims: one section each, and a way to look at offline runs."""

import sys
from types import ModuleType

import pytest

from common import dashboard
from common.dashboard import Panel, Section

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces")


@pytest.fixture
def paper(monkeypatch):
    module = ModuleType("some_paper.dashboard")
    module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec("some_paper.dashboard", None)
    module.sections = lambda: [
        Section("C1 Balanced", [Panel("rotation", x="step", group="config.optimizer.name", log_y=True)]),
        Section("C2 Tuned", [Panel("accuracy", x="config.optimizer.lr", kind="scatter"), Panel("loss", kind="bar")]),
    ]
    monkeypatch.setitem(sys.modules, "some_paper", ModuleType("some_paper"))
    monkeypatch.setitem(sys.modules, "some_paper.dashboard", module)
    return "some_paper"


def test_workspace_has_one_section_a_claim(paper):
    built = dashboard.workspace(paper, "team", dashboard.sections(paper))
    assert (built.entity, built.project) == ("team", paper)
    assert [section.name for section in built.sections] == ["C1 Balanced", "C2 Tuned"]
    assert [len(section.panels) for section in built.sections] == [1, 2]
    assert built.sections[0].is_open


def test_panels_name_their_axes_and_groups(paper):
    first, second = dashboard.workspace(paper, "team", dashboard.sections(paper)).sections
    (line,) = first.panels
    assert (line.x.name, line.y[0].name, line.groupby.name, line.log_y) == ("step", "rotation", "optimizer.name", True)
    scatter, bar = second.panels
    assert (scatter.x.name, scatter.y.name) == ("optimizer.lr", "accuracy")
    assert bar.metrics[0].name == "loss"
    assert line.title == "rotation over step"


def test_unknown_paper_and_kind_are_named():
    with pytest.raises(ValueError, match=r"paper=nowhere: there is no nowhere/dashboard\.py"):
        dashboard.sections("nowhere")
    with pytest.raises(ValueError, match="kind='pie': must be one of line, scatter, bar"):
        Panel("loss", kind="pie")


def test_offline_without_a_terminal_prints_the_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dashboard, "logged_in", lambda: False)
    monkeypatch.setattr(dashboard, "_has_leet", lambda: True)
    assert dashboard.main(["some_paper", "--results", str(tmp_path)]) == 1
    assert "make reproduce-some_paper" in capsys.readouterr().err
    (tmp_path / "some_paper" / "wandb" / "offline-run-1-x").mkdir(parents=True)
    assert dashboard.main(["some_paper", "--results", str(tmp_path)]) == 0
    assert f"wandb leet {tmp_path}/some_paper/wandb" in capsys.readouterr().out


def test_installed_wandb_has_leet():
    assert dashboard._has_leet()


def test_second_save_updates_the_first_workspace(paper, tmp_path, monkeypatch):
    import wandb
    import wandb_workspaces.workspaces as ws

    saved = []
    monkeypatch.setenv("WANDB_ENTITY", "team")
    monkeypatch.setattr(wandb, "Api", lambda **_: pytest.fail("asked the server"))
    monkeypatch.setattr(ws.Workspace, "save", lambda self: saved.append(self) or self)
    monkeypatch.setattr(ws.Workspace, "url", "https://wandb.test/team/some_paper?nw=1", raising=False)
    kept = ws.Workspace(entity="team", project=paper, name="by hand")
    monkeypatch.setattr(ws.Workspace, "from_url", lambda url: kept)
    assert dashboard.save(paper, tmp_path) == "https://wandb.test/team/some_paper?nw=1"
    assert dashboard.save(paper, tmp_path) == "https://wandb.test/team/some_paper?nw=1"
    assert saved[1] is kept
    assert [section.name for section in kept.sections] == ["C1 Balanced", "C2 Tuned"]
