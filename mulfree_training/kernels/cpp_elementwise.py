"""Binding of `elementwise.cpp`: the primitives on the CPU, bit for bit those of `reference`.

Operands are float32 of equal shapes and any strides (a broadcast one stays as small as it is); results are contiguous.
`shift` as in `bits.offset`. `level` is `avx512`, `avx2` or `generic`, by default the best of this processor. Every
function raises ValueError for shapes that differ, TypeError for another dtype, RuntimeError without a compiler.
"""

from __future__ import annotations

import ctypes
import functools
import struct

import torch
from torch import Tensor

from mulfree_training.kernels import cpp

_OPERATIONS = (
    "mul", "div", "slope", "mul_grad", "div_grad", "exp2", "exp2_grad", "log2", "log2_grad", "sqrt", "sqrt_grad"
)  # fmt: skip
(_MUL, _DIV, _SLOPE, _MUL_GRAD, _DIV_GRAD, _EXP2, _EXP2_GRAD, _LOG2, _LOG2_GRAD, _SQRT, _SQRT_GRAD) = range(11)
_FUNCTIONS = {"elementwise_run": (ctypes.c_char_p,)}
_DIMS = 8
# struct Numbers of the source; where there are no strides to pass, it ends before them
_FLAT, _STRIDED = struct.Struct("9q"), struct.Struct(f"{9 + 4 * _DIMS}q")


@functools.cache
def library(level: str | None = None) -> ctypes.CDLL | None:
    """The kernels built for an instruction set, by default the best of this processor; None without a compiler."""
    return cpp.library("elementwise.cpp", _FUNCTIONS, level or cpp.instruction_set())


def available() -> bool:
    """Could the kernels be built?"""
    return library(None) is not None


def mul(a: Tensor, b: Tensor, shift: int = 0, *, level: str | None = None) -> Tensor:
    """PAM(a, b), see `reference.mul`."""
    return _run(_MUL, (a, b), shift, level)


def div(a: Tensor, b: Tensor, shift: int = 0, *, level: str | None = None) -> Tensor:
    """PAD(a, b), see `reference.div`."""
    return _run(_DIV, (a, b), shift, level)


def slope(a: Tensor, b: Tensor, shift: int = 0, *, level: str | None = None) -> Tensor:
    """The derivative of PAM(a, b) with respect to a, see `reference.slope`."""
    return _run(_SLOPE, (a, b), shift, level)


def mul_grad(grad: Tensor, a: Tensor, b: Tensor, shift: int = 0, *, level: str | None = None) -> Tensor:
    """`slope` applied to `grad`, see `reference.mul_grad`."""
    return _run(_MUL_GRAD, (grad, a, b), shift, level)


def div_grad(grad: Tensor, a: Tensor, b: Tensor, shift: int = 0, *, level: str | None = None) -> Tensor:
    """The derivative of PAD(a, b) with respect to b, applied to `grad`, see `reference.div_grad`."""
    return _run(_DIV_GRAD, (grad, a, b), shift, level)


def exp2(x: Tensor, *, level: str | None = None) -> Tensor:
    """See `reference.exp2`."""
    return _run(_EXP2, (x,), 0, level)


def exp2_grad(grad: Tensor, x: Tensor, *, level: str | None = None) -> Tensor:
    """See `reference.exp2_grad`."""
    return _run(_EXP2_GRAD, (grad, x), 0, level)


def log2(x: Tensor, *, level: str | None = None) -> Tensor:
    """See `reference.log2`."""
    return _run(_LOG2, (x,), 0, level)


def log2_grad(grad: Tensor, x: Tensor, *, level: str | None = None) -> Tensor:
    """See `reference.log2_grad`."""
    return _run(_LOG2_GRAD, (grad, x), 0, level)


def sqrt(x: Tensor, *, level: str | None = None) -> Tensor:
    """See `reference.sqrt`."""
    return _run(_SQRT, (x,), 0, level)


def sqrt_grad(grad: Tensor, x: Tensor, *, level: str | None = None) -> Tensor:
    """See `reference.sqrt_grad`."""
    return _run(_SQRT_GRAD, (grad, x), 0, level)


def _run(operation: int, operands: tuple[Tensor, ...], shift: int, level: str | None) -> Tensor:
    first, last = operands[0], operands[-1]
    second = operands[1] if len(operands) == 3 else last
    shape, flat = first.shape, True
    for x in operands:
        if x.dtype is not torch.float32:
            raise TypeError(f"dtype={x.dtype}: must be float32")
        if x.shape != shape:
            raise ValueError(f"shape={tuple(x.shape)}: must be {tuple(shape)}, that of the first operand")
        flat = flat and x.is_contiguous()
    native = library(level)
    if native is None:
        raise RuntimeError("native=None: must be a library, but there is no C++ compiler")
    if not flat and (len(shape) > _DIMS or any(x.stride(-1) > 1 for x in operands)):
        # PyTorch transposes whole matrices faster than the kernel gathers their columns
        return _run(operation, tuple(x.contiguous() for x in operands), shift, level)
    # the former takes less time; the kernel writes float32, whatever PyTorch's default is
    out = torch.empty_like(first) if flat else torch.empty(shape, dtype=torch.float32, device=first.device)
    pointers = out.data_ptr(), first.data_ptr(), second.data_ptr(), last.data_ptr()
    head = (*pointers, operation, shift, torch.get_num_threads(), out.numel())
    if flat:
        native.elementwise_run(_FLAT.pack(*head, 0))
    else:
        rest = (0,) * (_DIMS - len(shape))
        strides = (*first.stride(), *rest, *second.stride(), *rest, *last.stride(), *rest)
        native.elementwise_run(_STRIDED.pack(*head, len(shape), *shape, *rest, *strides))
    return out
