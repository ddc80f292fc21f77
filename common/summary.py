"""`python -m common.summary`: one page for all papers, from results/*/report.json; and the tables of the READMEs.

python -m common.summary            print every paper's verdicts and write results/index.html
python -m common.summary --readme   write the tables between the markers of README.md and <paper>/README.md
python -m common.summary --check    exit 1 when one of those tables is not what report.json says
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from common.claims import SHAPES
from common.papers import PAPERS
from common.report import print_table, render, replace_file, results_table
from common.wording import status_text, table_cell, wall_text

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
ROOT = Path(__file__).resolve().parents[1]
Report = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit code: 1 when --check finds a stale README or a report cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m common.summary", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", default="results", help="folder of the reports (default: results)")
    parser.add_argument("--root", default=str(ROOT), help="folder of README.md and the papers")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--readme", action="store_true", help="write the generated tables of the READMEs")
    task.add_argument("--check", action="store_true", help="exit 1 when a README differs from report.json")
    options = parser.parse_args(arguments)
    root, results = Path(options.root), Path(options.root) / options.results
    try:
        reports = load(results)
        if options.readme or options.check:
            return _readmes(root, reports, write=options.readme)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    show(reports)
    page = render("index.html", papers=_papers(root, reports), total=count(reports), autoescape=True)
    replace_file(results / "index.html", page)
    print(f"page: {results / 'index.html'}")
    return 0


def load(results: Path) -> dict[str, Report]:
    """Read <results>/<paper>/report.json of the papers that have one, in the order of `PAPERS`.

    Raises ValueError naming the file when one is not a report.
    """
    reports = {}
    for paper in PAPERS:
        path = results / paper / "report.json"
        if path.exists():
            try:
                report = json.loads(path.read_text(encoding="utf-8"))
                reports[paper] = {
                    key: report[key] for key in ("paper", "title", "scale", "status", "provenance", "claims")
                }
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: is not a report ({error}); run `make reproduce-{paper}` again") from error
    return reports


def show(reports: dict[str, Report], console: Console | None = None) -> None:
    """Print every paper's table of verdicts and the counts over all papers."""
    console = console or Console()
    for report in reports.values():
        print_table({**report, "claims": [r for r in report["claims"] if r["part_of"] is None]}, console)
        console.print()
    console.print(f"{len(reports)} of {len(PAPERS)} papers: {status_text(count(reports))}")


def count(reports: dict[str, Report]) -> dict[str, int]:
    """Give verdict -> number of claims over all papers."""
    return {word: sum(r["status"].get(word, 0) for r in reports.values()) for word in SHAPES}


def papers_table(root: Path, reports: dict[str, Report]) -> str:
    """Give the Markdown table of the ten papers: status and verdict counts; a paper without folder reads `planned`."""
    lines = ["| paper | status | ✓ | ✗ | ? | – | claims in |", "|---|---|---|---|---|---|---|"]
    for entry in _papers(root, reports):
        title = table_cell(f"{entry['title']} ({entry['venue']})")
        name = f"[{title}]({entry['paper']}/)" if entry["exists"] else title
        counts = [str(entry["status"].get(word, 0)) if entry["status"] else "" for word in SHAPES]
        lines.append(f"| {name} | {entry['state']} | {' | '.join(counts)} | {entry['wall']} |")
    return "\n".join(lines)


def tables(root: Path, reports: dict[str, Report]) -> Iterator[tuple[Path, str]]:
    """Give (README, table it must hold between its markers) for the repository and every paper with a report."""
    yield root / "README.md", papers_table(root, reports)
    for paper, report in reports.items():
        if (root / paper).is_dir():
            yield root / paper / "README.md", results_table(report)


def insert(text: str, table: str, name: str) -> str:
    """Give `text` with `table` between the markers. Raises ValueError when the markers are not there once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{name}: must hold {BEGIN} and {END} once each, in this order")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def _readmes(root: Path, reports: dict[str, Report], write: bool) -> int:
    stale = []
    for path, table in tables(root, reports):
        if not path.exists():
            raise ValueError(f"{path.relative_to(root)}: is missing, must hold {BEGIN} and {END}")
        old = path.read_text(encoding="utf-8")
        new = insert(old, table, str(path.relative_to(root)))
        if new != old:
            stale.append(str(path.relative_to(root)))
            if write:
                replace_file(path, new)
    if write:
        print(f"written: {', '.join(stale) or 'nothing, all up to date'}")
        return 0
    if stale:
        sys.stderr.write(f"{', '.join(stale)}: not what report.json says; run `python -m common.summary --readme`\n")
    return int(bool(stale))


def _papers(root: Path, reports: dict[str, Report]) -> list[Report]:
    """Give one entry a paper: title, venue, whether it has a folder, state in a word, counts, its report or None."""
    entries = []
    for paper, (title, venue) in PAPERS.items():
        report = reports.get(paper)
        exists = (root / paper / "__init__.py").exists()
        state = "judged" if report and exists else "in progress" if exists else "planned"
        shown = report if state == "judged" else None
        entries.append(
            {
                "paper": paper,
                "title": title,
                "venue": venue,
                "exists": exists,
                "state": state,
                "status": shown["status"] if shown else {},
                "wall": wall_text(shown["provenance"].get("wall_s")) if shown else "",
                "report": shown,
            }
        )
    return entries


if __name__ == "__main__":
    sys.exit(main())
