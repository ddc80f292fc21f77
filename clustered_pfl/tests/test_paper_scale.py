"""`scale=paper` states the paper's set-up: it composes, networks have the known sizes, runs the known lengths, and its
data come through on folders of the hub sets' schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from clustered_pfl.claims import CLAIMS
from clustered_pfl.config import TrialConfig
from clustered_pfl.models import count_parameters
from clustered_pfl.tasks import images
from clustered_pfl.tests.worlds import Planned
from clustered_pfl.train import main
from common.claims import judge
from common.compose import Composer
from common.data import hub
from common.sweeps import Job, Planner
from common.tests.planners import seeds_of
from common.trials import Trial

Config = dict[str, Any]
SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}
ROWS = {"mnist": 60_000, "cifar10": 50_000, "cifar100": 50_000}  # of the training splits, from the sets' own cards
FIVE = [10, 11, 12, 13, 14]


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(main, None, "paper")


@pytest.fixture(scope="module")
def plans(planner: Planner) -> dict[str, list[Job]]:
    return {e: planner.plan(e) for e in planner.composer.experiments()}


def arm(plans: dict[str, list[Job]], experiment: str, name: str) -> list[Config]:
    found = [job.config for job in plans[experiment] if job.config["arm"] == name]
    assert found, (experiment, name)
    return found


def values(configs: list[Config], key: str) -> set[Any]:
    """The values that a dotted key has in them."""
    found = set()
    for config in configs:
        value: Any = config
        for part in key.split("."):
            value = value[part]
        found.add(value)
    return found


def test_every_experiment_has_a_paper_grid(planner: Planner, plans: dict[str, list[Job]]) -> None:
    for experiment, jobs in plans.items():
        assert "paper" in planner.sweeper(experiment)["grids"], experiment
        assert jobs and all(job.config["scale"] == "paper" and job.config["arm"] for job in jobs)
        assert len({(job.config["arm"], job.key) for job in jobs}) == len(jobs), experiment


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_what_a_claim_reads_is_recorded_at_paper_scale(claim: Any, plans: dict[str, list[Job]]) -> None:
    """Whatever the numbers are, no arm, seed or setting that a test, a control or a figure reads is missing."""
    records = Planned(plans)
    verdict = judge(claim, records, "paper")
    assert not verdict.reason.startswith("could not be tested"), verdict.reason
    assert "not testable" not in verdict.control_verdict
    assert all(part.outcome.n >= 5 for part in verdict.parts), "fewer than five seeds"
    if claim.figure is not None:
        plt.close(claim.figure(records))


@pytest.mark.parametrize(
    ("data", "model", "parameters"),
    [("mnist", "mlp", 159_010), ("cifar10", "vgg16", 15_245_130), ("cifar100", "vgg8", 1_264_388)],
)
def test_networks_have_their_known_number_of_parameters(
    plans: dict[str, list[Job]], data: str, model: str, parameters: int
) -> None:
    configs = [j.config for jobs in plans.values() for j in jobs if j.config["data"]["name"] == data]
    assert values(configs, "model.name") == {model}
    assert values(configs, "model.expected_parameters") == {parameters}
    config = Composer("clustered_pfl", TrialConfig).config([f"data={data}", f"model={_option(configs[0])}"])
    with torch.device("meta"):
        network = images.network_of(config, torch.Size(SHAPES[data]))
    assert count_parameters(network) == parameters
    shape, classes = SHAPES[data], config.data.classes
    if model == "mlp":
        assert parameters == (np.prod(shape) + 1) * 200 + 201 * classes
    with torch.device("meta"):
        assert network(torch.empty(2, *shape)).shape == (2, classes)


def _option(config: Config) -> str:
    return "mlp_mnist" if config["model"]["name"] == "mlp" else config["model"]["name"]


def test_every_trial_on_images_is_of_the_papers_sets(plans: dict[str, list[Job]]) -> None:
    trials = [j.config for jobs in plans.values() for j in jobs if j.config["task"]["name"] == "images"]
    assert values(trials, "data.name") == set(SHAPES)
    for config in trials:
        rows, clients = ROWS[config["data"]["name"]], config["partition"]["n_clients"]
        rows -= round(config["data"]["validation"] * rows)
        samples = config["partition"]["samples"] or rows // clients
        assert samples * clients <= rows
        tuned = config["experiment"] == "table1_tune"
        assert (config["task"]["evaluate"] == "validation") == tuned == (config["data"]["validation"] > 0)
        assert config["task"]["own_test_share"]
    fixed = [c for c in trials if c["experiment"] not in ("official",) and c["arm"] != "official_noise"]
    assert values(fixed, "task.redraw") == {False} and values(fixed, "task.loss") == {"cross_entropy"}


@pytest.mark.parametrize("experiment", ["table1", "table1_tune"])
def test_mnist_in_table1(plans: dict[str, list[Job]], experiment: str) -> None:
    jobs = [job.config for job in plans[experiment]]
    assert values(jobs, "partition.n_clients") == {300} and values(jobs, "partition.n_clusters") == {4}
    assert values(jobs, "partition.samples") == {200 if experiment == "table1" else 180}
    assert values(jobs, "task.batch_size") == {32} and values(jobs, "task.steps") == {210}  # 30 epochs of 7 batches
    assert values(jobs, "partition.kind") == {"private_label", "rotation"}
    fc = arm(plans, experiment, "fc")
    assert values(fc, "method.groups") == {15} and values(fc, "method.rounds") == {3}
    assert values(fc, "method.radius.factor") == {0.99} and values(fc, "method.radius.strict") == {False}
    assert 0.2 in values(arm(plans, "table1_tune", "fc"), "method.radius.quantile")
    assert values(jobs, "method.momentum_style") == {"heavy_ball"}


def test_the_official_codes_own_lengths_and_loss(plans: dict[str, list[Job]]) -> None:
    fc = arm(plans, "official", "fc_neg_prob")
    assert values(fc, "task.batch_size") == {1000} and values(fc, "task.steps") == {50}  # full batches, 50 epochs
    assert values(fc, "method.radius.quantile") == {0.2} and values(fc, "method.groups") == {15}
    assert values(fc, "method.rounds") == {3} and values(fc, "method.radius.factor") == {0.99}
    for name in ("local", "ground_truth", "global", "ifca", "ditto", "knn_per"):
        own = arm(plans, "official", f"{name}_neg_prob")
        assert values(own, "task.steps") == {210} and values(own, "task.batch_size") == {32}
        assert values(own, "method.name") == {name}
    every = [job.config for job in plans["official"] if job.config["arm"].endswith("_neg_prob")]
    assert values(every, "task.redraw") == {True} and values(every, "task.loss") == {"neg_prob"}
    assert values(every, "method.lr") == {0.1} and values(every, "method.momentum") == {0.9}
    assert values(every, "partition.samples") == {200} and values(every, "partition.n_clients") == {300}
    assert values(arm(plans, "official", "ditto_neg_prob"), "method.pull") == {1.0}
    assert values(arm(plans, "official", "knn_per_neg_prob"), "method.neighbours") == {10}


def test_cifar10_in_figure_4(plans: dict[str, list[Job]]) -> None:
    jobs = [job.config for job in plans["fig4"]]
    assert values(jobs, "partition.n_clients") == {20} and values(jobs, "partition.n_clusters") == {4}
    assert values(jobs, "partition.kind") == {"private_label"} and values(jobs, "model.dropout") == {0.5}
    assert values(jobs, "task.batch_size") == {32} and values(jobs, "task.augment") == {True}
    assert values(jobs, "task.steps") == {60 * (50_000 // 20 // 32)}
    assert values(jobs, "method.lr") == {0.1} and values(jobs, "method.momentum") == {0.9}
    fc = arm(plans, "fig4", "radius") + arm(plans, "fig4", "local_steps")
    assert values(fc, "method.rounds") == {10} and values(fc, "method.groups") == {2}
    assert values(arm(plans, "fig4", "radius"), "method.local_steps") == {10}
    assert values(arm(plans, "fig4", "radius"), "method.radius.quantile") >= {0.025, 0.05, 0.1, 0.2, 0.25}
    assert values(arm(plans, "fig4", "local_steps"), "method.local_steps") == {5, 10, 20, 40}
    assert values(arm(plans, "fig4", "local_steps"), "method.radius.quantile") == {0.2}
    assert values(arm(plans, "fig4", "ditto"), "method.pull") == {0.1}


def test_cifar100_in_figure_5(plans: dict[str, list[Job]]) -> None:
    jobs = [job.config for job in plans["fig5"]]
    assert values(jobs, "partition.n_clients") == {100} and values(jobs, "partition.n_clusters") == {10}
    assert values(jobs, "partition.samples") == {500} and values(jobs, "partition.kind") == {"label_groups"}
    assert values(jobs, "task.batch_size") == {32} and values(jobs, "task.steps") == {100 * (500 // 32)}
    for name, groups in (("fc", 5), ("fc_two_groups", 2)):
        fc = arm(plans, "fig5", name)
        assert values(fc, "method.groups") == {groups} and values(fc, "method.local_steps") == {20}
        assert values(fc, "method.rounds") == {10} and values(fc, "method.radius.quantile") == {0.1}


def test_byzantine_clients_in_figure_6(plans: dict[str, list[Job]]) -> None:
    jobs = [job.config for job in plans["fig6"]]
    assert values(jobs, "partition.n_clients") == {200} and values(jobs, "task.batch_size") == {32}
    assert values(jobs, "attack.clients") == {0, 50} and values(jobs, "task.steps") == {100 * 7}
    fc = arm(plans, "fig6", "fc")
    assert values(fc, "method.rounds") == {10} and values(fc, "method.groups") == {10}
    assert values(fc, "method.radius.quantile") == {0.2}
    assert values(fc, "attack.name") == values(arm(plans, "fig6", "global"), "attack.name")


def test_synthetic_experiments_have_the_papers_own_size(plans: dict[str, list[Job]]) -> None:
    fc = arm(plans, "fig3", "fc")
    rates = {
        (c["task"]["clusters"], c["task"]["clients"], c["method"]["lr"], c["method"]["radius"]["quantile"]) for c in fc
    }
    assert rates == {(4, 4, 0.1, 0.25), (4, 16, 0.1, 0.25), (16, 4, 0.01, 1 / 16)}
    for name, slow in (("ground_truth", 0.01), ("local", 0.01), ("global", 0.001)):
        own = arm(plans, "fig3", name)
        assert {(c["task"]["clusters"], c["method"]["lr"]) for c in own} == {(4, 0.1), (16, slow)}
        assert values(own, "method.momentum_style") == {"ema"} and values(own, "method.momentum") == {0.9}
    official = arm(plans, "fig3", "ifca_official")
    assert {(c["task"]["clusters"], c["task"]["clients"], c["method"]["lr"]) for c in official} == {
        (4, 4, 0.01), (4, 16, 0.01), (16, 4, 0.001),
    }  # fmt: skip
    every = [job.config for job in plans["fig3"]]
    assert values(every, "task.steps") == {800} and values(every, "task.samples") == {9}
    assert values(every, "task.dim") == {10} and values(every, "task.scale") == {100.0}
    (fig2,) = [job.config for job in plans["fig2"]]
    assert (fig2["task"]["clusters"], fig2["task"]["clients"], fig2["task"]["steps"]) == (4, 75, 100)
    assert (fig2["method"]["lr"], fig2["task"]["assumptions"]) == (1e-4, True)
    blobs = [job.config for job in plans["fig7"]]
    assert values(blobs, "task.std") == {0.5, 1.0, 2.0, 4.0} and values(blobs, "method.radius.quantile") == {0.1}
    assert values(blobs, "method.rounds") == {50}
    (points,) = {(c["task"]["points"], c["task"]["centers"], c["task"]["dim"], c["task"]["starts"]) for c in blobs}
    assert points == (90, 10, 10, 10)


def test_arms_that_are_compared_share_five_seeds_or_more(planner: Planner, plans: dict[str, list[Job]]) -> None:
    for experiment, jobs in plans.items():
        if experiment in ("table1_tune", "fig3_tune"):
            continue
        for name in {job.config["arm"] for job in jobs}:
            seeds = set(seeds_of(planner, experiment, name))
            assert seeds >= set(FIVE) and min(seeds) == 10, (experiment, name)


# -- the data path, on folders with the hub sets' schema


def picture(index: int, shape: tuple[int, int, int]) -> Image.Image:
    side = shape[1:] if shape[0] == 1 else (*shape[1:], 3)
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, side, dtype=np.uint8))


def folder_of(name: str, path: Path, train: int, test: int) -> str:
    """A folder of parquet files as the hub set has them, labels in turn."""
    data = Composer("clustered_pfl", TrialConfig).config([f"data={name}"]).data
    features = {data.inputs: datasets.Image(), data.label: datasets.Value("int64")}
    for split, count in (("train", train), ("test", test)):
        columns = {
            data.inputs: [picture(i + 1000 * (split == "test"), SHAPES[name]) for i in range(count)],
            data.label: [i % data.classes for i in range(count)],
        }
        if name == "cifar100":
            features["coarse_label"] = datasets.Value("int64")
            columns["coarse_label"] = [i % 20 for i in range(count)]
        found = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        found.to_parquet(path / f"{split}-00000-of-00001.parquet")
    return str(path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("asked the network"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def train(tmp_path: Path, name: str, rows: tuple[int, int], *overrides: str) -> list[dict[str, Any]]:
    """A short trial at paper scale's settings, on the CPU and a fixture."""
    path = tmp_path / name
    if not path.exists():
        path.mkdir()
        folder_of(name, path, *rows)
    option = {"mnist": "mlp_mnist", "cifar10": "vgg16", "cifar100": "vgg8"}[name]
    head = ["scale=paper", f"data={name}", f"model={option}", f"task=images_{name}", f"data.path={path}", "device=cpu"]
    config = Composer("clustered_pfl", TrialConfig).config([*head, "threads=1", *overrides])
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    found = images.run(config, Trial(scratch, list(range(config.seed, config.seed + config.n_seeds))))
    for row in found:
        assert not row["diverged"] and 0 <= row[f"{config.task.evaluate}_accuracy"] <= 1
    return found


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("method", ["federated_clustering", "knn_per"])
def test_mnist_trains_from_a_folder_as_the_official_code_does(tmp_path: Path, method: str) -> None:
    settings = [
        f"method={method}", "partition=rotation", "partition.n_clients=8", "data.validation=0", "partition.samples=10",
        "task.steps=3", "task.batch_size=1000", "task.loss=neg_prob", "task.redraw=true", "n_seeds=2", "seed=10",
    ]  # fmt: skip
    first, second = train(tmp_path, "mnist", (80, 24), *settings)
    assert first["test_loss"] != second["test_loss"]
    assert np.array(first["label_counts"]).sum(1).tolist() == [10] * 8
    if method == "federated_clustering":
        assert {"clustering_precision", "clustering_recall", "clustering_tau"} <= first.keys()


@pytest.mark.usefixtures("offline")
def test_cifar10_trains_from_a_folder_with_augmentation_and_repeated_noise(tmp_path: Path) -> None:
    # vgg8 takes the same images and classes in a fraction of the time
    settings = [
        "model.name=vgg8", "model.expected_parameters=null", "method=federated_clustering", "method.groups=2",
        "method.local_steps=2", "partition=private_label", "partition.n_clients=4", "partition.n_clusters=2",
        "data.validation=0", "task.batch_size=4", "task.steps=2",
    ]  # fmt: skip
    (row,) = train(tmp_path, "cifar10", (40, 20), *settings)
    assert row["test_accuracy"] * 20 == pytest.approx(round(row["test_accuracy"] * 20))  # 20 rows, 5 a client
    losses = {row["test_loss"]}
    for change in ("task.augment=false", "task.repeat_noise=true", "task.redraw=true", "task.own_test_share=false"):
        losses.add(train(tmp_path, "cifar10", (40, 20), *settings, change)[0]["test_loss"])
    assert len(losses) == 4  # redrawing starts with the second epoch, the others change the first two steps


@pytest.mark.usefixtures("offline")
def test_cifar100_trains_from_a_folder_in_clusters_of_classes(tmp_path: Path) -> None:
    settings = [
        "method=ground_truth", "partition=cifar100", "partition.n_clients=10", "partition.samples=8", "task.steps=1",
        "data.validation=0", "task.batch_size=4",
    ]  # fmt: skip
    (row,) = train(tmp_path, "cifar100", (100, 100), *settings)
    counts = np.array(row["label_counts"])
    assert counts.shape == (10, 100)
    for k, own in enumerate(counts):
        assert own[10 * k : 10 * k + 10].sum() == own.sum() == 8
