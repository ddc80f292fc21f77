"""How a float is laid out as an integer, and the constants that piecewise affine arithmetic adds and compares.

For a normal x, |x| = 2^E (1 + M) with 0 <= M < 1; the pattern without its sign is (E + bias) followed by M, so read as
an integer it is, up to a shift, E + M: a piecewise affine log2 |x| (section 2 of the paper; Mogami 2020).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A binary floating-point format seen as integers of the same width."""

    dtype: torch.dtype
    integer: torch.dtype
    width: int
    """Bits in all."""
    fraction: int
    """Bits of the mantissa M."""

    @property
    def exponent_bias(self) -> int:
        """Stored exponent of 1.0: 127 or 1023."""
        return 2 ** (self.width - self.fraction - 2) - 1

    @property
    def one(self) -> int:
        """Pattern of 1.0, the bias that a product subtracts (BIAS)."""
        return self.exponent_bias << self.fraction

    @property
    def sign(self) -> int:
        """The sign bit, as a (negative) integer of this width."""
        return -(1 << (self.width - 1))

    @property
    def magnitude(self) -> int:
        """All bits but the sign (ABS)."""
        return (1 << (self.width - 1)) - 1

    @property
    def mantissa(self) -> int:
        """The bits of M (MANT)."""
        return (1 << self.fraction) - 1

    @property
    def smallest(self) -> int:
        """Pattern of the smallest normal number (MIN); what is below counts as zero."""
        return 1 << self.fraction

    @property
    def infinity(self) -> int:
        """Pattern of infinity (INF); what is above is not a number."""
        return self.magnitude ^ self.mantissa

    @property
    def nan(self) -> int:
        """Pattern of the quiet NaN that the operations return."""
        return self.infinity | (1 << (self.fraction - 1))


FLOAT32 = Layout(torch.float32, torch.int32, 32, 23)
FLOAT64 = Layout(torch.float64, torch.int64, 64, 52)
LAYOUTS = {torch.float32: FLOAT32, torch.float64: FLOAT64}


def layout(x: Tensor) -> Layout:
    """The layout of a float32 or float64 tensor.

    Raises:
        TypeError: another dtype.
    """
    if x.dtype not in LAYOUTS:
        raise TypeError(f"dtype={x.dtype}: must be float32 or float64")
    return LAYOUTS[x.dtype]


def pattern(x: float) -> int:
    """The float32 pattern of a Python number, as a signed integer."""
    return struct.unpack("<i", struct.pack("<f", x))[0]


def offset(alpha: float | None) -> int:
    """What the compensation constant alpha adds to every float32 product's pattern: i(alpha) - BIAS; 0 for None.

    Raises:
        ValueError: alpha is not in (0.5, 2).
    """
    if alpha is None:
        return 0
    if not (isinstance(alpha, (int, float)) and 0.5 < alpha < 2):
        raise ValueError(f"alpha={alpha!r}: must be in (0.5, 2), or None")
    return pattern(alpha) - FLOAT32.one


def widened(shift: int, form: Layout) -> int:
    """An `offset`, given for float32, in another layout."""
    return shift << (form.fraction - FLOAT32.fraction)
