"""Verdicts -> report.json, report.md, one self-contained report.html, figures, and a table for the terminal.

Same verdicts and records, same bytes: everything dated or measured comes from the records' provenance, nothing from the
clock. `report.json` is the source of every table elsewhere (READMEs, the summary page).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common import figures
from common.claims import SHAPES, Claim, PartVerdict, Verdict
from common.page import experiment_tables, trial_table
from common.papers import PAPERS
from common.wording import effect_text, machine_text, number_text, p_cell, p_text, status_text, table_cell, wall_text

if TYPE_CHECKING:
    from common.records import Records

Row = dict[str, Any]
DIGITS = 7  # significant digits kept in report.json: more than any test resolves, fewer than platforms differ in
WORDING = (effect_text, machine_text, number_text, p_cell, p_text, status_text, table_cell, wall_text)
NARROW_WITHOUT = ("source", "paper", "control")  # columns that a terminal of less than 120 characters goes without
STYLES = {"reproduced": "green", "contradicted": "red", "inconclusive": "yellow", "not testable at this scale": "dim"}


def write(paper: str, verdicts: Sequence[Verdict], records: Records, results_dir: str | Path) -> Row:
    """Write report.{json,md,html} and figures/*.{svg,png} into `results_dir`; give the content of report.json.

    results_dir: the paper's own folder, results/<paper>, beside its trials/. Each file is replaced whole, so that a
    reader never sees half a report.
    """
    folder = Path(results_dir)
    drawn = {v.claim.id: _draw(v, records, folder / "figures") for v in verdicts if _has_figure(v)}
    report = content(paper, verdicts, records.provenance(), set(drawn))
    replace_file(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    replace_file(folder / "report.md", markdown(report))
    replace_file(folder / "report.html", _page(report, verdicts, records, drawn))
    return report


def content(paper: str, verdicts: Sequence[Verdict], provenance: Mapping[str, Any], drawn: set[str]) -> Row:
    """Give report.json as a dict: status counts, provenance and one row a claim, followed by one row a part.

    drawn: ids of the claims that have a figure. Numbers that do not exist (not testable, one seed) are None.
    """
    rows: list[Row] = []
    for verdict in verdicts:
        rows.append(_claim_row(paper, verdict, verdict.claim.id in drawn))
        if len(verdict.parts) > 1:
            rows += [_part_row(rows[-1], part) for part in verdict.parts]
    status = {word: sum(v.verdict == word for v in verdicts) for word in SHAPES}
    scale = verdicts[0].scale if verdicts else "laptop"
    return {
        "paper": paper,
        "title": PAPERS.get(paper, (paper, ""))[0],
        "scale": scale,
        "status": status,
        "provenance": _plain(dict(provenance)),
        "claims": rows,
    }


def rerun_command(paper: str, claim: Claim, scale: str) -> str:
    """Give the command that reruns a claim's experiments at the smallest scale that can test it."""
    if claim.command:
        return claim.command
    chosen = claim.scale_needed or scale
    suffix = "" if chosen == "laptop" else f" scale={chosen}"
    return " && ".join(f"python -m {paper}.train experiment={e}{suffix} -m" for e in claim.experiments)


def print_table(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the verdicts of a report (the dict that `write` gives) on the terminal."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)
    wide = console.width >= 120
    table = Table(title=f"{report['title']} · scale={report['scale']}", title_justify="left")
    for heading in ("id", "claim", "source", "paper", "ours [95 % CI]", "n", "p", "verdict", "control"):
        if wide or heading not in NARROW_WITHOUT:
            fixed = heading in ("id", "verdict")
            table.add_column(escape(heading), no_wrap=fixed, justify="right" if heading in ("n", "p") else "left")
    for row in report["claims"]:
        part = row["part_of"] is not None
        origin = ["", ""] if part else [row["source"], row["paper_value"]]
        cells = [
            row["id"],
            row["title"],
            *(origin if wide else []),
            effect_text(row),
            number_text(row["n"]),
            p_cell(row),
        ]
        word = row["verdict"].removesuffix(" at this scale")
        verdict = f"[{STYLES[row['verdict']]}]{SHAPES[row['verdict']]} {word}[/]"
        control = [escape(row["control_verdict"])] if wide else []
        table.add_row(*map(escape, cells), verdict, *control, style="dim" if part else None)
    console.print(table)
    console.print(status_text(report["status"]) + f" · {wall_text(report['provenance'].get('wall_s'))} of training")


def markdown(report: Mapping[str, Any]) -> str:
    """Give report.md: status, table of verdicts, one section a claim."""
    return render("report.md", report=report)


def results_table(report: Mapping[str, Any]) -> str:
    """Give the Markdown table of a paper's claims for its README, with the status line above it."""
    return render("table.md", report=report).strip()


def render(template: str, *, autoescape: bool = False, **context: Any) -> str:
    """Give a template of common/templates filled with `context`; autoescape=True for HTML."""
    loader = PackageLoader("common", "templates")
    environment = Environment(
        loader=loader, autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {word.__name__: word for word in WORDING} | {"shapes": SHAPES}
    return environment.get_template(template).render(**context)


def replace_file(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def _page(report: Row, verdicts: Sequence[Verdict], records: Records, drawn: Mapping[str, str]) -> str:
    names = list(dict.fromkeys(e for v in verdicts for e in v.claim.experiments))
    tables = {name: experiment_tables(records, name) for name in names}
    sections = []
    for verdict in verdicts:
        row = next(r for r in report["claims"] if r["id"] == verdict.claim.id)
        parts = [r for r in report["claims"] if r["part_of"] == verdict.claim.id]
        recorded = [tables[e] for e in verdict.claim.experiments if tables[e] is not None]
        sections.append({"row": row, "parts": parts, "figure": drawn.get(row["id"]), "experiments": recorded})
    trials = [trial_table(records, name) for name in names if tables[name] is not None]
    venue = PAPERS.get(report["paper"], ("", ""))[1]
    context = {"report": report, "venue": venue, "sections": sections, "trials_of": trials}
    return render("report.html", autoescape=True, **context)


def _has_figure(verdict: Verdict) -> bool:
    return verdict.claim.figure is not None and bool(verdict.parts)


def _draw(verdict: Verdict, records: Records, folder: Path) -> str:
    """Draw a claim's figure, save its files and give the SVG for the page."""
    assert verdict.claim.figure is not None
    with figures.style():
        return figures.save(verdict.claim.figure(records), folder, verdict.claim.id)


def _claim_row(paper: str, verdict: Verdict, has_figure: bool) -> Row:
    claim, part = verdict.claim, verdict.decisive
    numbers = _numbers(part)
    if len(verdict.parts) > 1 and part is not None:
        numbers["test"] = f"{len(verdict.parts)} parts, Holm; shown: {part.id}, which decides"
    return {
        "id": claim.id,
        "part_of": None,
        "title": claim.short,
        "statement": claim.statement,
        "source": claim.source,
        "paper_value": claim.paper_value,
        "verdict": verdict.verdict,
        **numbers,
        "control": verdict.control,
        "control_verdict": verdict.control_verdict,
        "reason": verdict.reason,
        "experiments": list(claim.experiments),
        "command": rerun_command(paper, claim, verdict.scale),
        "caption": claim.caption,
        "figure": f"figures/{claim.id}.svg" if has_figure else "",
        "note": claim.note,
    }


def _part_row(claim_row: Row, part: PartVerdict) -> Row:
    blank = {"caption": "", "figure": "", "note": "", "reason": ""}
    named = {"id": part.id, "part_of": claim_row["id"], "title": part.label, "statement": part.label}
    return {
        **claim_row,
        **blank,
        **named,
        "verdict": part.verdict,
        **_numbers(part),
        "control": part.control,
        "control_verdict": part.control,
    }


def _numbers(part: PartVerdict | None) -> Row:
    if part is None:
        empty = dict.fromkeys(("effect", "ci_low", "ci_high", "n", "p", "p_adjusted", "p_opposite"))
        return {**empty, "unit": "", "test": "not run", "detail": ""}
    o = part.outcome
    measured = {"effect": o.effect, "ci_low": o.ci_low, "ci_high": o.ci_high, "n": o.n, "p": o.p}
    adjusted = {"p_adjusted": part.p_adjusted, "p_opposite": o.p_opposite}
    return _plain({**measured, **adjusted, "unit": o.unit, "test": o.test, "detail": o.detail})


def _plain(value: Any) -> Any:
    """Give `value` as strict JSON: rounded floats, None for what is not finite, plain containers."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | str):
        return value
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float):
        return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None
    return number if isinstance(number, int) else str(number)
