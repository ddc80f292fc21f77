"""Piecewise affine multiplication, division, exp2, log2, exp, log, sqrt and powers, differentiable.

All take float32 tensors (bfloat16: in float32, rounded once; float64: with the reference only), broadcast like their
namesakes in torch, and treat special values as `reference` says. `alpha` is the compensation constant of section 2.7:
every product is in turn multiplied with it, every quotient divided by it; None leaves it out.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from mulfree_training.arguments import DTYPES, Rule, Rules, are_exact, check_dtype, check_pair, in_single, is_exact
from mulfree_training.autograd import OfOne, OfTwo, once_differentiable
from mulfree_training.bits import offset
from mulfree_training.operators import ops

LOG2E = math.log2(math.e)


class _Mul(OfTwo):
    """PAM of equal shapes."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, shift: int, exact: tuple[bool, bool], backend: str) -> Tensor:
        return ops.mul(a, b, shift, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), (shift, exact, backend) = saved, ctx.rest
        ga = gb = None
        if ctx.needs_input_grad[0]:
            ga = ops.mul_grad(grad, a, b, shift, backend) if exact[0] else ops.mul(grad, b, shift, backend)
        if ctx.needs_input_grad[1]:
            gb = ops.mul_grad(grad, b, a, shift, backend) if exact[1] else ops.mul(grad, a, shift, backend)
        return ga, gb, None, None, None


class _Div(OfTwo):
    """PAD of equal shapes."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, shift: int, exact: tuple[bool, bool], backend: str) -> Tensor:
        return ops.div(a, b, shift, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        (a, b), (shift, exact, backend) = saved, ctx.rest
        ga = gb = None
        if ctx.needs_input_grad[0]:
            inverse = ops.div(torch.ones_like(b), b, shift, backend)
            ga = ops.mul_grad(grad, a, inverse, 0, backend) if exact[0] else ops.mul(inverse, grad, shift, backend)
        if ctx.needs_input_grad[1]:
            if exact[1]:
                gb = ops.div_grad(grad, a, b, shift, backend)
            else:
                ratio = ops.div(ops.div(a, b, shift, backend), b, shift, backend)
                gb = -ops.mul(ratio, grad, shift, backend)
        return ga, gb, None, None, None


class _Exp2(torch.autograd.Function):
    """Base 2 exponential; `natural` leaves out the factor ln 2 of the approximate rule, for exp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, shift: int, exact: bool, natural: bool, backend: str) -> Tensor:
        return ops.exp2(x, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.rest = inputs
        ctx.save_for_backward(x, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, y), (shift, exact, natural, backend) = saved, ctx.rest
        if exact:
            return ops.exp2_grad(grad, x, backend), None, None, None, None
        slope = y if natural else ops.mul(y, _filled(y, math.log(2)), shift, backend)
        return ops.mul(slope, grad, shift, backend), None, None, None, None


class _Log2(OfOne):
    """Base 2 logarithm; `natural` as in `_Exp2`, for log."""

    @staticmethod
    def forward(x: Tensor, shift: int, exact: bool, natural: bool, backend: str) -> Tensor:
        return ops.log2(x, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (shift, exact, natural, backend) = saved, ctx.rest
        if exact:
            return ops.log2_grad(grad, x, backend), None, None, None, None
        gx = ops.div(grad, x, shift, backend)
        if not natural:
            gx = ops.div(gx, _filled(gx, math.log(2)), shift, backend)
        return gx, None, None, None, None


class _Sqrt(torch.autograd.Function):
    """Square root by a shift of the pattern."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, shift: int, exact: bool, backend: str) -> Tensor:
        return ops.sqrt(x, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *ctx.rest = inputs
        ctx.save_for_backward(x, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, y), (shift, exact, backend) = saved, ctx.rest
        if exact:
            return ops.sqrt_grad(grad, x, backend), None, None, None
        half = ops.mul(grad, _filled(grad, 0.5), 0, backend)  # a shift of the exponent, exact
        return ops.div(half, y, shift, backend), None, None, None


class _Pow(OfOne):
    """exp2(PAM(log2 x, p)), derived step by step, but for x = 0 as x^p: the steps there give 0 / 0."""

    @staticmethod
    def forward(x: Tensor, p: float, shift: int, exact: bool, backend: str) -> Tensor:
        return ops.exp2(ops.mul(ops.log2(x, backend), _filled(x, p), shift, backend), backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), (p, shift, exact, backend) = saved, ctx.rest
        u, factor, ln2 = ops.log2(x, backend), _filled(x, p), _filled(x, math.log(2))
        v = ops.mul(u, factor, shift, backend)
        if exact:
            gv = ops.exp2_grad(grad, v, backend)
            gx = ops.log2_grad(ops.mul_grad(gv, u, factor, shift, backend), x, backend)
        else:
            slope = ops.mul(ops.exp2(v, backend), ln2, shift, backend)
            gu = ops.mul(ops.mul(slope, grad, shift, backend), factor, shift, backend)
            gx = ops.div(ops.div(gu, x, shift, backend), ln2, shift, backend)
        at_zero = 0.0 if p > 1 or p == 0 else 1.0 if p == 1 else math.copysign(math.inf, p)
        # log2 takes numbers below the normal ones for 0 as well
        return torch.where(u == -math.inf, ops.mul(grad, _filled(x, at_zero), 0, backend), gx), None, None, None, None


def pam_mul(
    a: Tensor | float, b: Tensor | float, *, derivative: Rules = "approx", alpha: float | None = None, backend: str = ""
) -> Tensor:
    """Piecewise affine product (equation of section 2.1): exact if a factor is a power of two, else up to 1/9 small.

    Args:
        a: float32, bfloat16 or float64, or a real number of Python or NumPy (one of the two is a tensor).
        b: as a; shapes broadcast.
        derivative: `approx` or `exact`, or a pair of them, one an operand.
        alpha: see the module.
        backend: forces a face: `cpp`, `triton`, `torch` or `reference`; "" picks by device.

    Raises:
        TypeError: other dtypes, or two different ones.
        ValueError: shapes that do not broadcast, an unknown rule, or a face that cannot serve the call.
    """
    return _binary(_Mul, a, b, derivative, alpha, backend)


def pam_div(
    a: Tensor | float, b: Tensor | float, *, derivative: Rules = "approx", alpha: float | None = None, backend: str = ""
) -> Tensor:
    """Piecewise affine quotient, the inverse of `pam_mul`: up to 1/8 large. Arguments and errors as there."""
    return _binary(_Div, a, b, derivative, alpha, backend)


def pam_exp2(x: Tensor, *, derivative: Rule = "approx", alpha: float | None = None, backend: str = "") -> Tensor:
    """2^floor(x) (1 + x - floor(x)), at most 6.2 % above 2^x. Arguments and errors as in `pam_mul`."""
    return _unary(_Exp2, x, offset(alpha), is_exact(derivative), False, backend)


def pam_log2(x: Tensor, *, derivative: Rule = "approx", alpha: float | None = None, backend: str = "") -> Tensor:
    """E + M of x = 2^E (1 + M), at most .0861 below log2 x; -inf at 0, NaN for negative x."""
    return _unary(_Log2, x, offset(alpha), is_exact(derivative), False, backend)


def pam_exp(x: Tensor, *, derivative: Rule = "approx", alpha: float | None = None, backend: str = "") -> Tensor:
    """exp2(PAM(x, log2 e))."""
    exact, shift = is_exact(derivative), offset(alpha)

    def composed(x: Tensor) -> Tensor:
        if exact:
            return _Exp2.apply(
                pam_mul(x, LOG2E, derivative="exact", alpha=alpha, backend=backend), shift, True, False, backend
            )
        # the calculus rule of e^x as a whole: its derivative is itself
        return _Exp2.apply(_Rescaled.apply(x, shift, False, backend), shift, False, True, backend)

    check_dtype("x", x)
    return in_single(composed, x)


def pam_log(x: Tensor, *, derivative: Rule = "approx", alpha: float | None = None, backend: str = "") -> Tensor:
    """PAD(log2 x, log2 e); special values as `pam_log2`."""
    exact, shift = is_exact(derivative), offset(alpha)

    def composed(x: Tensor) -> Tensor:
        if exact:
            return pam_div(
                _Log2.apply(x, shift, True, False, backend), LOG2E, derivative="exact", alpha=alpha, backend=backend
            )
        return _Rescaled.apply(_Log2.apply(x, shift, False, True, backend), shift, True, backend)

    check_dtype("x", x)
    return in_single(composed, x)


def pam_sqrt(x: Tensor, *, derivative: Rule = "approx", alpha: float | None = None, backend: str = "") -> Tensor:
    """Square root by halving the pattern, at most 6.1 % above sqrt(x); NaN for negative x, the zero itself at 0.

    It is exp2(PAM(log2 x, 1/2)) without the rounding of E + M. Arguments and errors as in `pam_mul`.
    """
    return _unary(_Sqrt, x, offset(alpha), is_exact(derivative), backend)


def pam_pow(
    x: Tensor, p: float, *, derivative: Rule = "approx", alpha: float | None = None, backend: str = ""
) -> Tensor:
    """exp2(PAM(log2 x, p)) of x >= 0 with a constant exponent; 0 at 0 for p > 0, NaN for negative x.

    Its slope at 0 is that of x^p: 0 for p > 1, 1 for p = 1, infinity below.

    Args:
        x: float32, bfloat16 or float64.
        p: a number.
        derivative, alpha, backend: as in `pam_mul`.

    Raises:
        TypeError: another dtype, or p is no number.
        ValueError: an unknown rule, or a face that cannot serve the call.
    """
    check_dtype("x", x)
    if not _is_number(p):
        raise TypeError(f"p={p!r}: must be a number")
    # as one function, so that bfloat16 is rounded once
    return _unary(_Pow, x, float(p), offset(alpha), is_exact(derivative), backend)


class _Rescaled(torch.autograd.Function):
    """x times (or over) log2 e, whose factor the approximate rules of exp and log leave out of the derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, shift: int, inverse: bool, backend: str) -> Tensor:
        return (ops.div if inverse else ops.mul)(x, _filled(x, LOG2E), shift, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None


def _filled(like: Tensor, value: float) -> Tensor:
    """A constant of a tensor's shape, without memory."""
    return like.new_full((), value).expand_as(like)


def _unary(function: Any, x: Tensor, *rest: Any) -> Tensor:
    check_dtype("x", x)
    return in_single(lambda x: function.apply(x, *rest), x)


def _binary(
    function: Any, a: Tensor | float, b: Tensor | float, derivative: Rules, alpha: float | None, backend: str
) -> Tensor:
    x = a if isinstance(a, Tensor) else _number("a", a, b)
    y = b if isinstance(b, Tensor) else _number("b", b, a)
    check_pair(("a", "b"), x, y)
    rest = offset(alpha), are_exact(derivative), backend
    try:
        x, y = torch.broadcast_tensors(x, y)
    except RuntimeError as error:
        raise ValueError(f"b of shape {tuple(y.shape)}: must broadcast with a of shape {tuple(x.shape)}") from error
    if a is b:
        y = y.view_as(y)  # torch.compile does not take one tensor for both arguments
    return in_single(lambda x, y: function.apply(x, y, *rest), x, y)


def _number(name: str, value: Any, other: Any) -> Tensor:
    """A number as a tensor like the other operand."""
    if not _is_number(value):
        raise TypeError(f"{name}={value!r}: must be a tensor or a number")
    if not isinstance(other, Tensor):
        raise TypeError(f"{name}={value!r}: one of a and b must be a tensor")
    value = value if isinstance(value, (int, float)) else float(value)
    # of a dtype that is refused, it is the tensor that the error is to name
    return other.new_full((), value, dtype=other.dtype if other.dtype in DTYPES else torch.float32)


def _is_number(value: Any) -> bool:
    """Is it a real number, of Python or NumPy (whose numbers are no subclasses, but registered)?"""
    return not isinstance(value, bool) and isinstance(value, (int, float, numbers.Real))
