"""Checks of what users pass, with messages that name the argument, its value and what is allowed."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shapes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """Check q (B, H, Tq, D), k (B, Hk, Tk, D) and v (B, Hk, Tk, Dv); return (B, H, Tq, Tk).

    Raises:
        TypeError: not tensors of one floating dtype.
        ValueError: shapes that do not fit, or several devices.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: must be a tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} of shape {tuple(x.shape)}: must be (batch, heads, length, head_dim)")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} of dtype {x.dtype}: must be one of float32, bfloat16, float16, float64")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k, v of dtypes {q.dtype}, {k.dtype}, {v.dtype}: must be the same")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v on devices {q.device}, {k.device}, {v.device}: must be the same")
    given = f"q, k, v of shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"{given}: must have the same batch (dimension 0)")
    if k.shape[1] != v.shape[1] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{given}: k and v must have the same heads (dimension 1), dividing the heads of q")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"{given}: k and v must have the same length (dimension 2)")
    if q.shape[3] != k.shape[3] or q.shape[3] == 0 or v.shape[3] == 0:
        raise ValueError(f"{given}: q and k must have the same head_dim (dimension 3), not 0")
    return q.shape[0], q.shape[1], q.shape[2], k.shape[2]


def autocast(x: Tensor) -> Tensor:
    """x in the dtype of `torch.autocast`, where that is on; float64 and what is not floating stay, as in PyTorch."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype is torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocasting(x.device.type) else x


def autocasting(device: str) -> bool:
    """Is `torch.autocast` on for this type of device (some, as meta, know none)?"""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def keep(name: str, mask: Tensor | None, shape: tuple[int, int, int], device: torch.device) -> Tensor | None:
    """Check a keep mask and give it three dimensions, broadcastable to (B, H, T).

    Raises:
        TypeError: not a bool tensor (floats of 0 and 1 are refused: they hide mistakes).
        ValueError: not broadcastable, or on another device.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} of type {found}: must be a tensor of torch.bool (True keeps the row)")
    return _fit(name, mask, shape, device)


def ids(name: str, hashes: Tensor, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Check bucket ids and give them three dimensions, broadcastable to (B, H, T).

    Raises:
        TypeError: not an integer tensor.
        ValueError: not broadcastable, or on another device.
    """
    integers(name, hashes)
    signed = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
    return _fit(name, hashes if hashes.dtype in signed else hashes.long(), shape, device)


def integers(name: str, hashes: Tensor) -> None:
    """Check that bucket ids are integers.

    Raises:
        TypeError: not an integer tensor.
    """
    found = hashes.dtype if isinstance(hashes, Tensor) else type(hashes).__name__
    if not isinstance(hashes, Tensor) or hashes.is_floating_point() or hashes.is_complex() or found is torch.bool:
        raise TypeError(f"{name} of type {found}: must be a tensor of integers (bucket ids, any values)")


def scaling(scale: float | None, head_dim: int) -> float:
    """1 / sqrt(D) unless given.

    Raises:
        TypeError: not a number.
        ValueError: not a finite number.
    """
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if not isinstance(scale, numbers.Real):
        raise TypeError(f"scale={scale!r}: must be a finite number or None")
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale}: must be a finite number")
    return float(scale)


def _fit(name: str, x: Tensor, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    if x.device != device:
        raise ValueError(f"{name} on device {x.device}: must be on {device}, as q is")
    wanted = f"must be broadcastable to (batch, heads, length) = {shape}"
    if x.ndim > 3 or (x.ndim and x.shape[-1] != shape[-1]):
        raise ValueError(f"{name} of shape {tuple(x.shape)}: {wanted}, with the length in full")
    try:
        torch.broadcast_to(x, shape)
    except RuntimeError:
        raise ValueError(f"{name} of shape {tuple(x.shape)}: {wanted}") from None
    return x.expand(shape[-1:] if x.ndim == 0 else x.shape)[(None,) * (3 - max(x.ndim, 1))]
