"""Device, precision, accumulation, threads, seeds and processes of one training; Hugging Face accelerate underneath.

The papers keep their own loops. Under `torchrun --nproc_per_node N` the same loop runs on N processes: `distribute`
wraps the model, every process trains on its part of the batch, and gradients are averaged over processes.
"""

import contextlib
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from accelerate import Accelerator

Module = TypeVar("Module", bound=nn.Module)
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass
class Run:
    """The running environment of one training; made by `setup`."""

    accelerator: "Accelerator"
    """accelerate's own object, for everything that is not passed through here."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Is this the process that writes records?"""
        return self.accelerator.is_main_process

    def place(self, module: Module) -> Module:
        """Move a module to the device (build the optimizer after this)."""
        return module.to(self.device)

    def distribute(self, model: nn.Module) -> nn.Module:
        """Wrap a placed model for several processes and the chosen precision; the plain model where neither applies."""
        return self.accelerator.prepare_model(model)

    def prepare(self, *objects: Any) -> Any:
        """accelerate's prepare: models, optimizers, schedulers and loaders; float16 needs its optimizer in here."""
        return self.accelerator.prepare(*objects)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Mixed precision for code outside a distributed model's forward."""
        return self.accelerator.autocast()

    def accumulate(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """One micro-batch: `backward` divides by the number of them, processes synchronise on the last."""
        return self.accelerator.accumulate(model)

    def backward(self, loss: Tensor) -> None:
        """Backpropagate a scalar loss."""
        self.accelerator.backward(loss)

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor | None:
        """Clip the global gradient norm to `max_norm`; returns the norm before."""
        return self.accelerator.clip_grad_norm_(parameters, max_norm)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over processes, of the same shape on all of them."""
        return self.accelerator.reduce(value, reduction="mean") if self.world > 1 else value

    def wait(self) -> None:
        """Wait until every process is here."""
        self.accelerator.wait_for_everyone()


def setup(
    threads: int = 1,
    device: str = "auto",
    precision: str = "fp32",
    accumulate: int = 1,
    seed: int | None = None,
    deterministic: bool = True,
) -> Run:
    """Prepare the process for one training.

    Args:
        threads: CPU threads of PyTorch in this process, >= 1.
        device: "auto" (the GPU if there is one), "cpu", "cuda", "cuda:<index>" or "mps".
        precision: "fp32", "bf16" or "fp16" (mixed precision; parameters stay float32).
        accumulate: micro-batches a step, >= 1.
        seed: seeds Python, NumPy and PyTorch, shifted by the rank; None leaves them alone.
        deterministic: ask PyTorch for deterministic algorithms; where there is none it warns.

    Raises:
        ValueError: a value out of range, or a device that is not here.
    """
    if threads < 1:
        raise ValueError(f"threads={threads}: must be >= 1")
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate}: must be >= 1")
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: must be one of {', '.join(PRECISIONS)}")
    kind = _device_kind(device)
    torch.set_num_threads(threads)
    _determinism(deterministic)
    run = Run(_accelerator(kind, PRECISIONS[precision], accumulate))
    if kind.startswith("cuda:") and run.world == 1:
        torch.cuda.set_device(kind)
    if seed is not None:
        seed_everything(seed + run.rank)
    return run


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _device_kind(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not here.get(kind, False):
        raise ValueError(f"device={device}: must be one of auto, {', '.join(name for name, ok in here.items() if ok)}")
    return device


def _determinism(wanted: bool) -> None:
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    # else deterministic mode fills every torch.empty, which costs time and changes no result of correct code
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not wanted


def _accelerator(kind: str, mixed_precision: str, accumulate: int) -> "Accelerator":
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    if PartialState._shared_state and PartialState().num_processes == 1:
        # accelerate keeps one state a process; a worker runs many trials, each with its own device and precision
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    if kind == "cpu":
        # accelerate would take a GPU that is there, and MKL's variables for a sign of several processes
        return Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=accumulate)
    return Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=accumulate)
