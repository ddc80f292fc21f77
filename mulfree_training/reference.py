"""Piecewise affine arithmetic in nothing but integer operations of PyTorch: what every kernel must equal bit for bit.

Floating-point values occur only where the method has them: in sums, in x - floor(x), and in the exponent written out as
a float. There is no multiplication, no division and no elementary function in this file, on any device. float32 and
float64.

Special values, the same in all operations: an operand below the smallest normal number counts as zero; a result below
it is a signed zero; a result above the largest number is a signed infinity; inf * 0, 0 / 0, inf / inf and anything with
NaN is NaN; x / 0 is infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mulfree_training.bits import Layout, layout, widened

LANES = 16
"""Running sums of `row_sum`."""


def _patterns(x: Tensor, form: Layout) -> tuple[Tensor, Tensor]:
    """Pattern of x, and of |x| with subnormal numbers read as zero."""
    bits = x.contiguous().view(form.integer)
    size = bits & form.magnitude
    return bits, torch.where(size < form.smallest, 0, size)


def _clamped(size: Tensor, shift: Tensor, form: Layout) -> Tensor:
    """size + shift, at least 0 (underflow) and at most infinity; neither may wrap around."""
    over = (shift > 0) & (size >= form.infinity - shift)
    total = torch.where(over, form.infinity, size + torch.where(over, 0, shift))
    return torch.where(total < form.smallest, 0, total)


def mul(a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """PAM(a, b) of equal shapes: patterns added, the bias subtracted once, signs combined (equation of section 2).

    Args:
        a: float32 or float64.
        b: as a.
        shift: added to the pattern of every finite product (see `bits.offset`).
    """
    form = layout(a)
    (i, m), (j, n) = _patterns(a, form), _patterns(b, form)
    size = _clamped(m, n - form.one + widened(shift, form), form)
    zero, infinite = (m == 0) | (n == 0), (m == form.infinity) | (n == form.infinity)
    size = torch.where(zero, 0, torch.where(infinite, form.infinity, size))
    bad = (m > form.infinity) | (n > form.infinity) | (zero & infinite)
    return torch.where(bad, form.nan, size | ((i ^ j) & form.sign)).view(form.dtype)


def div(a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """PAD(a, b) of equal shapes, the inverse of PAM: patterns subtracted, the bias added once."""
    form = layout(a)
    (i, m), (j, n) = _patterns(a, form), _patterns(b, form)
    size = _clamped(m, form.one - n - widened(shift, form), form)
    zero, infinite = (m == 0) | (n == form.infinity), (m == form.infinity) | (n == 0)
    size = torch.where(zero, 0, torch.where(infinite, form.infinity, size))
    bad = (m > form.infinity) | (n > form.infinity) | (zero & infinite)
    return torch.where(bad, form.nan, size | ((i ^ j) & form.sign)).view(form.dtype)


def slope(a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """The derivative of PAM(a, b) with respect to a: sign(b) 2^(E_b + carry), a power of two.

    The carry is 1 where the mantissas add up to 1 or more (the right-hand segment at a kink). The mantissa of a zero,
    subnormal or infinite `a` counts as 0. b = 0 gives 0, infinite b infinity, NaN in either NaN.
    """
    form = layout(a)
    (_, m), (j, n) = _patterns(a, form), _patterns(b, form)
    size = _clamped(n, (m & form.mantissa) + widened(shift, form), form) & ~form.mantissa
    size = torch.where(n == 0, 0, torch.where(n == form.infinity, form.infinity, size))
    bad = (m > form.infinity) | (n > form.infinity)
    return torch.where(bad, form.nan, size | (j & form.sign)).view(form.dtype)


def mul_grad(grad: Tensor, a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """The exact derivative of PAM(a, b) with respect to a, applied to `grad`: a shift of its exponent."""
    return mul(grad, slope(a, b, shift))


def div_grad(grad: Tensor, a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """The exact derivative of y = PAD(a, b) with respect to b, applied to `grad`: slope -sign(a) 2^(E_y - E_b).

    (The derivative with respect to a is that of PAM(a, PAD(1, b)).)
    """
    y, b_power = div(a, b, shift), _power(b)
    # a power of two over a power of two is exact, and has the sign of a
    return -mul(grad, div(_power(y), b_power))


def _power(x: Tensor) -> Tensor:
    """sign(x) 2^E: x without its mantissa (infinities and NaN as they are)."""
    form = layout(x)
    bits, size = _patterns(x, form)
    return torch.where(size > form.infinity, bits, bits & ~form.mantissa).view(form.dtype)


def exp2(x: Tensor) -> Tensor:
    """2^floor(x) (1 + x - floor(x)); 0 below the smallest normal number, infinity from 128 (1024) on."""
    form = layout(x)
    # beyond these every result is 0 or infinity, and within them the integer below cannot overflow
    limit = float(2 * form.exponent_bias)
    clamped = x.clamp(-limit, limit)
    whole = clamped.floor()
    size = (1 + (clamped - whole)).view(form.integer)
    power = torch.where(x.isnan(), 0, whole).to(form.integer)
    size = _clamped(size, power << form.fraction, form)
    return torch.where(x.isnan(), form.nan, size).view(form.dtype)


def exp2_grad(grad: Tensor, x: Tensor) -> Tensor:
    """The exact derivative of `exp2`, applied to `grad`: slope 2^floor(x)."""
    return mul(grad, exp2(x.floor()))


def log2(x: Tensor) -> Tensor:
    """E + M; -inf at 0, NaN for negative x."""
    form = layout(x)
    bits, size = _patterns(x, form)
    exponent = ((size >> form.fraction) - form.exponent_bias).to(form.dtype)
    fraction = ((size & form.mantissa) | form.one).view(form.dtype) - 1
    y = torch.where(size == form.infinity, float("inf"), exponent + fraction)
    y = torch.where(size == 0, float("-inf"), y)
    return torch.where((size > form.infinity) | ((bits < 0) & (size > 0)), float("nan"), y)


def log2_grad(grad: Tensor, x: Tensor) -> Tensor:
    """The exact derivative of `log2`, applied to `grad`: slope 2^-E. grad / 0 at 0, NaN for negative x."""
    return torch.where(x < 0, float("nan"), div(grad, _power(x)))


def sqrt(x: Tensor) -> Tensor:
    """The square root with the exponent halved as a shift of the pattern; NaN for negative x."""
    form = layout(x)
    bits, size = _patterns(x, form)
    root = ((size - form.one) >> 1) + form.one
    root = torch.where(size == 0, 0, torch.where(size == form.infinity, form.infinity, root))
    bad = (size > form.infinity) | ((bits < 0) & (size > 0))
    return torch.where(bad, form.nan, root | (bits & form.sign)).view(form.dtype)


def sqrt_grad(grad: Tensor, x: Tensor) -> Tensor:
    """The exact derivative of `sqrt`, applied to `grad`: slope 2^(E_y - E_x - 1); NaN at 0, which has no slope."""
    half = torch.full_like(x, 0.5)
    return mul(mul(grad, half), div(_power(sqrt(x)), _power(x)))


def matmul(a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """Batched product (N, M, K) x (N, K, P) -> (N, M, P): PAM products added one by one in the order of K, from 0."""
    out = a.new_zeros(a.shape[0], a.shape[1], b.shape[2])
    for k in range(a.shape[2]):
        left, right = torch.broadcast_tensors(a[:, :, k : k + 1], b[:, k : k + 1, :])
        out = out + mul(left, right, shift)
    return out


def matmul_grad(grad: Tensor, a: Tensor, b: Tensor, shift: int = 0) -> Tensor:
    """The exact derivative of `matmul` with respect to a: (N, M, P), (N, M, K), (N, K, P) -> (N, M, K).

    Sum over p, in its order from 0, of `grad[m, p]` shifted by `slope(a[m, k], b[k, p])`. With all three transposed it
    is the derivative with respect to b, transposed: matmul_grad(grad^T, b^T, a^T)^T.
    """
    out = torch.zeros_like(a)
    for p in range(b.shape[2]):
        right = b[:, None, :, p].expand_as(a)
        out = out + mul_grad(grad[:, :, p : p + 1].expand_as(a), a, right, shift)
    return out


def row_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, (…, n) -> (…, 1), in an order that vector units follow on every machine.

    Sixteen running sums, each over every sixteenth entry in order and from 0; then the upper half of them is added to
    the lower half until one is left.
    """
    n = x.shape[-1]
    sums = x.new_zeros(*x.shape[:-1], LANES)
    for start in range(0, n, LANES):
        part = x[..., start : start + LANES]
        missing = LANES - part.shape[-1]
        sums = sums + (torch.nn.functional.pad(part, (0, missing)) if missing else part)
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[..., :half] + sums[..., half:]
    return sums
