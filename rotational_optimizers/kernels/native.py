"""Binding of `rows.c`: one call does the rotational step of all tensors of a model, a row at a time, in one pass.

The tensors travel as two tables, addresses and sizes (int64) and constants (double), one line a tensor.
"""

import ctypes
import functools
from array import array
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from common.kernels.native import load

ADAMW, SGD, GRADIENT, LION = range(4)
CONSTANTS = 5


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None without a compiler."""
    arguments = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(ctypes.c_int64)]
    return load(Path(__file__).with_name("rows.c"), {"rotational_step": arguments})


def fits(weight: Tensor, moments: tuple[Tensor, ...]) -> bool:
    """Can the kernel work on these in place: float32 on the CPU, contiguous?"""
    return weight.is_cpu and all(t.dtype is torch.float32 and t.is_contiguous() for t in (weight, *moments))


class Rule(NamedTuple):
    """What all tensors of a group that are at the same step share; ordered as in `rows.c`."""

    kind: int
    zero_mean: bool
    rotation: float  # radians
    decay: float  # f
    correction: float  # 1 − f^t
    scale: float  # the base optimizer's direction over the kernel's
    lr: float
    weight_decay: float
    sign: float  # −1 to maximise
    constants: tuple[float, ...]


class Batch:
    """The tensors of one step, collected and then stepped by one call."""

    def __init__(self) -> None:
        self._words = array("q")
        self._numbers = array("d")
        self._alive: list[Tensor] = []
        self._count = 0

    def add(
        self, weight: Tensor, grad: Tensor, moments: tuple[Tensor, ...], norm: Tensor, update_norm_sq: Tensor,
        speed: Tensor | None, rule: Rule,
    ) -> None:  # fmt: skip
        """Queue one tensor, (K, n) in memory with K = norm.numel(); float32 but for `grad` and `speed`."""
        if grad.dtype is not torch.float32 or not grad.is_contiguous():
            grad = self._keep(grad.to(torch.float32).contiguous())
        speeds = 0 if speed is None else self._keep(speed.to(torch.float32).contiguous()).data_ptr()
        first, second, *_ = (*[moment.data_ptr() for moment in moments], 0, 0)
        rows = norm.numel()
        addresses = (weight.data_ptr(), grad.data_ptr(), first, second, norm.data_ptr(), update_norm_sq.data_ptr())
        self._words.extend((*addresses, speeds, rows, weight.numel() // rows, rule.kind, rule.zero_mean))
        padding = (0.0,) * (CONSTANTS - len(rule.constants))
        self._numbers.extend((*rule[2:-1], *rule.constants, *padding))
        self._count += 1

    def _keep(self, tensor: Tensor) -> Tensor:
        """The tables hold bare addresses: what is made here must live until the call."""
        self._alive.append(tensor)
        return tensor

    def run(self) -> None:
        """Step everything queued.

        Raises:
            MemoryError: no memory for the work list; nothing was stepped.
        """
        if self._count == 0:
            return
        kernel = library()
        assert kernel is not None
        failed = ctypes.c_int64(0)
        addresses = (self._words.buffer_info()[0], self._numbers.buffer_info()[0])
        kernel.rotational_step(self._count, *addresses, torch.get_num_threads(), ctypes.byref(failed))
        if failed.value:
            raise MemoryError("rotational step: no memory for the work list; no parameter was changed")
