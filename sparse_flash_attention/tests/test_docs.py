"""What the README says works: its Python blocks run, its commands run (at smoke scale)."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.tests import docs

README = docs.ROOT / "sparse_flash_attention" / "README.md"
COMMANDS = docs.commands([README, docs.ROOT / "README.md"], "sparse_flash_attention")


def test_python_blocks_run() -> None:
    docs.run_python(README)


def test_there_is_a_trial_and_a_sweep_to_type() -> None:
    assert any(" -m" in command.removeprefix("python -m") for command in COMMANDS)
    assert any("experiment=" not in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str, tmp_path: Path) -> None:
    docs.run_command(command, tmp_path)


def test_local_links_lead_somewhere() -> None:
    docs.check_links([README])


def test_every_make_target_named_in_the_readme_exists() -> None:
    docs.check_make_targets([README])
