"""The command line of a trial: what it prints, and one clear line for everything a user can get wrong."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common.cli import ordered
from common.compose import Composer, conf_dir
from common.config import CommonConfig, did_you_mean, register, schema_keys, to_config, type_words
from common.errors import UsageError, explain
from common.tests.runs import OFF, PAPER, TRAIN, run

from fixture_paper.train import main as cli  # isort: skip


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


MISTAKES = {
    "seed=x": "seed=x: must be an integer",
    "n_seeds=1.5": "n_seeds=1.5: must be an integer",
    "optimizer.momentum=a": "optimizer.momentum=a: must be a number or null",
    "weights=3": "weights=3: must be a list like [a,b] of numbers",
    "tracking.progress=maybe": "tracking.progress=maybe: must be true or false",
    "nosuch=1": "nosuch=1: unknown key (--help lists them)",
    "sed=1": "sed=1: unknown key; did you mean 'seed'? (--help lists them)",
    "optimizer.lrr=1": "optimizer.lrr=1: unknown key; did you mean 'optimizer.lr'? (--help lists them)",
    "data=nosuch": "data=nosuch: unknown key (--help lists them)",
    "+nosuch=1": "nosuch: unknown key",
    "+optimizer.nosuch=1": "optimizer.nosuch: unknown key",
    "scale=nosuch": "scale=nosuch: no such option; scale is one of gpu, laptop, paper, smoke",
    "optimizer=heavy_bal": (
        "optimizer=heavy_bal: no such option; optimizer is one of gd, heavy_ball; did you mean 'heavy_ball'?"
    ),
    "experiment=nosuch": "experiment=nosuch: no such option; experiment is one of compare, tune",
    "tracking=nosuch": "tracking=nosuch: no such option; tracking is one of auto, disabled, offline, online",
    "optimizer.lr=-1": "optimizer.lr=-1.0: must be > 0",
    "steps=0": "steps=0: must be >= 1",
    "seed=-1": "seed=-1: must be in [0, 2**32)",
    "n_seeds=0": "n_seeds=0: must be >= 1",
    "threads=0": "threads=0: must be >= 1",
    "device=tpu": "device=tpu: must be auto, cpu, cuda or cuda:<index>",
    "precision=fp8": "precision=fp8: must be one of fp32, bf16, fp16",
    "optimizer.lr=???": "optimizer.lr: has no value; give one with optimizer.lr=<value>",
    "optimizer.lr=${nosuch}": "optimizer.lr: Interpolation key 'nosuch' not found; must be a number",
    "seed=1,2": "seed=1,2: several values make a sweep: add -m (or quote the value to mean a text)",
    "start_from=nosuch.txt": "nosuch.txt not found.",
    "fail=oserror": "/nowhere/data.csv: no such file",
    "fail=memory": "not enough memory (cannot allocate 1 TB); what was recorded is kept",
    "fail=bug": "KeyError: 'a bug' (HYDRA_FULL_ERROR=1 shows where)",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line_on_stderr(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([OFF, override] if not override.startswith("tracking=") else [override]) == 1
    out, err = capsys.readouterr()
    assert err == f"error: {MISTAKES[override]}\n" and out == ""


@pytest.mark.parametrize("word", ["foo", "--foo", "steps=[", "steps={a"])
def test_a_line_that_cannot_be_read_is_usage(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([OFF, word]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {word}: not ") and err.count("\n") == 1


def test_an_uninstalled_launcher_names_its_extra(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    try:
        import hydra_plugins.hydra_ray_launcher  # noqa: F401
    except ImportError:
        assert cli.main([OFF, "hydra/launcher=ray", "-m"]) == 1
        assert capsys.readouterr().err == "error: hydra/launcher=ray: not installed; pip install '.[ray]'\n"


@pytest.mark.parametrize("launcher", ["basic", "laptop"])
def test_a_sweep_trains_the_others_and_explains_the_first_failure(
    launcher: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{conf_dir('fixture_paper').parents[1]}")
    assert cli.main(["-m", OFF, f"hydra/launcher={launcher}", "fail='',memory", "steps=3,4"]) == 1
    out, err = capfd.readouterr()
    assert out == "sweep: 4 trials, 0 recorded already, training 4\n"
    assert err == (
        "error: 2 of 4 trials failed, the others are recorded; the first (tracking=disabled fail=memory steps=3): "
        "not enough memory (cannot allocate 1 TB); what was recorded is kept\n"
    )
    assert len(list((PAPER / "trials").iterdir())) == 2


def test_a_bad_value_in_a_sweep_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([OFF, "-m", "steps=3,0"]) == 1
    assert capsys.readouterr().err == "error: steps=0: must be >= 1\n"
    assert not (PAPER / "trials").exists()


def test_an_experiment_without_a_grid_at_this_scale_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([OFF, "experiment=compare", "scale=paper"]) == 1
    assert capsys.readouterr().err == "error: experiment=compare: has no grid at scale=paper; it has laptop\n"


def test_a_selection_before_its_experiment_says_what_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([OFF, "experiment=compare"]) == 1
    assert (
        "selects from tune, which has no record at scale=laptop: run that experiment first" in capsys.readouterr().err
    )


def test_a_trial_prints_its_summary_and_the_line_that_repeats_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([OFF, "optimizer=heavy_ball", "optimizer.lr=0.2", "weights=[1,3]", "n_seeds=2"]) == 0
    out = capsys.readouterr().out
    assert "seed 0, 1" in out and "final_loss" in out and "diverged" in out
    repeat = next(line for line in out.splitlines() if line.startswith("repeat: "))
    words = shlex.split(repeat.removeprefix("repeat: "))
    assert words[:3] == ["python", "-m", "fixture_paper.train"]
    assert cli.main(words[3:]) == 0
    assert capsys.readouterr().out.startswith("already recorded (same config, same code), nothing to train: results/")
    assert len(list((PAPER / "trials").iterdir())) == 1


def test_a_trial_of_an_experiment_is_repeated_alone(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [OFF, "experiment=tune", "arm=gd", "optimizer.lr=0.3", "n_seeds=2"]
    assert cli.main([*overrides, "hydra.mode=RUN"]) == 0
    repeat = capsys.readouterr().out.splitlines()[-1]
    assert repeat.endswith("experiment=tune arm=gd optimizer.lr=0.3 n_seeds=2 hydra.mode=RUN")
    assert cli.main([*overrides[:2], "-m"]) == 0
    assert capsys.readouterr().out == "tune: 9 trials, 1 recorded already, training 8\n"


def test_nothing_is_written_outside_results() -> None:
    assert cli.main([OFF]) == 0
    assert cli.main([OFF, "-m", "steps=2,3", "hydra/launcher=basic"]) == 0
    assert [path.name for path in Path().iterdir()] == ["results"]
    assert sorted(path.name for path in PAPER.iterdir()) == ["hydra", "locks", "scratch", "trials"]
    assert not list((PAPER / "locks").iterdir()) and not list((PAPER / "scratch").iterdir())


def test_help_lists_groups_and_keys_with_what_each_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for words in (
        "heavy_ball",
        "gradient descent with momentum",
        "Both arms at their best",
        "* laptop",
        "no W&B at all",
    ):
        assert words in out
    for key, info in schema_keys(cli.schema).items():
        assert dataclasses.is_dataclass(info.hint) or f"  {key} " in out
    assert "Momentum of the heavy ball. (a number or null)" in out
    assert max(map(len, out.splitlines())) <= 122


def test_tracebacks_are_shown_on_request_only(tmp_path: Path) -> None:
    quiet, loud = (run([*TRAIN, OFF, "fail=bug"], tmp_path, HYDRA_FULL_ERROR=full) for full in ("0", "1"))
    assert "Traceback" not in quiet.stderr and "misbehave" not in quiet.stderr and quiet.returncode == 1
    assert "Traceback" in loud.stderr and "in misbehave" in loud.stderr and loud.returncode == 1
    sweep = run([*TRAIN, OFF, "fail=bug", "-m"], tmp_path, HYDRA_FULL_ERROR="1")
    assert "in misbehave" in sweep.stderr and sweep.stderr.count("Traceback") == 1


def test_flags_may_stand_anywhere() -> None:
    assert ordered(["a=1", "-m", "~b", "--cfg", "job"]) == ["-m", "--cfg", "job", "a=1", "~b"]
    with pytest.raises(UsageError, match="--multi: not a flag|-x: not a flag"):
        ordered(["-x"])


def test_a_package_header_that_hydra_would_ignore_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "late_header" / "conf"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("# about\n# @package _global_\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"conf/config.yaml:2: '# @package' must be the file's first line"):
        conf_dir("late_header")


@dataclass(frozen=True)
class Inner:
    size: int = 1
    ratio: float | None = None


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    names: list[str] = field(default_factory=list)


def test_frozen_schemas_take_overrides_and_stay_frozen() -> None:
    from hydra.core.config_store import ConfigStore

    register("outer_schema", Outer)
    node = ConfigStore.instance().load("outer_schema.yaml").node
    OmegaConf.update(node, "inner.size", 3)
    made = to_config(node, Outer)
    assert made == Outer(Inner(size=3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.inner.size = 4  # type: ignore[misc]


def test_a_config_that_is_not_checked_is_refused() -> None:
    with pytest.raises(ValueError, match="not checked by Outer"):
        to_config(OmegaConf.create({"inner": {"size": 1}}), Outer)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "an integer"),
        (float | None, "a number or null"),
        (bool, "true or false"),
        (dict[str, int], "a mapping"),
        (list[float], "a list like [a,b] of numbers"),
        (Inner, "a group of keys: size, ratio"),
        (int | str, "or a text"),
    ],
)
def test_types_in_words(hint: object, words: str) -> None:
    assert words in type_words(hint)


def test_nearest_names() -> None:
    assert (
        did_you_mean("optimizer.weightdecay", ["optimizer.weight_decay", "seed"])
        == "; did you mean 'optimizer.weight_decay'?"
    )
    assert did_you_mean("lr", ["optimizer.lr", "seed"]) == "; did you mean 'optimizer.lr'?"
    assert did_you_mean("zzz", ["seed"]) == ""


def test_an_error_without_words_is_named() -> None:
    assert explain(AssertionError()) == "AssertionError:  (HYDRA_FULL_ERROR=1 shows where)"


def test_the_common_keys_are_frozen() -> None:
    names = "experiment arm scale seed n_seeds threads device precision results_dir tracking"
    assert [f.name for f in dataclasses.fields(CommonConfig)] == names.split()


def test_every_shared_option_composes() -> None:
    composer = Composer("fixture_paper", cli.schema)
    for group in ("tracking", "scale"):
        for path in sorted((Path(__file__).parents[1] / "conf" / group).glob("*.yaml")):
            config = composer.config([f"{group}={path.stem}"])
            assert path.stem in (config.tracking.mode, config.scale)
