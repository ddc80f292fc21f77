"""A paper from end to end at smoke scale, as its users start it."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class SmokeTests:
    """Every experiment trains at smoke scale and ends in a report with every claim and figure.

    Attributes:
        paper: package name.
    """

    paper: str

    @pytest.mark.slow
    @pytest.mark.timeout(1500)
    def test_every_experiment_ends_in_a_report(self, tmp_path: Path) -> None:
        claims = import_module(f"{self.paper}.claims").CLAIMS
        words = [sys.executable, "-m", "common.reproduce", self.paper, "scale=smoke", f"results_dir={tmp_path}"]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        folder = tmp_path / self.paper
        rows = json.loads((folder / "report.json").read_text())["claims"]
        assert {claim.id for claim in claims} <= {row["id"] for row in rows}
        waiting = {row["id"] for row in rows if row["verdict"] == "not testable at this scale"}
        assert waiting == {claim.id for claim in claims if claim.scale_needed == "paper"}
        drawn = {path.stem for path in (folder / "figures").glob("*.png")}
        assert {claim.id for claim in claims if claim.figure} <= drawn
        assert (folder / "report.html").stat().st_size > 100_000
        assert (folder / "report.md").stat().st_size > 1_000
        self.check(rows)

    def check(self, rows: list[dict[str, object]]) -> None:
        """What else must hold of the claims in the report."""
