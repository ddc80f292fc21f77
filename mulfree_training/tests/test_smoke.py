"""Every experiment trains at smoke scale and ends in a report with every claim and figure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mulfree_training.claims import CLAIMS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_experiment_ends_in_a_report(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "common.reproduce", "mulfree_training", "scale=smoke"]
    done = subprocess.run([*words, f"results_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "mulfree_training"
    report = json.loads((folder / "report.json").read_text())
    assert {claim.id for claim in CLAIMS} <= {row["id"] for row in report["claims"]}
    waiting = {row["id"] for row in report["claims"] if row["verdict"] == "not testable at this scale"}
    assert waiting == {claim.id for claim in CLAIMS if claim.scale_needed == "paper"}
    assert all("could not be tested" not in row["reason"] for row in report["claims"])
    drawn = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {claim.id for claim in CLAIMS if claim.figure} <= drawn
    assert (folder / "report.html").stat().st_size > 100_000
    assert (folder / "report.md").stat().st_size > 1_000
