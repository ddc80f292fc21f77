"""What READMEs say, as something to run: their Python blocks, their commands, their links and make targets."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_LINES = 15  # of a Python block: the method in someone's own code


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a Markdown file in one language ("" for those without)."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(), flags=re.S | re.M)  # pairs of fences, in order
    return [block for kind, block in found if kind == language]


def commands(paths: Iterable[Path], paper: str) -> list[str]:
    """The lines of all blocks that start the paper's training; none of a file that is not there."""
    found = [line for path in paths if path.exists() for block in blocks(path, "") for line in block.splitlines()]
    found = [line.split("#")[0].strip() for line in found]
    return sorted({line for line in found if line.startswith(f"python -m {paper}.train")})


def run_python(path: Path) -> None:
    """Run every Python block of a file; there must be one."""
    found = blocks(path, "python")
    assert found, f"{path}: no Python block"
    for block in found:
        assert len(block.splitlines()) <= MOST_LINES
        exec(compile(block, str(path), "exec"), {})


def run_command(command: str, results: Path) -> None:
    """Run a README's command at smoke scale, without W&B."""
    words = [sys.executable, *shlex.split(command)[1:]]
    if "--help" not in words:
        words = [word for word in words if not word.startswith("scale=")]
        words += ["scale=smoke", f"results_dir={results}", "tracking.mode=disabled"]
    if "-m" in words[3:]:
        words += ["hydra/launcher=basic"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]


def check_links(paths: Iterable[Path]) -> None:
    """Local links lead somewhere."""
    for path in paths:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def check_make_targets(paths: Iterable[Path]) -> None:
    """Every make target that is named exists."""
    targets = set(re.findall(r"^([a-z][a-z%-]*):", (ROOT / "Makefile").read_text(), flags=re.M))
    for path in paths:
        for named in re.findall(r"(?:`|^)make ([a-z-]+)", path.read_text(), flags=re.M):
            assert named in targets or f"{named.split('-')[0]}-%" in targets, f"{path}: make {named}"


class ReadmeTests:
    """What a paper's README says works: `class TestReadme(docs.ReadmeTests): paper = "<paper>"` in its tests."""

    paper: str

    @property
    def readme(self) -> Path:
        """The paper's README."""
        return ROOT / self.paper / "README.md"

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test a command that this README or the root's shows for the paper."""
        if "command" in metafunc.fixturenames:
            metafunc.parametrize("command", commands([self.readme, ROOT / "README.md"], self.paper))

    def test_python_blocks_run(self) -> None:
        run_python(self.readme)

    def test_there_is_a_trial_and_a_sweep_to_type(self) -> None:
        found = commands([self.readme], self.paper)
        assert any(" -m" in command.removeprefix("python -m") for command in found)
        assert any("experiment=" not in command for command in found)

    def test_commands_run(self, command: str, tmp_path: Path) -> None:
        run_command(command, tmp_path)

    def test_local_links_lead_somewhere(self) -> None:
        check_links([self.readme])

    def test_every_make_target_named_in_the_readme_exists(self) -> None:
        check_make_targets([self.readme])
