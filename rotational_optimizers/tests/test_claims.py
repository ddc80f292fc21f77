"""Every claim's test says `reproduced` on records in which the paper is right by construction, and nothing like it when
arms are swapped or the effect is taken away."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from common.claims import CONTRADICTED, REPRODUCED, judge
from common.compose import conf_dir
from common.tests.report_fakes import FakeRecords, arm_rows
from rotational_optimizers.claims import CLAIMS

SEEDS = np.arange(10, 18)
RNG = np.random.default_rng(0)


def rows(arm: str, noise: float = 1e-3, **means: object) -> pd.DataFrame:
    """One arm with a little seed noise in everything that is measured."""
    return arm_rows(arm, SEEDS, RNG, noise, _exact, **means)


def _exact(name: str) -> bool:
    return name in ("optimizer.lr", "schedule.warmup", "predicted") or name.endswith(("_predicted", "_exact"))


def accuracies(**arms: float) -> pd.DataFrame:
    return pd.concat([rows(arm, test_accuracy=value) for arm, value in arms.items()])


def walks() -> pd.DataFrame:
    arms = ("adamw", "adamw_large", "sgdm", "sgdw", "nesterov", "adam_l2", "lion", "lion_half", "lion_no_momentum")
    parts = []
    for i, arm in enumerate(arms):
        angle, norm = 0.01 * 1.5**i, 2.0 * 1.5**i
        exact = {"angle_predicted_exact": angle, "norm_predicted_exact": norm}
        parts.append(rows(arm, angle=angle, norm=norm, angle_predicted=angle, norm_predicted=norm, **exact))
    return pd.concat(parts)


def equilibrium() -> pd.DataFrame:
    spec = {  # ratio of convolutions, ratio of the head, spread, start
        "sgdm_bn": (1.0, 0.5, 0.03, 1.0),
        "sgdm_ln_ws": (1.0, 0.6, 0.02, 1.0),
        "sgdm_ln": (0.9, 0.7, 0.3, 1.0),
        "sgdm_none": (0.5, 0.5, 4.0, 0.1),
        "adamw_bn": (0.95, 0.4, 0.1, 5.0),
        "adam_l2_bn": (1.0, 0.4, 0.5, 5.0),
        "rv_sgdm_bn": (0.99, 0.99, 0.009, 1.1),
        "rv_adamw_bn": (0.99, 0.99, 0.009, 0.9),
    }
    parts = []
    for i, (arm, (ratio, head, spread, start)) in enumerate(spec.items()):
        predicted = 0.01 * 2**i
        angle = [ratio * predicted] * 4 + [head * predicted]
        parts.append(rows(arm, angle=angle, predicted=predicted, neuron_log_std=spread, start_ratio=[start] * 5))
    return pd.concat(parts)


def warmup(experiment_rates: list[float], base: str, rotational: str) -> pd.DataFrame:
    """The base is good at one rate and only with warm-up, the rotational variant everywhere."""
    parts = []
    for rate in experiment_rates:
        for warm in (0.0, 0.1):
            good = 0.9 if rate == experiment_rates[0] else 0.6
            for arm, value in ((base, good + 0.05 * (warm > 0)), (rotational, 0.95)):
                setting = {"optimizer.lr": rate, "schedule.warmup": warm}
                parts.append(rows(arm, test_accuracy=value, validation_accuracy=value, **setting))
    return pd.concat(parts)


def lr_vs_wd() -> pd.DataFrame:
    parts = []
    for rate, base in zip([1e-5, 1e-3, 1e-1], [0.2, 0.9, 0.6], strict=True):
        parts.append(rows("adamw", test_accuracy=base, **{"optimizer.lr": rate}))
        parts.append(rows("rv_adamw", noise=1e-4, test_accuracy=0.9 + 0.01 * (rate == 1e-3), **{"optimizer.lr": rate}))
        frozen = rows("frozen", noise=1e-4, test_accuracy=0.9, **{"optimizer.lr": rate})
        parts.append(frozen.assign(test_loss=0.1 + 0.001 * frozen["seed"]))
    return pd.concat(parts)


def scales() -> pd.DataFrame:
    return pd.concat([rows(a, slope=1e-4) for a in ("adamw", "sgdm", "lion")] + [rows("adam_l2", slope=-1 / 3)])


@pytest.fixture(scope="module")
def records() -> FakeRecords:
    pairs = {"adamw": 0.95, "rv_adamw": 0.952, "sgdm": 0.95, "rv_sgdm": 0.953, "lion": 0.94, "rv_lion": 0.95}
    starved = {"adamw_starved": 0.8, "rv_adamw_starved": 0.4, "rv_adamw_fed": 0.85}
    language = {"adamw_gains_none": 2.4, "adamw_gains_warm": 2.3, "rv_gains_none": 2.25, "rv_gains_warm": 2.25}
    provoked = pd.concat([warmup([0.8], "sgdm", "rv_sgdm"), warmup([0.03], "adamw", "rv_adamw")])
    none = {"none": 0.96, "triple_s3": 0.95, "triple_s10": 0.93, "triple_s30": 0.9}
    return FakeRecords(
        {
            "random_walk": walks(),
            "gradient_scale": scales(),
            "equilibrium": equilibrium(),
            "transient_walk": rows("adamw", max_deviation=0.02),
            "compare": accuracies(**pairs, adam_l2=0.94, forced_adam_l2=0.951),
            "unequal": accuracies(adamw=0.95, adam_l2=0.9, forced_adam_l2=0.949),
            "zero_shot": accuracies(rv_adamw=0.945, rv_sgdm=0.945, rv_lion=0.945, **starved),
            "warmup": warmup([0.05, 0.2, 0.8, 3.2], "sgdm", "rv_sgdm"),
            "warmup_deep": warmup([0.003, 0.01], "adamw", "rv_adamw"),
            "warmup_provoked": provoked,
            "language": pd.concat([rows(a, test_loss=v) for a, v in language.items()]),
            "normalization": accuracies(ln=0.9, ln_ws=0.95, rv_ln=0.951),
            "lr_vs_wd": lr_vs_wd(),
            "imbalance": accuracies(**none, triple_q10=0.94, triple_q90=0.92),
        }
    )


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_a_world_in_which_the_paper_is_right_is_judged_reproduced_and_the_control_is_not(claim, records) -> None:  # type: ignore[no-untyped-def]
    verdict = judge(claim, records)
    assert verdict.verdict == REPRODUCED, [(p.label, p.outcome) for p in verdict.parts]
    assert judge(claim, claim.control(records)).verdict != REPRODUCED


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.id in ("C5", "C5.unequal", "C8", "C10")], ids=lambda c: c.id)
def test_a_comparison_the_other_way_round_is_contradicted(claim, records) -> None:  # type: ignore[no-untyped-def]
    assert judge(claim, claim.control(records)).verdict == CONTRADICTED


def test_every_experiment_a_claim_reads_exists() -> None:
    names = {path.stem for path in (conf_dir("rotational_optimizers") / "experiment").glob("*.yaml")}
    assert {e for claim in CLAIMS for e in claim.experiments} <= names


def test_claims_are_those_of_the_paper() -> None:
    assert {claim.id.split(".")[0] for claim in CLAIMS} == {f"C{i}" for i in range(1, 12)}


def test_without_an_effect_nothing_that_compares_arms_is_reproduced(records) -> None:  # type: ignore[no-untyped-def]
    flat = records
    for name in ("compare", "unequal", "normalization", "imbalance"):
        frame = flat[name]
        noise = 0.9 + 0.01 * np.random.default_rng(1).standard_normal(len(frame))
        flat = flat.replace(name, frame.assign(test_accuracy=noise))
    for claim in CLAIMS:
        if claim.id in ("C5", "C5.unequal", "C5.forced", "C8", "C10"):
            assert judge(claim, flat).verdict != REPRODUCED
