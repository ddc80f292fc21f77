"""Softmax, log-softmax, layer norm, cross-entropy, dropout and attention scores made of piecewise affine operations.

`derivative`, `alpha` and `backend` mean the same everywhere; see `primitives`. Each is one registered operator, fused
in C++ and composed of the primitives on other faces; `formulas` writes them out, section by section of the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from mulfree_training.arguments import Rule, check_dtype, in_single, is_exact
from mulfree_training.autograd import OfOne, once_differentiable
from mulfree_training.bits import offset
from mulfree_training.operators import ops
from mulfree_training.primitives import pam_div, pam_mul

Smoothing = Literal["fairseq", "torch"]


class _Softmax(OfOne):
    @staticmethod
    def forward(x: Tensor, shift: int, exact: bool, backend: str) -> Tensor:
        return ops.softmax(x, shift, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        shift, exact, backend = ctx.rest
        return ops.softmax_grad(grad, *saved, shift, exact, backend), None, None, None


class _LogSoftmax(OfOne):
    @staticmethod
    def forward(x: Tensor, shift: int, exact: bool, exact_log2: bool, backend: str) -> Tensor:
        return ops.log_softmax(x, shift, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        return ops.log_softmax_grad(grad, *saved, *ctx.rest), None, None, None, None


class _LayerNorm(torch.autograd.Function):
    """Rows (R, n), weight and bias (n,) or None."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, shift: int, exact: bool, backend: str
    ) -> Tensor:
        return ops.layer_norm(x, weight, bias, eps, shift, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.bias, *ctx.rest = inputs[0], inputs[1], inputs[2] is not None, *inputs[3:]
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        gx, gw = ops.layer_norm_grad(grad, *saved, *ctx.rest)
        gb = grad.sum(0) if ctx.bias else None
        return gx, None if gw is None else gw.sum(0), gb, None, None, None, None


def _along(function: Callable[[Tensor], Tensor], x: Tensor, dim: int) -> Tensor:
    """Apply a function of the last dimension to another one."""
    if x.dim() == 0:
        raise ValueError("x of shape (): must have a dimension")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim={dim}: must be in [{-x.dim()}, {x.dim() - 1}]")
    if not x.numel():
        return x.clone()  # a maximum of nothing does not exist
    if dim in (-1, x.dim() - 1):
        return in_single(function, x)
    return in_single(function, x.movedim(dim, -1)).movedim(-1, dim)


def pam_softmax(
    x: Tensor, dim: int = -1, *, derivative: Rule = "approx", alpha: float | None = None, backend: str = ""
) -> Tensor:
    """PAD(e, sum of e) with e = exp2(u - floor(max u)) and u = PAM(x, log2 e), a maximum a row.

    The shift is an integer, so that it changes nothing; with the official code's maximum of the whole tensor rows would
    hang together. Entries of -inf give exactly 0 and pass no gradient; a row of nothing else gives zeros. Rows sum to 1
    only roughly: between 1 and 1.125.

    Args:
        x: any shape, float32, bfloat16 or float64.
        dim: along which to normalise.
        derivative, alpha, backend: see `primitives`.

    Raises:
        TypeError: another dtype.
        ValueError: no such dimension, rule or face.
    """
    check_dtype("x", x)
    rest = offset(alpha), is_exact(derivative), backend
    return _along(lambda x: _Softmax.apply(x, *rest), x, dim)


def pam_log_softmax(
    x: Tensor,
    dim: int = -1,
    *,
    derivative: Rule = "approx",
    alpha: float | None = None,
    lse_log2: Rule | None = None,
    backend: str = "",
) -> Tensor:
    """x - PAD(floor(max u) + log2 of sum of e, log2 e), with u and e as in `pam_softmax`.

    Args:
        lse_log2: `exact` derives the logarithm exactly even where `derivative` is `approx`, as the official code always
            does; where `derivative` is `exact` this changes nothing.

    Other arguments and errors as in `pam_softmax`.
    """
    check_dtype("x", x)
    exact = is_exact(derivative)
    exact_log2 = exact if lse_log2 is None else is_exact(lse_log2, "lse_log2")
    rest = offset(alpha), exact, exact_log2, backend
    return _along(lambda x: _LogSoftmax.apply(x, *rest), x, dim)


def pam_layer_norm(
    input: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    derivative: Rule = "approx",
    alpha: float | None = None,
    backend: str = "",
) -> Tensor:
    """`F.layer_norm` with piecewise affine squares, means, root, quotient and scale.

    Args:
        input: (…, *normalized_shape), float32, bfloat16 or float64.
        normalized_shape: the last dimensions of the input, which share mean and variance.
        weight, bias: of that shape, of the input's dtype, or None.
        eps: added to the variance.
        derivative, alpha, backend: see `primitives`.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not fit, negative eps, no such rule or face.
    """
    check_dtype("input", input)
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"normalized_shape={shape}: must be the end of the input's shape {tuple(input.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} of shape {tuple(x.shape)}: must be {shape}")
        if x is not None and x.dtype != input.dtype:
            raise TypeError(f"{name} of dtype {x.dtype}: must be {input.dtype}, as the input")
    if not eps >= 0:
        raise ValueError(f"eps={eps}: must be >= 0")
    rest = eps, offset(alpha), is_exact(derivative), backend

    def rows(x: Tensor) -> Tensor:
        own = (p if p is None else p.to(x.dtype).reshape(-1) for p in (weight, bias))
        flat = x.reshape(math.prod(x.shape[: -len(shape)]), math.prod(shape))  # (R, n)
        return _LayerNorm.apply(flat, *own, *rest).view(input.shape)

    return in_single(rows, input)


def pam_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    smoothing: Smoothing = "fairseq",
    derivative: Rule = "approx",
    alpha: float | None = None,
    lse_log2: Rule | None = None,
    backend: str = "",
) -> Tensor:
    """Cross-entropy of class indices with piecewise affine log-softmax, weights and mean.

    In contrast to `F.cross_entropy` there are no class weights, options go by keyword, and label smoothing is by
    default fairseq's, which leaves the target out of those that share epsilon; `smoothing="torch"` is PyTorch's.

    Args:
        input: logits (B, V) or (B, V, …), float32, bfloat16 or float64.
        target: class indices int64 (B,) or (B, …), in [0, V) or `ignore_index`.
        ignore_index: targets that do not count.
        reduction: `mean` over the targets that count, `sum` or `none`.
        label_smoothing: epsilon in [0, 1).
        smoothing: `fairseq`: the target has 1 - epsilon, the others epsilon / (V - 1) each; `torch`: epsilon / V goes
            to all, the target included.
        derivative, alpha, lse_log2, backend: see `pam_log_softmax`.

    Raises:
        TypeError: other dtypes.
        ValueError: shapes that do not fit, an unknown reduction or smoothing, label_smoothing out of range.
        IndexError: a target out of range.
    """
    check_dtype("input", input)
    _check_targets(input, target, reduction, label_smoothing, smoothing, ignore_index)
    options: dict[str, Any] = {"derivative": derivative, "alpha": alpha, "backend": backend}
    logits = input.movedim(1, -1) if input.dim() > 2 else input  # (B, …, V)
    lp = pam_log_softmax(logits, derivative=derivative, alpha=alpha, lse_log2=lse_log2, backend=backend)
    counts = target != ignore_index
    try:
        own = -lp.gather(-1, target.where(counts, 0)[..., None])[..., 0]  # (B, …)
    except RuntimeError as error:
        wrong = target[counts & ((target < 0) | (target >= lp.shape[-1]))]
        raise IndexError(f"target={wrong[0]}: must be in [0, {lp.shape[-1]}) or {ignore_index}") from error
    own = own.where(counts, 0.0)
    others = None
    if label_smoothing:
        others = (-lp.sum(-1)).where(counts, 0.0)
    if reduction != "none":
        own, others = own.sum(), None if others is None else others.sum()
    if others is not None:
        share = label_smoothing / (lp.shape[-1] - (smoothing == "fairseq"))  # a constant of the problem
        rest = 1 - label_smoothing - (share if smoothing == "fairseq" else 0)
        own = pam_mul(own, rest, **options) + pam_mul(others, share, **options)
    if reduction == "mean":
        own = pam_div(own, counts.sum().to(own.dtype), **options)
    return own


def _check_targets(
    input: Tensor, target: Tensor, reduction: str, label_smoothing: float, smoothing: str, ignore_index: int
) -> None:
    if input.dim() < 2 or target.shape != input.shape[:1] + input.shape[2:]:
        raise ValueError(
            f"target of shape {tuple(target.shape)}: must be (B, …) for input (B, V, …) of shape {tuple(input.shape)}"
        )
    if target.device != input.device:
        raise ValueError(f"target on {target.device}: must be on {input.device}, as input")
    if target.dtype is not torch.int64:
        raise TypeError(f"target of dtype {target.dtype}: must be int64, class indices")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: must be one of mean, sum, none")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing}: must be in [0, 1)")
    if smoothing not in ("fairseq", "torch"):
        raise ValueError(f"smoothing={smoothing!r}: must be fairseq or torch")
    if label_smoothing and smoothing == "fairseq" and input.shape[1] < 2:
        raise ValueError("input with 1 class: must have >= 2 for label_smoothing of fairseq")


def pam_dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    derivative: Rule = "approx",
    alpha: float | None = None,
    backend: str = "",
) -> Tensor:
    """Dropout whose factor 1 / (1 - p) is applied by PAM (exact for p = 1/2 and 3/4).

    Raises:
        TypeError: another dtype.
        ValueError: p is not in [0, 1).
    """
    check_dtype("x", x)
    if not 0 <= p < 1:
        raise ValueError(f"p={p}: must be in [0, 1)")
    if not training or p == 0:
        return x
    kept = torch.rand_like(x) >= p
    return pam_mul(x, 1 / (1 - p), derivative=derivative, alpha=alpha, backend=backend).where(kept, 0.0)
