"""Every experiment composes at every scale; bad values are refused with key, value and range."""

from __future__ import annotations

import re
from typing import Any

import pytest

from common.compose import Composer, conf_dir
from common.data.crops import DeiTConfig
from common.sweeps import Job, Planner
from common.tests.planners import Diagonal, Ends, seeds_of
from mulfree_training import config as schema
from mulfree_training.config import (
    AffineConfig,
    ArithmeticConfig,
    ImagesConfig,
    LanguageConfig,
    ModelConfig,
    OptimizerConfig,
    PrimitivesConfig,
    ProofConfig,
    TranslationConfig,
    TrialConfig,
)
from mulfree_training.names import ROWS, name
from mulfree_training.networks.blocks import ACTIVATIONS
from mulfree_training.networks.build import REGISTRY
from mulfree_training.operators import FACES
from mulfree_training.train import TASKS, main

CONF = conf_dir("mulfree_training")
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
TUNING = ("convolution_tune", "language_tune", "vision_tune")
PAPER_ONLY = ("imagenet", "translation")
MEASURED = ("affine", "primitives", "proof")
"""Tasks without any choice to tune."""
CUMULATIVE = {row: list(schema.SCOPE[:i]) for i, row in enumerate(("standard", *ROWS))}


@pytest.fixture(scope="module")
def laptop() -> Planner:
    return Planner(main, None, "laptop")


@pytest.fixture(scope="module")
def plans() -> dict[str, list[Job]]:
    planner = Ends(main, None, "laptop")
    return {experiment: planner.plan(experiment) for experiment in EXPERIMENTS}


def test_every_experiment_composes_at_laptop_scale(plans: dict[str, list[Job]]) -> None:
    assert {experiment for experiment, jobs in plans.items() if not jobs} == {*PAPER_ONLY}
    for experiment, jobs in plans.items():
        assert len({(job.config["arm"], job.key) for job in jobs}) == len(jobs)
        for job in jobs:
            config = job.config
            assert (config["experiment"], config["scale"], config["device"]) == (experiment, "laptop", "cpu")
            assert config["arm"] and job.entry == TASKS[config["task"]["name"]] and config["max_steps"] is None
            assert config["data"]["source"] == "embedded" and config["threads"] == 1


@pytest.mark.parametrize("scale", ["smoke", "gpu", "paper"])
def test_the_other_scales_compose(scale: str) -> None:
    planner = (Diagonal if scale == "smoke" else Ends)(main, None, scale)
    empty = set()
    for experiment in EXPERIMENTS:
        jobs = planner.plan(experiment)
        empty |= set() if jobs else {experiment}
        for config in (job.config for job in jobs):
            assert (config["experiment"], config["scale"]) == (experiment, scale) and config["arm"]
            if scale == "smoke":
                assert (config["max_steps"], config["tracking"]["mode"]) == (10, "disabled")
            else:  # what is read off compiled code or float64 is the CPU's
                assert config["device"] == ("cpu" if config["task"]["name"] in ("affine", "proof") else "cuda")
    # the paper has one learning rate, and no characters
    assert empty == ({*TUNING, "language", "language_long"} if scale == "paper" else {*PAPER_ONLY})


def test_settings_are_chosen_by_low_seeds_on_validation_data_and_judged_by_fresh_ones(laptop: Planner) -> None:
    for experiment in sorted({*EXPERIMENTS} - {*PAPER_ONLY}):
        for entry in laptop.entries(experiment):
            seeds = seeds_of(laptop, experiment, entry["arm"])
            assert (max(seeds) < 10) if experiment in TUNING else (min(seeds) >= 20), (experiment, entry["arm"])
            if experiment in TUNING:
                assert entry.get("task.evaluate", "validation") == "validation"
            elif experiment not in MEASURED:
                assert len(seeds) >= 5 and entry["task.evaluate"] == "test"
                assert entry["select"]["experiment"] in TUNING
                assert (entry["select"]["metric"], entry["select"]["mode"]) == ("validation_nll", "min")


OWN_RATE = {"matmul_own", "full_own", "power_of_two", "adder"}


def test_arms_of_an_experiment_differ_in_arithmetic_alone(plans: dict[str, list[Job]]) -> None:
    for experiment in ("vision", "language", "language_long", "convolution"):
        found: dict[str, set[str]] = {}
        for config in (job.config for job in plans[experiment]):
            data, images = dict(config["data"]), config["task"]["name"] == "images"
            assert data.pop("split_seed") == (config["seed"] if images else 0)  # each seed has a split of its own
            optimizer = {k: v for k, v in config["optimizer"].items() if k != "lr" or config["arm"] not in OWN_RATE}
            fixed = (config["task"], config["model"], data, optimizer.get("weight_decay"))
            found.setdefault(repr(fixed), set()).add(config["arm"])
        assert len(found) == 1, experiment


def test_every_arm_searches_the_same_grid(laptop: Planner) -> None:
    for experiment in TUNING:
        grids = [{k: v for k, v in e.items() if k not in ("arm", "arithmetic")} for e in laptop.entries(experiment)]
        assert all(grid == grids[0] for grid in grids), experiment
    own = {e["arm"]: e["select"]["arm"] for e in laptop.entries("vision") if e["select"]["arm"] != "standard"}
    assert own == {arm: arm.removesuffix("_own") for arm in OWN_RATE}


def test_what_is_trained_without_multiplications_is_what_is_proven(plans: dict[str, list[Job]]) -> None:
    proven = arithmetic_of(plans["proof"])
    trained = {(e, arm): x for e in ("vision", "language") for arm, x in arithmetic_of(plans[e]).items()}
    assert trained["vision", "full"] == trained["language", "full"] == proven["full"] == proven["language_full"]
    assert trained["vision", "full_exact"] == trained["language", "full_exact"] == proven["full_exact"]


def arithmetic_of(jobs: list[Job]) -> dict[str, Any]:
    return {job.config["arm"]: job.config["arithmetic"] for job in jobs}


@pytest.mark.parametrize("experiment", ["vision", "language"])
def test_the_rows_of_the_ablation_are_cumulative(plans: dict[str, list[Job]], experiment: str) -> None:
    arms = arithmetic_of(plans[experiment])
    assert {arm: arms[arm]["scope"] for arm in CUMULATIVE} == CUMULATIVE
    assert all(arms[arm]["derivative"] == "approx" and arms[arm]["alpha"] is None for arm in CUMULATIVE)
    assert arms["full_exact"]["derivative"] == "exact" and arms["full_exact"]["loss_derivative"] is None
    assert arms["full_exact_but_loss"]["loss_derivative"] == "approx"
    assert arms["full_alpha"]["alpha"] == 1.0552 == arms["matmul_alpha"]["alpha"]
    assert all(name(arm) != arm for arm in arms)


def test_every_option_of_every_group_composes() -> None:
    composer = Composer("mulfree_training", TrialConfig)
    seen: dict[str, set[str]] = {}
    for group in ("task", "model", "arithmetic", "optimizer", "data"):
        for path in sorted((CONF / group).glob("*.yaml")):
            value = getattr(composer.config([f"{group}={path.stem}"]), group)
            seen.setdefault(group, set()).add(getattr(value, "name", getattr(value, "kind", "")))
    assert seen["task"] == set(TASKS) and seen["arithmetic"] == set(schema.KINDS)
    assert seen["model"] == set(schema.NETWORKS) == set(REGISTRY) and seen["optimizer"] == set(schema.OPTIMIZERS)
    assert set(schema.BACKENDS) == {"", *FACES} and set(schema.ACTIVATIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["arithmetic.scop=[matmul]"], "scop"),
        (["+model.speed=1"], "model.speed: unknown key"),
        (["task=affine", "task.batch_size=3"], "batch_size"),
        (["optimizer.lr=fast"], "fast"),
        (["optimizer.lr=0"], "optimizer.lr=0.0: must be > 0"),
        (["arithmetic=analog"], "analog"),
        (["arithmetic.scope=[matmul]"], r"arithmetic.scope=\['matmul'\]: must be empty unless arithmetic.kind=pam"),
        (
            ["arithmetic=matmul", "arithmetic.scope=[]"],
            r"arithmetic.scope=\[\]: must be empty unless .* not empty then",
        ),
        (["arithmetic=matmul", "arithmetic.alpha=2"], r"arithmetic.alpha=2.0: must be in \(0.5, 2\), or null"),
        (["model.patch_size=3"], "model.patch_size=3: must be a divisor of 8"),
        (["arithmetic=matmul", "precision=bf16"], "precision=bf16: must be fp32 for arithmetic.kind=pam"),
        (["precision=fp16"], "precision=fp16: must be fp32 or bf16"),
        (["max_steps=0"], "max_steps=0: must be >= 1, or null"),
    ],
)
def test_bad_overrides_are_refused_in_words(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message) as caught:
        Composer("mulfree_training", TrialConfig).config(overrides)
    if "must be" in message or "unknown key" in message:
        assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["arithmetic.kind=float"],
            "arithmetic.kind=float: must be one of standard, pam, perturbed, power_of_two, adder",
        ),
        (["model.d_model=66"], "model.d_model=66: must be a multiple of model.n_head=4"),
        (["task.augment=deit"], "task.upsample=None: must be given for task.augment=deit"),
        (["model.context=12"], "model.context=12: vit does not read it; it reads in_channels, classes, "),
        (["task.evaluate=test", "data.test=0"], "task.evaluate=test: data.test=0 leaves no test split"),
    ],
)
def test_the_command_line_says_it_in_one_line(
    overrides: list[str], message: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([*overrides, f"results_dir={tmp_path}", "tracking.mode=disabled"]) == 1
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1


def test_help_lists_the_groups_and_what_each_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help"]) == 0
    page = capsys.readouterr().out
    for group in ("task", "arithmetic", "model", "optimizer", "data", "scale", "experiment"):
        assert re.search(rf"^\s*{group}\b", page, flags=re.M), group
        for path in (CONF / group).glob("*.yaml"):
            assert path.stem in page
    assert "arithmetic.scope" in page and "What is piecewise affine (pam)" in page
    assert "Row 1: matrix products piecewise affine" in page


def outside(kind: type, key: str, values: list[Any], allowed: str, group: str = "task") -> list[tuple[Any, Any, str]]:
    return [(kind, {key: value}, f"{group}.{key}={value}: must be {allowed}") for value in values]


def at_least_one(kind: type, *keys: str, group: str = "task") -> list[tuple[Any, Any, str]]:
    return [case for key in keys for case in outside(kind, key, [0, -1], ">= 1", group)]


PAM = {"kind": "pam", "scope": ["matmul"]}
TRAININGS = (ImagesConfig, LanguageConfig, TranslationConfig)
SHARES = ("beta1", "beta2")
REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    *outside(ArithmeticConfig, "kind", ["float"], "one of standard, pam, perturbed", "arithmetic"),
    (ArithmeticConfig, {**PAM, "scope": ["gelu"]}, "arithmetic.scope=['gelu']: must be different words among matmul, "),
    (ArithmeticConfig, {**PAM, "scope": ["norm", "norm"]}, "arithmetic.scope=['norm', 'norm']: must be different"),
    (ArithmeticConfig, {"scope": ["norm"]}, "arithmetic.scope=['norm']: must be empty unless arithmetic.kind=pam"),
    (ArithmeticConfig, {"kind": "pam"}, "arithmetic.scope=[]: must be empty unless arithmetic.kind=pam, and not empty"),
    *outside(ArithmeticConfig, "derivative", ["true"], "one of approx, exact", "arithmetic"),
    *outside(ArithmeticConfig, "loss_derivative", ["true"], "null or one of approx, exact", "arithmetic"),
    *outside(ArithmeticConfig, "lse_log2", ["true"], "null or one of approx, exact", "arithmetic"),
    *outside(ArithmeticConfig, "alpha", [0.5, 2.0, -1.0, float("nan")], "in (0.5, 2), or null", "arithmetic"),
    *outside(ArithmeticConfig, "host_scalars", ["none"], "exact or pam", "arithmetic"),
    (ArithmeticConfig, {"backend": "cuda"}, "arithmetic.backend='cuda': must be empty or one of cpp, triton, torch, "),
    *outside(ModelConfig, "name", ["mlp"], "one of vit, gpt, translation, plain_conv", "model"),
    *at_least_one(
        ModelConfig, "in_channels", "classes", "image_size", "patch_size", "vocab", "source_vocab", "context",
        "d_model", "n_layer", "n_head", "d_hidden", "depth", "channels", "groups", "kernel_size", group="model",
    ),
    *outside(ModelConfig, "d_model", [66], "a multiple of model.n_head=4", "model"),
    *outside(ModelConfig, "activation", ["tanh"], "one of relu, gelu", "model"),
    *outside(ModelConfig, "dropout", [-0.1, 1.0], "in [0, 1)", "model"),
    *outside(ModelConfig, "drop_path", [-0.1, 1.0], "in [0, 1)", "model"),
    *outside(ModelConfig, "eps", [-1e-9], ">= 0", "model"),
    *outside(ModelConfig, "std", [0.0, -1.0], "> 0", "model"),
    *outside(ModelConfig, "layout", [[], [0, 16], [16, -1]], "channels, 0 for a pooling", "model"),
    *outside(ModelConfig, "kernel_size", [4], "odd", "model"),
    *outside(ModelConfig, "patch_size", [3], "a divisor of 8", "model"),
    *outside(ModelConfig, "expected_parameters", [0, -1], "> 0, or null", "model"),
    *outside(OptimizerConfig, "name", ["lion"], "one of adamw, sgd", "optimizer"),
    *outside(OptimizerConfig, "lr", [0.0, -1.0], "> 0", "optimizer"),
    *[c for k in ("weight_decay", "eps", "warmup") for c in outside(OptimizerConfig, k, [-1], ">= 0", "optimizer")],
    *[c for k in SHARES for c in outside(OptimizerConfig, k, [-0.1, 1.0], "in [0, 1)", "optimizer")],
    *[c for k in ("start", "final") for c in outside(OptimizerConfig, k, [-0.1, 1.1], "in [0, 1]", "optimizer")],
    *[c for kind in TRAININGS for c in at_least_one(kind, "accumulate", "eval_batch_size", "log_every")],
    *[c for kind in TRAININGS for c in outside(kind, "evaluate", ["train"], "one of validation, test")],
    *[c for kind in TRAININGS for c in outside(kind, "label_smoothing", [-0.1, 1.0], "in [0, 1)")],
    *at_least_one(ImagesConfig, "epochs", "batch_size"),
    *outside(ImagesConfig, "augment", ["flip"], "one of none, crop, deit"),
    *outside(ImagesConfig, "upsample", [0], ">= 1, or null"),
    (ImagesConfig, {"augment": "deit"}, "task.upsample=None: must be given for task.augment=deit"),
    *at_least_one(LanguageConfig, "steps", "batch_size", "eval_tokens"),
    *outside(LanguageConfig, "vocabulary", ["words"], "characters or tokenizer"),
    *at_least_one(TranslationConfig, "steps", "batch_tokens", "beams", "evaluate_every"),
    *outside(TranslationConfig, "length_extra", [-1], ">= 0"),
    *outside(TranslationConfig, "select", ["first"], "one of last, best"),
    *[c for k in ("color_jitter", "mixup", "cutmix") for c in outside(DeiTConfig, k, [-0.1], ">= 0", "task.deit")],
    *outside(DeiTConfig, "erasing", [-0.1, 1.1], "in [0, 1]", "task.deit"),
    *outside(DeiTConfig, "erasing_mode", ["noise"], "one of const, rand, pixel", "task.deit"),
    *outside(TranslationConfig, "length_factor", [0.0, -1.0], "> 0"),
    *outside(PrimitivesConfig, "mantissa_bits", [1, 13], "in [2, 12]"),
    *at_least_one(PrimitivesConfig, "pairs"),
    *at_least_one(AffineConfig, "points", "d_model", "tokens"),
    *outside(AffineConfig, "steps", [[], [1e-6, 0.0]], "distances > 0"),
    *outside(ProofConfig, "workload", ["text"], "images or language"),
    *at_least_one(ProofConfig, "batch_size"),
    (TrialConfig, {"max_steps": 0}, "max_steps=0: must be >= 1, or null"),
    (TrialConfig, {"precision": "fp16"}, "precision=fp16: must be fp32 or bf16"),
    (TrialConfig, {"precision": "bf16", "arithmetic": ArithmeticConfig(kind="adder")}, "must be fp32 for arithmetic."),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "values", "message"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_values_out_of_range_are_refused_by_name(kind: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(**values)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (ArithmeticConfig, {"kind": "pam", "scope": [*schema.SCOPE], "alpha": 0.51, "lse_log2": "exact"}),
        (ArithmeticConfig, {"kind": "pam", "scope": ["optimizer"], "loss_derivative": "exact", "backend": "torch"}),
        (ModelConfig, {"n_head": 1, "d_model": 1, "dropout": 0.0, "drop_path": 0.99, "eps": 0.0, "kernel_size": 1}),
        (ModelConfig, {"name": "gpt", "patch_size": 3, "layout": [1], "expected_parameters": 1}),
        (OptimizerConfig, {"weight_decay": 0.0, "eps": 0.0, "warmup": 0, "beta1": 0.0, "start": 1.0, "final": 1.0}),
        (ImagesConfig, {"epochs": 1, "batch_size": 1, "augment": "deit", "upsample": 1, "label_smoothing": 0.0}),
        (LanguageConfig, {"steps": 1, "batch_size": 1, "eval_tokens": 1, "vocabulary": "tokenizer"}),
        (TranslationConfig, {"steps": 1, "batch_tokens": 1, "beams": 1, "length_factor": 0.1, "length_extra": 0}),
        (TranslationConfig, {"select": "best", "evaluate_every": 1}),
        (DeiTConfig, {"auto_augment": None, "color_jitter": 0.0, "erasing": 1.0, "mixup": 0.0, "cutmix": 0.0}),
        (PrimitivesConfig, {"mantissa_bits": 12, "pairs": 1}),
        (AffineConfig, {"points": 1, "d_model": 1, "tokens": 1, "steps": [1e-9]}),
        (TrialConfig, {"max_steps": 1, "precision": "bf16"}),
    ],
)
def test_values_at_the_ends_of_their_ranges_are_accepted(kind: type, values: dict[str, Any]) -> None:
    assert all(getattr(kind(**values), key) == value for key, value in values.items())
