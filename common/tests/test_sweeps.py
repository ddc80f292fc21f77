"""An experiment file names its trials exactly, and selections take the best recorded setting."""

from __future__ import annotations

import dataclasses
import gc
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pytest

from common.compose import Composer, hydra_for, merge, target
from common.config import to_config
from common.launch import untrained
from common.sweeps import Job, Planner, axes, on_border, plan, product, text
from common.tests import runs  # noqa: F401 (makes the fixture paper importable)

from fixture_paper.config import TrialConfig  # isort: skip
from fixture_paper.train import main as cli  # isort: skip


class Store:
    """Records made up by a function of the job's config."""

    root = Path("unused")

    def __init__(self, planner: Planner, loss: Any) -> None:
        self.jobs = {job.key: job for job in planner.plan("tune")}
        self.loss = loss

    def load(self, key: str) -> Any:
        rows = self.loss(self.jobs[key].config)
        return None if rows is None else SimpleNamespace(rows=rows)


def planner(scale: str = "laptop", overrides: tuple[str, ...] = (), loss: Any = None) -> Planner:
    made = Planner(cli, None, scale, list(overrides))
    if loss is not None:
        made.store = Store(made, loss)  # type: ignore[assignment]
    return made


def rows(*losses: float) -> list[dict[str, Any]]:
    return [{"seed": i, "diverged": not math.isfinite(x), "final_loss": x} for i, x in enumerate(losses)]


def by_lr(table: dict[float, list[float]]) -> Any:
    return lambda config: rows(*table[config["optimizer"]["lr"]])


def test_a_grid_is_the_product_of_its_axes_the_last_one_fastest() -> None:
    grid = {"arm": "x", "a": [1, 2], "b": [True, None]}
    assert product(grid) == [
        ["arm=x", "a=1", "b=true"],
        ["arm=x", "a=1", "b=null"],
        ["arm=x", "a=2", "b=true"],
        ["arm=x", "a=2", "b=null"],
    ]


def test_keys_joined_by_a_comma_move_together() -> None:
    assert product({"a,b": [[1, 2], [3, 4]], "c": 0}) == [["a=1", "b=2", "c=0"], ["a=3", "b=4", "c=0"]]
    with pytest.raises(ValueError, match=r"a,b=\[1,2\]: must be a list of lists of 2 values"):
        product({"a,b": [1, 2]})


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.1, "0.1"),
        (1e-05, "1e-05"),
        (None, "null"),
        (False, "false"),
        ("a(b)", "a(b)"),
        ([1, [2, 3]], "[1,[2,3]]"),
        ({"a": 1, "b": [0.5]}, "{a:1,b:[0.5]}"),
    ],
)
def test_yaml_values_become_override_values(value: Any, written: str) -> None:
    assert text(value) == written


def test_of_several_overrides_of_a_key_the_last_one_stays() -> None:
    assert merge(["a=1", "b=1"], ["c=1", "a=2"], ["+d=1", "b=1"]) == ["c=1", "a=2", "+d=1", "b=1"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("a.b=1", "a.b"),
        ("+a=1", "a"),
        ("++a.b=x=y", "a.b"),
        ("~a", "a"),
        ("hydra/launcher=basic", "hydra/launcher"),
        ("db@backup=x", "db"),
        ("a={b:1}", "a"),
    ],
)
def test_the_key_of_an_override(override: str, key: str) -> None:
    assert target(override) == key


@pytest.mark.parametrize("experiment", ["tune", "compare"])
@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_planned_configs_are_hydras_own(experiment: str, scale: str) -> None:
    made = planner(scale, ("weights=[1,2,3]", "optimizer=heavy_ball", "threads=2"))
    for job in made.plan(experiment)[::4]:
        composed = to_config(Composer("fixture_paper", TrialConfig).full(job.overrides), TrialConfig)
        assert dataclasses.asdict(composed) == job.config
        assert type(job.config["weights"][0]) is float


def test_files_read_once_give_the_configs_of_files_read_anew() -> None:
    composer = Composer("fixture_paper", TrialConfig)
    for overrides in (["experiment=tune"], ["optimizer=heavy_ball", "n_seeds=3"], ["scale=smoke"], ["experiment=tune"]):
        with hydra_for("fixture_paper"):
            plain = hydra.compose("config", overrides, return_hydra_config=True)
        made = composer.full(overrides)
        assert made == plain and made.hydra.overrides == plain.hydra.overrides
        made.hydra.overrides.task.append("n_seeds=9")  # what is done to a config must not reach the next
        made.n_seeds = 9
    assert gc.isenabled()


def test_the_plan_is_the_file(tmp_path: Path) -> None:
    jobs = plan("fixture_paper", "tune", results=tmp_path)
    found = [(j.config["arm"], j.config["optimizer"]["lr"], j.config["optimizer"]["momentum"]) for j in jobs]
    plain = [("gd", lr, None) for lr in (0.1, 0.3, 0.9)]
    assert found == plain + [("heavy_ball", lr, m) for lr in (0.1, 0.3, 0.9) for m in (0.2, 0.6)]
    assert all(job.config["n_seeds"] == 2 and job.config["experiment"] == "tune" for job in jobs)
    assert len({job.key for job in jobs}) == 9


def test_a_cached_plan_is_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = plan("fixture_paper", "tune", results=tmp_path)
    monkeypatch.setattr(Composer, "full", lambda *_: pytest.fail("composed again"))
    assert plan("fixture_paper", "tune", results=tmp_path) == first
    (tmp_path / "fixture_paper" / "hydra" / "plans.json").write_text('{"inputs": "stale", "values": {')
    monkeypatch.undo()
    assert plan("fixture_paper", "tune", results=tmp_path) == first


def test_smoke_shrinks_every_job_and_the_command_line_has_the_last_word() -> None:
    assert {job.config["steps"] for job in planner("smoke").plan("compare")} == {3}
    assert {job.config["steps"] for job in planner("smoke", ("steps=7",)).plan("compare")} == {7}
    assert {job.config["steps"] for job in planner().plan("compare")} == {15}


def test_a_scale_without_grids_falls_back_or_is_empty() -> None:
    assert len(planner("gpu").plan("tune")) == len(planner("smoke").plan("tune")) == 9
    assert len(planner("paper").plan("tune")) == 3
    assert planner("paper").plan("compare") == []


def test_a_scale_can_take_over_the_entries_of_another() -> None:
    made = planner("paper")
    own = {"arm": "x", "seed": 1}
    made.sweeper = lambda experiment: {"grids": {"laptop": [own], "paper": [[own, own], {"arm": "y"}]}}  # type: ignore
    assert made.entries("tune") == [own, own, {"arm": "y"}]


def test_selection_takes_the_best_mean_over_seeds() -> None:
    made = planner(loss=by_lr({0.1: [0.0, 9.0], 0.3: [3.0, 3.0], 0.9: [4.0, 4.0]}))
    gd, ball = made.plan("compare")
    assert gd.config["optimizer"]["lr"] == 0.3 and gd.config["seed"] == 10 and gd.config["n_seeds"] == 5
    assert gd.selected is not None and gd.selected.chosen == {"optimizer.lr": "0.3"}
    assert (gd.selected.value, gd.selected.n, gd.selected.on_border) == (3.0, 2, [])
    assert ball.config["optimizer"]["name"] == "heavy_ball" and ball.config["optimizer"]["lr"] == 0.3


def test_a_diverged_seed_makes_a_setting_the_worst() -> None:
    made = planner(loss=by_lr({0.1: [5.0, 5.0], 0.3: [0.0, math.nan], 0.9: [0.0, math.inf]}))
    selected = made.plan("compare")[0].selected
    assert selected is not None and selected.chosen == {"optimizer.lr": "0.1"} and selected.value == 5.0


def test_when_everything_diverged_the_value_says_so() -> None:
    selected = planner(loss=lambda config: rows(math.nan, math.nan)).plan("compare")[0].selected
    assert selected is not None and math.isnan(selected.value)


def test_an_optimum_on_the_border_is_reported() -> None:
    made = planner(loss=by_lr({0.1: [1.0], 0.3: [2.0], 0.9: [3.0]}))
    gd, ball = (job.selected for job in made.plan("compare"))
    assert gd is not None and gd.on_border == ["optimizer.lr"]
    assert gd.grid == {"optimizer.lr": ["0.1", "0.3", "0.9"]}
    assert ball is not None and ball.on_border == ["optimizer.lr"]  # momentum has two values only


@pytest.mark.parametrize(
    ("chosen", "values", "border"),
    [
        ("1", ["1", "2", "3"], True),
        ("2", ["1", "2", "3"], False),
        ("3e0", ["1", "2", "3e0"], True),
        ("1", ["1", "2"], False),
        ("a", ["a", "b", "c"], False),
        ("-1", ["0", "-1", "5"], True),
    ],
)
def test_border_of_a_grid(chosen: str, values: list[str], border: bool) -> None:
    assert on_border(chosen, values) is border


def test_axes_are_the_keys_that_vary() -> None:
    assert axes([{"a": "1", "b": "x"}, {"a": "2", "b": "x"}, {"a": "1", "b": "x"}]) == {"a": ["1", "2"]}


def test_a_selection_without_records_names_the_experiment_to_run() -> None:
    with pytest.raises(
        ValueError, match="compare: selects from tune, which has no record .* run that experiment first"
    ):
        planner(loss=lambda config: None).plan("compare")


def test_a_selection_of_an_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"select\.metric=final_loss: must be one of accuracy"):
        planner(loss=lambda config: [{"seed": 0, "diverged": False, "accuracy": 1.0}]).plan("compare")


def with_entries(monkeypatch: pytest.MonkeyPatch, entries: dict[str, list[dict[str, Any]]]) -> Planner:
    monkeypatch.setattr(Planner, "entries", lambda self, experiment: entries[experiment])
    return planner()


def test_waves_put_selections_after_what_they_select_from(monkeypatch: pytest.MonkeyPatch) -> None:
    from_a, from_b = ({"select": {"experiment": e, "arm": "x", "metric": "m"}} for e in "ab")
    made = with_entries(monkeypatch, {"a": [{}], "b": [from_a], "c": [{}], "d": [from_a, from_b]})
    assert made.waves("dcba") == [["c", "a"], ["b"], ["d"]]


def test_selecting_in_a_circle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_entries(monkeypatch, {e: [{"select": {"experiment": o}}] for e, o in (("a", "b"), ("b", "a"))})
    with pytest.raises(ValueError, match=r"selects in a circle \(a, b\)"):
        made.waves("ab")


def test_where_narrows_a_selection_and_separate_seed_trials_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    tune = [{"arm": "gd", "optimizer.lr": [0.1, 0.2, 0.4], "steps": [5, 6], "seed": [0, 1]}]
    select = {"experiment": "tune", "arm": "gd", "metric": "final_loss", "mode": "min", "where": {"steps": 6}}
    made = with_entries(monkeypatch, {"tune": tune, "compare": [{"arm": "new", "select": select, "seed": 7}]})

    def loss(config: dict[str, Any]) -> list[dict[str, Any]]:
        best = {(0.1, 0): 0.0, (0.1, 1): 9.0, (0.2, 0): 2.0, (0.2, 1): 2.0}  # 0.1 wins one seed, 0.2 the mean
        value = best.get((config["optimizer"]["lr"], config["seed"]), 5.0)
        return rows(value if config["steps"] == 6 else -1.0)

    made.store = Store(made, loss)  # type: ignore[assignment]
    (job,) = made.plan("compare")
    assert (job.config["arm"], job.config["optimizer"]["lr"], job.config["steps"]) == ("new", 0.2, 6)
    assert job.selected is not None and (job.selected.value, job.selected.n) == (2.0, 2)
    assert job.selected.grid == {"optimizer.lr": ["0.1", "0.2", "0.4"]}


def test_a_bad_select_says_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_entries(monkeypatch, {"compare": [{"arm": "x", "select": {"experiment": "tune", "metrics": "m"}}]})
    with pytest.raises(ValueError, match="must be of experiment, arm, metric, mode"):
        made.plan("compare")


def test_missing_trials_are_launched_once_a_key_and_the_costliest_first() -> None:
    jobs = [
        Job([str(i)], {"cost": cost}, key, "entry")
        for i, (key, cost) in enumerate(zip("abcab", (1, 3, 2, 1, 3), strict=False))
    ]
    store = SimpleNamespace(load=lambda key: object() if key == "c" else None)
    assert [job.key for job in untrained(jobs, store)] == ["b", "a"]  # type: ignore[arg-type]
