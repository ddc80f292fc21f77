"""What the READMEs say works: their Python blocks run, their commands run (at smoke scale)."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.tests import docs

READMES = {"root": docs.ROOT / "README.md", "paper": docs.ROOT / "rotational_optimizers" / "README.md"}


@pytest.mark.parametrize("name", READMES)
def test_python_blocks_run(name: str) -> None:
    docs.run_python(READMES[name])


@pytest.mark.parametrize("command", docs.commands(READMES.values(), "rotational_optimizers"))
def test_commands_run(command: str, tmp_path: Path) -> None:
    docs.run_command(command, tmp_path)


def test_local_links_lead_somewhere() -> None:
    docs.check_links([*READMES.values(), docs.ROOT / "CONTRIBUTING.md"])


def test_every_make_target_named_in_a_readme_exists() -> None:
    docs.check_make_targets(READMES.values())
