"""`scale=paper` states the paper's set-up: it composes, networks have the known sizes, schedules the known steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from common.models import ModelConfig, build, count_parameters
from common.tests.planners import Ends, seeds_of
from rotational_optimizers.schedule import lr_factor
from rotational_optimizers.train import main

Config = dict[str, Any]
# rows of the training splits, from the data sets' own cards
ROWS = {"cifar10": 50_000, "cifar100": 50_000, "imagenet": 1_281_167}


@pytest.fixture(scope="module")
def planner() -> Ends:
    return Ends(main, None, "paper")


@pytest.fixture(scope="module")
def plans(planner: Ends) -> dict[str, list[Config]]:
    return {e: [job.config for job in planner.plan(e)] for e in planner.composer.experiments()}


@pytest.fixture(scope="module")
def configs(plans: dict[str, list[Config]]) -> list[Config]:
    return [config for experiment in plans.values() for config in experiment]


@pytest.fixture(scope="module")
def seeds(planner: Ends) -> Callable[[str, str], list[int]]:
    return lambda experiment, arm: seeds_of(planner, experiment, arm)


def test_every_experiment_has_a_paper_grid(plans: dict[str, list[Config]]) -> None:
    assert all(plans.values())
    assert all(config["scale"] == "paper" and config["arm"] for jobs in plans.values() for config in jobs)


def test_every_network_has_its_known_number_of_parameters(configs: list[Config]) -> None:
    """`build` refuses a network whose count is not the file's; only our own variants may go without a count."""
    found = {repr(c["model"]): (c["model"], c["experiment"]) for c in configs if c["task"]["name"] == "network"}
    assert len(found) >= 20
    for values, experiment in found.values():
        with torch.device("meta"):
            model = build(ModelConfig(**values), [0])
        known = values["expected_parameters"]
        if known is None:
            assert values["name"] == "convnet1d" or values["width"] != 1, experiment
        else:
            assert count_parameters(model) == known


def _steps(config: Config) -> int:
    """Length of the run, as the sources count it."""
    task, data = config["task"], config["data"]
    if task["epochs"] is None:
        return task["steps"]
    rows = ROWS[data["name"]]
    rows -= round(data["validation"] * rows)
    return round(task["epochs"] * (rows // task["batch_size"]))


def _warm_up(config: Config) -> int:
    """Steps before the learning rate reaches its peak."""
    schedule, steps = config["schedule"], _steps(config)
    factors = (lr_factor(s, steps, "constant", schedule["warmup"]) for s in range(steps))
    return next((s for s, factor in enumerate(factors) if factor == 1), steps) + (schedule["warmup"] > 0)


@pytest.mark.parametrize(
    ("experiment", "arm", "steps", "warm_up"),
    [
        ("zero_shot", "adamw_starved", 22_021, 4_000),
        ("zero_shot", "rv_adamw_gpt2", 5_000, 250),
        ("zero_shot", "rv_adamw_wikitext", 15_000, 300),
        ("zero_shot", "rv_sgdm_imagenet", 90 * 5_004, 5_004),
        ("zero_shot", "rv_adamw_deit", 300 * 1_251, 5 * 1_251),
        ("compare", "adamw", 200 * 195, 5 * 195),
        ("compare", "sgdm", 200 * 24, 5 * 24),
        ("compare", "sgdm_128", 200 * 390, 5 * 390),
        ("warmup", "sgdm_long_warm", 90 * 156, 156),
    ],
)
def test_runs_and_warm_ups_have_the_papers_length(
    plans: dict[str, list[Config]], experiment: str, arm: str, steps: int, warm_up: int
) -> None:
    config = next(c for c in plans[experiment] if c["arm"] == arm)
    assert (_steps(config), _warm_up(config)) == (steps, warm_up)


def test_the_paper_keeps_its_details(plans: dict[str, list[Config]]) -> None:
    arms = {(c["experiment"], c["arm"]): c for jobs in plans.values() for c in jobs}
    gpt2 = arms["zero_shot", "rv_adamw_gpt2"]
    tokens = gpt2["task"]["batch_size"] * gpt2["model"]["context"]
    assert (tokens, gpt2["task"]["clip_norm"], gpt2["model"]["gains"]) == (491_520, 1.0, True)
    translation = arms["zero_shot", "adamw_starved"]
    assert (translation["task"]["batch_tokens"], translation["task"]["label_smoothing"]) == (4096, 0.1)
    assert arms["lr_vs_wd", "adamw_wikitext"]["optimizer"]["exclude"] == ["token", "position"]
    deit = arms["compare", "adamw_deit"]
    assert (deit["task"]["augment"], deit["task"]["image_size"], deit["model"]["drop_path"]) == ("deit", 224, 0.1)
    assert arms["zero_shot", "rv_adamw_fed"]["optimizer"]["weight_decay"] == 4000 * 1e-4


def test_lr_times_weight_decay_is_constant_in_each_arm(plans: dict[str, list[Config]]) -> None:
    for arm, product in (("adamw", 5e-4), ("rv_adamw", 5e-4), ("adamw_wikitext", 2.5e-3)):
        optimizers = [c["optimizer"] for c in plans["lr_vs_wd"] if c["arm"] == arm]
        assert len(optimizers) > 1
        for o in optimizers:
            assert o["lr"] * o["weight_decay"] == pytest.approx(product, rel=1e-6)
    frozen = {c["optimizer"]["lr"] * c["optimizer"]["weight_decay"] for c in plans["lr_vs_wd"] if c["arm"] == "frozen"}
    assert len(frozen) == 1  # to the last bit, as its test needs


@pytest.mark.parametrize(
    "pair",
    [
        (("compare", "adamw"), ("compare", "adam_l2")),
        (("compare", "adamw"), ("compare", "forced_adam_l2")),
        (("compare", "adamw"), ("compare", "rv_adamw")),
        (("compare", "sgdm"), ("compare", "rv_sgdm")),
        (("compare", "lion"), ("compare", "rv_lion")),
        (("compare", "adamw"), ("zero_shot", "rv_adamw")),
        (("compare", "sgdm"), ("zero_shot", "rv_sgdm")),
        (("compare", "lion"), ("zero_shot", "rv_lion")),
        (("zero_shot", "adamw_starved"), ("zero_shot", "rv_adamw_starved")),
        (("zero_shot", "adamw_starved"), ("zero_shot", "rv_adamw_fed")),
        (("equilibrium", "adam_l2_bn"), ("equilibrium", "adamw_bn")),
        (("equilibrium", "sgdm_ln"), ("equilibrium", "sgdm_ln_ws")),
        (("normalization", "ln"), ("normalization", "rv_ln")),
        (("imbalance", "none"), ("imbalance", "triple_q10")),
        (("language", "adamw_gains_warm"), ("language", "rv_gains_warm")),
    ],
    ids=lambda pair: "/".join(pair[0] if isinstance(pair[0], str) else pair[0] + pair[1]),
)
def test_arms_that_are_compared_share_their_seeds(
    seeds: Callable[[str, str], list[int]], pair: tuple[tuple[str, str], tuple[str, str]]
) -> None:
    first, second = (seeds(*arm) for arm in pair)
    assert first == second and len(first) >= 3
    assert max(Counter(first).values()) == 1  # one setting a seed


def test_judging_seeds_are_fresh_where_an_arm_was_tuned(seeds: Callable[[str, str], list[int]]) -> None:
    for tuned, judged, arm in (
        ("tune", "compare", "adam_l2"),
        ("tune", "compare", "rv_adamw"),
        ("normalization_tune", "normalization", "ln"),
        ("imbalance_tune", "imbalance", "none"),
        ("language_tune", "language", "adamw_warm"),
    ):
        assert not set(seeds(tuned, arm)) & set(seeds(judged, arm)), judged
