"""Binding of `matmul.cpp`: the matrix product and its exact derivative on the CPU."""

from __future__ import annotations

import ctypes
import functools
import struct

import torch
from torch import Tensor

from mulfree_training.kernels import cpp

_FUNCTIONS = {"matmul_scratch": (ctypes.c_char_p, ctypes.c_void_p), "matmul_run": (ctypes.c_char_p,)}
_NUMBERS = struct.Struct("21q")  # struct Numbers of the source


# what the kernel writes, whatever dtype and device are PyTorch's default
_empty = functools.partial(torch.empty, dtype=torch.float32, device="cpu")


@functools.cache
def library(level: str | None = None) -> ctypes.CDLL | None:
    """The kernels built for an instruction set, by default the best of this processor; None without a compiler."""
    return cpp.library("matmul.cpp", _FUNCTIONS, level or cpp.instruction_set())


def available() -> bool:
    """Could the kernels be built?"""
    return library(None) is not None


def matmul(a: Tensor, b: Tensor, shift: int = 0, *, level: str | None = None) -> Tensor:
    """Batched product (N, M, K) x (N, K, P) -> (N, M, P), bit for bit `reference.matmul`.

    Args:
        a: float32 on the CPU, any strides.
        b: as a.
        shift: see `bits.offset`.
        level: `avx512`, `avx2` or `generic`; by default the best of this processor.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: another dtype.
        RuntimeError: there is no compiler.
    """
    n, m, k = a.shape
    if b.shape[0] != n or b.shape[1] != k:
        raise ValueError(f"b.shape={tuple(b.shape)}: must be ({n}, {k}, P) for a of shape {tuple(a.shape)}")
    out = _empty(n, m, b.shape[2])
    return _run(a, b, None, out, (n, m, k, b.shape[2]), shift, level)


def matmul_grad(grad: Tensor, a: Tensor, b: Tensor, shift: int = 0, *, level: str | None = None) -> Tensor:
    """The exact derivative of `matmul` with respect to a, (N, M, K), bit for bit `reference.matmul_grad`.

    Args:
        grad: (N, M, P) float32, any strides.
        a: (N, M, K).
        b: (N, K, P).
        shift: see `bits.offset`.
        level: see `matmul`.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: another dtype.
        RuntimeError: there is no compiler.
    """
    n, m, k = a.shape
    p = b.shape[2]
    if b.shape[0] != n or b.shape[1] != k:
        raise ValueError(f"b.shape={tuple(b.shape)}: must be ({n}, {k}, P) for a of shape {tuple(a.shape)}")
    if grad.shape != (n, m, p):
        raise ValueError(f"grad.shape={tuple(grad.shape)}: must be ({n}, {m}, {p})")
    out = _empty(n, m, k)
    return _run(grad, b.mT, a, out, (n, m, p, k), shift, level)


def _run(
    x: Tensor, y: Tensor, a: Tensor | None, out: Tensor, sizes: tuple[int, int, int, int], shift: int, level: str | None
) -> Tensor:
    if x.dtype is not torch.float32 or y.dtype is not torch.float32:
        raise TypeError(f"dtype={x.dtype}, {y.dtype}: must be float32")
    native = library(level)
    if native is None:
        raise RuntimeError("native=None: must be a library, but there is no C++ compiler")
    pointers = x.data_ptr(), y.data_ptr(), 0 if a is None else a.data_ptr(), out.data_ptr()
    tail = (*sizes, *x.stride(), *y.stride(), *((0, 0, 0) if a is None else a.stride()))
    tail = (*tail, shift, a is not None, torch.get_num_threads())
    words = ctypes.c_int64()
    native.matmul_scratch(_NUMBERS.pack(*pointers, 0, *tail), ctypes.byref(words))
    scratch = _empty(words.value, dtype=torch.int32)
    native.matmul_run(_NUMBERS.pack(*pointers, scratch.data_ptr(), *tail))
    return out
