"""Records without any training: a scale's plans with made-up metrics, in a world in which every claim is right."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from common.sweeps import Job
from common.tests import worlds
from common.tests.report_fakes import FakeRecords
from common.tests.worlds import Change
from mulfree_training.train import main

VISION = {  # accuracy, loss, tempered loss
    "standard": (96.0, 0.21, 0.19), "perturbed": (96.1, 0.21, 0.19), "bf16": (96.0, 0.21, 0.19),
    "matmul": (95.6, 0.22, 0.195), "softmax": (95.7, 0.221, 0.196), "norm": (95.5, 0.222, 0.197),
    "loss": (95.4, 0.225, 0.198), "full": (95.2, 0.23, 0.2), "matmul_exact": (95.8, 0.21, 0.19),
    "full_exact": (95.0, 0.33, 0.23), "full_exact_but_loss": (95.1, 0.25, 0.21), "matmul_alpha": (95.9, 0.21, 0.19),
    "full_alpha": (95.5, 0.22, 0.19), "power_of_two": (94.0, 0.3, 0.28), "adder": (88.0, 0.5, 0.48),
    "matmul_own": (96.2, 0.2, 0.18), "full_own": (95.9, 0.21, 0.19),
}  # fmt: skip
LANGUAGE = {  # loss, tempered loss
    "standard": (2.11, 2.1), "matmul": (2.12, 2.11), "softmax": (2.121, 2.11),
    "norm": (2.122, 2.11), "loss": (2.125, 2.112), "full": (2.13, 2.115), "matmul_exact": (2.13, 2.12),
    "full_exact": (2.25, 2.14), "full_exact_but_loss": (2.16, 2.13), "matmul_alpha": (2.115, 2.1),
    "full_alpha": (2.12, 2.11),
}  # fmt: skip
LONG = {"standard": 1.9, "matmul": 1.91, "full": 1.92}
CONVOLUTION = {"standard": 97.0, "matmul": 96.5}
TRANSLATION = {"standard": 2.0, "matmul": 2.01, "softmax": 2.011, "norm": 2.012, "loss": 2.015, "full": 2.02}
FINDINGS = {
    "standard": 294, "matmul": 253, "softmax": 245, "norm": 235, "loss": 224, "full": 0, "full_exact": 0,
    "language_standard": 312, "language_full": 0, "language_full_exact": 0,
}  # fmt: skip
ENERGY = {"matrix_products": 200.0, "elementwise": 10.0, "additions": 20.0}


def noise(*name: Any) -> float:
    """A normal number that depends on the name alone."""
    return float(np.random.default_rng(zlib.crc32(repr(name).encode())).standard_normal())


def right(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Metrics of one seed of a trial where the paper and we are right."""
    return {"seed": seed} | KINDS[config["task"]["name"]](config, seed)


def _images(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    arm, split = config["arm"], config["task"]["evaluate"]
    if config["experiment"] == "convolution":
        kind = "matmul" if arm.endswith("matmul") else "standard"
        level, loss, tempered = CONVOLUTION[kind], 0.1, 0.09
    else:
        level, loss, tempered = VISION[arm]
    found = {"accuracy": level + 0.8 * noise("image", seed) + 0.2 * noise(arm, seed)}
    found |= {"nll": loss * _factor(arm, seed), "nll_tempered": tempered * _factor(arm, seed, "tempered")}
    return _trained(split, found, seed)


def _language(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    arm, shared = config["arm"], 0.03 * noise("text", seed)
    loss, tempered = LANGUAGE[arm]
    if config["experiment"] == "language_long":
        loss = tempered = LONG[arm]
    found = {"nll": loss + shared + 0.002 * noise(arm, seed)}
    found["nll_tempered"] = tempered + shared + 0.002 * noise(arm, seed, "tempered")
    return _trained(config["task"]["evaluate"], found, seed)


def _translation(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    loss = TRANSLATION[config["arm"]] + 0.002 * noise(config["arm"], seed)
    found = {"nll": loss, "bleu": 34.0 - 5 * (loss - 2.0)}
    return _trained(config["task"]["evaluate"], found, seed)


def _factor(*name: Any) -> float:
    return math.exp(0.01 * noise(*name))


def _trained(split: str, found: Mapping[str, float], seed: int) -> dict[str, Any]:
    named = {f"{split}_{metric}": value for metric, value in found.items()}
    return named | {"diverged": False, "train_loss": 0.5 + 0.01 * noise(seed), "train_s": 5.0, "temperature": 1.2}


@functools.cache
def error_law() -> dict[str, float]:
    """The errors of all operations in closed form, their means by quadrature; formulas of real numbers, no bits."""
    m = (np.arange(2000) + 0.5) / 2000  # mantissas less 1
    worst = 1 / math.log(2) - 1  # where 1 + m has the slope of 2^m
    found = {"mul_min": -1 / 9, "mul_max": 0.0, "div_min": 0.0, "div_max": 1 / 8, "square_min": -1 / 9}
    found |= {"square_max": 0.0, "exp2_min": 0.0, "exp2_max": (1 + worst) / 2**worst - 1, "log2_max": 0.0}
    found |= {"log2_min": worst - math.log2(1 + worst), "sqrt_min": 0.0, "sqrt_max": 1.5 / math.sqrt(2) - 1}
    for kind, x in (("uniform", 1 + m), ("logarithmic", 2.0**m)):
        a, b = x[:, None], x[None]
        product = np.where(a + b < 3, a + b - 1, 2 * (a + b - 2)) / (a * b)
        quotient = np.where(a >= b, 1 + a - b, (2 + a - b) / 2) / (a / b)
        found |= {f"mul_mean_{kind}": float(product.mean() - 1), f"div_mean_{kind}": float(quotient.mean() - 1)}
        found[f"square_mean_{kind}"] = float((np.where(x < 1.5, 2 * x - 1, 4 * (x - 1)) / x**2).mean() - 1)
    return found | {"exp2_mean": float(((1 + m) / 2**m).mean() - 1), "log2_mean": float((m - np.log2(1 + m)).mean())}


def _primitives(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: value + (1e-5 if "mean" in name else 1e-8) * noise(name, seed) for name, value in error_law().items()
    }
    gain = 1.0 if config["arm"] == "alpha" else 0.9623
    found |= {"gain": gain + 1e-4 * noise("gain", seed), "residual": 0.0288}
    sides = (np.arange(12) + 0.5) / 12
    found["map"] = (-(1 / 9) * np.minimum(4 * sides[:, None] * sides[None], 1)).tolist()
    for name, low in (("mul", -1 / 9), ("div", 0.0)):
        found |= {f"{name}_edges": np.linspace(low, low + 1 / 8, 9).tolist(), f"{name}_density": [8.0] * 8}
    return found


def _affine(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    own = config["arm"] != "standard"
    found: dict[str, Any] = {}
    for h in config["task"]["steps"]:
        level = 3e-17 / h if own and h < 1e-5 else h
        found |= {f"curvature_{h:g}": level * math.exp(0.3 * noise(own, h, seed)), f"affine_{h:g}": 0.7 if own else 0.0}
    right = {"standard": 0.97, "pam": 0.7, "pam_approx": 0.03}[config["arm"]]
    return found | {"gradient_right": right + 0.01 * noise("slope", config["arm"], seed)}


def _proof(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    arm = config["arm"]
    scan = {"machine_findings": 0, "ptx_findings": 0, "sass_findings": 0}
    scan |= {"machine_instructions": 2000, "ptx_kernels": 231, "sass_kernels": 77}
    scan |= {"planted_machine": 5, "planted_ptx": 7, "planted_sass": 3}
    found: dict[str, Any] = {"findings": FINDINGS[arm], "planted_backward": 1} | (scan if arm == "full" else {})
    ratios = {"cost_ratio_multiplication": 37.0, "cost_ratio_accumulate": 4.6, "cost_ratio_step": 4.4}
    ratios |= {"cost_ratio_multiplication_area": 56.0, "cost_ratio_accumulate_area": 2.8}
    cheap = 4.4 if "full" in arm else 1.0
    return found | ratios | {f"energy_uj_{kind}": uj / cheap for kind, uj in ENERGY.items()}


KINDS = {
    "images": _images, "language": _language, "translation": _translation, "primitives": _primitives,
    "affine": _affine, "proof": _proof,
}  # fmt: skip


def records(scale: str) -> FakeRecords:
    """Those of every planned trial."""
    return worlds.recorded(plans(scale), right)


def plans(scale: str) -> dict[str, list[Job]]:
    """All trials of a scale by experiment."""
    return worlds.planned(main, scale)


def chosen(frame: pd.DataFrame, arm: str) -> pd.Series:
    """Which rows are an arm's."""
    found = frame["arm"] == arm
    assert found.any(), arm
    return found


def level(arm: str, metric: str, value: float, spread: float = 0.0) -> Change:
    """`metric` of an arm is about `value`."""

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        near = value + spread * np.array([noise(metric, value, seed) for seed in frame["seed"]])
        return frame.assign(**{metric: frame[metric].where(~chosen(frame, arm), near)})

    return change


def beside(arm: str, other: str, metric: str, gap: float, spread: float = 1e-4) -> Change:
    """`metric` of `arm` is that of `other` plus about `gap`, seed by seed."""

    def change(frame: pd.DataFrame) -> pd.DataFrame:
        levels = frame[chosen(frame, other)].set_index("seed")[metric]
        near = np.array(
            [levels.get(seed, np.nan) + gap + spread * noise(arm, gap, metric, seed) for seed in frame["seed"]]
        )
        return frame.assign(**{metric: frame[metric].where(~chosen(frame, arm), near)})

    return change


def without(arm: str) -> Change:
    """The arm was not run."""
    return lambda frame: frame[~chosen(frame, arm)]
