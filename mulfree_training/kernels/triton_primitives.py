# mypy: disallow-untyped-defs=False
"""The primitives of `reference` on blocks of float32 patterns (int32), for use inside Triton kernels.

Line by line the same integer operations. Floats occur where the method has them: in x - floor(x), 1 + f and E + M.
"""

import triton
import triton.language as tl

from mulfree_training.bits import FLOAT32

FRACTION = tl.constexpr(FLOAT32.fraction)
EXPONENT_BIAS = tl.constexpr(FLOAT32.exponent_bias)
LIMIT = tl.constexpr(2.0 * FLOAT32.exponent_bias)
BIAS = tl.constexpr(FLOAT32.one)
SIGN = tl.constexpr(FLOAT32.sign)
ABS = tl.constexpr(FLOAT32.magnitude)
MANT = tl.constexpr(FLOAT32.mantissa)
POWER = tl.constexpr(~FLOAT32.mantissa)
MIN = tl.constexpr(FLOAT32.smallest)
INF = tl.constexpr(FLOAT32.infinity)
MINUS_INF = tl.constexpr(FLOAT32.infinity | FLOAT32.sign)
NAN = tl.constexpr(FLOAT32.nan)
HALF = tl.constexpr(FLOAT32.one - FLOAT32.smallest)


@triton.jit
def magnitude(i):
    """Pattern of |x|, subnormal numbers read as zero."""
    size = i & ABS
    return tl.where(size < MIN, 0, size)


@triton.jit
def clamped(size, shift):
    """size + shift, at least 0 (underflow) and at most infinity; where the sum wraps around it is not used."""
    over = (shift > 0) & (shift - INF + size >= 0)
    total = tl.where(over, INF, shift + size)
    return tl.where(total < MIN, 0, total)


@triton.jit
def product(i, j, shift):
    """`reference.mul`."""
    m, n = magnitude(i), magnitude(j)
    size = clamped(m, n - BIAS + shift)
    zero, infinite = (m == 0) | (n == 0), (m == INF) | (n == INF)
    size = tl.where(zero, 0, tl.where(infinite, INF, size))
    bad = (m > INF) | (n > INF) | (zero & infinite)
    return tl.where(bad, NAN, size | ((i ^ j) & SIGN))


@triton.jit
def quotient(i, j, shift):
    """`reference.div`."""
    m, n = magnitude(i), magnitude(j)
    size = clamped(m, -n + BIAS - shift)
    zero, infinite = (m == 0) | (n == INF), (m == INF) | (n == 0)
    size = tl.where(zero, 0, tl.where(infinite, INF, size))
    bad = (m > INF) | (n > INF) | (zero & infinite)
    return tl.where(bad, NAN, size | ((i ^ j) & SIGN))


@triton.jit
def slope(i, j, shift):
    """`reference.slope`."""
    m, n = magnitude(i), magnitude(j)
    size = clamped(n, (m & MANT) + shift) & POWER
    size = tl.where(n == 0, 0, tl.where(n == INF, INF, size))
    bad = (m > INF) | (n > INF)
    return tl.where(bad, NAN, size | (j & SIGN))


@triton.jit
def power(i):
    """sign(x) 2^E; infinities and NaN as they are."""
    return tl.where((i & ABS) > INF, i, tl.where((i & ABS) < MIN, i & SIGN, i & POWER))


@triton.jit
def product_grad(g, i, j, shift):
    """`reference.mul_grad`."""
    return product(g, slope(i, j, shift), 0)


@triton.jit
def quotient_grad(g, i, j, shift):
    """`reference.div_grad`; the sign is flipped as a bit, for `-x` of a float is 0 - x in Triton."""
    return product(g, quotient(power(quotient(i, j, shift)), power(j), 0), 0) ^ SIGN


@triton.jit
def _whole(i):
    """x as a float and floor(x) as an integer, x first brought within the limit; and where x is not a number.

    Beyond the limit every power is 0 or infinity, and within it no integer overflows. Not `tl.floor`: a GPU reads
    subnormal numbers as zero there, so that the floor of a small negative number would be 0.
    """
    missing = (i & ABS) > INF
    x = tl.where(missing, 0, i).to(tl.float32, bitcast=True)
    x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    whole = x.to(tl.int32)
    return x, tl.where(x < whole.to(tl.float32), whole - 1, whole), missing


@triton.jit
def exp2(i):
    """`reference.exp2`."""
    x, whole, missing = _whole(i)
    size = (1.0 + (x - whole.to(tl.float32))).to(tl.int32, bitcast=True)
    return tl.where(missing, NAN, clamped(size, whole << FRACTION))


@triton.jit
def exp2_grad(g, i):
    """`reference.exp2_grad`; the power of an integer has no mantissa."""
    _, whole, missing = _whole(i)
    return product(g, tl.where(missing, NAN, clamped(BIAS, whole << FRACTION)), 0)


@triton.jit
def log2(i):
    """`reference.log2`."""
    size = magnitude(i)
    exponent = ((size >> FRACTION) - EXPONENT_BIAS).to(tl.float32)
    fraction = ((size & MANT) | BIAS).to(tl.float32, bitcast=True) - 1.0
    y = (exponent + fraction).to(tl.int32, bitcast=True)
    y = tl.where(size == INF, INF, y)
    y = tl.where(size == 0, MINUS_INF, y)
    return tl.where((size > INF) | ((i < 0) & (size > 0)), NAN, y)


@triton.jit
def log2_grad(g, i):
    """`reference.log2_grad`."""
    return tl.where((i < 0) & ((i & ABS) != 0), NAN, quotient(g, power(i), 0))


@triton.jit
def sqrt(i):
    """`reference.sqrt`."""
    size = magnitude(i)
    root = ((size - BIAS) >> 1) + BIAS
    root = tl.where(size == 0, 0, tl.where(size == INF, INF, root))
    return tl.where((size > INF) | ((i < 0) & (size > 0)), NAN, root | (i & SIGN))


@triton.jit
def sqrt_grad(g, i):
    """`reference.sqrt_grad`."""
    return product(product(g, HALF, 0), quotient(power(sqrt(i)), power(i), 0), 0)
