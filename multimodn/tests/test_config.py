"""Every experiment composes at every scale; bad values are refused with key, value and range."""

from __future__ import annotations

from typing import Any

import pytest

from common.compose import Composer, conf_dir
from common.sweeps import Job, Planner
from common.tests.planners import Diagonal
from multimodn.cohorts.config import EMBEDDED, FILES, read
from multimodn.config import CorruptionConfig, FusionConfig, NetworkConfig, TabularConfig, TrialConfig
from multimodn.missing import RULES, Rule
from multimodn.train import TASKS, main

CONF = conf_dir("multimodn")
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
TUNING = ("tune", "rules_tune")


@pytest.fixture(scope="module")
def laptop() -> Planner:
    return Planner(main, None, "laptop")


@pytest.fixture(scope="module")
def plans(laptop: Planner) -> dict[str, list[Job]]:
    return {e: laptop.plan(e) for e in EXPERIMENTS}


@pytest.fixture(scope="module")
def paper() -> dict[str, list[Job]]:
    planner = Planner(main, None, "paper")
    return {e: planner.plan(e) for e in EXPERIMENTS}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_at_laptop_scale(plans: dict[str, list[Job]], experiment: str) -> None:
    jobs = plans[experiment]
    assert jobs and len({(job.config["arm"], job.key) for job in jobs}) == len(jobs)
    for job in jobs:
        config = job.config
        assert (config["experiment"], config["scale"], config["device"]) == (experiment, "laptop", "cpu")
        assert config["arm"] and job.entry == TASKS[config["task"]["name"]]
        assert config["cohort"]["name"] in EMBEDDED and config["max_steps"] is None
        assert (config["task"]["evaluate"] == "validation") == (experiment in TUNING)


def test_settings_are_chosen_by_low_seeds_and_judged_by_fresh_ones(plans: dict[str, list[Job]]) -> None:
    for experiment, jobs in plans.items():
        for config in (job.config for job in jobs):
            seeds = range(config["seed"], config["seed"] + config["n_seeds"])
            assert len(seeds) >= 5
            assert max(seeds) < 10 if experiment in TUNING else min(seeds) >= 20, (experiment, config["arm"])
            assert seeds[0] % 5 == 0 and len(seeds) % 5 == 0  # whole partitions: every row is tested as often


def test_every_arm_searches_as_many_settings(laptop: Planner) -> None:
    for entry in laptop.entries("tune"):
        settings = 1
        for key, value in entry.items():
            settings *= len(value) if isinstance(value, list) and key != "cohort" else 1
        assert settings == 4, entry["arm"]
        assert entry["cohort"] == ["star", "weather", "nhefs", "pbc", "digits"]


def test_arms_of_the_mnar_experiments_differ_in_network_and_rule_alone(plans: dict[str, list[Job]]) -> None:
    for experiment in ("mnar", "positions", "rules"):
        for config in (job.config for job in plans[experiment]):
            if config["task"]["name"] == "tabular":
                continue
            task = config["task"]
            assert (task["batch_size"], task["epochs"], task["lr"], task["shuffle"]) == (16, 10, 1e-3, True)
            assert config["network"]["state_size"] == 50 and config["network"]["hidden"] == [32, 32]
            assert config["network"]["dropout"] == (0.0 if config["network"]["encoder"] == "raw" else 0.2)


def test_the_papers_scale_adds_its_own_data_to_the_embedded(
    plans: dict[str, list[Job]], paper: dict[str, list[Job]]
) -> None:
    for experiment, jobs in paper.items():
        own = {job.config["arm"] for job in jobs if job.config["cohort"]["name"] in FILES}
        embedded = {
            (j.config["arm"], j.config["cohort"]["name"]) for j in jobs if j.config["cohort"]["name"] in EMBEDDED
        }
        laptop = {(j.config["arm"], j.config["cohort"]["name"]) for j in plans[experiment]}
        assert embedded == laptop
        assert own or experiment == "planted"


def test_the_official_mimic_setting(paper: dict[str, list[Job]]) -> None:
    jobs = [
        j.config for j in paper["mnar"] if j.config["cohort"]["name"] == "haim" and j.config["task"]["name"] == "fusion"
    ]
    assert {c["arm"] for c in jobs} >= {"mm_batch", "mm_sample", "pf_sample", "pf_batch", "raw_sample"}
    for config in jobs:
        task = config["task"]
        assert (task["epochs"], task["batch_size"], task["lr"], task["shuffle"]) == (100, 16, 1e-3, False)
        assert (task["error_weight"], task["state_change_weight"], task["normalise"]) == (1.0, 0.0, "constant")
        assert config["cohort"]["leaky_scaler"] and config["corruption"]["modality"] == 1
        assert config["network"]["link"] == "sigmoid" or config["network"]["kind"] == "pfusion"
    assert {c["corruption"]["share"] for c in jobs if c["arm"] == "mm_batch"} == {0.2, 0.4, 0.6, 0.8}


def test_smoke_and_gpu_scales_compose() -> None:
    smoke = Diagonal(main, None, "smoke")
    gpu = Diagonal(main, None, "gpu")
    for experiment in EXPERIMENTS:
        for config in (job.config for job in smoke.plan(experiment)):
            assert (config["max_steps"], config["n_seeds"], config["tracking"]["mode"]) == (10, 3, "disabled")
        assert all(job.config["device"] == "cuda" for job in gpu.plan(experiment))


def test_every_option_of_every_group_composes() -> None:
    composer = Composer("multimodn", TrialConfig)
    for group in ("task", "network", "cohort", "corruption", "missing"):
        names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        assert names
        for name in names:
            config = composer.config([f"{group}={name}"])
            if group == "cohort":
                assert config.cohort.name == name
            if group == "missing" and name in RULES:
                assert config.missing == RULES[name]
    cohorts = {path.stem for path in (CONF / "cohort").glob("*.yaml")}
    assert cohorts == {*EMBEDDED, *FILES}


def test_embedded_cohorts_load_from_their_yaml() -> None:
    composer = Composer("multimodn", TrialConfig)
    for name in EMBEDDED:
        assert len(read(composer.config([f"cohort={name}"]).cohort)) > 200


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["network.dropuot=0.5"], "dropuot"),
        (["+network.speed=1"], "network.speed: unknown key"),
        (["task=logistic", "task.batch_size=3"], "batch_size"),
        (["task.lr=fast"], "fast"),
        (["task.lr=0"], "task.lr=0.0: must be > 0"),
        (["cohort.name=stars"], "cohort.name=stars: must be one of star"),
        (["corruption.share=1.5"], r"corruption.share=1.5: must be in \[0, 1\]"),
        (["missing.dropout=1"], r"missing.dropout=1.0: must be in \[0, 1\)"),
        (["network=rnn"], "rnn"),
        (["precision=bf16"], "precision=bf16: must be fp32"),
        (["max_steps=0"], "max_steps=0: must be >= 1, or null"),
    ],
)
def test_bad_overrides_are_refused_in_words(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        Composer("multimodn", TrialConfig).config(overrides)
    if "must be" in message or "unknown key" in message:
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (NetworkConfig, {"kind": "sum"}, "network.kind=sum: must be one of multimodn, pfusion"),
        (NetworkConfig, {"encoder": "raw"}, "network.encoder=raw: must be another than raw"),
        (NetworkConfig, {"state_size": 0}, "network.state_size=0"),
        (NetworkConfig, {"hidden": [0]}, r"network.hidden=\[0\]"),
        (NetworkConfig, {"joins": "none"}, "network.joins=none: must be one of input, output"),
        (NetworkConfig, {"indicator": True}, "network.indicator=True"),
        (NetworkConfig, {"only": -1}, "network.only=-1"),
        (NetworkConfig, {"link": "relu"}, "network.link=relu"),
        (CorruptionConfig, {"mechanism": "all"}, "corruption.mechanism=all: must be one of none, mcar, mar, mnar"),
        (CorruptionConfig, {"hide": 2}, "corruption.hide=2: must be 0 or 1"),
        (CorruptionConfig, {"modality": -1}, "corruption.modality=-1"),
        (FusionConfig, {"epochs": 0}, "task.epochs=0"),
        (FusionConfig, {"normalise": "sum"}, "task.normalise=sum"),
        (FusionConfig, {"evaluate": "train"}, "task.evaluate=train: must be one of validation, test"),
        (FusionConfig, {"state_change_weight": -1.0}, "task.state_change_weight=-1.0"),
        (TabularConfig, {"classifier": "svm"}, "task.classifier=svm: must be one of logistic, hist_gradient_boosting"),
        (TabularConfig, {"strength": 0.0}, "task.strength=0.0"),
        (Rule, {"train": "never"}, "missing.train=never: must be one of sample, batch"),
    ],
)
def test_ranges(kind: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**options)
