"""Bindings of `softmax.cpp`, `norm.cpp` and `adamw.cpp`: the functions of `formulas` over `reference`, fused in C++.

Tensors are float32; results are contiguous and have the shape of x. A row is the last dimension. `shift` as in
`bits.offset`. `level` is `avx512`, `avx2` or `generic`, by default the best of this processor. Every function raises
ValueError for shapes that do not fit, TypeError for another dtype, RuntimeError without a compiler.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any

import torch
from torch import Tensor

from mulfree_training.formulas import AdamWNumbers
from mulfree_training.kernels import cpp

_CALL = (ctypes.c_char_p,)
_SOURCES = {
    "softmax.cpp": ("softmax_run", "softmax_grad_run", "log_softmax_run", "log_softmax_grad_run"),
    "norm.cpp": ("layer_norm_run", "layer_norm_grad_run"),
    "adamw.cpp": ("adamw_run",),
}
_ROWS = struct.Struct("15qd")  # struct Rows of rows.h
_STEP = struct.Struct("6q7d")  # struct Numbers of adamw.cpp
_NEAR, _BUFFERS = 4096, 2  # as in rows.h
# what the kernels write, whatever dtype and device are PyTorch's default
_empty = functools.partial(torch.empty, dtype=torch.float32, device="cpu")


@functools.cache
def library(source: str, level: str | None = None) -> ctypes.CDLL | None:
    """The kernels of a source built for an instruction set, by default the best here; None without a compiler."""
    return cpp.library(source, dict.fromkeys(_SOURCES[source], _CALL), level or cpp.instruction_set())


def available() -> bool:
    """Could the kernels be built?"""
    return all(library(source) is not None for source in _SOURCES)


def softmax(x: Tensor, shift: int = 0, *, level: str | None = None) -> Tensor:
    """See `formulas.softmax`."""
    return _rows("softmax.cpp", "softmax_run", x, shift=shift, level=level)[0]


def softmax_grad(grad: Tensor, x: Tensor, shift: int = 0, exact: bool = False, *, level: str | None = None) -> Tensor:
    """See `formulas.softmax_grad`."""
    return _rows("softmax.cpp", "softmax_grad_run", x, grad, shift=shift, exact=exact, level=level)[0]


def log_softmax(x: Tensor, shift: int = 0, *, level: str | None = None) -> Tensor:
    """See `formulas.log_softmax`."""
    return _rows("softmax.cpp", "log_softmax_run", x, shift=shift, level=level)[0]


def log_softmax_grad(
    grad: Tensor, x: Tensor, shift: int = 0, exact: bool = False, exact_log2: bool = False, *, level: str | None = None
) -> Tensor:
    """See `formulas.log_softmax_grad`."""
    name = "log_softmax_grad_run"
    return _rows("softmax.cpp", name, x, grad, shift=shift, exact=exact, exact_log2=exact_log2, level=level)[0]


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    shift: int = 0,
    *,
    level: str | None = None,
) -> Tensor:
    """See `formulas.layer_norm`; weight and bias are (n,)."""
    return _rows("norm.cpp", "layer_norm_run", x, None, weight, bias, shift=shift, eps=eps, level=level)[0]


def layer_norm_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    shift: int = 0,
    exact: bool = False,
    *,
    level: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `formulas.layer_norm_grad`: the gradient of x, and that of the weight before the sum over rows."""
    name = "layer_norm_grad_run"
    return _rows("norm.cpp", name, x, grad, weight, shift=shift, eps=eps, exact=exact, level=level)


def _rows(
    source: str,
    name: str,
    x: Tensor,
    grad: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    shift: int,
    eps: float = 0.0,
    exact: bool = False,
    exact_log2: bool = False,
    level: str | None,
) -> tuple[Tensor, Tensor | None]:
    shape = x.shape
    if not shape:
        raise ValueError("x.shape=(): must have a last dimension")
    n = shape[-1]
    if grad is not None and grad.shape != shape:
        raise ValueError(f"grad.shape={tuple(grad.shape)}: must be {tuple(shape)}")
    for key, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.shape != (n,):
            raise ValueError(f"{key}.shape={tuple(given.shape)}: must be ({n},)")
    for given in (x, grad, weight, bias):
        if given is not None and given.dtype is not torch.float32:
            raise TypeError(f"dtype={given.dtype}: must be float32")
    native = library(source, level)
    if native is None:
        raise RuntimeError("native=None: must be a library, but there is no C++ compiler")
    plain = x.is_contiguous()
    out = torch.empty_like(x) if plain else _empty(shape)  # the former takes less time
    weight_out = _empty(shape) if grad is not None and weight is not None else None
    count = out.numel()
    if not count:
        return out, weight_out
    x, x_step = (x, n) if plain else _strided(x)
    grad, grad_step = (grad, n) if grad is None or grad.is_contiguous() else _strided(grad)
    weight = weight if weight is None else weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    threads = torch.get_num_threads()
    # where a memory profile sees it
    scratch = _empty(threads * _BUFFERS * (n + 15)) if n > _NEAR else None
    tensors = (out, weight_out, x, grad, weight, bias, scratch)
    pointers = (0 if given is None else given.data_ptr() for given in tensors)
    numbers = (count // n, n, x_step, grad_step, threads, shift, exact, exact_log2, eps)
    getattr(native, name)(_ROWS.pack(*pointers, *numbers))
    return out, weight_out


def _strided(x: Tensor) -> tuple[Tensor, int]:
    """x as a matrix of contiguous rows, a view where that can be, and the distance of its rows."""
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
    return flat, flat.stride(0)


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    numbers: AdamWNumbers,
    *,
    level: str | None = None,
) -> None:
    """`formulas.adamw` in place on every parameter and its moments, in one call.

    Args:
        params: contiguous float32 tensors.
        grads: as params.
        ms: as params.
        vs: as params.
        numbers: of the step.
        level: see above.

    Raises:
        ValueError: lists of unequal length, shapes that differ, or a tensor that is not contiguous.
        TypeError: another dtype.
        RuntimeError: there is no compiler.
    """
    columns: dict[str, Any] = {"params": params, "grads": grads, "ms": ms, "vs": vs}
    for key, tensors in columns.items():
        if len(tensors) != len(params):
            raise ValueError(f"len({key})={len(tensors)}: must be {len(params)}, that of params")
        for x, param in zip(tensors, params, strict=True):
            if x.dtype is not torch.float32:
                raise TypeError(f"dtype={x.dtype}: must be float32")
            if x.shape != param.shape:
                raise ValueError(f"{key}: shape={tuple(x.shape)}: must be {tuple(param.shape)}")
            if not x.is_contiguous():
                raise ValueError(f"{key}: strides={x.stride()}: must be those of a contiguous tensor")
    native = library("adamw.cpp", level)
    if native is None:
        raise RuntimeError("native=None: must be a library, but there is no C++ compiler")
    if not params:
        return
    counts = [x.numel() for x in params]
    array = ctypes.c_int64 * len(params)
    sizes = array(*counts)
    pointers = (ctypes.c_int64 * (4 * len(params)))(*(x.data_ptr() for tensors in columns.values() for x in tensors))
    head = (ctypes.addressof(sizes), ctypes.addressof(pointers), len(params), sum(counts), torch.get_num_threads())
    native.adamw_run(_STEP.pack(*head, numbers.decay != 0, *numbers))
