"""Count what multiplies in a training step and in the compiled kernels, and what the step would cost (C4.proof, C8)."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from common.data import load
from common.kernels import native
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

SMOOTHING = 0.1
PLANTED_PTX = "mul.f32 %f1, %f2, %f3;\nfma.rn.f32 %f4, %f1, %f2, %f3;\ndiv.full.f32 %f5, %f4, %f1;\n"
PLANTED_SASS = "/*0010*/ FMUL R1, R2, R3 ;\n/*0020*/ FFMA R4, R1, R2, R3 ;\n/*0030*/ MUFU.RCP R5, R4 ;\n"
SASS = 90
"""Target whose machine code is disassembled (H100); that of the others takes as long again each."""
FEW = 3
"""Kernels of it where measurements are cut short."""
STEPS = 2
"""The second step of an optimizer is the usual one; the first makes its state."""


class _Planted(torch.autograd.Function):
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


def step_of(
    config: TrialConfig, seed: int, inputs: Tensor, target: Tensor, *, planted: bool = False
) -> Callable[[], None]:
    """A whole training step in the trial's arithmetic: forward pass, loss, backward pass, optimizer."""
    model = convert(build(config.model, seed), config.arithmetic)
    vision = config.task.workload == "images"
    loss_of = loss_function(config.arithmetic, SMOOTHING if vision else 0.0, "torch" if vision else "fairseq")
    optimizer = make_optimizer(model, config.optimizer, config.arithmetic)

    def step() -> None:
        logits = model(inputs)
        loss_of(_Planted.apply(logits) if planted else logits, target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def step_findings(step: Callable[[], None]) -> Counter[str]:
    """Multiplying operations of the first steps, by name."""
    with count_multiplications() as found:
        for _ in range(STEPS):
            step()
    return Counter(found)


def scans(few: bool = False) -> dict[str, Any]:
    """Multiplying instructions in the compiled kernels and in planted ones, where there is a compiler and Triton."""
    row: dict[str, Any] = {}
    if native.compiler("c++"):
        machine = scan_kernels()
        row["machine_findings"] = sum(len(scan.findings) for scan in machine.values())
        row["machine_instructions"] = sum(scan.instructions for scan in machine.values())
        row["planted_machine"] = len(scan_control().findings)
    if importlib.util.find_spec("triton"):
        from mulfree_training.kernels import aot, ptx

        kernels = ptx.scan_kernels(machine=False, workers=1)
        row |= {"ptx_findings": sum(len(scan.findings) for scan in kernels), "ptx_kernels": len(kernels)}
        row["planted_ptx"] = len(ptx.scan_ptx(PLANTED_PTX))
        codes = [ptx.machine_code(ptx.compiled(x, SASS).asm["cubin"]) for x in aot.KERNELS[: FEW if few else None]]
        disassembled = [ptx.scan_machine_code(code) for code in codes if code is not None]
        if len(disassembled) == len(codes):
            row |= {"sass_findings": sum(map(len, disassembled)), "sass_kernels": len(codes)}
            row["planted_sass"] = len(ptx.scan_machine_code(PLANTED_SASS))
    return row


def run(config: TrialConfig, trial: Trial) -> list[dict[str, Any]]:
    """One trial; nothing in it is random but the initial weights.

    Returns:
        One dict a seed: `findings`, multiplying operations of two whole steps, and `found`, them by name;
        `planted_backward`, those found more when one is planted in the backward pass; `energy_uj_<kind>` of one step
        and `cost_ratio_<what>`; with `task.kernels` also those in the compiled kernels, `machine_findings` in C++,
        `ptx_findings` and, for one GPU, `sass_findings`, and `planted_machine`, `planted_ptx` and `planted_sass`, those
        found where some were planted.
    """
    setup(config.threads, config.device, seed=config.seed)
    inputs, target = batch_of(config)
    rows = []
    for seed in trial.seeds:
        found = step_findings(step_of(config, seed, inputs, target))
        planted = step_findings(step_of(config, seed, inputs, target, planted=True))
        row: dict[str, Any] = {"seed": seed, "findings": found.total(), "found": dict(found)}
        row |= {"planted_backward": planted.total() - found.total()}
        counts = operation_count(step_of(config, seed, inputs, target))
        row |= cost(counts) | ratios(counts)
        rows.append(row | (scans(config.max_steps is not None) if config.task.kernels else {}))
    return rows
