"""Binding of `ranges.cpp`: the attention on the CPU, built once by the system's compiler."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.kernels.native import load
from sparse_flash_attention.segments import Plan

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_DIM = 1024


_CALL = (ctypes.c_void_p, ctypes.c_float, ctypes.c_void_p, ctypes.c_void_p)
SOURCE = Path(__file__).with_name("ranges.cpp")
FUNCTIONS: dict[str, Sequence[Any]] = {
    "attention_forward": _CALL,
    "attention_backward": _CALL,
    "attention_scratch": (ctypes.c_void_p, ctypes.c_void_p),
    "attention_products": (ctypes.c_void_p, ctypes.c_void_p),
    "attention_lanes": (ctypes.c_void_p,),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None without a compiler (after one warning)."""
    return load(SOURCE, FUNCTIONS)


def refuses(q: Tensor, v: Tensor) -> str | None:
    """Why this face cannot serve queries and values like these, or None."""
    if not q.is_cpu:
        return f"needs tensors on the CPU, got {q.device}"
    if q.dtype not in TYPES:
        return f"needs float32, bfloat16 or float16, got {q.dtype}"
    if max(q.shape[3], v.shape[3]) > MAX_DIM:
        return f"needs head_dim <= {MAX_DIM}, got {max(q.shape[3], v.shape[3])}"
    return None if library() else "needs a C++ compiler (or COMMON_NATIVE is 0)"


def forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    """See `operator.planned_attention`."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    _call("attention_forward", (q, k, v, q), scale, (q, k, v, *plan, out, lse))
    return out, lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `operator.planned_attention`."""
    grad, q, k, v, out = _rows(grad), _rows(q), _rows(k), _rows(v), out.contiguous()
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    # float sums in rows of whole vectors: for float32 of usual widths they are the result itself
    dk, dv = (x.new_zeros(*x.shape[:3], -(-x.shape[3] // lanes()) * lanes(), dtype=torch.float32) for x in (k, v))
    _call("attention_backward", (q, k, v, grad), scale, (q, k, v, *plan, out, lse, grad, dq, dk, dv))
    return dq, dk[..., : k.shape[3]].to(k.dtype), dv[..., : v.shape[3]].to(v.dtype)


@functools.cache
def lanes() -> int:
    """Floats in a vector of this build."""
    found = ctypes.c_int64()
    native = library()
    assert native is not None
    native.attention_lanes(ctypes.byref(found))
    return found.value


@functools.cache
def product_rate() -> float:
    """Best measured operations per second of this build's matrix product on one thread."""
    native, times = library(), ctypes.c_int64(200)
    assert native is not None
    rows, width, keys = 96, 64, 128  # TILE, head_dim and BLOCK of the source
    memory = torch.ones(rows * width + width * keys + rows * keys)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        native.attention_products(memory.data_ptr(), ctypes.byref(times))
        seconds.append(time.perf_counter() - start)
    return 2 * rows * width * keys * times.value / min(seconds)


def _rows(x: Tensor) -> Tensor:
    """Rows must be contiguous; batch, head and row may have any stride."""
    return x if x.stride(3) == 1 else x.contiguous()


def _call(name: str, strided: tuple[Tensor, ...], scale: float, data: tuple[Tensor, ...]) -> None:
    q, k, v, _ = strided
    threads = torch.get_num_threads()
    numbers = [*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], TYPES[q.dtype], threads]
    numbers += [stride for x in strided for stride in x.stride()[:3]]
    sizes = (ctypes.c_int64 * len(numbers))(*numbers)
    floats = (ctypes.c_int64 * 2)()
    native = library()
    assert native is not None
    native.attention_scratch(sizes, floats)
    # through PyTorch's allocator, where a memory profile sees it
    scratch = torch.empty(floats[name == "attention_backward"], dtype=torch.float32)
    pointers = (ctypes.c_void_p * len(data))(*(x.data_ptr() for x in data))
    getattr(native, name)(sizes, scale, pointers, scratch.data_ptr())
