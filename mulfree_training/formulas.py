"""Softmax, layer norm and AdamW with their derivatives, spelled out in piecewise affine primitives (section 2.5 ff.).

Every function takes `p`, a face with the operations of `reference` (they want operands of equal shapes), and works on
the last dimension. Sums over it are `reference.row_sum`; the fused kernels equal these lines bit for bit. `exact`
chooses the true, piecewise constant derivative of every operation; otherwise each has the calculus rule of the function
that it stands for, its products in turn piecewise affine.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mulfree_training.reference import row_sum

LOG2E = math.log2(math.e)
LN2 = math.log(2)
INF = float("inf")


def _wide(x: Tensor | float, like: Tensor) -> Tensor:
    """x as a tensor of `like`'s shape."""
    return x.expand_as(like) if isinstance(x, Tensor) else like.new_full((), x).expand_as(like)


class _Powers(NamedTuple):
    """What softmax and log-softmax share: u = PAM(x, log2 e), its integer top a row, e = exp2(u - top), and sum e."""

    u: Tensor
    top: Tensor
    e: Tensor
    total: Tensor


def _powers(p: Any, x: Tensor, shift: int) -> _Powers:
    u = torch.where(x == -INF, -INF, p.mul(x, _wide(LOG2E, x), shift))
    top = u.amax(-1, keepdim=True).floor()  # an integer, so that the factor 2^top is exact
    top = torch.where(top == -INF, 0.0, top)
    e = p.exp2(u - top)
    return _Powers(u, top, e, row_sum(e))


def _through_powers(p: Any, grad: Tensor, x: Tensor, w: _Powers, shift: int, exact: bool) -> Tensor:
    """From the gradient of e to that of x."""
    if exact:
        return p.mul_grad(p.exp2_grad(grad, w.u - w.top), x, _wide(LOG2E, x), shift)
    scaled = p.mul(p.mul(w.e, _wide(LN2, x), shift), grad, shift)
    return p.mul(scaled, _wide(LOG2E, x), shift)


def softmax(p: Any, x: Tensor, shift: int) -> Tensor:
    """PAD(e, sum e) with e = exp2(u - floor(max u)), u = PAM(x, log2 e); 0 at -inf, and in rows of nothing else."""
    w = _powers(p, x, shift)
    total = w.total.expand_as(x)
    return torch.where(total == 0, 0.0, p.div(w.e, total, shift))


def softmax_grad(p: Any, grad: Tensor, x: Tensor, shift: int, exact: bool) -> Tensor:
    """Gradient of x; 0 where x is -inf."""
    w = _powers(p, x, shift)
    total = w.total.expand_as(x)
    inverse = p.div(_wide(1.0, x), total, shift)
    if exact:
        own, whole = p.mul_grad(grad, w.e, inverse, 0), p.div_grad(grad, w.e, total, shift)
    else:
        own = p.mul(inverse, grad, shift)
        whole = -p.mul(p.div(p.div(w.e, total, shift), total, shift), grad, shift)
    gx = _through_powers(p, own + row_sum(whole), x, w, shift, exact)
    return torch.where((x == -INF) | (total == 0), 0.0, gx)


def log_softmax(p: Any, x: Tensor, shift: int) -> Tensor:
    """x - PAD(top + log2 sum e, log2 e)."""
    w = _powers(p, x, shift)
    bits = w.top + p.log2(w.total)
    return x - p.div(bits, _wide(LOG2E, bits), shift)


def log_softmax_grad(p: Any, grad: Tensor, x: Tensor, shift: int, exact: bool, exact_log2: bool) -> Tensor:
    """Gradient of x; 0 where x is -inf. `exact_log2`: the logarithm has the exact rule whatever the others have."""
    w = _powers(p, x, shift)
    total = -row_sum(grad)
    c = _wide(LOG2E, total)
    inverse = p.div(_wide(1.0, total), c, shift)
    if exact:
        bits = p.mul_grad(total, w.top + p.log2(w.total), inverse, 0)
    else:
        bits = p.mul(inverse, total, shift)
    if exact or exact_log2:
        of_sum = p.log2_grad(bits, w.total)
    else:
        of_sum = p.div(p.div(bits, w.total, shift), _wide(LN2, total), shift)
    gx = grad + _through_powers(p, of_sum.expand_as(x), x, w, shift, exact)
    return torch.where(x == -INF, 0.0, gx)


class _Normed(NamedTuple):
    """Parts of a layer norm; all but z a value a row."""

    total: Tensor
    z: Tensor
    squares: Tensor
    variance: Tensor
    d: Tensor


def _normed(p: Any, x: Tensor, eps: float, shift: int) -> _Normed:
    n = float(x.shape[-1])
    total = row_sum(x)
    z = x - p.div(total, _wide(n, total), shift)
    squares = row_sum(p.mul(z, z, shift))
    variance = p.div(squares, _wide(n, squares), shift) + eps
    return _Normed(total, z, squares, variance, p.sqrt(variance))


def layer_norm(p: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, shift: int) -> Tensor:
    """PAM(PAD(z, d), w) + b with z = x - mean, d = sqrt(mean PAM(z, z) + eps); weight and bias have the row's shape."""
    w = _normed(p, x, eps, shift)
    y = p.div(w.z, w.d.expand_as(x), shift)
    y = y if weight is None else p.mul(y, weight.expand_as(x), shift)
    return y if bias is None else y + bias


def layer_norm_grad(
    p: Any, grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, shift: int, exact: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient of x, and of the weight before the sum over rows (None without a weight)."""
    w = _normed(p, x, eps, shift)
    d = w.d.expand_as(x)
    h = p.div(w.z, d, shift)
    inverse = p.div(_wide(1.0, x), d, shift)
    per_n = p.div(_wide(1.0, w.total), _wide(float(x.shape[-1]), w.total), shift)
    gh, gw = grad, None
    if exact:
        if weight is not None:
            wide = weight.expand_as(x)
            gh, gw = p.mul_grad(grad, h, wide, shift), p.mul_grad(grad, wide, h, shift)
        gz, gd = p.mul_grad(gh, w.z, inverse, 0), row_sum(p.div_grad(gh, w.z, d, shift))
        g_squares = p.mul_grad(p.sqrt_grad(gd, w.variance), w.squares, per_n, 0)
        twice = p.mul_grad(g_squares.expand_as(x), w.z, w.z, shift)
    else:
        if weight is not None:
            gh, gw = p.mul(grad, weight.expand_as(x), shift), p.mul(grad, h, shift)
        gz, gd = p.mul(inverse, gh, shift), row_sum(-p.mul(p.div(h, d, shift), gh, shift))
        g_variance = p.div(p.mul(gd, _wide(0.5, gd), 0), w.d, shift)
        g_squares = p.mul(per_n, g_variance, shift)
        twice = p.mul(g_squares.expand_as(x), w.z, shift)
    gz = gz + (twice + twice)
    g_mean = -row_sum(gz)
    gx = p.mul_grad(g_mean, w.total, per_n, 0) if exact else p.mul(per_n, g_mean, shift)
    return gz + gx, gw


class AdamWNumbers(NamedTuple):
    """Host scalars of one AdamW step, each rounded to float32 where it meets a tensor."""

    beta1: float
    rest1: float
    """1 - beta1."""
    beta2: float
    rest2: float
    eps: float
    decay: float
    """weight decay times learning rate; 0 leaves the parameter as it is."""
    step_size: float
    """Learning rate times sqrt(1 - beta2^t) / (1 - beta1^t)."""


def adamw(p: Any, param: Tensor, grad: Tensor, m: Tensor, v: Tensor, c: AdamWNumbers) -> tuple[Tensor, Tensor, Tensor]:
    """New parameter and moments; eps is added to the uncorrected root, and where the sum is 0 only the decay acts."""

    def times(x: Tensor, factor: float) -> Tensor:
        return p.mul(x, _wide(factor, x), 0)

    m = times(m, c.beta1) + times(grad, c.rest1)
    v = times(v, c.beta2) + times(p.mul(grad, grad, 0), c.rest2)
    d = p.sqrt(v) + c.eps
    if c.decay:
        param = param - times(param, c.decay)
    ratio = torch.where(d == 0, 0.0, p.div(m, d, 0))
    return param - times(ratio, c.step_size), m, v
