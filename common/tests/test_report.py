"""The report says what the verdicts say, in the same bytes each time, and is one page that needs nothing else."""

import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from common import claims, figures, report, wording
from common.page import experiment_tables, trial_table
from common.tests.report_fakes import FakeRecords, claim, four_claims, frame, records

REQUIRED = {"id", "statement", "source", "paper_value", "verdict", "effect", "ci_low", "ci_high", "n", "p", "test"} | {
    "control",
    "experiments",
}
PROVENANCE = {"commit", "dirty", "fingerprint", "versions", "device", "threads", "started", "wall_s"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "rotational_optimizers"
    report.write("rotational_optimizers", claims.judge_all(four_claims(), records()), records(), path)
    return path


@pytest.fixture(scope="module")
def content(folder):
    return json.loads((folder / "report.json").read_text(), parse_constant=lambda x: pytest.fail(f"{x} is not JSON"))


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text()


def row(content, id):
    return next(r for r in content["claims"] if r["id"] == id)


def test_every_row_has_the_promised_keys(content):
    assert [r["id"] for r in content["claims"]] == ["C1", "C1a", "C1b", "C2", "C3", "C4"]
    for r in content["claims"]:
        assert set(r) >= REQUIRED
    assert set(content["provenance"]) >= PROVENANCE


def test_status_counts_claims_and_not_parts(content):
    assert content["status"] == dict.fromkeys(claims.SHAPES, 1)


def test_numbers_are_those_of_the_decisive_part(content):
    verdict = claims.judge(four_claims()[1], records())
    outcome = verdict.decisive.outcome
    for key in ("effect", "ci_low", "ci_high", "p"):
        assert row(content, "C2")[key] == pytest.approx(getattr(outcome, key), rel=10.0 ** -(report.DIGITS - 1))
    assert "C1b" in row(content, "C1")["test"] and row(content, "C1")["effect"] == row(content, "C1b")["effect"]


def test_what_was_not_tested_has_no_numbers(content):
    untested = row(content, "C4")
    assert untested["verdict"] == "not testable at this scale"
    assert all(untested[key] is None for key in ("effect", "ci_low", "ci_high", "n", "p"))
    assert untested["command"] == "python -m rotational_optimizers.train experiment=table2 scale=gpu -m"


def test_the_same_records_give_the_same_bytes(folder, tmp_path):
    report.write("rotational_optimizers", claims.judge_all(four_claims(), records()), records(), tmp_path)
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert {str(n) for n in names} == {"report.json", "report.md", "report.html", "figures/C1.svg", "figures/C1.png"}
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_a_users_matplotlib_settings_do_not_change_a_figure(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(figures.matplotlib.rcParams, "font.size", 30.0)
    report.write("rotational_optimizers", claims.judge_all(four_claims(), records()), records(), tmp_path)
    assert (folder / "figures/C1.svg").read_bytes() == (tmp_path / "figures/C1.svg").read_bytes()
    assert figures.matplotlib.rcParams["font.size"] == 30.0


class Tags(HTMLParser):
    VOID = ("meta", "br", "path", "use", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.addresses = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.addresses += [found[k] for k in ("href", "src", "xlink:href") if k in found]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_but_itself_and_the_records(page):
    tags = Tags(page)
    assert tags.open == []
    assert len(tags.ids) == len(set(tags.ids)), "figures must not share ids"
    targets = {a for a in tags.addresses if a.startswith("#")}
    assert {t[1:] for t in targets} <= set(tags.ids)
    assert all(a.startswith("trials/") for a in set(tags.addresses) - targets)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_every_claim_has_a_section_with_its_verdict_in_words_and_shape(page):
    for verdict in claims.judge_all(four_claims(), records()):
        section = page[page.index(f'<section id="{verdict.claim.id}">') :].split("</section>")[0]
        assert f"{claims.SHAPES[verdict.verdict]} {verdict.verdict}" in section
        assert verdict.claim.statement in section and verdict.claim.source in section
        assert "python -m rotational_optimizers.train" in section


def test_the_page_escapes_what_authors_write(page):
    assert "We tried &lt;b&gt;two&lt;/b&gt; rates." in page and "<b>two</b>" not in page


def test_the_figure_takes_its_ink_from_the_page(page, folder):
    inline = page[page.index("<figure") :].split("</figure>")[0]
    assert "currentColor" in inline and figures.INK not in inline
    assert "<style" not in inline, "a figure's style would apply to the whole page"
    alone = (folder / "figures/C1.svg").read_text()
    assert f"svg{{color:{figures.INK}}}" in alone and "prefers-color-scheme:dark" in alone


def test_the_page_links_every_trial_and_flags_an_optimum_on_the_border(page):
    for key in set(frame()["key"]):
        assert f'href="trials/{key}/"' in page
    assert "! on the border" in page and "0.003, 0.01, 0.03" in page


def test_markdown_holds_every_claim_and_part(folder, content):
    text = (folder / "report.md").read_text()
    for r in content["claims"]:
        assert r["id"] in text and wording.effect_text(r) in text
    assert "scale=gpu" in text


def test_the_terminal_table_names_verdicts_in_words_and_shapes(content):
    output = io.StringIO()
    report.print_table(content, Console(file=output, width=200))
    for r in content["claims"]:
        shape = claims.SHAPES[r["verdict"]]
        assert re.search(rf"{r['id']}\b.*{re.escape(shape)} {r['verdict'][:12]}", output.getvalue())
    assert "[91.24, 92.58]" in output.getvalue(), "brackets are not markup"


@pytest.mark.parametrize("width", [80, 119, 120, 160])
def test_the_terminal_table_fits_and_keeps_every_verdict(content, width):
    output = io.StringIO()
    report.print_table(content, Console(file=output, width=width, force_terminal=True, color_system=None))
    rows = [line for line in output.getvalue().splitlines() if line.startswith("│")]
    assert all(line.endswith("│") and len(line) <= width for line in rows)
    assert sum("✗ contradicted" in line for line in rows) == 1


def test_a_claim_that_could_not_be_tested_is_reported_with_its_reason(tmp_path):
    broken = claim(control=claims.swap_arms("table1", "method", "nobody"), figure=None)
    written = report.write("ghost_noise", [claims.judge(broken, records())], records(), tmp_path)
    assert "nobody" in written["claims"][0]["control"] and "not trusted" in (tmp_path / "report.html").read_text()


def test_one_seed_gives_a_report_without_interval(tmp_path):
    few = records(seeds=range(1))
    written = report.write("ghost_noise", [claims.judge(claim(), few)], few, tmp_path)
    assert written["claims"][0]["ci_low"] is None and written["claims"][0]["p"] == 1


def test_a_paper_of_one_empty_experiment_still_gets_a_page(tmp_path):
    empty = FakeRecords({"table2": pd.DataFrame()})
    verdict = claims.judge(four_claims()[3], empty)
    report.write("ghost_noise", [verdict], empty, tmp_path)
    assert "needs scale=gpu" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("effect", "low", "high", "unit", "text"),
    [
        (0.66123, 0.2, 1.12, "points", "0.66 points [0.20, 1.12]"),
        (1.00012, 0.99991, 1.00033, "×", "1.00012× [0.99991, 1.00033]"),
        (-1234.5, -1300.0, -1169.0, "ms", "−1234 ms [−1300, −1169]"),
        (0.0, 0.0, 0.0, "", "0 [0, 0]"),
        (-0.001, -1.0, 1.0, "", "0.0 [−1.0, 1.0]"),
        (2e-9, 1e-9, 3e-9, "", "2e−09 [1e−09, 3e−09]"),
        (0.5, None, None, "%", "0.500%"),
        (None, None, None, "", "–"),
    ],
)
def test_an_effect_has_the_decimals_its_interval_supports(effect, low, high, unit, text):
    assert wording.effect_text({"effect": effect, "ci_low": low, "ci_high": high, "unit": unit}) == text


@pytest.mark.parametrize(("p", "text"), [(0, "<0.001"), (0.0123, "0.012"), (0.5, "0.50"), (1, "1.00"), (None, "–")])
def test_p_is_short(p, text):
    assert wording.p_text(p) == text


def test_a_contradicted_row_shows_the_p_that_contradicts(content):
    assert wording.p_cell(row(content, "C2")) == "1.00 (opposite <0.001)"


@pytest.mark.parametrize(("seconds", "text"), [(42, "42 s"), (321, "5.3 min"), (7200, "2.0 h"), (None, "unknown time")])
def test_durations_are_readable(seconds, text):
    assert wording.wall_text(seconds) == text


def test_arms_are_listed_with_what_differs_between_them():
    arms = experiment_tables(records(lr=(0.01, 0.03, 0.1, 0.3, 1.0)), "table1")["arms"]
    assert [a["arm"] for a in arms] == ["base", "method", "twin"]
    assert arms[0]["settings"] == {"optimizer.lr": "0.01 … 1 (5 values)", "optimizer.name": "base"}
    assert arms[0]["n"] == 8 and len(arms[0]["keys"]) == 5


def test_a_trial_row_is_the_mean_over_its_seeds():
    table = trial_table(records(), "table1")
    assert table["columns"] == ["arm", "optimizer.name", "seeds", "diverged", "accuracy"]
    mean = frame().groupby("arm")["accuracy"].mean()["base"]
    assert table["rows"][0]["cells"] == ["base", "base", "5–12", "0", f"{mean:.4g}"]


def test_interval_of_a_curve_is_students():
    samples = np.random.default_rng(0).normal(size=(5, 3))
    mean, low, high = figures.interval(samples)
    half = 2.7764451051977987 * samples.std(0, ddof=1) / math.sqrt(5)  # t quantile for 4 degrees of freedom
    np.testing.assert_allclose([low, high], [mean - half, mean + half], rtol=1e-12)


def test_helpers_draw_all_kinds_of_figures(tmp_path):
    generator = np.random.default_rng(0)
    fig, axes = figures.new(2, 2, height=7)
    for i in range(7):
        figures.curve_with_band(axes[0, 0], range(20), generator.normal(i, 1, (5, 20)), f"arm {i}", i)
    figures.paired_dots(axes[0, 1], [1, 2], [2, 3], ("a", "b"), "accuracy (%)")
    figures.ratio_dots(axes[1, 0], ["x", "y"], [[0.99, 1.0], [1.01, 1.1]], 0.98, 1.02, "ratio")
    figures.heat_map(axes[1, 1], [[1, 2], [math.nan, 4]], ["r", "s"], ["u", "v"], "points")
    axes[0, 0].legend()
    assert len({(str(line.get_linestyle()), line.get_marker()) for line in axes[0, 0].lines}) == 7, "told apart in grey"
    assert axes[1, 0].patches[0].get_x() == 0.98 and axes[1, 0].patches[0].get_width() == pytest.approx(0.04)
    svg = figures.save(fig, tmp_path, "all")
    assert set(re.findall(r'href="([^"]{5})', svg)) == {"#all-", "data:"}, "links stay inside the figure"
    assert {"arm 6", "accuracy (%)", "ratio", "points", "×"} <= set(re.findall(r">([^<]+)</text>", svg))


@pytest.mark.parametrize(("samples", "cut"), [([[90, 91], [92, 93]], True), ([[1, 2], [30, 31]], False)])
def test_bars_say_when_their_axis_is_cut(samples, cut):
    _, ax = figures.new()
    figures.bars_with_ci(ax, ["a", "b"], samples, "accuracy (%)")
    assert (ax.get_ylim()[0] > 0) == cut == ("does not start at 0" in ax.get_title(loc="right"))


@pytest.mark.parametrize(
    "call",
    [
        lambda ax: figures.curve_with_band(ax, [1, 2], [[1, 2, 3]], ""),
        lambda ax: figures.paired_dots(ax, [1], [1, 2], ("a", "b"), ""),
        lambda ax: figures.heat_map(ax, [[1, 2]], ["r"], ["u"], ""),
    ],
    ids=["curve", "pairs", "heat map"],
)
def test_helpers_name_a_wrong_shape(call):
    with pytest.raises(ValueError, match="shape"):
        call(figures.new()[1])
