"""What the READMEs say works: their Python blocks run, their commands run (at smoke scale)."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READMES = {"root": ROOT / "README.md", "paper": ROOT / "rotational_optimizers" / "README.md"}


def _blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.S)


def _commands() -> list[str]:
    lines = [line for path in READMES.values() for block in _blocks(path, "") for line in block.splitlines()]
    lines = [line.split("#")[0].strip() for line in lines]
    return sorted({line for line in lines if line.startswith("python -m rotational_optimizers")})


@pytest.mark.parametrize("name", READMES)
def test_python_blocks_run(name: str) -> None:
    blocks = _blocks(READMES[name], "python")
    assert blocks
    for block in blocks:
        assert len(block.splitlines()) <= 15
        exec(compile(block, str(READMES[name]), "exec"), {})


@pytest.mark.parametrize("command", _commands())
def test_commands_run(command: str, tmp_path: Path) -> None:
    words = [sys.executable, *shlex.split(command)[1:]]
    if "--help" not in words:
        words += ["scale=smoke", f"results_dir={tmp_path}", "tracking.mode=disabled"]
    if "-m" in words[3:]:
        words += ["hydra/launcher=basic"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


def test_local_links_lead_somewhere() -> None:
    for path in (*READMES.values(), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_make_target_named_in_a_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z%-]*):", makefile, flags=re.M))
    for path in READMES.values():
        for named in re.findall(r"`?make ([a-z-]+)(?:_optimizers|<paper>)?", path.read_text()):
            stem = named.split("-")[0]
            assert named in targets or f"{stem}-%" in targets or f"{named}%" in targets, named
