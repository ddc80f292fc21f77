"""The face of plain PyTorch, for any device and without a compiler.

A matrix product takes one broadcast sum of patterns and one float sum for each step of the inner index.
That is all as long as operands and results are normal numbers, for then the signs multiply by themselves in the sum of
the patterns. Zeros and products below the smallest normal number are masked out (a sum that starts at +0 does not see
a zero of either sign); where infinities, NaN or overflow are possible, the reference takes over. The ranges of the
operands decide. Temporaries are as large as the result, whatever the inner dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mulfree_training import reference
from mulfree_training.bits import FLOAT32
from mulfree_training.reference import (
    div,
    div_grad,
    exp2,
    exp2_grad,
    log2,
    log2_grad,
    mul,
    mul_grad,
    slope,
    sqrt,
    sqrt_grad,
)

__all__ = [
    "div", "div_grad", "exp2", "exp2_grad", "log2", "log2_grad", "matmul", "matmul_grad", "mul", "mul_grad", "slope",
    "sqrt", "sqrt_grad",
]  # fmt: skip

BIAS, MIN, INF, ABS, MANT = FLOAT32.one, FLOAT32.smallest, FLOAT32.infinity, FLOAT32.magnitude, FLOAT32.mantissa
MAX = ABS  # above every magnitude


class _Range(NamedTuple):
    """Magnitudes of a tensor: the smallest normal one, the largest, and is any below the normal ones."""

    low: int
    high: int
    zero: bool


def _ranges(*tensors: Tensor) -> list[_Range]:
    """Of tensors that are not empty; one transfer from the device for all."""
    found = []
    for x in tensors:
        size = x.view(torch.int32) & ABS
        found += [torch.where(size < MIN, MAX, size).amin(), size.amax(), size.amin()]
    numbers = torch.stack(found).tolist()
    return [_Range(low, high, least < MIN) for low, high, least in zip(*[iter(numbers)] * 3, strict=True)]


def _limits(x: Tensor, bias: int) -> Tensor:
    """Largest magnitude of the other factor whose product with x is zero; MAX for a zero x."""
    size = x.view(torch.int32) & ABS
    return torch.where(size < MIN, MAX, (MIN + bias - size).clamp(min=MIN) - 1)


def _keep_above(total: Tensor, size: Tensor, limit: Tensor, scratch: Tensor) -> None:
    """Zero the entries of `total` where size <= limit: with the sign of a difference, for masked_fill is slow."""
    torch.sub(limit, size, out=scratch)
    scratch >>= 31
    total &= scratch


def matmul(a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """Batched product (N, M, K) x (N, K, P) -> (N, M, P) of float32, bit for bit `reference.matmul`."""
    out = a.new_zeros(a.shape[0], a.shape[1], b.shape[2])
    if not a.numel() or not b.numel():
        return out
    bias = BIAS - shift
    left, right = _ranges(a, b)
    if max(left.high, right.high, left.high + right.high - bias) >= INF:
        return reference.matmul(a, b, shift)
    columns, rows = a.view(torch.int32), b.view(torch.int32) - bias  # (N, M, K), (N, K, P)
    total = torch.empty_like(out, dtype=torch.int32)
    masked = left.zero or right.zero or left.low + right.low - bias < MIN
    tests = (columns & ABS, _limits(b, bias), torch.empty_like(total)) if masked else None
    for k in range(a.shape[2]):
        torch.add(columns[:, :, k : k + 1], rows[:, k : k + 1], out=total)  # (N, M, P)
        if tests:
            sizes, limits, scratch = tests
            _keep_above(total, sizes[:, :, k : k + 1], limits[:, k : k + 1], scratch)
        out += total.view(torch.float32)
    return out


def matmul_grad(grad: Tensor, a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """The exact derivative of `matmul` with respect to a, (N, M, K) float32, bit for bit `reference.matmul_grad`."""
    out = torch.zeros_like(a, memory_format=torch.contiguous_format)
    if not a.numel() or not b.numel():
        return out
    given, own, other = _ranges(grad, a, b)
    # a slope has at most one exponent more than b, and a shift below 1 takes at most one from it
    most, least = other.high + MIN + max(shift, 0), other.low - (MIN if shift < 0 else 0)
    if own.high > INF or max(given.high, most, given.high - BIAS + most) >= INF:
        return reference.matmul_grad(grad, a, b, shift)
    size = a.view(torch.int32) & ABS
    mantissa = torch.where(size < MIN, 0, size & MANT)  # (N, M, K)
    bits = b.view(torch.int32)
    # a zero has no shift, so that its slope stays below every limit
    rows = torch.where((bits & ABS) < MIN, 0, bits + shift).mT.contiguous()  # (N, P, K)
    scaled = grad.view(torch.int32) - BIAS  # (N, M, P)
    total = torch.empty_like(out, dtype=torch.int32)
    masked = given.zero or other.zero or least < 2 * MIN or given.low - BIAS + least - MIN < MIN
    tests = (torch.empty_like(total), _limits(grad, BIAS), torch.empty_like(total)) if masked else None
    for p in range(b.shape[2]):
        torch.add(mantissa, rows[:, p : p + 1], out=total)  # (N, M, K)
        total &= ~MANT
        if tests:
            torch.bitwise_and(total, ABS, out=tests[0])
        total += scaled[:, :, p : p + 1]
        if tests:
            sizes, limits, scratch = tests
            _keep_above(total, sizes, limits[:, :, p : p + 1], scratch)
        out += total.view(torch.float32)
    return out
