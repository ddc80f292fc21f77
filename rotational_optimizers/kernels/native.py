"""Binding of `rows.c`: one call does the rotational step of all tensors of a model, a row at a time, in one pass.

The tensors travel as two tables, addresses and sizes (int64) and constants (double), one line a tensor.
"""

import ctypes
import functools
from array import array
from pathlib import Path

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


def fits(*tensors: Tensor) -> bool:
    """Can the kernel work on these in place: float32 on the CPU, contiguous?"""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)


class Batch:
    """The tensors of one step, collected and then stepped by one call."""

    def __init__(self) -> None:
        self._words = array("q")
        self._numbers = array("d")
        self._alive: list[Tensor | None] = []
        self._count = 0

    def add(
        self, weight: Tensor, grad: Tensor, moments: tuple[Tensor, ...], norm: Tensor, update_norm_sq: Tensor,
        speed: Tensor | None, *, kind: int, zero_mean: bool, rotation: float, decay: float, correction: float,
        scale: float, lr: float, weight_decay: float, maximize: bool, constants: tuple[float, ...],
    ) -> None:  # fmt: skip
        """Queue one tensor; all arguments as in `rows.c`, weights as (K, n) in memory with K = norm.numel()."""
        grad = grad.to(torch.float32).contiguous()
        speed = None if speed is None else speed.to(torch.float32).contiguous()
        first, second = (*(m.data_ptr() for m in moments), 0, 0)[:2]
        rows = norm.numel()
        self._words.extend((
            weight.data_ptr(), grad.data_ptr(), first, second, norm.data_ptr(), update_norm_sq.data_ptr(),
            0 if speed is None else speed.data_ptr(), rows, weight.numel() // rows, kind, zero_mean,
        ))  # fmt: skip
        self._numbers.extend((rotation, decay, correction, scale, lr, weight_decay, -1.0 if maximize else 1.0))
        self._numbers.extend((*constants, *[0.0] * (CONSTANTS - len(constants))))
        # the table holds bare addresses: copies made here must outlive the call
        self._alive += [grad, speed]
        self._count += 1

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
