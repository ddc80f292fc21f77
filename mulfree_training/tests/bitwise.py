"""Operands for tests of the arithmetic, what equal means there, and the real-valued formulas of the paper.

The formulas take numbers apart with frexp, never as patterns, and compute in float64, where sums of float32 mantissas
are exact: an oracle that shares nothing with the implementation.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mulfree_training.bits import LAYOUTS, offset

LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_normal)
INF, NAN = math.inf, math.nan
ALPHAS = (None, 1.0552, 0.6, 1.9)
SHIFTS = [offset(alpha) for alpha in ALPHAS]
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}

_positive = [
    0.0, 2.0**-149, SMALLEST - 2.0**-149, SMALLEST, SMALLEST + 2.0**-149, 1.5 * SMALLEST, 2 * SMALLEST, 2.0**-64,
    2.0**-63, 1e-20, 1e-3, 0.25, 0.5, 1 - 2.0**-24, 1.0, 1 + 2.0**-23, 4 / 3, 1.5, 2 - 2.0**-23, 2.0, 3.0, 4.0, 126.5,
    127.99, 128.0, 149.0, 8388609.0, 3e9, 1e20, 2.0**63, 2.0**64, 2.0**126, 1.5 * 2.0**126, 2.0**127, LARGEST, INF,
]  # fmt: skip
SPECIAL = torch.tensor([*_positive, *(-x for x in _positive), NAN])
"""Zeros, both ends of the subnormal and of the normal numbers, powers of two and their neighbours, infinities, NaN."""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shapes, dtypes and patterns; -0 differs from 0, and no NaN from another."""
    return a.shape == b.shape and a.dtype == b.dtype and not _different(a, b).any()


def assert_same(found: Tensor, truth: Tensor, *operands: Tensor) -> None:
    """`same_bits`, or an error that shows the first place that differs."""
    assert found.dtype == truth.dtype, (found.dtype, truth.dtype)
    assert found.shape == truth.shape, (tuple(found.shape), tuple(truth.shape))
    wrong = _different(found, truth)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        given = [x[place].item() for x in operands]
        raise AssertionError(f"{int(wrong.sum())} differ, at {place}: {found[place]} for {truth[place]} of {given}")


def _different(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.detach(), b.detach()
    integer = INTEGERS[a.dtype]
    return (a.contiguous().view(integer) != b.contiguous().view(integer)) & ~(a.isnan() & b.isnan())


def pairs(x: Tensor, times: int = 2) -> tuple[Tensor, ...]:
    """All combinations of entries, a vector an operand."""
    return tuple(x.contiguous() for x in torch.cartesian_prod(*[x] * times).unbind(1))


def random_patterns(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every pattern as likely as any other: all exponents, subnormal numbers, infinities and NaN among them."""
    form = LAYOUTS[dtype]
    source = torch.Generator().manual_seed(seed)
    return torch.randint(form.sign, form.magnitude, (count,), generator=source, dtype=form.integer).view(dtype)


def ordinary(*shape: int, seed: int = 0, octaves: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random signs and mantissas, exponents from -octaves to octaves - 1."""
    source = torch.Generator().manual_seed(seed)
    mantissa = 1 + torch.rand(shape, generator=source, dtype=dtype) * (1 - 2.0**-20)
    exponent = torch.randint(-octaves, octaves, shape, generator=source)
    sign = 1 - 2 * torch.randint(0, 2, shape, generator=source)
    return torch.ldexp(mantissa, exponent) * sign


def powers(*shape: int, seed: int = 0, octaves: int = 4) -> Tensor:
    """Plus or minus 2^k with |k| <= octaves."""
    source = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-octaves, octaves + 1, shape, generator=source)
    return torch.ldexp(1.0 - 2 * torch.randint(0, 2, shape, generator=source), exponent)


def mantissa(x: Tensor) -> Tensor:
    """M of x = 2^E (1 + M), in float64."""
    return torch.from_numpy(_parts(x.detach().double().numpy())[1])


def inside(mantissas: Tensor, margin: float = 1e-3) -> Tensor:
    """Where a mantissa is further than `margin` from both ends of its octave, where segments meet."""
    return (mantissas > margin) & (mantissas < 1 - margin)


def _parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E (as integers) and M of |x| = 2^E (1 + M), for finite x other than 0."""
    half, exponent = np.frexp(np.abs(x))
    return exponent - 1, 2 * half - 1


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """PAM of finite numbers other than 0, the two cases of the paper; exact for float32 mantissas."""
    (e, m), (f, n) = _parts(a), _parts(b)
    size = np.where(m + n < 1, np.ldexp(1 + m + n, e + f), np.ldexp(m + n, e + f + 1))
    return np.sign(a) * np.sign(b) * size


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """PAD of finite numbers other than 0, the two cases of the paper; exact for float32 mantissas."""
    (e, m), (f, n) = _parts(a), _parts(b)
    size = np.where(m >= n, np.ldexp(1 + m - n, e - f), np.ldexp(2 + m - n, e - f - 1))
    return np.sign(a) * np.sign(b) * size


def power(x: np.ndarray) -> np.ndarray:
    """exp2 of finite x."""
    whole = np.floor(x)
    return np.ldexp(1 + (x - whole), whole.astype(int))


def logarithm(x: np.ndarray) -> np.ndarray:
    """log2 of finite x > 0; exact for float32 mantissas."""
    exponent, rest = _parts(x)
    return exponent + rest


def root(x: np.ndarray) -> np.ndarray:
    """exp2(log2(x) / 2) of finite x > 0; exact for float32 mantissas."""
    return power(logarithm(x) / 2)


def rounded(x: np.ndarray) -> Tensor:
    """float64 to float32: to the nearest, 0 below the smallest normal number, infinity above the largest."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.where(np.abs(x) < SMALLEST, np.copysign(0.0, x), x).astype(np.float32))
