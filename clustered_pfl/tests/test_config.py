"""Every experiment composes at every scale; bad values are refused with key, value and range."""

from __future__ import annotations

import math
import re
from typing import Any

import matplotlib.pyplot as plt
import pytest

from clustered_pfl import attacks, rivals
from clustered_pfl.claims import CLAIMS
from clustered_pfl.config import (
    ATTACKS,
    METHODS,
    RULES,
    AttackConfig,
    BlobsConfig,
    EstimationConfig,
    ImagesConfig,
    MethodConfig,
    ModelConfig,
    PartitionConfig,
    QuadraticsConfig,
    RadiusConfig,
    RegressionConfig,
    TrialConfig,
)
from clustered_pfl.tests.worlds import Planned
from clustered_pfl.train import TASKS, main
from common.claims import NOT_TESTABLE, judge
from common.compose import Composer, conf_dir
from common.sweeps import Job, Planner
from common.tests.planners import seeds_of

CONF = conf_dir("clustered_pfl")
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
TUNING = ("table1_tune", "fig3_tune")


@pytest.fixture(scope="module")
def laptop() -> Planner:
    return Planner(main, None, "laptop")


@pytest.fixture(scope="module")
def plans(laptop: Planner) -> dict[str, list[Job]]:
    return {e: laptop.plan(e) for e in EXPERIMENTS}


class First(Planner):
    """Plans the first grid of every experiment, the first value of every axis."""

    def entries(self, experiment: str) -> list[dict[str, Any]]:
        entry = super().entries(experiment)[0]
        return [{k: v[:1] if isinstance(v, list) else v for k, v in entry.items()}]


def check_jobs(jobs: list[Job], experiment: str, scale: str) -> None:
    assert jobs, experiment
    for job in jobs:
        config = job.config
        assert (config["experiment"], config["scale"]) == (experiment, scale)
        assert config["arm"], f"{experiment}: a job without the name of its arm"
        assert config["device"] == ("cuda" if scale in ("gpu", "paper") else "cpu")
        assert job.entry == TASKS[config["task"]["name"]]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_at_laptop_scale(plans: dict[str, list[Job]], experiment: str) -> None:
    check_jobs(plans[experiment], experiment, "laptop")
    assert len({job.key for job in plans[experiment]}) == len(plans[experiment])  # no trial twice
    assert all(job.config["max_steps"] is None for job in plans[experiment])


def test_every_experiment_composes_at_smoke_scale_and_is_short() -> None:
    planner = First(main, None, "smoke")
    for experiment in EXPERIMENTS:
        jobs = planner.plan(experiment)
        check_jobs(jobs, experiment, "smoke")
        for config in (job.config for job in jobs):
            assert (config["max_steps"], config["n_seeds"], config["tracking"]["mode"]) == (10, 3, "disabled")
            assert config["task"].get("steps", 10) == 10 and config["task"].get("draws", 10) == 10


def test_grids_for_one_gpu_are_those_of_the_paper_or_the_laptop_and_compose(laptop: Planner) -> None:
    """`test_paper_scale` plans the paper's grids in full."""
    grids = {e: laptop.sweeper(e)["grids"] for e in EXPERIMENTS}
    own = [e for e in EXPERIMENTS if "gpu" in grids[e]]
    assert own == ["fig6", "official", "table1", "table1_tune"]
    planner = First(main, None, "gpu")
    for experiment in own:
        assert grids[experiment]["gpu"] == grids[experiment]["paper"]
        check_jobs(planner.plan(experiment), experiment, "gpu")


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.scale_needed is None], ids=lambda c: c.id)
def test_what_a_claim_reads_is_recorded_at_laptop_scale(claim: Any, plans: dict[str, list[Job]]) -> None:
    """Whatever the numbers are, no arm, seed or setting that a test, a control or a figure reads is missing."""
    records = Planned(plans)
    verdict = judge(claim, records)
    assert verdict.verdict != NOT_TESTABLE and not verdict.reason.startswith("could not be tested"), verdict.reason
    assert "not testable" not in verdict.control_verdict
    assert all(part.outcome.n >= 5 for part in verdict.parts), "fewer than five seeds"
    if claim.figure is not None:
        plt.close(claim.figure(records))


def test_every_arm_searches_as_many_settings_a_task(laptop: Planner) -> None:
    grids = laptop.sweeper("table1_tune")["grids"]
    for scale, entries in grids.items():
        arms = [entry["arm"] for entry in entries]
        assert len(set(arms)) == len(arms) == 8
        for entry in entries:
            axes = {k: v for k, v in entry.items() if isinstance(v, list) and k != "partition"}
            assert entry["partition"] == ["private_label", "rotation"]
            assert math.prod(map(len, axes.values())) == 6, (scale, entry["arm"])
            assert len(axes["method.lr"]) == 3 and entry["task.evaluate"] == "validation"
        # the same budget for all of them
        shared = ("task.steps", "seed", "n_seeds", "partition.samples", "partition.n_clients", "data", "model", "task")
        assert len({tuple(entry.get(k) for k in shared) for entry in entries}) == 1


def test_ifca_is_tuned_in_every_panel_over_the_rates_of_the_digest(laptop: Planner) -> None:
    (entry,) = laptop.sweeper("fig3_tune")["grids"]["laptop"]
    assert entry["task.clusters,task.clients"] == [[4, 4], [4, 16], [16, 4]]
    assert (min(entry["method.lr"]), max(entry["method.lr"])) == (5e-4, 0.02)


def test_settings_are_chosen_by_low_seeds_on_validation_data_and_judged_by_fresh_ones(laptop: Planner) -> None:
    for experiment in EXPERIMENTS:
        for scale, entries in laptop.sweeper(experiment)["grids"].items():
            planner = Planner(main, None, scale)
            planner.sweeper = laptop.sweeper  # type: ignore[method-assign]
            for entry in entries:
                seeds = seeds_of(planner, experiment, entry["arm"])
                fine = max(seeds) < 10 if experiment in TUNING else min(seeds) >= 10
                assert fine, (experiment, scale, entry["arm"], seeds)
                if "select" in entry:
                    assert entry["select"]["experiment"] in TUNING
                    assert entry["select"]["metric"] in ("validation_accuracy", "log10_distance")
                    assert entry.get("task.evaluate", "test") == "test"


def test_every_option_of_every_group_composes() -> None:
    composer = Composer("clustered_pfl", TrialConfig)
    seen: dict[str, set[str]] = {}
    for group in ("method", "attack", "task", "partition", "model"):
        for path in sorted((CONF / group).glob("*.yaml")):
            config = composer.config([f"{group}={path.stem}"])
            value = getattr(config, group)
            seen.setdefault(group, set()).add(getattr(value, "name", getattr(value, "kind", "")))
    assert seen["method"] == set(METHODS) and seen["attack"] == set(ATTACKS)
    assert seen["task"] == set(TASKS)
    assert set(ATTACKS) == {"none", "label_flip", *attacks.ATTACKS} and set(RULES) == {"mean", *rivals.RULES}
    assert seen["partition"] == {"rotation", "private_label", "label_groups"}
    assert seen["model"] == {"mlp", "vgg8", "vgg16"}


def test_defaults_of_the_shared_settings_come_from_the_paper() -> None:
    method = Composer("clustered_pfl", TrialConfig).config(["method=federated_clustering_synthetic"]).method
    assert (method.momentum, method.momentum_style, method.rounds) == (0.9, "ema", 10)
    assert (method.radius.strict, method.radius.quantile, method.radius.factor) == (True, 0.25, 1.0)
    plain = MethodConfig()
    assert (plain.lr, plain.momentum, plain.momentum_style, plain.radius.quantile) == (0.1, 0.9, "heavy_ball", 0.2)
    task = RegressionConfig()
    assert (task.clusters, task.clients, task.samples, task.dim, task.scale) == (4, 4, 9, 10, 100.0)
    assert (task.start_std, task.steps) == (0.1, 800)
    assert plain.mixtures == [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0] and plain.neighbours == 10


def test_max_steps_cuts_steps_or_draws_and_lengthens_nothing() -> None:
    for task, key in ((ImagesConfig(), "steps"), (RegressionConfig(), "steps"), (QuadraticsConfig(), "steps")):
        assert getattr(TrialConfig(task=task, max_steps=7).task, key) == 7
    assert TrialConfig(task=EstimationConfig(), max_steps=7).task.draws == 7
    assert TrialConfig(task=RegressionConfig(steps=5), max_steps=7).task.steps == 5
    assert TrialConfig(task=BlobsConfig(), max_steps=7).task == BlobsConfig()
    assert TrialConfig(task=ImagesConfig(steps=150)).task.steps == 150


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.momentun=0.5"], "momentun"),
        (["+method.speed=1"], "method.speed: unknown key"),
        (["task=regression", "task.batch_size=3"], "batch_size"),
        (["method.lr=fast"], "fast"),
        (["method.radius.quantile=1"], r"method.radius.quantile=1.0: must be in \[0, 1\)"),
        (["attack=bit_flip", "attack.clients=0"], "attack.clients=0: must be 0 exactly when attack.name=none"),
        (["method=sgd"], "sgd"),
        (["precision=bf16"], "precision=bf16: must be fp32"),
    ],
)
def test_bad_overrides_are_refused_in_words(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        Composer("clustered_pfl", TrialConfig).config(overrides)
    if "must be" in message or "unknown key" in message:
        assert isinstance(caught.value, ValueError)


def at_least_one(kind: type, *keys: str, group: str = "task") -> list[tuple[Any, dict[str, Any], str]]:
    return [(kind, {key: 0}, f"{group}.{key}=0: must be >= 1") for key in keys]


OPEN = "in [0, 1)"
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (RadiusConfig, {"rule": "median"}, "method.radius.rule=median: must be one of quantile, fixed, two_means"),
    *[(RadiusConfig, {"quantile": q}, f"method.radius.quantile={q}: must be {OPEN}") for q in (1.0, -0.1)],
    (RadiusConfig, {"factor": 0.0}, "method.radius.factor=0.0: must be > 0"),
    (RadiusConfig, {"tau": -1.0}, "method.radius.tau=-1.0: must be >= 0"),
    (MethodConfig, {"name": "fedavg"}, "method.name=fedavg: must be one of federated_clustering, momentum_clustering"),
    (MethodConfig, {"lr": 0.0}, "method.lr=0.0: must be > 0"),
    *[(MethodConfig, {"momentum": m}, f"method.momentum={m}: must be {OPEN}") for m in (1.0, -0.1)],
    (MethodConfig, {"momentum_style": "adam"}, "method.momentum_style=adam: must be one of heavy_ball, ema"),
    *at_least_one(MethodConfig, "groups", "local_steps", "neighbours", group="method"),
    (MethodConfig, {"rounds": -1}, "method.rounds=-1: must be >= 0"),
    (MethodConfig, {"memory_mb": 0.0}, "method.memory_mb=0.0: must be > 0"),
    *[(MethodConfig, {"alpha": a}, f"method.alpha={a}: must be in (0, 1]") for a in (0.0, 1.1)],
    *[(MethodConfig, {k: 0}, f"method.{k}=0: must be >= 1, or null") for k in ("centers", "models")],
    (MethodConfig, {"variant": "both"}, "method.variant=both: must be gradient or model"),
    (
        MethodConfig,
        {"start": "zero"},
        "method.start=zero: must be one of random, oracle, official, equal, shared, crowded",
    ),
    (MethodConfig, {"pull": -0.1}, "method.pull=-0.1: must be >= 0"),
    *[(MethodConfig, {"mixtures": m}, f"method.mixtures={m}: must be a list") for m in ([], [0.5, 1.5], [-0.5])],
    (MethodConfig, {"aggregate": "max"}, "method.aggregate=max: must be one of mean, krum, multi_krum, median"),
    (AttackConfig, {"name": "sybil", "clients": 1}, "attack.name=sybil: must be one of none, large_gradient"),
    (AttackConfig, {"name": "bit_flip", "clients": -1}, "attack.clients=-1: must be >= 0"),
    (AttackConfig, {"name": "bit_flip"}, "attack.clients=0: must be 0 exactly when attack.name=none"),
    (AttackConfig, {"clients": 3}, "attack.clients=3: must be 0 exactly when attack.name=none"),
    (PartitionConfig, {"kind": "iid"}, "partition.kind=iid: must be one of rotation, private_label, label_groups"),
    (PartitionConfig, {"n_clients": 0}, "partition.n_clients=0: must be >= 1"),
    *[(PartitionConfig, {"n_clusters": k}, f"partition.n_clusters={k}: must be in [1, ") for k in (0, 41)],
    (PartitionConfig, {"samples": 0}, "partition.samples=0: must be >= 1, or null"),
    *[
        (PartitionConfig, {"cluster_sizes": s}, f"partition.cluster_sizes={s}: must be partition.n_clusters numbers")
        for s in ([20, 20], [0, 10, 10, 20], [10, 10, 10, 11])
    ],
    (ModelConfig, {"name": "resnet"}, "model.name=resnet: must be one of mlp, vgg16, vgg8"),
    (ModelConfig, {"hidden": [4, 0]}, "model.hidden=[4, 0]: must be a list of integers >= 1"),
    *[(ModelConfig, {"dropout": d}, f"model.dropout={d}: must be {OPEN}") for d in (1.0, -0.1)],
    (ModelConfig, {"expected_parameters": 0}, "model.expected_parameters=0: must be > 0, or null"),
    *at_least_one(ImagesConfig, "steps", "batch_size", "log_every"),
    (ImagesConfig, {"loss": "mse"}, "task.loss=mse: must be one of cross_entropy, neg_prob"),
    (ImagesConfig, {"evaluate": "train"}, "task.evaluate=train: must be one of validation, test"),
    *at_least_one(RegressionConfig, "clusters", "clients", "samples", "dim", "steps", "log_every"),
    (RegressionConfig, {"scale": 0.0}, "task.scale=0.0: must be > 0"),
    (RegressionConfig, {"start_std": -1.0}, "task.start_std=-1.0: must be >= 0"),
    (RegressionConfig, {"dtype": "float16"}, "task.dtype=float16: must be one of float32, float64"),
    *at_least_one(QuadraticsConfig, "clusters", "clients", "dim", "steps"),
    (QuadraticsConfig, {"dim": 3}, "task.dim=3: must be >= task.clusters=4"),
    (QuadraticsConfig, {"separation": 0.0}, "task.separation=0.0: must be > 0"),
    *[(QuadraticsConfig, {k: -1.0}, f"task.{k}=-1.0: must be >= 0") for k in ("noise", "start_std")],
    *[(QuadraticsConfig, {"burn_in": b}, f"task.burn_in={b}: must be {OPEN}") for b in (1.0, -0.1)],
    *at_least_one(BlobsConfig, "points", "centers", "dim", "starts"),
    (BlobsConfig, {"points": 9}, "task.points=9: must be >= task.centers=10"),
    (BlobsConfig, {"std": 0.0}, "task.std=0.0: must be > 0"),
    *at_least_one(EstimationConfig, "dim", "draws"),
    (EstimationConfig, {"rounds": -1}, "task.rounds=-1: must be >= 0"),
    (EstimationConfig, {"noise": 0.0}, "task.noise=0.0: must be > 0"),
    *[(EstimationConfig, {"members": m}, f"task.members={m}: must be a list of integers >= 1") for m in ([], [4, 0])],
    *[
        (EstimationConfig, {key: bad}, f"task.{key}={bad}: must be a list of numbers > 0")
        for key in ("separation", "distance")
        for bad in ([], [1.0, 0.0])
    ],
    *[
        (EstimationConfig, {"byzantine": b}, f"task.byzantine={b}: must be a list of numbers in [0, 0.5)")
        for b in ([], [0.5], [-0.1])
    ],
    (TrialConfig, {"max_steps": 0}, "max_steps=0: must be >= 1, or null"),
    (TrialConfig, {"precision": "bf16"}, "precision=bf16: must be fp32"),
]


@pytest.mark.parametrize(("kind", "values", "message"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_values_out_of_range_are_refused_by_name(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**values)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (RadiusConfig, {"quantile": 0.0, "tau": 0.0}),
        (MethodConfig, {"momentum": 0.0, "rounds": 0, "alpha": 1.0, "centers": 1, "models": 1, "pull": 0.0}),
        (MethodConfig, {"mixtures": [0.0, 1.0]}),
        (AttackConfig, {"name": "label_flip", "clients": 1}),
        (PartitionConfig, {"n_clients": 4, "n_clusters": 4, "samples": 1, "cluster_sizes": [1, 1, 1, 1]}),
        (ModelConfig, {"hidden": [], "dropout": 0.0, "expected_parameters": 1}),
        (QuadraticsConfig, {"dim": 4, "noise": 0.0, "start_std": 0.0, "burn_in": 0.0}),
        (BlobsConfig, {"points": 10}),
        (EstimationConfig, {"rounds": 0, "members": [1], "byzantine": [0.0, 0.49]}),
    ],
)
def test_values_at_the_ends_of_their_ranges_are_accepted(kind: type, values: dict[str, Any]) -> None:
    assert all(getattr(kind(**values), key) == value for key, value in values.items())
