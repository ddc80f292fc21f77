"""Layouts, patterns and the compensation constant."""

import math
import struct

import numpy as np
import pytest
import torch

from mulfree_training import bits
from mulfree_training.bits import FLOAT32, FLOAT64

NUMBERS = {torch.float32: np.float32, torch.float64: np.float64}


def integer(x, form):
    """Pattern of a number by NumPy."""
    return int(np.array(x, NUMBERS[form.dtype]).view(f"int{form.width}"))


@pytest.mark.parametrize("form", [FLOAT32, FLOAT64])
def test_constants_are_those_of_the_format(form):
    about = np.finfo(NUMBERS[form.dtype])
    assert form.one == integer(1.0, form)
    assert form.smallest == integer(about.smallest_normal, form)
    assert form.infinity == integer(np.inf, form) == integer(about.max, form) + 1
    assert form.sign == integer(-0.0, form)
    assert form.magnitude == ~form.sign
    assert form.mantissa == integer(2 - about.eps, form) - form.one
    assert form.exponent_bias == about.maxexp - 1
    assert form.fraction == about.nmant
    pattern = torch.tensor(form.nan, dtype=form.integer).view(form.dtype)
    assert pattern.isnan() and form.nan == integer(np.nan, form)


def test_constants_of_the_paper():
    assert FLOAT32.one == 0x3F800000 and FLOAT32.mantissa == 0x007FFFFF and FLOAT32.magnitude == 0x7FFFFFFF
    assert FLOAT32.smallest == 0x00800000 and FLOAT32.infinity == 0x7F800000 and FLOAT32.sign == -0x80000000
    assert FLOAT64.one == 0x3FF << 52


def test_layout_of_a_tensor():
    assert bits.layout(torch.ones(1)) is FLOAT32
    assert bits.layout(torch.ones(1).double()) is FLOAT64
    for dtype in (torch.float16, torch.bfloat16, torch.int32, torch.complex64):
        with pytest.raises(TypeError, match=rf"dtype={dtype}: must be float32 or float64"):
            bits.layout(torch.ones(1, dtype=dtype))


@pytest.mark.parametrize("x", [0.0, -0.0, 1.0, -1.0, 1.5, math.log2(math.e), 1e-40, -3e38, math.inf, -math.inf, 0.1])
def test_pattern(x):
    assert bits.pattern(x) == integer(x, FLOAT32)


def test_pattern_of_log2_e():
    assert bits.pattern(math.log2(math.e)) == 0x3FB8AA3B


@pytest.mark.parametrize("alpha", [1.0552, 1.04, 0.6, 1.999, 0.5001, 1])
def test_offset_is_the_distance_of_the_pattern_from_that_of_one(alpha):
    assert bits.offset(alpha) == integer(alpha, FLOAT32) - integer(1.0, FLOAT32)
    assert (bits.offset(alpha) > 0) == (alpha > 1)


def test_no_offset():
    assert bits.offset(None) == bits.offset(1.0) == 0


@pytest.mark.parametrize("alpha", [0.5, 2.0, 2, 0, -1.0, math.nan, math.inf, -math.inf, "1.05", 1j])
def test_offset_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"^alpha=.*: must be in \(0\.5, 2\), or None$"):
        bits.offset(alpha)


@pytest.mark.parametrize("alpha", [1.0552, 0.6, 1.0])
def test_an_offset_widened_is_that_of_the_same_number(alpha):
    shift = bits.offset(alpha)
    assert bits.widened(shift, FLOAT32) == shift
    wide = struct.unpack("<q", struct.pack("<d", float(np.float32(alpha))))[0]
    # below 1 the exponent is one less, in the pattern of either format
    assert bits.widened(shift, FLOAT64) == wide - FLOAT64.one
