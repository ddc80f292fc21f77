"""The rules of the house that no other tool checks."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAPERS = sorted(path.parent.name for path in ROOT.glob("*/train.py"))
MAX_LINES = 400


def _sources() -> list[Path]:
    return [path for name in ("common", *PAPERS) for path in (ROOT / name).rglob("*.py") if "tests" not in path.parts]


def test_import_rules_cover_every_paper() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert set(contracts["root_packages"]) == {"common", *PAPERS}
    assert set(contracts["contracts"][0]["forbidden_modules"]) == set(PAPERS)
    assert set(contracts["contracts"][1]["modules"]) == set(PAPERS)


def test_schemas_of_papers_have_names_of_their_own() -> None:
    """Hydra has one store a process: a paper that registers another's name takes its schema away."""
    found: dict[tuple[str, str], str] = {}
    for paper in PAPERS:
        text = (ROOT / paper / "config.py").read_text()
        for name, group in re.findall(r'^register\("(\w+)", \w+(?:, group="(\w+)")?\)', text, flags=re.M):
            assert found.setdefault((group, name), paper) == paper, f"{paper} and {found[group, name]}: {group}/{name}"
    assert len(found) > 2 * len(PAPERS)


def test_no_library_file_is_longer_than_a_reader_likes() -> None:
    long = {str(p.relative_to(ROOT)): n for p in _sources() if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long


@pytest.mark.parametrize("paper", PAPERS)
def test_a_paper_has_every_room(paper: str) -> None:
    rooms = ["README.md", "__init__.py", "config.py", "train.py", "claims.py", "bench.py", "conf/config.yaml", "tests"]
    assert [room for room in rooms if not (ROOT / paper / room).exists()] == []


def test_every_make_target_is_described() -> None:
    targets = re.findall(r"^([a-z][a-z%-]*):(?!=)(.*)$", (ROOT / "Makefile").read_text(), flags=re.M)
    assert [name for name, rest in targets if "##" not in rest] == []


def test_make_help_lists_targets_and_papers() -> None:
    page = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for word in ("setup", "test", "reproduce-<paper>", "bench-<paper>", "dashboard-<paper>", *PAPERS):
        assert word in page
