"""READMEs hold what the reports say, and a difference is found."""

import json

import pytest

from common import claims, report, summary
from common.papers import PAPERS
from common.tests.report_fakes import FakeRecords, claim, four_claims, frame

EMPTY = f"# Title\n\nBefore.\n\n{summary.BEGIN}\n{summary.END}\n\nAfter.\n"


@pytest.fixture
def root(tmp_path):
    """A repository with two papers, one of them judged."""
    (tmp_path / "README.md").write_text(EMPTY)
    for paper in ("rotational_optimizers", "ghost_noise"):
        (tmp_path / paper).mkdir()
        (tmp_path / paper / "__init__.py").touch()
        (tmp_path / paper / "README.md").write_text(EMPTY)
    records = FakeRecords({"table1": frame()})
    verdicts = claims.judge_all(four_claims(), records)
    report.write("rotational_optimizers", verdicts, records, tmp_path / "results" / "rotational_optimizers")
    return tmp_path


def run(root, *arguments):
    return summary.main(["--root", str(root), *arguments])


def test_check_finds_a_stale_readme_and_readme_mends_it(root, capsys):
    assert run(root, "--check") == 1
    assert "README.md, rotational_optimizers/README.md" in capsys.readouterr().err
    assert run(root, "--readme") == 0 and run(root, "--check") == 0
    text = (root / "rotational_optimizers/README.md").read_text()
    assert text.startswith("# Title\n\nBefore.\n") and text.endswith("\nAfter.\n")
    for c in four_claims():
        assert f"| {c.id} | {c.short} | {c.source} | {c.paper_value} |" in text
    assert (root / "ghost_noise/README.md").read_text() == EMPTY


def test_writing_twice_changes_nothing(root):
    run(root, "--readme")
    before = (root / "README.md").read_bytes()
    assert run(root, "--readme") == 0 and (root / "README.md").read_bytes() == before


@pytest.mark.parametrize("edited", ["README.md", "rotational_optimizers/README.md"])
def test_an_edited_number_is_found(root, edited):
    run(root, "--readme")
    text = (root / edited).read_text()
    (root / edited).write_text(text.replace("321", "322").replace("5.3 min", "5.2 min"))
    assert run(root, "--check") == 1


def test_a_changed_report_is_found(root):
    run(root, "--readme")
    path = root / "results/rotational_optimizers/report.json"
    content = json.loads(path.read_text())
    content["claims"][0]["effect"] += 1
    path.write_text(json.dumps(content))
    assert run(root, "--check") == 1


def test_the_readme_lists_ten_papers_with_their_state(root):
    table = summary.papers_table(root, summary.load(root / "results"))
    lines = table.splitlines()[2:]
    assert len(lines) == len(PAPERS) == 10
    states = {paper: line.split(" | ")[1] for paper, line in zip(PAPERS, lines, strict=True)}
    assert states.pop("rotational_optimizers") == "judged" and states.pop("ghost_noise") == "in progress"
    assert set(states.values()) == {"planned"}
    assert "| judged | 1 | 1 | 1 | 1 | 5.3 min |" in table and "(rotational_optimizers/)" in table


def test_the_page_and_the_terminal_show_every_claim_of_every_paper(root, capsys):
    records = FakeRecords({"table1": frame()})
    report.write("ghost_noise", [claims.judge(claim(), records)], records, root / "results/ghost_noise")
    assert run(root) == 0
    page, printed = (root / "results/index.html").read_text(), capsys.readouterr().out
    for c in four_claims():
        assert f'href="rotational_optimizers/report.html#{c.id}"' in page and c.id in printed
    assert 'href="ghost_noise/report.html#C1"' in page
    assert "2 of 10 papers: ✓ 2 reproduced · ✗ 1 contradicted · ? 1 inconclusive" in printed
    assert "✓ 2 reproduced" in page


@pytest.mark.parametrize("text", ["no markers", EMPTY + EMPTY, f"{summary.END} {summary.BEGIN}"])
def test_a_readme_without_its_markers_is_named(root, text, capsys):
    (root / "rotational_optimizers/README.md").write_text(text)
    assert run(root, "--readme") == 1
    assert capsys.readouterr().err.startswith("rotational_optimizers/README.md: must hold <!-- results:begin -->")


def test_a_missing_readme_is_named(root, capsys):
    (root / "rotational_optimizers/README.md").unlink()
    assert run(root, "--check") == 1 and "rotational_optimizers/README.md: is missing" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", '{"paper": "x"}'])
def test_a_torn_report_is_named_in_one_line(root, text, capsys):
    (root / "results/rotational_optimizers/report.json").write_text(text)
    assert run(root) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "report.json: is not a report" in error


def test_no_report_at_all_still_gives_a_page(tmp_path, capsys):
    assert run(tmp_path) == 0 and "0 of 10 papers" in capsys.readouterr().out
    assert (tmp_path / "results/index.html").read_text().count("planned") == 10


def test_the_readmes_of_this_repository_say_what_its_reports_say(capsys):
    if not (summary.ROOT / "README.md").exists():
        pytest.skip("no README yet")
    assert summary.main(["--check"]) == 0, capsys.readouterr().err
