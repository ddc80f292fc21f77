"""Count what multiplies in one training step and in the compiled kernels, and what the step would cost (C4.proof, C8)."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.data import load
from common.training import setup
from mulfree_training.disassembly import scan_control, scan_kernels
from mulfree_training.networks.build import build
from mulfree_training.operations import cost, operation_count, ratios
from mulfree_training.proof import count_multiplications
from mulfree_training.tasks.arithmetic import convert, loss_function, make_optimizer
from mulfree_training.tasks.images import images_of
from mulfree_training.tasks.text import Characters

if TYPE_CHECKING:
    from common.trials import Trial
    from mulfree_training.config import TrialConfig

STEPS = 2
"""The second step of an optimizer is the usual one; the first makes its state."""


class Planted(torch.autograd.Function):
    """Does nothing, but multiplies in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.0


def batch_of(config: TrialConfig) -> tuple[Tensor, Tensor]:
    """Real inputs and targets: the first images, or the first characters, of the training split."""
    size, data = config.task.batch_size, config.data
    split = load(data)["train"]
    if config.task.workload == "images":
        x, y = images_of(split, config)
        return x[:size], y[:size]
    text, context = "".join(split[data.inputs]), config.model.context
    ids = Characters([text], config.model.vocab).encode([text[: size * context + 1]]).long()
    return ids[:-1].view(size, context), ids[1:].view(size, context)


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial; nothing in it is random but the initial weights.

    Returns:
        One dict a seed: `findings`, multiplying operations of two whole steps, and `found`, them by name;
        `planted_backward`, those found when one is planted in a backward pass; `energy_uj_<kind>` of one step and
        `cost_ratio_<what>`; with `task.kernels` also `machine_findings` and `ptx_findings` in the compiled kernels, and
        `planted_machine` and `planted_ptx`, those found where some were planted.
    """
    setup(config.threads, config.device, seed=config.seed)
    inputs, target = batch_of(config)
    rows = []
    for seed in trial.seeds:
        found = step_findings(config, seed, inputs, target, planted=False)
        planted = step_findings(config, seed, inputs, target, planted=True) - found
        counts = operation_count(step_of(config, seed, inputs, target), config.arithmetic)
        row: dict[str, Any] = {"seed": seed, "findings": sum(found.values()), "found": dict(found)}
        row |= {"planted_backward": sum(planted.values())} | cost(counts) | ratios(counts)
        rows.append(row | (scans() if config.task.kernels else {}))
    return rows
